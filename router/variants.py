"""Station 6, first half: which variant of the main model answers. The choice is pure: a secret, weights and dice.

    asked for by name (where that is allowed)
    or where a request with this Idempotency-Key went before (homes.py)
    or drawn: by the session or user where requests stick to one, else by the key, else by dice

A variant takes part while it has a weight, was not taken back (rollback.py) and has a replica that is ready; what
would have been its share goes to the others as their weights are, and to stable where there is no other.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Mapping
from typing import Any

from ..runtime.errors import InvalidRequest, LogLost, Unavailable
from .headers import IDEMPOTENCY_KEY, LAST_EVENT_ID, VARIANT, Asks
from .homes import Homes
from .meters import VariantMeter
from .model import Model
from .rollback import Court
from .rollout_config import STABLE, RolloutConfig
from .store import StoreAbsent, StoreDown
from .tenant import Tenant
from .twin import is_ready

logger = logging.getLogger("shoal.router")


def order_of(weights: Mapping[str, float], point: bytes, *, secret: bytes) -> list[str]:
    """The names that have a weight, in the order in which they come to what lies at `point`: the first one takes it.

    Weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", SPAA 2005, the
    logarithmic method): each name draws a time from an exponential distribution whose rate is its weight, by a keyed
    hash, and the earliest goes first. So a name takes its share of all points, who knows the secret agrees, a weight
    that rises draws points to its name alone, and of one that is left out each point goes to the next in its order.
    """

    def time(name: str) -> float:
        drawn = hashlib.blake2b(point, key=secret, salt=_salt(name), digest_size=8).digest()
        return -math.log((int.from_bytes(drawn, "big") + 0.5) / 2**64) / weights[name]

    return sorted((name for name, weight in weights.items() if weight > 0), key=time)


def _salt(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=hashlib.blake2b.SALT_SIZE).digest()


class Variants:
    """The variants of one ingress, and the rollout in force. All belongs to one event loop.

    secret: the cluster's, so that all ingresses stick alike. rng: for requests that stick to nothing.
    """

    def __init__(
        self,
        stable: Model,
        *,
        secret: bytes,
        homes: Homes,
        court: Court,
        meter: VariantMeter,
        rng: random.Random,
    ) -> None:
        self.config = RolloutConfig()
        self.court = court
        self._stable = stable
        self._members = {STABLE: stable}
        self._secret = secret
        self._homes = homes
        self._meter = meter
        self._rng = rng
        self._missed: set[str] = set()  # names that are no variant's, as far as the log has said so

    # What there is

    @property
    def members(self) -> list[Model]:
        return list(self._members.values())

    def get(self, name: str) -> Model | None:
        return self._members.get(name)

    def add(self, model: Model) -> None:
        """It takes part from now on, once it is open and has a weight."""
        assert model.name not in self._members, f"there is a variant {model.name!r} already"
        self._members[model.name] = model
        self._missed.discard(model.name)

    def drop(self, name: str) -> Model:
        """It takes no part any more."""
        assert name != STABLE, "stable stays"
        return self._members.pop(name)

    def roll_out(self, config: RolloutConfig) -> None:
        """From the next request on."""
        self.config = config
        self.court.roll_out(config)
        for name in sorted({*config.weights, *config.shadow} - self._members.keys() - self._missed):
            logger.warning("the rollout names the variant %r, which is not there yet", name)
            self._missed.add(name)

    def twin_of(self, model: Model) -> Model | None:
        """Another variant that computes the same tokens and is ready."""
        if not model.is_open or not model.info.digest:
            return None
        return next((other for other in self._members.values() if other is not model and _replaces(other, model)), None)

    # Who answers

    async def choose(self, tenant: Tenant, asks: Asks, *, user: str | None, avoid: frozenset[str]) -> Model:
        """The variant that answers. avoid: those that could not.

        Raises:
            InvalidRequest: it asks for a variant that it may not ask for, or goes on with nobody knows which.
            LogLost: it goes on with the answer of a variant that is gone. Unavailable: the one it asks for is not open,
            or nobody can say now which one began the answer.
        """
        if asks.variant is not None:
            return self._named(asks.variant)
        if asks.received is not None:
            return await self._where_it_was(tenant, asks, user)
        if len(self._members) == 1:
            return self._stable
        drawn = self._drawn(self._point(tenant, asks, user), avoid)
        if (key := asks.idempotency_key) is None:
            return drawn
        home = self.get(await self._homes.settle(tenant.salt, key, drawn.name))
        # Also where it has no replica: its answer may be kept.
        if home is not None and home.is_open and home.name not in avoid:
            return home
        await self._homes.move(tenant.salt, key, drawn.name)
        return drawn

    async def _where_it_was(self, tenant: Tenant, asks: Asks, user: str | None) -> Model:
        """Of a request that goes on with an answer: who began it, whatever the weights are now."""
        if asks.idempotency_key is None:  # only an answer that can be made again is gone on with without one
            if len(self._members) > 1:
                raise InvalidRequest(
                    f"{LAST_EVENT_ID} needs the {IDEMPOTENCY_KEY} under which the request was first sent: this model "
                    "has variants, and the key says which one answered",
                    param=LAST_EVENT_ID,
                )
            return self._stable
        try:
            home = await self._homes.find(tenant.salt, asks.idempotency_key)
        except StoreDown as error:
            if len(self._members) == 1 or isinstance(error, StoreAbsent):
                return self._drawn(self._point(tenant, asks, user), frozenset())
            text = "Redis, which knows the variant that began the answer, does not answer"
            raise Unavailable(text, retry_after=1.0) from error
        model = self._stable if home is None else self.get(home)  # None: it came while there was but one
        if model is None or not model.is_open:
            raise LogLost(
                f"the variant {home!r:.80} that began the answer is gone: ask again without {LAST_EVENT_ID}",
                param=LAST_EVENT_ID,
            )
        return model

    def _named(self, name: str) -> Model:
        if not self.config.allow_variant_header:
            raise InvalidRequest(
                f"{VARIANT} is {name!r:.80}; clients may not choose here (rollout.allow_variant_header)", param=VARIANT
            )
        model = self.get(name)
        if model is None:
            there = ", ".join(self._members)
            raise InvalidRequest(f"{VARIANT} is {name!r:.80}; there is {there}", param=VARIANT)
        _ = model.info  # raises where it is not open
        return model

    def _point(self, tenant: Tenant, asks: Asks, user: str | None) -> bytes:
        """Where a request lies: those that are to stick together lie at one point, each tenant's at its own."""
        session = asks.session or user if self.config.sticky_by == "session" else None
        by = {"none": None, "user": user, "session": session}[self.config.sticky_by]
        by = by or asks.idempotency_key
        if not by:
            return self._rng.randbytes(16)
        return b"\0".join((tenant.salt.encode(), by.encode()))

    def _drawn(self, point: bytes, avoid: frozenset[str]) -> Model:
        for name in order_of(self._weights, point, secret=self._secret):
            why = self._absence(name) or ("refused" if name in avoid else None)
            if why is None:
                return self._members[name]
            self._meter.passed_over.labels(name, why).inc()
        return self._stable

    @property
    def _weights(self) -> Mapping[str, float]:
        return self.config.weights or {STABLE: 1.0}

    def _absence(self, name: str) -> str | None:
        """Why it takes no part now; None where it does."""
        if self.court.verdict(name) is not None:
            return "rolled_back"
        model = self._members.get(name)
        if model is None:
            return "unknown"
        return None if model.is_ready else "not_ready"

    def has_other(self, model: Model, avoid: frozenset[str]) -> bool:
        """Whether a request that `model` did not answer may go to another variant, none of `avoid`."""
        shares = self.shares()
        may = {name for name, share in shares.items() if share > 0} | {STABLE}
        return self._members.get(model.name) is model and any(self._members[name].is_ready for name in may - avoid)

    # How it stands

    def shares(self) -> dict[str, float]:
        """What part of the requests each variant gets at this moment."""
        weights = {name: weight for name, weight in self._weights.items() if self._absence(name) is None}
        total = sum(weights.values())
        if not total:
            weights, total = {STABLE: 1.0}, 1.0
        return {name: weights.get(name, 0.0) / total for name in self._members}

    @property
    def can_answer(self) -> bool:
        """Whether a variant that gets requests has a replica that is ready."""
        return any(share > 0 and self._members[name].is_ready for name, share in self.shares().items())

    def describe(self) -> list[dict[str, Any]]:
        """For `/v1/cluster`."""
        shares, config = self.shares(), self.config
        return [
            {
                "name": name,
                "state": self._state(model),
                "weight": self._weights.get(name, 0.0),
                "share": round(shares[name], 6),
                "shadow": config.shadow.get(name, 0.0),
                "model": model.info.model if model.is_open else None,
                "digest": model.info.digest if model.is_open else None,
                "replicas": list(model.backend.replicas()),
            }
            for name, model in self._members.items()
        ]

    def _state(self, model: Model) -> str:
        verdict = self.court.verdict(model.name)
        if verdict is not None:
            return f"rolled back: {verdict.words}"
        if not model.is_ready:
            return "not ready"
        if model.is_asleep:
            return "waking" if model.sleep.held else "asleep"
        return "serving" if self._weights.get(model.name) else "idle"


def _replaces(other: Model, model: Model) -> bool:
    return (
        other.is_open
        and other.info.digest == model.info.digest
        and other.info.max_model_len >= model.info.max_model_len
        and is_ready(other.backend)
    )
