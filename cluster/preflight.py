"""What can be refused before anything starts: so far, a port that is taken."""

from __future__ import annotations

import socket

from ..runtime.errors import ConfigError


def free_port(host: str, port: int) -> int:
    """`port` if `host` can be listened on there; for 0 one that is free now.

    Raises:
        ConfigError: taken, or not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family) as listener:
            chosen: int = listener.getsockname()[1]
            return chosen
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"can not listen on {host} port {port}: {reason}; choose --host and --port") from None
