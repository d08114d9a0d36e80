"""Linear layers cut over the ranks of a tensor-parallel group, as plain callables: [T, in] -> [T, out].

Built once from a `LinearMethod` that already holds this rank's slice; what is called each step has no options left.
The bias of a row-parallel layer is added on shard 0 alone, before the sum, so that one formula serves any width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear import Linear, linear
from .comm import Comm
from .partition import cut_vocab, length
from .quant import LinearMethod

Layer = Callable[[Tensor], Tensor]


def then(first: Layer, second: Layer) -> Layer:
    """The two, one after the other."""
    return lambda x: second(first(x))


def column_linear(method: LinearMethod, bias: Tensor | None) -> Layer:
    """This rank's output columns of a layer. Nothing is said to the other ranks."""
    if bias is None:
        return method.apply
    apply = method.apply
    return lambda x: apply(x).add_(bias)


def partial_linear(method: LinearMethod, bias: Tensor | None, *, comm: Comm) -> Layer:
    """A layer whose inputs are cut: a partial sum on each rank, for the caller to add up over the ranks."""
    return column_linear(method, bias if comm.shard == 0 else None)


def row_linear(method: LinearMethod, bias: Tensor | None, *, comm: Comm) -> Layer:
    """A layer whose inputs are cut: the whole sum on every rank."""
    return then(partial_linear(method, bias, comm=comm), comm.all_reduce)


def table_lookup(table_VD: Tensor) -> Layer:
    """Rows of a dense table."""
    return lambda ids_T: F.embedding(ids_T, table_VD)


def vocab_embedding(lookup: Layer, *, vocab_size: int, comm: Comm) -> Layer:
    """Rows of a table of which each rank holds those of its part of the vocabulary: ids [T] -> [T, D].

    lookup: the rank's part, by ids that count from its own first.
    """
    if comm.size == 1:
        return lookup
    mine = cut_vocab(vocab_size, shard=comm.shard, size=comm.size)

    def embed(ids_T: Tensor) -> Tensor:
        outside_T1 = ((ids_T < mine.start) | (ids_T >= mine.stop))[:, None]
        rows_T = (ids_T - mine.start).clamp_(0, max(length(mine) - 1, 0))
        return comm.all_reduce(lookup(rows_T).masked_fill_(outside_T1, 0))

    return embed


def float32_linear(weight_VD: Tensor, product: Linear = linear) -> Layer:
    """`x @ W.T` in float32 for x in float32: products are summed and kept in it, whatever the weight is stored as.

    The logits of likely tokens lie near each other and far from zero, where bfloat16 steps by 0.125: rounded to it
    they tie. Torch has this product for 16-bit weights on GPUs only.
    """
    return lambda x_RD: product(x_RD.to(weight_VD.dtype), weight_VD, torch.float32)


def cast_linear(method: LinearMethod, dtype: torch.dtype) -> Layer:
    """A method that wants its input in `dtype`, for x in float32."""
    return lambda x_RD: method.apply(x_RD.to(dtype))


def vocab_linear(linear: Layer, bias: Tensor | None) -> Layer:
    """Logits in float32 over this rank's part of the vocabulary: [R, D] -> [R, V of the shard]. See `vocab.py`."""
    layer = linear if bias is None else then(linear, lambda x_RV: x_RV.add_(bias))
    return lambda x_RD: layer(x_RD).float()
