"""Where things lie in a shared segment: offsets that writers and readers agree on, without torch."""

from dataclasses import dataclass

from .shm import CELL_BYTES

TURNS = 2  # sets of slots of a `CommPlan`


@dataclass(frozen=True, slots=True)
class LinePlan:
    """A line of messages: the writer's cell, a cell for each reader, and a ring of `capacity` bytes.

    writer, readers: ranks, or `DRIVER`, by which errors name them.
    """

    offset: int
    capacity: int
    writer: int
    readers: tuple[int, ...]

    @property
    def written(self) -> int:
        """The writer's cell."""
        return self.offset

    @property
    def read(self) -> range:
        """The readers' cells."""
        return range(self.offset + CELL_BYTES, self.data, CELL_BYTES)

    @property
    def data(self) -> int:
        return self.offset + CELL_BYTES * (1 + len(self.readers))

    @property
    def end(self) -> int:
        return self.data + self.capacity


@dataclass(frozen=True, slots=True)
class CommPlan:
    """The meeting place of one stage's shards: a cell for each, and `TURNS` sets of a slot for each.

    ranks: by shard, by which errors name them.
    """

    offset: int
    slot_bytes: int
    ranks: tuple[int, ...]

    @property
    def cells(self) -> range:
        return range(self.offset, self.slots, CELL_BYTES)

    @property
    def slots(self) -> int:
        return self.offset + CELL_BYTES * len(self.ranks)

    @property
    def end(self) -> int:
        return self.slots + TURNS * len(self.ranks) * self.slot_bytes
