"""Between stations 2 and 1: a request that was understood, and the flight that brings its answer."""

from __future__ import annotations

from typing import NamedTuple

from .cache import CacheStatus, Caching
from .flight import Flight
from .headers import CACHE, CACHE_AGE, DEGRADED, VARIANT
from .model import Model
from .prepare import Job
from .rollback import Trial
from .tenant import Tenant


class Asked(NamedTuple):
    """A request, understood. id: of the answer. model: a variant of the main one, or a further one. trial: of that."""

    id: str
    job: Job
    model: Model
    tenant: Tenant
    caching: Caching
    trial: Trial


class Launch(NamedTuple):
    """An admitted request, and the flight that brings the answer. limits: headers on how the tenant's rates stand."""

    asked: Asked
    flight: Flight
    limits: dict[str, str]

    def headers(self) -> dict[str, str]:
        """Of the answer, once its first pieces are there."""
        status, age_s = self.flight.origin()
        headers = {CACHE: status.value, VARIANT: self.asked.model.name, **self.limits}
        if status is CacheStatus.HIT:
            headers[CACHE_AGE] = str(int(age_s))
        if degraded := self.asked.job.degraded:
            headers[DEGRADED] = ", ".join(f"{what}={limit}" for what, limit in degraded.items())
        return headers
