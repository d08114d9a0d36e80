"""Beside station 3: what is given up as load grows, rung by rung, as the config declares it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .config import Rung

_SLACK = 0.9  # a rung is left when load has fallen below this part of it, so that nobody flaps on it


class Degradation(msgspec.Struct, frozen=True, kw_only=True):
    """What holds at one load. max_tokens, truncate_to: the most tokens of an answer, and of a prompt that may be cut.

    model: the served name of the smaller model. shed: requests of tenants with priority 0 or more are refused.
    """

    max_tokens: int | None = None
    truncate_to: int | None = None
    model: str | None = None
    shed: bool = False


NOTHING = Degradation()


class Ladder:
    """Climbed at once as load grows, and down again with hysteresis."""

    def __init__(self, rungs: Sequence[Rung]) -> None:
        """`rungs`, lowest load first: `RouterConfig` sees to it."""
        self._loads = [rung.load for rung in rungs]
        self._states = [NOTHING, *(_held(rungs[: count + 1]) for count in range(len(rungs)))]
        self._height = 0
        self.shed_until = _SLACK * min((rung.load for rung in rungs if rung.shed), default=0.0)
        """The load below which nobody is shed any more."""

    def at(self, load: float) -> Degradation:
        """load: generations in flight or waiting, as a share of the places."""
        loads = self._loads
        while self._height < len(loads) and load >= loads[self._height]:
            self._height += 1
        while self._height and load < _SLACK * loads[self._height - 1]:
            self._height -= 1
        return self._states[self._height]


def _held(rungs: Sequence[Rung]) -> Degradation:
    """All of these at once: the tightest limits, the last model."""
    return Degradation(
        max_tokens=min((rung.max_tokens for rung in rungs if rung.max_tokens is not None), default=None),
        truncate_to=min((rung.truncate_to for rung in rungs if rung.truncate_to is not None), default=None),
        model=next((rung.model for rung in reversed(rungs) if rung.model is not None), None),
        shed=any(rung.shed for rung in rungs),
    )
