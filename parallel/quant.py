"""Weight formats: how one linear layer's slice of the weights is held, and multiplied with.

A rank's slice is cut when it is read (`runtime/weights.py`), so a method here knows nothing of shards. Which method
serves which kind of quantised weights on a device is decided once, in `select_kernels`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.linear import Linear, linear
from ..kernels.native import Native, load_native
from .codes import Codes, Kind, Quantised
from .int4 import Int4Layout, Int4Linear, probe_int4_layout
from .int8 import Int8Linear
from .native import NativeDenseLinear, NativeInt4Linear, NativeInt8Linear, fits_q4
from .native_head import NativeHead


class LinearMethod(Protocol):
    """`y = x @ W.T`, for a weight of [out_features, in_features] in some format. Biases are the layer's affair."""

    out_features: int
    in_features: int

    def apply(self, x_TD: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features], in x's dtype."""
        ...

    def num_bytes(self) -> int:
        """Memory the weight takes, scales included."""
        ...


class DenseLinear:
    """A weight in a float dtype, used as it is. `product` is the device's."""

    def __init__(self, weight_FD: Tensor, product: Linear = linear) -> None:
        self.weight_FD = weight_FD
        self._product = product
        self.out_features, self.in_features = weight_FD.shape

    def apply(self, x_TD: Tensor) -> Tensor:
        return self._product(x_TD, self.weight_FD)

    def num_bytes(self) -> int:
        return self.weight_FD.numel() * self.weight_FD.element_size()


class StackedLinear:
    """Weights one under the other that no single method holds: a fused layer whose parts are stored differently."""

    def __init__(self, parts: Sequence[LinearMethod]) -> None:
        self.parts = tuple(parts)
        self.out_features, self.in_features = sum(part.out_features for part in parts), parts[0].in_features

    def apply(self, x_TD: Tensor) -> Tensor:
        return torch.cat([part.apply(x_TD) for part in self.parts], 1)

    def num_bytes(self) -> int:
        return sum(part.num_bytes() for part in self.parts)


class GatheredLinear:
    """A method over columns in an order of its own, `Codes.order_D`: x is put into that order first."""

    def __init__(self, method: LinearMethod, order_D: Tensor, in_features: int) -> None:
        self._method = method
        self._order_D = order_D
        self._padding = int(bool((order_D == in_features).any()))  # by a column of zeros, for what stands for none
        self.out_features, self.in_features = method.out_features, in_features

    def apply(self, x_TD: Tensor) -> Tensor:
        return self._method.apply(F.pad(x_TD, (0, self._padding)).index_select(1, self._order_D))

    def num_bytes(self) -> int:
        return self._method.num_bytes() + self._order_D.nbytes


class HalfLinear:
    """A weight in float16 for inputs and outputs in float32: FBGEMM's product, which reads 16 bits and sums 32.

    On a CPU it runs at the memory's speed where torch's own float32 and bfloat16 products do not: 1.3 ms against 9.8
    and 3.1 for one row by 49,152 x 576 on two cores. It sums each row for itself, in one order for any number of rows.
    """

    def __init__(self, weight_FD: Tensor) -> None:
        """`weight_FD` is float32; what is beyond float16's range is clipped to it."""
        self.out_features, self.in_features = weight_FD.shape
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight_FD, None)

    @staticmethod
    def is_available() -> bool:
        """FBGEMM is part of torch on x86 processors with AVX2."""
        return "fbgemm" in torch.backends.quantized.supported_engines

    def apply(self, x_TD: Tensor) -> Tensor:
        y_TF: Tensor = torch.ops.quantized.linear_dynamic_fp16(x_TD, self._packed)
        return y_TF

    def num_bytes(self) -> int:
        return 2 * self.out_features * self.in_features


class CodeTable:
    """An embedding table as codes: the rows that are asked for are dequantised, float32 [T, D]."""

    def __init__(self, codes: Codes) -> None:
        codes_FD = codes.codes_FD
        self._pairs = codes.kind is Kind.INT4  # two codes a byte
        packed = codes_FD[:, ::2] | codes_FD[:, 1::2] << 4 if self._pairs else codes_FD
        self._codes = replace(codes, codes_FD=packed)

    def __len__(self) -> int:
        return self._codes.out_features

    def lookup(self, ids_T: Tensor) -> Tensor:
        codes = self._codes.rows(ids_T)
        if self._pairs:
            pairs_TD = codes.codes_FD
            codes = replace(codes, codes_FD=torch.stack((pairs_TD & 15, pairs_TD >> 4), 2).flatten(1))
        return codes.dense()

    def num_bytes(self) -> int:
        parts = self._codes.codes_FD, self._codes.scale_FG, self._codes.zero_FG
        return sum(part.nbytes for part in parts if part is not None)


class Kernels(Protocol):
    """The products that a device has beside those of its `Ops`."""

    kinds: frozenset[Kind]
    """What is worth asking for."""

    def make(self, weight: Quantised) -> LinearMethod | None:
        """A method that multiplies straight from codes; None where dense weights are the better form."""
        ...

    def dense(self, weight_FD: Tensor) -> LinearMethod | None:
        """A method over numbers, which takes no more memory than they do; None where `Ops.linear` is the better one."""
        ...

    def head(self, weight: Quantised) -> NativeHead | None:
        """A vocabulary's codes for products in float32, and for looking rows up; None where there is no kernel."""
        ...


class NoKernels:
    """Everything is dequantised: float32's products from codes are 60 times slower than the dense one."""

    kinds: frozenset[Kind] = frozenset()

    def make(self, weight: Quantised) -> LinearMethod | None:
        return None

    def dense(self, weight_FD: Tensor) -> LinearMethod | None:
        return None

    def head(self, weight: Quantised) -> NativeHead | None:
        return None


class CpuKernels:
    """bfloat16 on a CPU: our own kernels where they can be built, else torch's.

    deterministic: a row's result does not depend on how many rows there are. Our own are so as they are; torch's int4
    product sums each row for itself and in one order, but unpacked, the order is a dense product's.
    """

    kinds = frozenset({Kind.INT4, Kind.INT8})

    def __init__(self, native: Native | None, layout: Int4Layout | None, *, deterministic: bool) -> None:
        """layout: torch's of nibbles, if it is known."""
        self._native = native
        self._layout = layout
        self._deterministic = deterministic

    def make(self, weight: Quantised) -> LinearMethod | None:
        return over_codes(weight, self._int4 if weight.kind is Kind.INT4 else self._int8)

    def dense(self, weight_FD: Tensor) -> LinearMethod | None:
        if self._native is None or not NativeDenseLinear.fits(weight_FD):
            return None
        return NativeDenseLinear(self._native, weight_FD)

    def head(self, weight: Quantised) -> NativeHead | None:
        if self._native is None or not isinstance(weight, Codes) or not NativeHead.fits(weight):
            return None
        return NativeHead(self._native, weight)

    def _int4(self, codes: Codes) -> LinearMethod | None:
        if self._native is not None and fits_q4(codes):
            return NativeInt4Linear(self._native, codes)
        unpack_from = None if self._deterministic else Int4Linear.UNPACK_FROM
        return None if self._layout is None else Int4Linear(codes, self._layout, unpack_from=unpack_from)

    def _int8(self, codes: Codes) -> LinearMethod | None:
        if self._native is not None:
            return NativeInt8Linear(self._native, codes)
        if codes.zero_FG is not None or codes.scale_FG.shape[1] > 1:
            return None
        return Int8Linear(codes, unpack_from=None if self._deterministic else Int8Linear.UNPACK_FROM)


def over_codes(weight: Quantised, make: Callable[[Codes], LinearMethod | None]) -> LinearMethod | None:
    """What `make` makes of integers in whole units, their order of columns seen to. None also where so much padding was
    added that dense weights in 16 bits take little more."""
    if not isinstance(weight, Codes) or weight.group % weight.unit:
        return None
    bits = 4 if weight.kind is Kind.INT4 else 8
    if bits * weight.codes_FD.shape[1] > 12 * weight.in_features:
        return None
    method = make(weight)
    if method is None or weight.order_D is None:
        return method
    return GatheredLinear(method, weight.order_D, weight.in_features)


def kernel_kinds(device: str, dtype: torch.dtype) -> frozenset[Kind]:
    """What stays codes on a device of this type with activations of `dtype`: the `kinds` of `select_kernels`."""
    if device == "cpu" and dtype is torch.bfloat16:
        return CpuKernels.kinds
    return frozenset(Kind) if device == "cuda" and dtype is not torch.float32 else NoKernels.kinds


def select_kernels(device: torch.device, dtype: torch.dtype, *, deterministic: bool = False) -> Kernels:
    """What there is for activations of `dtype` on the device."""
    if device.type == "cpu" and dtype is torch.bfloat16:
        native = load_native()
        return CpuKernels(native, None if native else probe_int4_layout(), deterministic=deterministic)
    if device.type == "cuda" and dtype is not torch.float32:
        from .gpu import GpuKernels

        capability = torch.cuda.get_device_capability(device)
        return GpuKernels(device, capability=capability, deterministic=deterministic)
    return NoKernels()
