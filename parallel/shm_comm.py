"""The tensor-parallel axis inside a node without GPUs: one-shot collectives in shared memory.

Every shard lays its tensor into a slot of its own, says so, waits for the others and then reads all slots, so that all
come to the same bits, summed in the order of the shards. Two sets of slots take turns: who writes into a set has met
the others in the turn between, and they had by then read what was there. So one meeting a call is enough.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import TURNS, CommPlan
from .peer import absent
from .shm import Cell, Patience, Segment
from .station import COMPUTE, Station
from .tensors import Operation, fold, wide

_KEPT_SHAPES = 512  # views of the slots that are kept, by shape


@dataclass(frozen=True, slots=True)
class _Turn:
    """One set of slots, seen as tensors of one shape: mine, those of all shards, and these as one tensor."""

    mine: Tensor
    parts: tuple[Tensor, ...]
    stacked: Tensor


class SharedMemoryComm:
    """A `Comm` of CPU tensors. 16-bit floats are summed in float32 and rounded once."""

    def __init__(
        self,
        segment: Segment,
        plan: CommPlan,
        *,
        shard: int,
        patience: Patience,
        station: Station,
        deadline_s: float,
    ) -> None:
        self.shard = shard
        self.size = len(plan.ranks)
        self._plan = plan
        self._memory = segment.memory
        self._station = station
        self._deadline_s = deadline_s
        cells = [Cell(segment, offset, waiter=shard, patience=patience) for offset in plan.cells]
        self._mine = cells[shard]
        self._others = [(plan.ranks[i], cell) for i, cell in enumerate(cells) if i != shard]
        self._turn = 0
        self._views: dict[tuple[torch.Size, torch.dtype], tuple[_Turn, ...]] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._reduce(x, torch.add)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._reduce(x, torch.maximum)

    def _reduce(self, x: Tensor, operation: Operation) -> Tensor:
        dtype = wide(x.dtype)
        if x.numel() * dtype.itemsize <= self._plan.slot_bytes:
            return fold(operation, self._lay(x, dtype, "all_reduce").parts, out=x)
        flat = x.reshape(-1)  # x's own memory if it is contiguous
        for piece in torch.split(flat, self._plan.slot_bytes // dtype.itemsize):
            self._reduce(piece, operation)
        return x if flat.data_ptr() == x.data_ptr() else x.copy_(flat.view(x.shape))

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        if x.nbytes <= self._plan.slot_bytes:
            return gathered.copy_(self._lay(x, x.dtype, "all_gather").stacked)
        count = self._plan.slot_bytes // x.dtype.itemsize
        pieces = torch.split(x.reshape(-1), count)
        outs = torch.split(gathered.view(self.size, -1), count, dim=1)
        for piece, out in zip(pieces, outs, strict=True):
            out.copy_(self._lay(piece, x.dtype, "all_gather").stacked)
        return gathered

    def _lay(self, x: Tensor, dtype: torch.dtype, station: str) -> _Turn:
        """Lay x into this shard's slot as `dtype`, and wait until every shard has."""
        self._station.at(station)
        views = self._views.get((x.shape, dtype)) or self._view(x.shape, dtype)
        self._turn += 1
        turn = views[self._turn % TURNS]
        turn.mine.copy_(x)
        self._mine.publish(self._turn)
        for rank, cell in self._others:
            if not cell.wait_for(self._turn, self._deadline_s):
                raise absent(rank, station, self._deadline_s)
        self._station.at(COMPUTE)
        return turn

    def _view(self, shape: torch.Size, dtype: torch.dtype) -> tuple[_Turn, ...]:
        """The slots as tensors. Making them costs as much as a small collective, so they are kept."""
        if len(self._views) >= _KEPT_SHAPES:
            self._views.clear()
        count = TURNS * self.size * self._plan.slot_bytes // dtype.itemsize
        slots = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._plan.slots)
        turns = []
        for slots_of_turn in slots.view(TURNS, self.size, -1):
            stacked = slots_of_turn[:, : shape.numel()].unflatten(1, shape) if shape else slots_of_turn[:, 0]
            turns.append(_Turn(stacked[self.shard], tuple(stacked.unbind()), stacked))
        self._views[shape, dtype] = tuple(turns)
        return tuple(turns)
