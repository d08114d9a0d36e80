"""Beside station 2: what a body and its headers together ask of the cache, and under which names."""

from __future__ import annotations

import uuid

import msgspec

from ..runtime.errors import InvalidRequest
from .auth import Keys
from .cache import CacheMode, Caching
from .config import RouterConfig
from .headers import IDEMPOTENCY_KEY, LAST_EVENT_ID, Asks
from .prepare import Job
from .schema import SamplingBody
from .tenant import Tenant

SHARED_SCOPE = "shared"  # no salt looks like it


class Scopes:
    """Who may share what of an answer. keys: make the salts."""

    def __init__(self, keys: Keys, config: RouterConfig) -> None:
        self._keys = keys
        self._cache_mode = config.cache_mode

    def answer_id(self, tenant: Tenant, asks: Asks) -> str:
        """The same whenever the request is sent again under its key."""
        if asks.idempotency_key is None:
            return uuid.uuid4().hex
        return self._keys.salt(tenant.salt.encode(), b"answer", asks.idempotency_key.encode())[:32]

    def salt(self, body: SamplingBody, tenant: Tenant) -> str:
        """Who shares its cached prefixes, and its answers where they are its own."""
        if body.cache_salt is None:
            return tenant.salt
        return self._keys.salt(tenant.salt.encode(), body.cache_salt.encode())

    def caching(self, body: SamplingBody, tenant: Tenant, asks: Asks) -> Caching:
        """What `body` may be answered from. What is neither looked up nor stored can be continued all the same."""
        mode = asks.cache or CacheMode.AUTO
        if self._cache_mode == "off" and mode is not CacheMode.ONLY:
            mode = CacheMode.BYPASS
        is_reproducible = body.temperature == 0 or body.seed is not None or self._cache_mode == "all"
        idempotency = None
        if asks.idempotency_key is not None:
            idempotency = (asks.idempotency_key, 0)
            is_reproducible = is_reproducible and mode is not CacheMode.BYPASS
            if not is_reproducible and mode is not CacheMode.ONLY:
                mode = CacheMode.AUTO  # a second log under this name would not go on where the first one was left
        if asks.received is not None and idempotency is None and not is_reproducible:
            raise InvalidRequest(
                f"{LAST_EVENT_ID} needs the {IDEMPOTENCY_KEY} under which the request was first sent: an answer that "
                "was sampled without a seed cannot be made again",
                param=LAST_EVENT_ID,
            )
        # Keys are the tenant's own, also where it shares: another one may have hit on the same.
        is_shared = tenant.shares_cache and body.cache_salt is None and (is_reproducible or idempotency is None)
        return Caching(
            mode=mode,
            scope=SHARED_SCOPE if is_shared else self.salt(body, tenant),
            is_reproducible=is_reproducible,
            idempotency=idempotency,
            resumes=asks.received is not None,
        )


def received_of(job: Job, body: SamplingBody, asks: Asks) -> list[int]:
    """Tokens that the client has had, of each choice. Raises InvalidRequest."""
    num_choices = len(job.requests)
    if asks.received is None:
        return [0] * num_choices
    if not body.stream:
        raise InvalidRequest(f"{LAST_EVENT_ID} needs stream: true", param=LAST_EVENT_ID)
    if len(asks.received) != num_choices:
        raise InvalidRequest(
            f"{LAST_EVENT_ID} counts the tokens of {len(asks.received)} choices; this request has {num_choices}",
            param=LAST_EVENT_ID,
        )
    return asks.received


def of_choice(caching: Caching, index: int) -> Caching:
    """Of one of a request's logs."""
    if caching.idempotency is None:
        return caching
    return msgspec.structs.replace(caching, idempotency=(caching.idempotency[0], index))
