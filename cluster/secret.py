"""The cluster's one secret: salts of tenants, cache keys and the line's proofs. Made once, at the first start."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from ..runtime.errors import ConfigError

LENGTH = 32  # bytes
_MOST = 4096


def default_file() -> Path:
    """Where it is kept unless the config has it."""
    return Path.home() / ".config" / "shoal" / "secret"


def cluster_secret(file: Path) -> str:
    """What `file` holds; made there, for its owner alone, if there is no such file.

    Raises:
        ConfigError: it cannot be read or made, is too short, or others can read it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not file.exists():
            _make(file)
        return _read(file)
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror or error}: the cluster's secret is kept there unless router.secret is given"
        ) from None


def _make(file: Path) -> None:
    """Whole or not at all, and not where another process was first."""
    handle, name = tempfile.mkstemp(dir=file.parent)  # for its owner alone
    try:
        with os.fdopen(handle, "w") as out:
            out.write(secrets.token_hex(LENGTH) + "\n")
        with suppress(FileExistsError):
            Path(file).hardlink_to(name)
    finally:
        Path(name).unlink()


def _read(file: Path) -> str:
    if file.stat().st_mode & 0o077:
        raise ConfigError(f"{file}: others can read the cluster's secret: chmod 600 it")
    secret = file.read_text(encoding="ascii", errors="replace")[:_MOST].strip()
    if len(secret) < LENGTH:
        raise ConfigError(f"{file} has a secret of {len(secret)} characters; at least {LENGTH} are needed")
    return secret
