"""A model's spec as it was read the last time on this machine: transformers, which reads it, takes 2 s to import.

Kept in the user's cache under a hash of all that decides it: the config, transformers' version and our own reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from ...kernels.native_build import UnavailableError, private_folder
from .spec import ModelSpec

SOURCES = Path(__file__).parent


def remembered_spec(config: dict[str, Any], *, max_len: int | None = None) -> ModelSpec:
    """`ModelSpec.from_config`, which is asked the first time alone. Raises ConfigError as it does."""
    file = _file(config, max_len)
    if file is None:
        return ModelSpec.from_config(config, max_len=max_len)
    with contextlib.suppress(OSError, msgspec.DecodeError):  # not there, or of no use: it is written anew
        return msgspec.msgpack.decode(file.read_bytes(), type=ModelSpec)
    spec = ModelSpec.from_config(config, max_len=max_len)
    with contextlib.suppress(OSError):
        _write(file, msgspec.msgpack.encode(spec))
    return spec


def _file(config: dict[str, Any], max_len: int | None) -> Path | None:
    """None where nothing can be kept."""
    try:
        folder = private_folder()
        said = json.dumps([config, max_len, version("transformers")], sort_keys=True)
    except (UnavailableError, TypeError, ValueError):
        return None
    digest = hashlib.sha256(said.encode())
    for source in sorted(SOURCES.glob("*.py")):
        digest.update(source.read_bytes())
    return folder / f"spec-{digest.hexdigest()[:20]}"


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all."""
    handle, made = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(made, file)
    except OSError:
        os.unlink(made)
        raise
