"""8-bit keys and values: what a code means, whichever device wrote it.

Each token's head has codes of one scale, so that it can be written when it comes and never again: scale = largest |x|
/ largest code, code = x / scale, rounded to the nearest, ties to even. int8 is linear, float8_e4m3fn ("fp8") has three
bits of mantissa everywhere. Per token and not per tensor: nothing has to be calibrated, and a token with outliers costs
no other one its precision.
"""

import torch
from torch import Tensor

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A head whose numbers are all below this is stored as zeros: larger / smaller stay within float32.
SMALLEST = 1e-30


def largest_code(dtype: torch.dtype) -> float:
    """Of a cache of this dtype; 0: it has no codes, numbers are stored as they are."""
    return _LARGEST.get(dtype, 0.0)


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x's shape and float32 scales without its last dim. What is not finite makes its head's scale so."""
    x = x.float()
    highest = x.abs().amax(dim=-1).clamp(min=SMALLEST)
    # A tensor, too: torch may divide a number by a tensor, or by a number, as a product with a rounded reciprocal.
    largest = torch.full_like(highest, largest_code(dtype))
    codes = (x * (largest / highest)[..., None]).nan_to_num(0.0)
    if not dtype.is_floating_point:
        codes = codes.round()
    return codes.to(dtype), highest / largest


def decode(codes: Tensor, scale: Tensor | None) -> Tensor:
    """Float32 numbers; codes as they are where there is no scale."""
    return codes if scale is None else codes.float() * scale[..., None]
