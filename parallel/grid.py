"""The grid of ranks: `rank = stage * tp + shard`. Stages follow each other; the shards of a stage share its layers."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """`tp` shards by `pp` stages."""

    tp: int = 1
    pp: int = 1

    @property
    def size(self) -> int:
        return self.tp * self.pp

    def place(self, rank: int) -> "Place":
        return Place(self, *divmod(rank, self.tp))

    def __iter__(self) -> Iterator["Place"]:
        """Places by rank."""
        return map(self.place, range(self.size))


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank stands."""

    grid: Grid
    stage: int
    shard: int

    @property
    def rank(self) -> int:
        return self.stage * self.grid.tp + self.shard

    @property
    def is_first(self) -> bool:
        """Of the first stage: it embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Of the last stage: it has the head, and draws."""
        return self.stage == self.grid.pp - 1

    @property
    def answers(self) -> bool:
        """The output rank: the one whose results go back to the driver."""
        return self.is_last and self.shard == 0

    @property
    def next_rank(self) -> int:
        """The rank of the same shard in the next stage; the last stage's is in the first."""
        return (self.stage + 1) % self.grid.pp * self.grid.tp + self.shard

    def __str__(self) -> str:
        return f"rank {self.rank} (stage {self.stage} of {self.grid.pp}, shard {self.shard} of {self.grid.tp})"
