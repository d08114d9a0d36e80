"""Who holds what: how heads, MLP columns, the vocabulary and layers are cut over ranks. Pure arithmetic.

Every cut is contiguous and sizes differ by at most one unit, so any model runs at any width that its heads allow.
"""

from dataclasses import dataclass


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
