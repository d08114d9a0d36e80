"""What can be refused before anything starts: a port that is taken, a chat template that is none, a bad grid."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ..runtime.config import EngineConfig
from ..runtime.errors import ConfigError, InvalidRequest
from ..runtime.hub import resolve_model


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


def check_grid(engine: EngineConfig) -> None:
    """See that the model can be cut so, before anything starts. One rank alone always can: then nothing is read.

    Raises:
        ConfigError, CheckpointError: with what is possible.
    """
    if engine.grid.size == 1:
        return
    from ..runtime.models.spec import ModelSpec
    from ..runtime.rank import open_checkpoint
    from ..runtime.share import deal

    config = open_checkpoint(resolve_model(engine.model)).config
    deal(ModelSpec.from_config(config, max_len=engine.max_model_len), engine.grid, engine.pp_layers)
