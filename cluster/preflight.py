"""What can be refused before anything starts: a port that is taken, a file that is not there, a bad grid."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ..router.redis_url import parse_redis_url
from ..runtime.config import EngineConfig
from ..runtime.errors import ConfigError, InvalidRequest, StartupError
from ..runtime.hub import resolve_model
from .config import EMBEDDED, NO_REDIS, Check, ShoalConfig, served
from .config_checks import placed_parts
from .config_errors import Problem
from .secret import api_keys_in, redis_password_in, secret_of


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
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    except UnicodeError:
        raise ConfigError(f"--host {host:.80}: not a name of a host") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"can not listen on {host} port {port}: {reason}; choose --host and --port") from None


def read_chat_template(file: Path | None) -> str | None:
    """The template's source; None where no file is named. Read here, for other processes have other folders.

    Raises:
        ConfigError: no such file, not text, or not a template.
    """
    if file is None:
        return None
    from ..runtime.template import ChatTemplate

    try:
        source = file.expanduser().read_text(encoding="utf-8")
        ChatTemplate(source)
    except OSError as error:
        raise ConfigError(f"--chat-template {file}: {error.strerror or error}") from None
    except (UnicodeDecodeError, InvalidRequest) as error:
        raise ConfigError(f"--chat-template {file}: {error}") from None
    return source


def port_problems(config: ShoalConfig) -> Iterator[Problem]:
    """A host or a port of this machine that cannot be listened on."""
    try:
        free_port(config.server.host, config.server.port)
    except ConfigError as error:
        yield Problem(("server", "host" if str(error).startswith("--host") else "port"), str(error))


def model_problems(config: ShoalConfig) -> Iterator[Problem]:
    """Models that are not on this machine."""
    for path, part in placed_parts(config):
        try:
            resolve_model(part.engine.model)
        except ConfigError as error:
            yield Problem(path if path[:1] == ("server",) else (*path, "engine", "model"), str(error))


def file_problems(config: ShoalConfig) -> Iterator[Problem]:
    """Files that cannot be what they are named for, where all that they are for runs on this machine."""
    router, server = config.router, config.server
    named: list[tuple[tuple[str, str], Path | None, Callable[[Path], object]]] = [
        (("router", "secret_file"), router.secret_file, lambda _: secret_of(router)),
        (("router", "api_key_file"), router.api_key_file, api_keys_in),
        (("router", "chat_template"), router.chat_template, read_chat_template),
        (("server", "redis_password_file"), server.redis_password_file, redis_password_in),
    ]
    if server.redis_url not in (EMBEDDED, NO_REDIS):
        tls = parse_redis_url(server.redis_url).tls or {}
        files = [str(tls[name]) for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if name in tls]
        named += [(("server", "redis_url"), Path(file), _readable) for file in files]
    for path, file, read in named:
        try:
            _ = file is not None and read(file)
        except ConfigError as error:
            yield Problem(path, str(error))


def _readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(f"--redis-url {file}: {error.strerror or error}") from None


def grid_problems(config: ShoalConfig) -> Iterator[Problem]:
    """Grids that cannot be, of the models that are here, whose configs are read; others may be on the nodes alone."""
    from ..runtime.model_config import model_config
    from ..runtime.models.spec_cache import remembered_spec
    from ..runtime.share import deal

    for path, part in placed_parts(config):
        engine = part.engine
        if engine.grid.size == 1:
            continue
        try:
            model = resolve_model(engine.model)
        except ConfigError:
            continue
        try:
            deal(remembered_spec(model_config(model), max_len=engine.max_model_len), engine.grid, engine.pp_layers)
        except StartupError as error:
            field = str(error).partition(":")[0].partition(" ")[0].removeprefix("--").replace("-", "_")
            yield Problem((*path, "engine", field if field in EngineConfig.model_fields else "model"), str(error))


HERE: tuple[Check, ...] = (served, file_problems, port_problems, model_problems, grid_problems)
"""What a service on this machine is held against, before anything of it starts."""
