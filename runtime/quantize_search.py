"""The arithmetic of `shoal quantize`: scales, limits and codes that change a linear layer's outputs least. No files.

On a text a change dW of the weights moves the outputs by `sum_t |x_t dW^T|^2 = tr(dW G dW^T)`, G being the sum of
`x_t^T x_t`. So G is all that is kept of a text, however long it is, and a trial costs one product with it.
Letters as in `kernels/ops.py`; D inputs and F outputs of any linear layer, G groups of g columns that share a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EXPONENTS = tuple(step / 10 for step in range(11))
LIMITS = tuple(1.05 - step / 40 for step in range(18))  # shares of a group's range
FEW_LIMITS = (1.0, 0.9, 0.8, 0.7)  # enough to compare exponents by
SAMPLED_ROWS = 512  # outputs on which exponents are tried
BLOCK = 128  # columns whose errors are passed on together, where groups do not say
ROUNDS = 2  # of fitting scales to codes, and codes to scales
FITTED_ROWS = 1024  # whose scales are fitted together: each takes G^2 numbers
SHRINKAGE = 0.25  # how little a text is believed about which inputs go together
DAMPING = 1e-3  # of G's mean diagonal, added to it: inputs that the text never moved stay solvable
FP8_MAX = 448.0  # of e4m3


class Rounded(NamedTuple):
    """A quantised matrix: `w = (code - zero) * scale`, with a scale for each row and group of columns.

    codes_FD: int8 (4-bit codes are -8 to 7) or float8_e4m3fn. scale_FG: as it is stored. zero_FG: int8; None: all 0.
    """

    codes_FD: Tensor
    scale_FG: Tensor
    zero_FG: Tensor | None = None

    def rows(self, which: slice) -> "Rounded":
        return Rounded(
            self.codes_FD[which], self.scale_FG[which], None if self.zero_FG is None else self.zero_FG[which]
        )

    def dense(self) -> Tensor:
        """float32 [F, D]."""
        codes_FGg = self.codes_FD.float().reshape(*self.scale_FG.shape, -1)
        if self.zero_FG is not None:
            codes_FGg = codes_FGg - self.zero_FG.float()[..., None]
        return (codes_FGg * self.scale_FG.float()[..., None]).flatten(1)


class Grid(Protocol):
    """The numbers that a format has. Scales are rounded as they are stored, and the codes are chosen for those."""

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None: a whole row's."""
        ...

    def measure(self, weight_FGg: Tensor, limit_FG: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros [F, G] that cover each group's range, or the share `limit_FG` of it."""
        ...

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, in their dtype. Shapes broadcast; all float32 but `scale` and `zero`."""
        ...


@dataclass(frozen=True, slots=True)
class SymmetricGrid:
    """Signed integers around zero."""

    bits: int
    scale_dtype: torch.dtype
    group: int | None = None

    def measure(self, weight_FGg: Tensor, limit_FG: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        most_FG = _limited(weight_FGg.abs().amax(-1), limit_FG)
        return _stored(most_FG / (2 ** (self.bits - 1) - 0.5), self.scale_dtype), None

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return _nearest(weight / scale.float(), self.bits)


@dataclass(frozen=True, slots=True)
class ZeroPointGrid:
    """Integers that reach from a group's smallest to its largest number, 0 among them."""

    bits: int
    scale_dtype: torch.dtype
    group: int | None = None

    def measure(self, weight_FGg: Tensor, limit_FG: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        least_FG = _limited(weight_FGg.amin(-1).clamp_(max=0), limit_FG)
        most_FG = _limited(weight_FGg.amax(-1).clamp_(min=0), limit_FG)
        scale_FG = _stored((most_FG - least_FG) / (2**self.bits - 1), self.scale_dtype)
        return scale_FG, _nearest(-(2 ** (self.bits - 1)) - least_FG / scale_FG.float(), self.bits)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        assert zero is not None, "these scales are another grid's"
        return _nearest(weight / scale.float() + zero.float(), self.bits)


@dataclass(frozen=True, slots=True)
class Float8Grid:
    """e4m3 numbers."""

    scale_dtype: torch.dtype
    group: int | None = None

    def measure(self, weight_FGg: Tensor, limit_FG: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return _stored(_limited(weight_FGg.abs().amax(-1), limit_FG) / FP8_MAX, self.scale_dtype), None

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (weight / scale.float()).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _limited(x_FG: Tensor, limit_FG: Tensor | None) -> Tensor:
    return x_FG if limit_FG is None else x_FG * limit_FG


def _stored(scale_FG: Tensor, dtype: torch.dtype) -> Tensor:
    """Never 0, not even where all weights of a group are."""
    rounded_FG = scale_FG.to(dtype)
    return rounded_FG.masked_fill(rounded_FG == 0, 1)


def _nearest(x: Tensor, bits: int) -> Tensor:
    return x.round().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


class Moments:
    """What is kept of a layer's inputs: G, and the mean of |x|."""

    def __init__(self) -> None:
        self._sum_DD = torch.zeros(0, 0)
        self._sum_D = torch.zeros(0)
        self._count = 0

    def add(self, x_TD: Tensor) -> None:
        if self._count == 0:
            self._sum_DD = x_TD.new_zeros(x_TD.shape[1], x_TD.shape[1])
            self._sum_D = x_TD.new_zeros(x_TD.shape[1])
        self._sum_DD.addmm_(x_TD.T, x_TD)
        self._sum_D += x_TD.abs().sum(0)
        self._count += len(x_TD)

    def gram(self) -> Tensor:
        """G [D, D], what lies off its diagonal made smaller."""
        return self._sum_DD * (1 - SHRINKAGE) + torch.diag(self._sum_DD.diagonal() * SHRINKAGE)

    def mean_magnitude(self) -> Tensor:
        """[D]: the mean of |x|."""
        return self._sum_D / max(self._count, 1)


def grouped(weight_FD: Tensor, grid: Grid) -> Tensor:
    """[F, G, g]."""
    return weight_FD.reshape(len(weight_FD), -1, grid.group or weight_FD.shape[1])


def round_nearest(weight_FD: Tensor, grid: Grid, limit_FG: Tensor | None = None) -> Rounded:
    """The nearest codes of a float32 matrix."""
    weight_FGg = grouped(weight_FD, grid)
    scale_FG, zero_FG = grid.measure(weight_FGg, limit_FG)
    zero_FG1 = None if zero_FG is None else zero_FG[..., None]
    return Rounded(grid.encode(weight_FGg, scale_FG[..., None], zero_FG1).flatten(1), scale_FG, zero_FG)


def search_limits(weight_FD: Tensor, gram_DD: Tensor, grid: Grid, limits: Sequence[float] = LIMITS) -> Tensor:
    """The share [F, G] of each group's range that errs least on its own part of the outputs; the rest is clipped."""
    width = grid.group or weight_FD.shape[1]
    blocks_Ggg = torch.stack([gram_DD[at : at + width, at : at + width] for at in range(0, len(gram_DD), width)])
    best_FG = torch.ones(len(weight_FD), len(blocks_Ggg), device=weight_FD.device)
    least_FG = torch.full_like(best_FG, float("inf"))
    for limit in limits:
        delta_FD = round_nearest(weight_FD, grid, torch.full_like(best_FG, limit)).dense() - weight_FD
        delta_GFg = grouped(delta_FD, grid).transpose(0, 1)
        error_FG = (torch.bmm(delta_GFg, blocks_Ggg) * delta_GFg).sum(-1).T
        best_FG[error_FG < least_FG] = limit
        least_FG = torch.minimum(least_FG, error_FG)
    return best_FG


def search_scale(weights: Sequence[Tensor], magnitude_D: Tensor, gram_DD: Tensor, grid: Grid) -> Tensor:
    """Factors [D] for the columns of layers with one input, which is to be divided by them: important columns then get
    finer steps at the others' cost.

    They are `magnitude ** alpha`, by the alpha that errs least on the layers' own outputs. AWQ (Lin et al.,
    arXiv:2306.00978).
    """
    rows = sum(len(weight_FD) for weight_FD in weights)
    sample_RD = torch.cat([weight_FD[:: -(-rows // SAMPLED_ROWS)] for weight_FD in weights])
    magnitude_D = magnitude_D.clamp(min=1e-4)
    best_D, least = torch.ones_like(magnitude_D), float("inf")
    for exponent in EXPONENTS:
        scale_D = magnitude_D**exponent
        scale_D = scale_D / (scale_D.max() * scale_D.min()).sqrt()
        scaled_RD = sample_RD * scale_D
        limit_RG = search_limits(scaled_RD, gram_DD / scale_D / scale_D[:, None], grid, FEW_LIMITS)
        delta_RD = round_nearest(scaled_RD, grid, limit_RG).dense() / scale_D - sample_RD
        error = float(((delta_RD @ gram_DD) * delta_RD).sum())
        if error < least:
            best_D, least = scale_D, error
    return best_D


def round_compensated(weight_FD: Tensor, gram_DD: Tensor, grid: Grid) -> Rounded:
    """Rounded chosen column by column, each column's error made up for by those to its right.

    GPTQ (Frantar et al., arXiv:2210.17323): with `G^-1 = U^T U`, a column's error over U's diagonal times U's row is
    what the others have to take on. Groups are measured, and clipped, when their turn comes; whole rows at once.
    """
    columns = weight_FD.shape[1]
    weight_FD, upper_DD = weight_FD.clone(), _inverse_root(gram_DD)
    whole = grid.measure(weight_FD[:, None]) if grid.group is None else None
    step = grid.group or BLOCK
    codes, scales, zeros = [], [], []
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        block_Fg = weight_FD[:, part]
        scale_F1, zero_F1 = whole or grid.measure(block_Fg[:, None], search_limits(block_Fg, gram_DD[part, part], grid))
        codes_Fg, error_Fg = _round_block(block_Fg, upper_DD[part, part], scale_F1, zero_F1, grid=grid)
        weight_FD[:, part.stop :] -= error_Fg @ upper_DD[part, part.stop :]
        codes.append(codes_Fg)
        scales.append(scale_F1)
        zeros.append(zero_F1)
    if whole is not None:
        scales, zeros = scales[:1], zeros[:1]
    found = [zero_F1 for zero_F1 in zeros if zero_F1 is not None]
    return Rounded(_joined(codes), torch.cat(scales, 1), torch.cat(found, 1) if found else None)


def _joined(parts: list[Tensor]) -> Tensor:
    """Side by side. torch joins no 8-bit floats, so their bytes are."""
    return torch.cat([part.view(torch.int8) for part in parts], 1).view(parts[0].dtype)


def _inverse_root(gram_DD: Tensor) -> Tensor:
    """Upper triangular U with `U^T U = (G + damping)^-1`, float32."""
    damped_DD = gram_DD.double()
    mean = damped_DD.diagonal().mean().clamp(min=1e-12)
    damped_DD.diagonal().add_(DAMPING * mean)
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(damped_DD))
    upper_DD: Tensor = torch.linalg.cholesky(inverse_DD, upper=True)
    return upper_DD.float()


def _round_block(
    weight_Fg: Tensor, upper_gg: Tensor, scale_F1: Tensor, zero_F1: Tensor | None, *, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Rounded [F, g], and each column's error over U's diagonal [F, g]. Overwrites the weights."""
    # By columns in memory: one is written at a time, and all to its right.
    left_gF = weight_Fg.T.contiguous()
    codes_gF, errors_gF = [], torch.empty_like(left_gF)
    for index, column_F in enumerate(left_gF):
        codes_F1 = grid.encode(column_F[:, None], scale_F1, zero_F1)
        rounded_F = Rounded(codes_F1, scale_F1, zero_F1).dense()[:, 0]
        errors_gF[index] = (column_F - rounded_F) / upper_gg[index, index]
        left_gF[index + 1 :].addr_(upper_gg[index, index + 1 :], errors_gF[index], alpha=-1)
        codes_gF.append(codes_F1)
    return _joined(codes_gF), errors_gF.T


def polish(weight_FD: Tensor, codes: Rounded, gram_DD: Tensor, grid: Grid) -> Rounded:
    """Rounded that err less on the layer's outputs: codes and scales in turn, each the best for the others.

    The zeros stay. As in COMQ (arXiv:2403.07134).
    """
    codes = refine(weight_FD, codes, gram_DD, grid)
    for _ in range(ROUNDS):
        codes = refine(weight_FD, fit_scales(weight_FD, codes, gram_DD), gram_DD, grid)
    return codes


def fit_scales(weight_FD: Tensor, codes: Rounded, gram_DD: Tensor) -> Rounded:
    """The same codes under the scales that err least, row by row: least squares in G unknowns. Rows that would not
    gain, or would get a scale below 0, keep theirs.
    """
    pull_FD = (weight_FD - codes.dense()) @ gram_DD
    blocks = [slice(start, start + FITTED_ROWS) for start in range(0, len(pull_FD), FITTED_ROWS)]
    scales = [_fitted(pull_FD[rows], codes.rows(rows), gram_DD) for rows in blocks]
    return codes._replace(scale_FG=torch.cat(scales))


def _fitted(pull_FD: Tensor, codes: Rounded, gram_DD: Tensor) -> Tensor:
    """Scales [F, G], as they are stored. pull_FD: (what is missing of the weight) @ G."""
    scale_FG = codes.scale_FG
    units_FGg = codes._replace(scale_FG=torch.ones_like(scale_FG)).dense().view(*scale_FG.shape, -1)
    want_FG = (pull_FD.view_as(units_FGg) * units_FGg).sum(-1)
    gram_GgD = gram_DD.view(*units_FGg.shape[1:], -1)
    by_group = zip(units_FGg.unbind(1), gram_GgD, strict=True)
    products = ((unit_Fg @ rows_gD).view_as(units_FGg) for unit_Fg, rows_gD in by_group)
    normal_FGG = torch.stack([(product_FGg * units_FGg).sum(-1) for product_FGg in products], 1)
    damped_FGG = normal_FGG.clone()
    diagonal_FG = damped_FGG.diagonal(dim1=1, dim2=2)
    diagonal_FG += DAMPING * diagonal_FG.mean(1, keepdim=True).clamp(min=1e-20)
    step_FG = torch.linalg.solve(damped_FGG, want_FG)
    new_FG = (scale_FG + step_FG).to(scale_FG.dtype)
    step_FG = new_FG.float() - scale_FG.float()  # what rounding leaves of it
    change_F = ((normal_FGG @ step_FG[..., None])[..., 0] * step_FG - 2 * want_FG * step_FG).sum(-1)
    return torch.where(((change_F < 0) & (new_FG > 0).all(1))[:, None], new_FG, scale_FG)


def refine(weight_FD: Tensor, codes: Rounded, gram_DD: Tensor, grid: Grid) -> Rounded:
    """Rounded that err less under the same scales: each column in turn takes its best, given all the others.

    Coordinate descent, as in QuantEase (arXiv:2309.01885).
    """
    new_FD = codes.codes_FD.clone()
    pull_FD = (codes.dense() - weight_FD) @ gram_DD  # half the gradient
    width = weight_FD.shape[1] // codes.scale_FG.shape[1]
    step = grid.group or BLOCK
    for start in range(0, weight_FD.shape[1], step):
        part = slice(start, min(start + step, weight_FD.shape[1]))
        group = slice(start // width, start // width + 1)
        scale_F1, zero_F1 = codes.scale_FG[:, group], None if codes.zero_FG is None else codes.zero_FG[:, group]
        old = Rounded(new_FD[:, part], scale_F1, zero_F1)
        found, change_Fg = _descend(old, pull_FD[:, part], gram_DD[part, part], grid)
        new_FD[:, part] = found
        pull_FD += change_Fg @ gram_DD[part]
    return codes._replace(codes_FD=new_FD)


def _descend(old: Rounded, pull_Fg: Tensor, gram_gg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The block's new codes, and by how much each weight changed: both [F, g]."""
    old_gF, pull_gF = old.dense().T.contiguous(), pull_Fg.T.contiguous()
    codes_gF, changes_gF = [], torch.empty_like(old_gF)
    for index, column_F in enumerate(old_gF):
        best_F = column_F - pull_gF[index] / gram_gg[index, index].clamp(min=1e-20)
        codes_F1 = grid.encode(best_F[:, None], old.scale_FG, old.zero_FG)
        changes_gF[index] = Rounded(codes_F1, old.scale_FG, old.zero_FG).dense()[:, 0] - column_F
        pull_gF.addr_(gram_gg[index], changes_gF[index])
        codes_gF.append(codes_F1)
    return _joined(codes_gF), changes_gF.T
