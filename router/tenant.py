"""Whose request it is: what a key stands for, beside the secret salt that keeps tenants' caches apart."""

from __future__ import annotations

import msgspec


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One owner of keys. Compared by `name`, which is the config's and fit for metrics and logs; a salt is neither.

    salt: an HMAC of the name under the cluster's secret: the root of its block names and cache keys.
    priority: of its requests, lower goes first; theirs may only be behind it. weight: its share, against others'.
    requests_per_minute, tokens_per_minute, max_in_flight: None is without limit; tokens count prompt and answer.
    token_budget: tokens in all, over `budget_s` seconds. shares_cache: reads and fills the cache that all share.
    """

    name: str
    salt: str
    priority: int = 0
    weight: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    token_budget: int | None = None
    budget_s: float = 86_400.0
    max_in_flight: int | None = None
    shares_cache: bool = False
