"""What a model is, as one digest: of two that differ in what decides tokens, one never answers for the other."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import CheckpointError

SAMPLES = 4096  # so a file of 16 GB is looked at every 4 MB
SAMPLE_BYTES = 4096
_SUFFIXES = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"})


def model_digest(path: Path, *settings: str) -> str:
    """SHA-256, in hexadecimal, of a model's files and of the settings under which it computes.

    path: a folder or a .gguf file. Small files are read whole; of a large one `SAMPLES` places, evenly spread, and its
    length: hashing a terabyte of weights would take longer than loading them. A change of one value between two places
    goes unseen, one of training does not.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    digest = hashlib.sha256()
    for part in settings:
        _add(digest, part.encode())
    for file in files:
        _add(digest, file.name.encode() if path.is_dir() else b"")
        try:
            _add(digest, _content(file))
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror or error}") from None
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    """The digest of what is looked at."""
    content = hashlib.sha256()
    with file.open("rb") as source:
        size = file.stat().st_size
        if size <= SAMPLES * SAMPLE_BYTES:
            content.update(source.read())
        else:
            for i in range(SAMPLES):
                source.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                content.update(source.read(SAMPLE_BYTES))
        content.update(size.to_bytes(8, "big"))
    return content.digest()


def _add(digest: hashlib._Hash, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "big") + part)
