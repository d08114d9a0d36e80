"""The cluster's one secret, for salts of tenants, cache keys and the line's proofs; and what else is read from files.

On one machine the secret is made at the first start. A cluster's config names files instead, which every node that
needs them has, so that no secret stands in a config, in Ray's store or in a list of processes.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from ..router.config import RouterConfig, check_key
from ..router.log_key import derived
from ..runtime.errors import ConfigError

LENGTH = 32  # bytes
_MOST = 2**20


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


def secret_of(router: RouterConfig) -> bytes:
    """The cluster's, which the config has or names a file with. Raises ConfigError."""
    if router.secret is not None:
        return router.secret.encode()
    assert router.secret_file is not None, "the command has settled it, or refused"
    return _long_enough(_text(router.secret_file, "router.secret_file"), router.secret_file).encode()


def line_secret(router: RouterConfig) -> bytes:
    """What the two ends of a line between ingress and replica prove to each other to know. Raises ConfigError."""
    return derived(secret_of(router), b"line")


def with_secrets(router: RouterConfig) -> RouterConfig:
    """The config with what its files hold. Raises ConfigError."""
    secret = secret_of(router).decode()
    keys = router.api_keys
    if router.api_key_file is not None:
        keys = (*keys, *api_keys_in(router.api_key_file))
    return router.model_copy(update={"secret": secret, "api_keys": keys})


def api_keys_in(file: Path) -> tuple[str, ...]:
    """One key, or its digest, a line.

    Raises:
        ConfigError: it cannot be read, has no key, or a line that is none; no key is shown.
    """
    lines = [line.strip() for line in _text(file, "--api-key-file").splitlines()]
    for number, line in enumerate(lines, 1):
        try:
            _ = line and check_key(line)
        except ValueError as error:
            raise ConfigError(f"--api-key-file {file}: line {number}: {error}") from None
    keys = tuple(filter(None, lines))
    if not keys:
        raise ConfigError(f"--api-key-file {file}: no key in it")
    return keys


def redis_password_in(file: Path) -> str:
    """Raises ConfigError."""
    password = _text(file, "server.redis_password_file").strip()
    if not password:
        raise ConfigError(f"server.redis_password_file {file}: there is nothing in it")
    return password


def _text(file: Path, field: str) -> str:
    try:
        with file.expanduser().open(encoding="utf-8") as stream:
            return stream.read(_MOST)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{field} {file}: {reason}: every node that needs it has the file at this place") from None


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
    return _long_enough(file.read_text(encoding="ascii", errors="replace")[:_MOST], file)


def _long_enough(text: str, file: Path) -> str:
    secret = text.strip()
    if len(secret) < LENGTH:
        raise ConfigError(f"{file} has a secret of {len(secret)} characters; at least {LENGTH} are needed")
    return secret
