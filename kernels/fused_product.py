"""A layer's products of few rows with what stands before and behind them: a layer is six launches.

    qkv of the norm, rotate and store, attention, out; gate and up of the norm with the activation, down.

What a part puts out is not added to the residual stream at once. Whoever reads the stream adds what is due, in
registers; the last product of the layer, in which nobody reads the stream, stores the sum. So no launch is spent on
norms, on additions or on the activation, and ranks that share a layer sum their parts in between as ever.

Every tile of features reads the whole stream again, from the L2 cache: that is little beside the weight for few rows.
"""

import torch
import triton
from torch import Tensor

from .coded_weight import CodedWeight
from .ops import Activation, NormWeight
from .product import Around, Stream, product
from .quant_tiles import few_rows_tile


def normed_product(
    stream: Stream,
    norm: NormWeight,
    weight: CodedWeight,
    *,
    bias_F: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """`norm(residual + deltas) @ W.T + bias`: [T, F] in the deltas' dtype, bfloat16. At most FEW_ROWS rows.

    activation: W is a gate's rows, then as many others, and the result `act(gate) * other`. The norm's factor of a row
    multiplies the sum and not the row, whose numbers must therefore be within the dtype's range before they are
    normalised: those of float16 may not be.
    """
    residual_TD, deltas = stream
    features = weight.out_features // (1 if activation is None else 2)
    out_TF = torch.empty((len(residual_TD), features), dtype=deltas[0].dtype, device=residual_TD.device)
    around = Around(stream, norm, bias_F, activation)
    return _few_rows(None, weight, out_TF, around)


def plain_product(
    x_TF: Tensor, weight: CodedWeight, *, bias_F: Tensor | None = None, settled: Stream | None = None
) -> Tensor:
    """`x @ W.T + bias`: [T, D] in x's dtype. At most FEW_ROWS rows.

    settled: a stream as wide as the result, whose deltas are added to its residual, in place.
    """
    out_TD = torch.empty((len(x_TF), weight.out_features), dtype=x_TF.dtype, device=x_TF.device)
    assert settled is None or settled.residual_TD.shape == out_TD.shape
    return _few_rows(x_TF, weight, out_TD, Around(settled, bias_F=bias_F))


def _few_rows(x_TD: Tensor | None, weight: CodedWeight, out_TF: Tensor, around: Around) -> Tensor:
    if out_TF.numel():
        blocks = triton.cdiv(weight.in_features, weight.block)
        normed = around.norm is not None
        product(x_TD, weight, out_TF, few_rows_tile(weight.out_features, blocks, normed=normed), around)
    return out_TF
