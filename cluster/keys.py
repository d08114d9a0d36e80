"""`shoal keys`: new API keys, and where a server finds whose they are: a line of its config, or a record in Redis."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..router.config import TenantConfig, check_key
from ..runtime.errors import ConfigError, Unavailable
from .secret import cluster_secret, default_file
from .secret import secret_of as of_router

KEY_BYTES = 32
_TIMEOUT_S = 5.0  # an operator's patience, not a request's
_DAY_S = 86_400.0


def new_key() -> str:
    """256 random bits, in letters that a header and a shell can carry."""
    return "sk-shoal-" + secrets.token_urlsafe(KEY_BYTES)


def tenant_config(fields: Mapping[str, Any]) -> TenantConfig:
    """The tenant that flags describe; None leaves a field out. Raises ConfigError."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return TenantConfig.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{problem['loc'][0]}: {problem['msg'].removeprefix('Value error, ')}") from None


def config_line(tenant: TenantConfig, key: str) -> str:
    """An entry of `router.tenants` for this key, in YAML's short form."""
    from ..router.tenants import digest_of

    fields = tenant.model_dump(exclude={"keys"}, exclude_defaults=True)
    return f"- {json.dumps({**fields, 'keys': [digest_of(key)]})}"


def secret_of(file: Path | None) -> bytes:
    """The cluster's, as the server finds it: router.secret of the config, or this user's file. Raises ConfigError."""
    if file is not None:
        from .config import load_config

        router = load_config({("engine", "model"): "any"}, file=file).router
        if router.secret is not None or router.secret_file is not None:
            return of_router(router)
    return cluster_secret(default_file()).encode()


def put_key(url: str, key: str, tenant: TenantConfig, *, secret: bytes, days: float) -> None:
    """Store whose the key is, for so many days. Raises ConfigError, Unavailable."""
    from ..router.tenants import Seals, name_of, record_of

    try:
        check_key(key)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    seals = Seals(secret)
    name = name_of(key, seals)
    asyncio.run(_set(url, name, seals.seal(name, record_of(tenant)), days * _DAY_S))


def delete_key(url: str, key: str, *, secret: bytes) -> None:
    """The key is nobody's any more, within half a minute. Raises ConfigError (there is no such key), Unavailable."""
    from ..router.tenants import Seals, name_of

    asyncio.run(_set(url, name_of(key, Seals(secret)), None, 0))


async def _set(url: str, name: bytes, value: bytes | None, ttl_s: float) -> None:
    from ..router.metrics import RouterMetrics
    from ..router.redis_store import RedisStore
    from ..router.redis_url import parse_redis_url
    from ..router.store import StoreDown

    address = parse_redis_url(url)
    store = RedisStore(address, RouterMetrics().store, timeout_s=_TIMEOUT_S)
    try:
        if value is not None:
            await store.set(name, value, ttl_s=ttl_s)
        elif await store.get(name) is None:
            raise ConfigError(f"{address} has no such key under this cluster's secret: nothing was deleted")
        else:
            await store.delete(name)
    except StoreDown as failure:
        raise Unavailable(f"{address}: {failure}") from None
    finally:
        await store.close()
