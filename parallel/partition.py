"""Who holds what: how heads, MLP columns, the vocabulary and layers are cut over ranks. Pure arithmetic.

Every cut is contiguous and sizes differ by at most one unit, so any model runs at any width that its heads allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf


def even_cut(total: int, *, shard: int, size: int, unit: int = 1) -> slice:
    """The shard's part of [0, total), in whole units where `total` has them; the larger parts come first.

    A last, broken unit counts as one. Parts are empty where there are more shards than units.
    """
    units = -(-total // unit)
    small, larger = divmod(units, size)
    start = shard * small + min(shard, larger)
    stop = start + small + (shard < larger)
    return slice(min(start * unit, total), min(stop * unit, total))


def length(part: slice) -> int:
    """How many a slice with bounds holds."""
    return int(part.stop - part.start)


@dataclass(frozen=True, slots=True)
class HeadCut:
    """A rank's heads. `copies` is how many ranks hold these same KV heads (1 up to as many ranks as KV heads)."""

    query: slice
    kv: slice
    copies: int = 1

    @property
    def num_query(self) -> int:
        return length(self.query)

    @property
    def num_kv(self) -> int:
        return length(self.kv)


def cut_heads(num_heads: int, num_kv_heads: int, *, shard: int, size: int) -> HeadCut:
    """The heads of one shard.

    Up to as many shards as KV heads: contiguous KV heads, their query heads with them. Beyond: one KV head a shard,
    its query heads split among the shards that hold a copy of it.
    """
    if size > num_heads:
        raise ValueError(f"tensor_parallel_size {size} is more than the model's {num_heads} attention heads")
    group = num_heads // num_kv_heads
    if size <= num_kv_heads:
        kv = even_cut(num_kv_heads, shard=shard, size=size)
        return HeadCut(slice(kv.start * group, kv.stop * group), kv)
    # Shards are dealt to KV heads here as KV heads were to shards above; as size <= num_heads, each gets a query head.
    for head in range(num_kv_heads):
        holders = even_cut(size, shard=head, size=num_kv_heads)
        if holders.start <= shard < holders.stop:
            break
    copies = length(holders)
    query = even_cut(group, shard=shard - holders.start, size=copies)
    first = head * group
    return HeadCut(slice(first + query.start, first + query.stop), slice(head, head + 1), copies)


def cut_mlp(num_columns: int, *, shard: int, size: int, unit: int = 1) -> slice:
    """The MLP columns of one shard, in units (of a quantisation group) unless that would leave a shard empty."""
    while unit > 1 and -(-num_columns // unit) < size:
        unit //= 2
    if size > num_columns:
        raise ValueError(f"tensor_parallel_size {size} is more than the model's {num_columns} MLP columns")
    return even_cut(num_columns, shard=shard, size=size, unit=unit)


def cut_vocab(vocab_size: int, *, shard: int, size: int) -> slice:
    """The vocabulary ids of one shard."""
    return even_cut(vocab_size, shard=shard, size=size)


def cut_layers(
    costs: Sequence[float],
    *,
    stages: int,
    head: float = 0.0,
    entry: float = 0.0,
    speeds: Sequence[float] | None = None,
) -> list[range]:
    """Contiguous layers for each stage, so that the dearest stage is as cheap as it can be.

    costs: of each layer, in any unit; entry and head are what the first and the last stage have to do besides. speeds:
    of each stage, in any unit; default: all alike. Each stage gets at least one layer. Among equal cuts the earlier
    stages are the smaller ones. Dynamic programming over (stages, layers), as in the linear partition problem (Skiena,
    The Algorithm Design Manual, 10.7).
    """
    num = len(costs)
    if not 1 <= stages <= num:
        raise ValueError(f"pipeline_parallel_size {stages}: the model has {num} layers; possible: 1 to {num}")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def work(start: int, stop: int) -> float:
        return before[stop] - before[start] + (entry if start == 0 else 0.0) + (head if stop == num else 0.0)

    speeds = speeds or [1.0] * stages
    # best[stop]: (cost of the dearest of the first k stages over layers [0, stop), where the k-th begins)
    best = [(work(0, stop) / speeds[0], 0) for stop in range(num + 1)]
    starts = [[begin for _, begin in best]]
    for stage, speed in enumerate(speeds[1:], start=2):
        best = [
            min(
                ((max(best[begin][0], work(begin, stop) / speed), begin) for begin in range(stage - 1, stop)),
                default=(inf, 0),
            )
            for stop in range(num + 1)
        ]
        starts.append([begin for _, begin in best])
    cuts: list[range] = []
    stop = num
    for begins in reversed(starts):
        cuts.append(range(begins[stop], stop))
        stop = begins[stop]
    return cuts[::-1]
