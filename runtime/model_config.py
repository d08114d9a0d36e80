"""What a model's `config.json` says, or what a .gguf file says in its place: read without torch, in milliseconds."""

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError


def model_config(model: Path) -> dict[str, Any]:
    """Of a folder or a .gguf file, as `hub.resolve_model` finds them. Raises CheckpointError."""
    if model.suffix == ".gguf":
        from .gguf_file import GGUFFile
        from .gguf_names import build_config

        return build_config(GGUFFile(model))
    return read_json(model / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
