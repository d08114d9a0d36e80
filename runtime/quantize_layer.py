"""Quantises one layer: scales its inputs where that pays, then rounds its matrices (under `quantize.py`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .quantize_parts import Part, Source
from .quantize_search import Grid, Moments, Rounded, polish, round_compensated, search_scale

Read = Callable[[str], Tensor]
"""A tensor of the original by name."""


@dataclass(slots=True)
class QuantisedLayer:
    """codes: by module. changed: dense tensors by name that took factors in. unscaled: why, for each part that did not
    have its inputs scaled."""

    codes: dict[str, Rounded] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    unscaled: list[str] = field(default_factory=list)

    def replaced(self) -> set[str]:
        """Names of the tensors that differ from the original's."""
        return {f"{module}.weight" for module in self.codes} | self.changed.keys()

    def dense(self) -> dict[str, Tensor]:
        """All that differs from the original, in float32 or as it is stored."""
        return {f"{module}.weight": codes.dense() for module, codes in self.codes.items()} | self.changed


@dataclass(frozen=True, slots=True)
class Original:
    """The layer as it was.

    matrix: in full. vector: in the dtype in which the new checkpoint has it. moments: of the parts' inputs, by role.
    dense: modules to leave alone.
    """

    parts: Sequence[Part]
    moments: Mapping[str, Moments]
    matrix: Read
    vector: Read
    dense: frozenset[str] = frozenset()


def quantise_layer(original: Original, grids: Mapping[str, Grid], *, scaled: bool) -> QuantisedLayer:
    """grids: of the parts, by role. scaled: look for factors for the inputs, too."""
    work = _Layer(original)
    if scaled:
        work.scale_inputs(grids)
    for part in original.parts:
        work.round(part, grids[part.role])
    return work.done


class _Layer:
    """A layer in the making: matrices in float32, by module, and the products of each part's inputs, by role."""

    def __init__(self, original: Original) -> None:
        self.done = QuantisedLayer()
        self._original = original
        self._grams = {role: moment.gram() for role, moment in original.moments.items()}
        self._weights = {
            module: original.matrix(f"{module}.weight").to(self._grams[part.role].device, torch.float32, copy=True)
            for part in original.parts
            for module in part.modules
            if module not in original.dense
        }

    def scale_inputs(self, grids: Mapping[str, Grid]) -> None:
        # All are searched before one is applied: factors of rows would move the errors of those rows.
        found = [
            (part, part.source, self._factors(part, grids[part.role]))
            for part in self._original.parts
            if self._may_scale(part)
        ]
        for part, source, scale_D in found:
            assert source is not None, "checked by _may_scale"
            self._apply(part, source, scale_D)

    def _may_scale(self, part: Part) -> bool:
        why = part.why
        whole = (
            (*part.modules, part.source.module)
            if part.source is not None and part.source.rows is not None
            else part.modules
        )
        if any(module not in self._weights for module in whole):
            why = "part of it is left dense"
        if why:
            self.done.unscaled.append(f"{part.role}: {why}")
        return not why

    def _factors(self, part: Part, grid: Grid) -> Tensor:
        magnitude_D = self._original.moments[part.role].mean_magnitude()
        if part.source is not None:  # one factor for all that read the same row
            by_head = magnitude_D.view(part.source.heads, part.source.repeats, -1)
            magnitude_D = by_head.mean(1, keepdim=True).expand_as(by_head).flatten()
        return search_scale([self._weights[m] for m in part.modules], magnitude_D, self._grams[part.role], grid)

    def _apply(self, part: Part, source: Source, scale_D: Tensor) -> None:
        if source.rows is None:
            scale_D = self._divide_norm(source, scale_D)
        else:
            by_row = scale_D.view(source.heads, source.repeats, -1)[:, 0].flatten()
            self._weights[source.module][source.rows] /= by_row[:, None]
            if source.bias:
                self._divide(f"{source.module}.bias", by_row, source.rows)
        for module in part.modules:
            self._weights[module] *= scale_D
        self._grams[part.role] = self._grams[part.role] / scale_D / scale_D[:, None]

    def _divide_norm(self, source: Source, scale_D: Tensor) -> Tensor:
        """The factors that the norm's weight, rounded as it is stored, really has taken in."""
        name = f"{source.module}.weight"
        before_D = self._original.vector(name).to(scale_D)
        after_D = self._divide(name, scale_D).to(scale_D)
        exact_D = torch.where(after_D == 0, torch.ones_like(scale_D), before_D / after_D)
        if source.bias:
            self._divide(f"{source.module}.bias", exact_D)
        return exact_D

    def _divide(self, name: str, by: Tensor, rows: slice = slice(None)) -> Tensor:
        vector = self.done.changed.get(name, self._original.vector(name)).clone()
        vector[rows] = (vector[rows].to(by) / by).to(vector)
        self.done.changed[name] = vector
        return vector

    def round(self, part: Part, grid: Grid) -> None:
        """Matrices with one input share the work on it."""
        modules = [module for module in part.modules if module in self._weights]
        if not modules:
            return
        weight_FD, gram_DD = torch.cat([self._weights[module] for module in modules]), self._grams[part.role]
        whole = polish(weight_FD, round_compensated(weight_FD, gram_DD, grid), gram_DD, grid)
        sizes = [len(self._weights[module]) for module in modules]
        zeros = (None,) * len(sizes) if whole.zero_FG is None else whole.zero_FG.split_with_sizes(sizes)
        for module, codes, scale, zero in zip(
            modules, whole.codes_FD.split_with_sizes(sizes), whole.scale_FG.split_with_sizes(sizes), zeros, strict=True
        ):
            self.done.codes[module] = Rounded(codes, scale, zero)
