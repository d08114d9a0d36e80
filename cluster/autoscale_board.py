"""What a part's policy has decided, from Serve's controller, where it runs, to the ingresses, which show it.

Neither can call the other, so it goes through the key-value store of Ray's GCS. A word that nobody repeats is void: the
part is gone, or its number is not settled by a policy any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from ..router.load_report import Decided

logger = logging.getLogger("shoal.cluster")

AGAIN_S = 10.0  # a word is repeated after so long,
STALE_S = 300.0  # and void after so long: clocks of two machines are compared
LOOK_S = 2.0
NAMESPACE = b"shoal-autoscaling"


class Board(Protocol):
    """Where it is shown what is wanted, and why."""

    def show(self, decided: Decided) -> None:
        """Must not block."""
        ...


class GcsBoard:
    """One application's."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._thread = ThreadPoolExecutor(1)  # while the GCS is away, Serve's controller is not to wait for it

    def show(self, decided: Decided) -> None:
        """As `Board`."""
        self._thread.submit(_put, self._application, decided)


def _put(application: str, decided: Decided) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(application.encode(), msgspec.json.encode(decided), overwrite=True, namespace=NAMESPACE)


def read_board(applications: Iterable[str], *, now: float) -> dict[str, Decided]:
    """The last words of those that have one. now: unix seconds. Blocks for the GCS; {} without a Ray."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    found: dict[str, Decided] = {}
    if not _internal_kv_initialized():
        return found
    for application in applications:
        said = _internal_kv_get(application.encode(), namespace=NAMESPACE)
        if said is not None:
            decided = msgspec.json.decode(said, type=Decided)
            if now - decided.said_at < STALE_S:
                found[application] = decided
    return found


async def follow_board(
    applications: Callable[[], Iterable[str]], hear: Callable[[Mapping[str, Decided]], None]
) -> None:
    """Tell `hear` what is decided, as long as this runs."""
    while True:
        try:
            hear(await asyncio.to_thread(read_board, list(applications()), now=time.time()))
        except Exception as error:  # noqa: BLE001 - it is shown and nothing depends on it
            logger.debug("nobody says how many replicas there are to be: %s", type(error).__name__)
        await asyncio.sleep(LOOK_S)
