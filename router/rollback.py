"""Beside station 6: when is a variant taken back? Pure: it counts how requests fared, and the clock is handed in.

A request counts once, for the variant that computed it, when the last of its logs is over. It has failed where we did:
an error of the engine or of its replicas, or a deadline that the client did not set. What the client did wrong, wanted
too soon, or left unfinished is no failure, and what came from the cache says nothing. Nor does a wait in the ingress's
own queue: a first token's time runs from when the request has its place.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import msgspec

from ..runtime.errors import RequestError, RequestTimeout
from ..runtime.generation import FinishReason, TokenEvent
from .rollout_config import STABLE, RollbackConfig, RolloutConfig

logger = logging.getLogger("shoal.router")

Bound = Literal["error_rate", "ttft"]

MOST = 10_000  # requests that a window remembers
_LATE = 0.1  # one in ten may be slower than the bound: so it is the 90th percentile that is bounded


class _Fared(NamedTuple):
    """None: nobody knows."""

    at: float
    failed: bool | None
    is_late: bool | None


class Window:
    """How the requests of the last `bounds.window_s` fared, the last `MOST` of them; nothing costs more than O(1)."""

    def __init__(self, bounds: RollbackConfig, *, clock: Callable[[], float]) -> None:
        self._bounds = bounds
        self._clock = clock
        self._fared: deque[_Fared] = deque()
        self._num_ended = self._num_failed = self._num_timed = self._num_late = 0

    def add(self, *, failed: bool | None, ttft_s: float | None, waited_s: float = 0.0) -> None:
        """One more. failed: None where its client left before it was known. ttft_s: seconds to its first token, None
        where none came: then it waited at least `waited_s`."""
        limit = self._bounds.max_ttft_s
        if limit is None:
            is_late = None
        elif ttft_s is not None:
            is_late = ttft_s > limit
        else:
            is_late = True if waited_s > limit else None
        self._fared.append(_Fared(self._clock(), failed, is_late))
        self._count(self._fared[-1], 1)
        if len(self._fared) > MOST:
            self._count(self._fared.popleft(), -1)

    def crossed(self) -> tuple[Bound, str] | None:
        """The bound that is crossed now, and in words how far."""
        bounds = self._bounds
        while self._fared and self._fared[0].at <= self._clock() - bounds.window_s:
            self._count(self._fared.popleft(), -1)
        num, most = self._num_ended, bounds.max_error_rate
        if most is not None and num >= bounds.min_requests and self._num_failed > most * num:
            return "error_rate", f"{self._num_failed} of {num} requests failed (max_error_rate {most:g})"
        timed, late = self._num_timed, self._num_late
        if bounds.max_ttft_s is not None and timed >= bounds.min_requests and late > _LATE * timed:
            slow = f"{late} of {timed} first tokens took longer than {bounds.max_ttft_s:g} s"
            return "ttft", f"{slow} (max_ttft_s, of nine in ten)"
        return None

    def _count(self, fared: _Fared, by: int) -> None:
        self._num_ended += by * (fared.failed is not None)
        self._num_failed += by * bool(fared.failed)
        self._num_timed += by * (fared.is_late is not None)
        self._num_late += by * bool(fared.is_late)


class Charge(NamedTuple):
    """What a variant is judged on: a rollout of it is another one where this differs."""

    weight: float
    bounds: RollbackConfig

    def fingerprint(self) -> bytes:
        return msgspec.json.encode([self.weight, self.bounds.model_dump()])


class Verdict(NamedTuple):
    """A variant was taken back. words: why; of another ingress's verdict they only say that."""

    bound: Bound
    words: str
    is_own: bool


class Court:
    """Who is on trial, and who was taken back. Stable never is.

    on_verdict: told each, when it falls.
    """

    def __init__(
        self, *, clock: Callable[[], float], on_verdict: Callable[[str, Verdict], None] = lambda name, verdict: None
    ) -> None:
        self.is_closed = False  # whoever shuts down sees failures that are its own
        self._clock = clock
        self._on_verdict = on_verdict
        self._charges: dict[str, Charge] = {}
        self._windows: dict[str, Window] = {}
        self._verdicts: dict[str, Verdict] = {}

    @property
    def charges(self) -> Mapping[str, Charge]:
        """Of those who are or were judged under the rollout in force."""
        return self._charges

    def roll_out(self, config: RolloutConfig) -> None:
        """Judge from now on by this. A verdict stands as long as its variant's weight and the bounds do."""
        judged = {name: weight for name, weight in config.weights.items() if weight > 0 and name != STABLE}
        bounds = config.rollback
        charges = {} if bounds is None else {name: Charge(weight, bounds) for name, weight in judged.items()}
        for name in self._charges.keys() | charges.keys():
            if self._charges.get(name) != charges.get(name):
                self.forget(name)
        self._charges = charges

    def forget(self, name: str) -> None:
        """What is known of a variant, and the verdict on it, is void: it is another one from now on."""
        self._windows.pop(name, None)
        self._verdicts.pop(name, None)

    def verdict(self, name: str) -> Verdict | None:
        return self._verdicts.get(name)

    def hear(self, name: str, verdict: Verdict) -> None:
        """A verdict under the charge in force. The first one counts."""
        if name in self._charges and name not in self._verdicts and not self.is_closed:
            self._verdicts[name] = verdict
            self._windows.pop(name, None)
            logger.warning("the variant %r gets no more requests: %s", name, verdict.words)
            self._on_verdict(name, verdict)

    def fared(self, name: str, *, failed: bool | None, ttft_s: float | None, waited_s: float = 0.0) -> None:
        """How one request fared with that variant: see `Window.add`."""
        charge = self._charges.get(name)
        if charge is None or name in self._verdicts or self.is_closed:
            return
        window = self._windows.get(name)
        if window is None:
            window = self._windows[name] = Window(charge.bounds, clock=self._clock)
        window.add(failed=failed, ttft_s=ttft_s, waited_s=waited_s)
        if (crossed := window.crossed()) is not None:
            self.hear(name, Verdict(*crossed, is_own=True))

    def trial(self, name: str, *, has_deadline: bool) -> Trial:
        """Of one request. has_deadline: the client set it one."""
        return Trial(self, name, has_deadline=has_deadline, clock=self._clock)


class Trial:
    """How one request fares, told by what makes its logs. It is open while anything of it runs, as its `Grant` is."""

    def __init__(self, court: Court, name: str, *, has_deadline: bool, clock: Callable[[], float]) -> None:
        self._court = court
        self._name = name
        self._has_deadline = has_deadline
        self._clock = clock
        self._began: float | None = None  # with the first log that is made
        self._ttft_s: float | None = None
        self._failed = False
        self._is_timed = True
        self._num_open = 1

    @property
    def has_failed(self) -> bool:
        return self._failed

    @contextmanager
    def log(self, *, is_timed: bool) -> Iterator[None]:
        """One of its logs is made meanwhile; what that raises is how it ended. is_timed: no replica must be started
        first, which is to take its time."""
        self._num_open += 1
        self._is_timed &= is_timed
        if self._began is None:
            self._began = self._clock()
        try:
            yield
        except RequestTimeout:
            self._failed |= not self._has_deadline
            raise
        except RequestError:
            raise
        except Exception:
            self._failed = True
            raise
        finally:
            self.close()

    def came(self, events: Iterable[TokenEvent]) -> None:
        """Of any of its logs."""
        for event in events:
            if event.tokens and self._ttft_s is None and self._began is not None:
                self._ttft_s = self._clock() - self._began
            if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                self._failed = True
            elif event.finish_reason is FinishReason.TIMEOUT:
                self._failed |= not self._has_deadline

    def close(self) -> None:
        """One has ended. Behind the last it counts, if any log was made."""
        self._num_open -= 1
        if self._num_open or self._began is None:
            return
        was_left = not self._failed and self._ttft_s is None
        self._court.fared(
            self._name,
            failed=None if was_left else self._failed,
            ttft_s=self._ttft_s if self._is_timed else None,
            waited_s=self._clock() - self._began if self._is_timed else 0.0,
        )
