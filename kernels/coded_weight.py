"""A quantised weight as the GPU's products read it: codes in 16-bit words, packed once at load.

A word holds codes whose columns are a run apart: of a block of `run * codes a word` columns, word c has column
`i * run + c` at its i-th place from the lowest bit. So one shift and one mask of a tile of words give a run of
neighbouring columns, two codes an instruction, with nothing to interleave. Blocks are of 128 columns, of 64 or 32
where groups of 8-bit codes ask for it; what the last one lacks is code 0.
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant_tiles import most_tickets

RUN = 64  # of 8-bit codes, but for groups that are not whole runs
_NIBBLE_RUN = 32  # every group is whole runs
_RUNS = (RUN, 32, 16)  # of 8-bit codes; the shortest is what tensor cores take at once
_LARGEST_ZERO = 65504.0  # float16's
_ROW = 0  # a group as long as the row


class Encoding(Enum):
    """What a code stands for."""

    INT4 = "int4"  # 0 to 15, less a zero point
    INT8 = "int8"  # -128 to 127
    E4M3 = "e4m3"  # float8_e4m3fn
    DENSE = "dense"  # a number of 16 bits, itself

    @property
    def codes_a_word(self) -> int:
        return {Encoding.INT4: 4, Encoding.DENSE: 1}.get(self, 2)


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """[out_features, in_features] as codes: `w = scale * (code - zero)`. Made by `int4_weight` and its sisters.

    scales_GF: [groups, out_features], each of `group` columns; group 0: one for the whole row. INT8, E4M3: float32.
        INT4: int32 of two float16: in the upper half the scale, less the factor `gain`, in the lower the zero point.
        DENSE: none.
    fractional: some zero point is no integer between -128 and 128.
    tickets: int32 zeros by which the programs of a product find out who is the last; they leave zeros behind. So two
        products with one weight must not overlap in time, as on one stream they do not.
    """

    encoding: Encoding
    words_FW: Tensor
    scales_GF: Tensor
    tickets: Tensor
    in_features: int
    run: int
    group: int
    gain: float = 1.0
    fractional: bool = False

    @property
    def out_features(self) -> int:
        return self.words_FW.shape[0]

    @property
    def block(self) -> int:
        """Columns in `run` words."""
        return self.run * self.encoding.codes_a_word

    def num_bytes(self) -> int:
        return self.words_FW.nbytes + self.scales_GF.nbytes + self.tickets.nbytes


def dense_weight(weight_FD: Tensor) -> CodedWeight:
    """A weight in 16 bits as it lies, the last dim contiguous, for products that read few rows."""
    none = torch.empty(0, device=weight_FD.device)
    features, columns = weight_FD.shape
    assert weight_FD.itemsize == 2
    assert weight_FD.stride(1) == 1
    return CodedWeight(Encoding.DENSE, weight_FD, none, _tickets(features, weight_FD.device), columns, RUN, _ROW)


def int4_weight(codes_FD: Tensor, scale_FG: Tensor, zero_FG: Tensor | None = None) -> CodedWeight:
    """codes_FD: uint8, 0 to 15; zero_FG None: 8. Scales and zero points are kept as float16.

    D / G, the columns of a group, is a multiple of 32, or G is 1. ValueError: a zero point beyond float16's range.
    """
    scale_FG = scale_FG.float()
    zero_FG = torch.full_like(scale_FG, 8) if zero_FG is None else zero_FG.float()
    if not bool((zero_FG.abs() <= _LARGEST_ZERO).all()):
        raise ValueError(f"a zero point of a 4-bit weight lies beyond {_LARGEST_ZERO:.0f}, the most that is kept")
    # Subnormal numbers are then those of groups that hardly count beside the rest.
    gain = 2.0 ** float(scale_FG.abs().max().clamp(min=1e-30).log2().ceil())
    scales_FG = _bits(scale_FG / gain) << 16 | _bits(zero_FG) & 0xFFFF
    fractional = bool(((zero_FG != zero_FG.round()) | (zero_FG.abs() > 128)).any())
    return _weight(Encoding.INT4, codes_FD, scales_FG, run=_NIBBLE_RUN, gain=gain, fractional=fractional)


def _bits(x: Tensor) -> Tensor:
    return x.half().view(torch.int16).int()


def int8_weight(codes_FD: Tensor, scale_FG: Tensor) -> CodedWeight:
    """codes_FD: int8. D / G, the columns of a group, is a multiple of 16, or G is 1."""
    groups = scale_FG.shape[1]
    group = codes_FD.shape[1] // groups
    run = RUN if groups == 1 else next(run for run in _RUNS if group % run == 0)
    return _weight(Encoding.INT8, codes_FD.view(torch.uint8), scale_FG.float(), run=run)


def fp8_weight(codes_FD: Tensor, scale: Tensor) -> CodedWeight:
    """codes_FD: float8_e4m3fn. scale: [1, 1] | [F, 1] | one for each 128 x 128 weights, the last ones cut short."""
    features = codes_FD.shape[0]
    rows_a_scale = 1 if scale.shape[0] == features else -(-features // scale.shape[0])
    by_block = scale.shape[1] > 1 or (scale.shape[0] > 1 and rows_a_scale > 1)
    scale_FG = scale.float().repeat_interleave(128 if by_block else rows_a_scale, dim=0)[:features]
    return _weight(Encoding.E4M3, codes_FD.view(torch.uint8), scale_FG, run=RUN, group=128 if by_block else None)


def _weight(
    encoding: Encoding,
    codes_FD: Tensor,
    scales_FG: Tensor,
    *,
    run: int,
    group: int | None = None,
    gain: float = 1.0,
    fractional: bool = False,
) -> CodedWeight:
    """group: None: what D / G makes it."""
    features, columns = codes_FD.shape
    groups = scales_FG.shape[1]
    assert scales_FG.shape[0] == features
    if group is None:
        assert columns % groups == 0
        group = columns // groups
    assert groups == 1 or group % run == 0
    return CodedWeight(
        encoding,
        _words(encoding, codes_FD, run),
        scales_FG.t().contiguous(),
        _tickets(features, codes_FD.device),
        columns,
        run,
        _ROW if groups == 1 else group,
        gain,
        fractional,
    )


def _tickets(features: int, on: torch.device) -> Tensor:
    return torch.zeros(most_tickets(features), dtype=torch.int32, device=on)


def _words(encoding: Encoding, codes_FD: Tensor, run: int) -> Tensor:
    """uint8 [F, D] -> int16 [F, words]."""
    places = encoding.codes_a_word
    padded_FD = F.pad(codes_FD, (0, -codes_FD.shape[1] % (run * places)))
    by_place = padded_FD.view(len(codes_FD), -1, places, run).unbind(2)
    words = torch.zeros_like(by_place[0], dtype=torch.int16)
    for place, codes in enumerate(by_place):  # int16 wraps: the highest place carries the sign
        words |= codes.to(torch.int16) << (16 // places * place)
    return words.flatten(1).contiguous()
