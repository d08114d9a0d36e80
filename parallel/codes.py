"""Quantised matrices in the one form that every format is unpacked to, on the CPU, before a device packs it anew.

Shape letters: F outputs, D columns of codes, G groups of columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import gcd

import torch
from torch import Tensor

UNIT = 32
"""Columns: kernels want groups of a multiple of this many, half of it where there are 8 bits and no zeros."""


class Kind(Enum):
    """What a kernel has to know of codes before it sees them."""

    INT4 = "4-bit"
    INT8 = "8-bit"
    FLOAT8 = "fp8"


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A matrix [F, in_features] of integers with scales: `w = (code - zero) * scale`.

    codes_FD: uint8 from 0 to 15 (4 bits), or int8 (8 bits). Each `group` columns share a column of scale_FG and zero_FG
    (float32, [F, D / group]; no zero_FG: zero is 0 throughout).
    order_D: column j of the codes is for column order_D[j] of x; None: as they are. `in_features` in it marks padding,
    which stands for no column of x.
    round_inputs: the model was made for inputs that are rounded to 8 bits, with a scale for each token.
    """

    codes_FD: Tensor
    scale_FG: Tensor
    zero_FG: Tensor | None
    group: int
    in_features: int
    order_D: Tensor | None = None
    round_inputs: bool = False

    @property
    def kind(self) -> Kind:
        return Kind.INT4 if self.codes_FD.dtype is torch.uint8 else Kind.INT8

    @property
    def out_features(self) -> int:
        return len(self.codes_FD)

    @property
    def unit(self) -> int:
        """Columns: kernels want groups of a multiple of this many."""
        return unit_of(self.codes_FD, self.zero_FG)

    def regrouped(self, group: int) -> "Codes":
        """The same with smaller groups: `group` divides the present size."""
        if group == self.group:
            return self
        times = self.group // group
        zero_FG = None if self.zero_FG is None else self.zero_FG.repeat_interleave(times, 1)
        return replace(self, scale_FG=self.scale_FG.repeat_interleave(times, 1), zero_FG=zero_FG, group=group)

    def rows(self, which: slice | Tensor) -> "Codes":
        """Some of the rows: a view for a slice, a copy for ids."""
        zero_FG = None if self.zero_FG is None else self.zero_FG[which]
        return replace(self, codes_FD=self.codes_FD[which], scale_FG=self.scale_FG[which], zero_FG=zero_FG)

    def to(self, device: torch.device) -> "Codes":
        return replace(
            self,
            codes_FD=self.codes_FD.to(device),
            scale_FG=self.scale_FG.to(device),
            zero_FG=None if self.zero_FG is None else self.zero_FG.to(device),
            order_D=None if self.order_D is None else self.order_D.to(device),
        )

    def dense(self) -> Tensor:
        """The numbers, float32 [F, in_features]."""
        groups = self.codes_FD.float().view(self.out_features, -1, self.group)
        if self.zero_FG is not None:
            groups.sub_(self.zero_FG[..., None])
        weight_FD = groups.mul_(self.scale_FG[..., None]).flatten(1)
        if self.order_D is None:
            return weight_FD
        ordered = torch.empty(self.out_features, self.in_features + 1)
        ordered[:, self.order_D] = weight_FD
        return ordered[:, : self.in_features]


@dataclass(frozen=True, slots=True, eq=False)
class Float8:
    """A matrix in float8_e4m3fn: `w = code * scale`.

    scale: float32, one for all [1, 1], for each row [F, 1], or for each square of `block` [F / block, D / block].
    round_inputs: as in `Codes`.
    """

    codes_FD: Tensor
    scale: Tensor
    block: int | None = None
    round_inputs: bool = False

    @property
    def kind(self) -> Kind:
        return Kind.FLOAT8

    @property
    def in_features(self) -> int:
        return self.codes_FD.shape[1]

    @property
    def out_features(self) -> int:
        return len(self.codes_FD)

    def to(self, device: torch.device) -> "Float8":
        return replace(self, codes_FD=self.codes_FD.to(device), scale=self.scale.to(device))

    def dense(self) -> Tensor:
        """The numbers, float32 [F, D]."""
        weight_FD = self.codes_FD.float()
        if self.block is None:
            return weight_FD.mul_(self.scale)
        rows, columns = weight_FD.shape
        by_row = self.scale.repeat_interleave(self.block, 0)[:rows]
        return weight_FD.mul_(by_row.repeat_interleave(self.block, 1)[:, :columns])


Quantised = Codes | Float8


def unit_of(codes_FD: Tensor, zero_FG: Tensor | None) -> int:
    """`Codes.unit` of codes that are yet to be made."""
    return UNIT // 2 if codes_FD.dtype is torch.int8 and zero_FG is None else UNIT


def in_groups(codes_FD: Tensor, scale_FG: Tensor, zero_FG: Tensor | None, group_of_D: Tensor) -> Codes:
    """Codes whose columns belong to any of the groups, each to group_of_D[j] (int64), in groups that kernels take.

    Columns of one group are brought together (that is what a checkpoint in the order of activations asks for, GPTQ's
    `desc_act`), and groups that a rank's cut has left with no whole multiple of their unit are padded to one.
    """
    groups, order_D = torch.sort(group_of_D, stable=True)
    present, counts = torch.unique_consecutive(groups, return_counts=True)
    sorted_already = bool(torch.equal(groups, group_of_D))
    unit = gcd(*counts.tolist())
    columns = None if sorted_already else order_D
    wanted = unit_of(codes_FD, zero_FG)
    if unit % wanted:
        padded = -(-counts // wanted) * wanted
        columns = torch.full((int(padded.sum()),), len(group_of_D))
        starts = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        columns[torch.arange(len(groups)) + starts.repeat_interleave(counts)] = order_D
        counts, unit = padded, gcd(*padded.tolist())
    if columns is not None:
        codes_FD = codes_FD[:, columns.clamp(max=len(group_of_D) - 1)]
    of_unit = present.repeat_interleave(counts // unit)
    whole = len(of_unit) == scale_FG.shape[1] and torch.equal(of_unit, torch.arange(len(of_unit)))
    return Codes(
        codes_FD,
        scale_FG if whole else scale_FG[:, of_unit],
        zero_FG if whole or zero_FG is None else zero_FG[:, of_unit],
        unit,
        len(group_of_D),
        columns,
    )


def cut_columns(codes: Codes, start: int, stop: int) -> Codes:
    """Columns `start` to `stop` of codes that lie in their own order. Groups that are split keep their scales."""
    if start == 0 and stop == codes.in_features:
        return codes
    part_FD = codes.codes_FD[:, start:stop]
    return in_groups(part_FD, codes.scale_FG, codes.zero_FG, torch.arange(start, stop) // codes.group)


def stack(parts: Sequence[Quantised]) -> Quantised | None:
    """The rows of all, one under the other; None where one form cannot hold them."""
    if len(parts) == 1:
        return parts[0]
    codes = [part for part in parts if isinstance(part, Codes)]
    floats = [part for part in parts if isinstance(part, Float8)]
    if len(codes) == len(parts):
        return _stack_codes(codes)
    return _stack_floats(floats) if len(floats) == len(parts) else None


def _stack_codes(parts: Sequence[Codes]) -> Codes | None:
    first = parts[0]
    for part in parts[1:]:
        if part.kind is not first.kind or part.round_inputs != first.round_inputs:
            return None
        if (part.zero_FG is None) != (first.zero_FG is None) or not _same_order(part.order_D, first.order_D):
            return None
    group = gcd(*(part.group for part in parts))
    if group % first.unit and any(part.group != group for part in parts):
        return None
    parts = [part.regrouped(group) for part in parts]
    zeros = [part.zero_FG for part in parts if part.zero_FG is not None]
    return replace(
        parts[0],
        codes_FD=torch.cat([part.codes_FD for part in parts]),
        scale_FG=torch.cat([part.scale_FG for part in parts]),
        zero_FG=torch.cat(zeros) if zeros else None,
    )


def _same_order(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _stack_floats(parts: Sequence[Float8]) -> Float8 | None:
    if len({(part.block, part.round_inputs) for part in parts}) > 1:
        return None
    block = parts[0].block
    if block is not None and any(part.out_features % block for part in parts[:-1]):
        return None
    # Scales of whole matrices become scales of rows, except where they agree.
    scales = [part.scale for part in parts]
    if block is None and any(not torch.equal(scale, scales[0]) for scale in scales):
        scales = [part.scale.expand(part.out_features, 1) for part in parts]
    elif block is None and scales[0].numel() == 1:
        scales = scales[:1]
    codes_FD = torch.cat([part.codes_FD.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return replace(parts[0], codes_FD=codes_FD, scale=torch.cat(scales))
