"""Quantised weights on a GPU: `LinearMethod`s over the Triton products, which multiply straight from codes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels.coded_weight import CodedWeight, fp8_weight, int4_weight, int8_weight
from ..kernels.eight_bit_matmul import dynamic_matmul, takes_eight_bit_rows
from ..kernels.quant_matmul import weight_only_matmul
from .codes import Codes, Float8, Kind, Quantised
from .quant import LinearMethod, over_codes

_FP8_BLOCK = 128  # the one that the kernel knows


class CodedLinear:
    """Codes in the kernels' own form. `product` says what becomes of the inputs.

    rounds_inputs: it rounds those of many rows to 8 bits.
    """

    def __init__(
        self, weight: CodedWeight, product: Callable[[Tensor, CodedWeight], Tensor], *, rounds_inputs: bool = False
    ) -> None:
        self.weight = weight
        self.rounds_inputs = rounds_inputs
        self._product = product
        self.out_features, self.in_features = weight.out_features, weight.in_features

    def apply(self, x_TD: Tensor) -> Tensor:
        return self._product(x_TD if x_TD.stride(1) == 1 else x_TD.contiguous(), self.weight)

    def num_bytes(self) -> int:
        return self.weight.num_bytes()


class GpuKernels:
    """`Kernels` for 16-bit activations on a GPU. Codes are packed there, once.

    Inputs are rounded to 8 bits, in steps of many rows, where the checkpoint is made for it and the GPU has the
    product, but not where a row's bits are to be its own affair.
    """

    kinds = frozenset(Kind)

    def __init__(self, device: torch.device, *, capability: tuple[int, int], deterministic: bool) -> None:
        self._device = device
        self._capability = capability
        self._deterministic = deterministic

    def make(self, weight: Quantised) -> LinearMethod | None:
        weight = weight.to(self._device)
        return self._float8(weight) if isinstance(weight, Float8) else over_codes(weight, self._integers)

    def dense(self, weight_FD: Tensor) -> None:
        return None

    def head(self, weight: Quantised) -> None:
        return None

    def _float8(self, weight: Float8) -> LinearMethod | None:
        if weight.block not in {None, _FP8_BLOCK}:
            return None
        return self._linear(fp8_weight(weight.codes_FD, weight.scale), round_inputs=weight.round_inputs)

    def _integers(self, codes: Codes) -> LinearMethod | None:
        if codes.kind is Kind.INT4:
            zero_FG = torch.zeros_like(codes.scale_FG) if codes.zero_FG is None else codes.zero_FG
            return self._linear(int4_weight(codes.codes_FD, codes.scale_FG, zero_FG), round_inputs=codes.round_inputs)
        if codes.zero_FG is not None:
            return None
        return self._linear(int8_weight(codes.codes_FD, codes.scale_FG), round_inputs=codes.round_inputs)

    def _linear(self, weight: CodedWeight, *, round_inputs: bool) -> LinearMethod:
        if round_inputs and not self._deterministic and takes_eight_bit_rows(weight, self._capability):
            return CodedLinear(weight, dynamic_matmul, rounds_inputs=True)
        return CodedLinear(weight, partial(weight_only_matmul, deterministic=self._deterministic))
