"""Who made the ranks fail? The scheduler's judgement after a failure. Pure: it only remembers who is under suspicion.

    the failing rank names a row          its sequence is guilty
    the plans in flight may be the cause  whoever had a slice in them is a suspect
    a plain kill from outside             proves nothing: nobody becomes a suspect, and who is one stays one

Suspects run one at a time, with nothing else in any plan in flight, each until it is past the place where it was; then
it is cleared and the next one's turn comes. The one that runs alone when the ranks fail again is guilty. So a request
that kills ranks costs two restarts, one in company and one alone, and no other request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from .outline import Flight
from .sequence import Sequence


class Verdict(NamedTuple):
    """What one failure has shown: who must end, and who has come under suspicion."""

    guilty: list[Sequence]
    suspects: list[Sequence]


class Quarantine:
    """The suspects, in the order in which they are tried, and how many tokens each must have to be past its place."""

    def __init__(self) -> None:
        self._places: dict[Sequence, int] = {}

    @property
    def suspect(self) -> Sequence | None:
        """Who runs alone now; None while everything runs as usual."""
        return next(iter(self._places)) if self._places else None

    @property
    def num_suspects(self) -> int:
        return len(self._places)

    def judge(
        self, flights: Collection[Flight], *, is_suspect: bool, slots: Collection[int], live: Mapping[str, Sequence]
    ) -> Verdict:
        """Take in a failure of the ranks under the plans in flight. is_suspect, slots: see `GroupFailure`."""
        places: dict[Sequence, int] = {}  # of all that had a slice, those that have ended since too
        tenants: dict[int, set[Sequence]] = {slot: set() for slot in slots}
        for flight in flights:
            for part, (seq, _) in zip(flight.plan.slices, flight.rows, strict=True):
                places[seq] = max(places.get(seq, 0), len(seq.tokens) + 1, part.start + part.count + part.samples)
                if part.slot in tenants:
                    tenants[part.slot].add(seq)
        accused = set().union(*tenants.values())
        named = {seq for each in tenants.values() if len(each) == 1 for seq in each}
        if not accused:
            accused = set(places) if is_suspect else set()
            # Whoever runs alone was a suspect before: it has failed twice. What has ended since may be the cause, too.
            named = accused if self._places and len(accused) == 1 else set()
        guilty = [seq for seq in places if seq in named and live.get(seq.request.id) is seq]
        suspects = [seq for seq in places if seq in accused - named and live.get(seq.request.id) is seq]
        suspects = sorted((seq for seq in suspects if seq not in self._places), key=lambda seq: seq.key)
        self._places.update((seq, places[seq]) for seq in suspects)
        return Verdict(guilty, suspects)

    def release(self) -> list[Sequence]:
        """Clear the suspect that has got past its place, if it has."""
        suspect = self.suspect
        if suspect is None or len(suspect.tokens) < self._places[suspect]:
            return []
        del self._places[suspect]
        return [suspect]

    def discharge(self, seq: Sequence) -> None:
        """A sequence has ended, suspect or not."""
        self._places.pop(seq, None)
