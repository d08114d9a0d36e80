"""Where a model lies: a folder, a .gguf file, or a hub id whose snapshot is in the local cache. Never the network."""

import re
from pathlib import Path

from .errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(model: str) -> Path:
    """The folder (with a config.json) or the .gguf file.

    Raises:
        ConfigError: it is none of these; says what was looked for.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"model {model!r} is a file but not a .gguf file: give its folder, or a .gguf file")
        return path.resolve()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = ", ".join(sorted(entry.name for entry in path.glob("*.gguf"))[:3])
            raise ConfigError(f"model folder {model!r} has no config.json" + (f"; it has {hint}" if hint else ""))
        return path.resolve()
    if HUB_ID.fullmatch(model):
        return _cached_snapshot(model)
    raise ConfigError(f"model {model!r}: no such folder or .gguf file, and not a hub id such as 'org/name'")


def _cached_snapshot(model: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    if not isinstance(found, str):
        raise ConfigError(
            f"model {model!r}: no such folder, and not in the local hub cache ({constants.HF_HUB_CACHE}); nothing is "
            f"downloaded at run time: get it first with `hf download {model}`"
        )
    return Path(found).parent
