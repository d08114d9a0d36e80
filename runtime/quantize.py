"""`shoal quantize`: writes a quantised copy of a model, layer by layer (outside of serving).

A calibration text goes through the layers as they are quantised, so each layer makes up for what those before it lost.
What is in memory is one layer, and the text's hidden states.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, ConfigError
from .layerwise import QUANTISED, AsDense, LayerwiseRun, cut_text
from .models.spec import ModelSpec
from .perplexity import need_tokenizer
from .progress import Progress
from .quantize_files import new_folder, write_companions
from .quantize_format import FORMATS, GROUPS, Format, select_finer, select_format
from .quantize_layer import Original, QuantisedLayer, quantise_layer
from .quantize_parts import Part, layer_parts
from .quantize_search import Moments
from .rank import DTYPES, open_checkpoint
from .safetensors_writer import SafetensorsWriter, header_room

MAX_CHUNKS = 128  # of a calibration text; the rest of a longer one is not read
HEAD = "lm_head"
SMALL = 1024  # columns: with fewer, coarse groups cost too much


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make.

    group_size, symmetric: of "int4"; None: the largest size that fits (small models: 32), and with zero points.

    ignore: modules to leave dense, by name or as `re:` and an expression that matches a name's beginning. The
    embedding and the head are always left so.
    """

    format: str
    group_size: int | None = None
    symmetric: bool | None = None
    ignore: tuple[str, ...] = (HEAD,)


@dataclass(slots=True)
class Report:
    """What was made.

    bits: a weight takes in the matrices that were quantised, with its share of scales and zeros. finer: matrices of 8
    bits in a 4-bit model. unscaled: for how many layers a part's inputs were not scaled, by part and reason.
    """

    format: str
    layout: str
    group_size: int | None
    num_layers: int
    num_matrices: int = 0
    bits: float = 0.0
    calibration_tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    dense: list[str] = field(default_factory=list)
    finer: list[str] = field(default_factory=list)
    unscaled: dict[str, int] = field(default_factory=dict)


def quantize(model: Path, out: Path, recipe: Recipe, *, calibration: str, device: torch.device) -> Report:
    """Write the model at `model` into the folder `out`, which appears when it is complete. Shows progress.

    Deterministic: the same input gives the same files on the same kind of device.

    Raises:
        ConfigError: the recipe does not fit the model, or `out` cannot be written. CheckpointError: bad weights.
    """
    began = time.monotonic()
    job = _Job(model, recipe, device)
    chunks = cut_text(need_tokenizer(model), calibration, max_len=job.spec.max_len)[:MAX_CHUNKS]
    if not chunks:
        raise ConfigError("--calibration: there is no text in it")
    job.report.calibration_tokens = sum(map(len, chunks))
    with new_folder(out, num_bytes=job.num_bytes()) as folder:
        job.write(folder, chunks)
    job.report.seconds = time.monotonic() - began
    return job.report


class _Job:
    """One run of `quantize`: the model, what becomes of each of its matrices, and the report."""

    def __init__(self, model: Path, recipe: Recipe, device: torch.device) -> None:
        if recipe.format not in FORMATS:
            raise ConfigError(f"--format {recipe.format!r}: use one of {', '.join(FORMATS)}")
        self._model = model
        self._device = device
        self._source = open_checkpoint(model)
        self.spec = ModelSpec.from_config(self._source.config)
        if self.spec.names.transposed:
            raise ConfigError(f"a {self.spec.family} model keeps its matrices transposed, for which no format is made")
        self._names = self._source.names()
        self._dtype = DTYPES.get(self.spec.dtype or "bfloat16", torch.bfloat16)
        prefix = self._prefix()
        self._parts = [layer_parts(self.spec, prefix, index) for index in range(self.spec.num_layers)]
        modules = [module for parts in self._parts for part in parts for module in part.modules]
        _check_patterns(recipe.ignore, modules)
        self._dense = frozenset(module for module in modules if _matches(recipe.ignore, module))
        self._quantised = [module for module in modules if module not in self._dense]
        self._format = self._select(recipe)
        self._fine = select_finer(self._format, scale_dtype=self._dtype)
        _refuse_same(self._source.config, self._format)
        self._stored_bytes = self._num_weights = 0
        self.report = Report(
            recipe.format,
            self._format.layout,
            self._format.grid.group,
            self.spec.num_layers,
            num_matrices=len(self._quantised),
            bytes_before=_size(model),
            dense=sorted(self._dense),
            finer=self._finer(),
        )

    def _prefix(self) -> str:
        names = self.spec.names
        first = f"{names.layer.format(0)}{names.down}.weight"
        found = next((prefix for prefix in names.prefixes if prefix + first in self._names), None)
        if found is None:
            raise CheckpointError(f"{self._source.file_of(first)}: no tensor {names.prefixes[0]}{first}")
        return found

    def _select(self, recipe: Recipe) -> Format:
        if recipe.format != "int4" and (recipe.group_size is not None or recipe.symmetric is not None):
            flag = "--symmetric/--asymmetric" if recipe.group_size is None else f"--group-size {recipe.group_size}"
            raise ConfigError(f"{flag} is of --format int4; {recipe.format} has one scale for each row")
        if not self._quantised:
            raise ConfigError(f"--ignore {' '.join(recipe.ignore)}: nothing is left to quantise")
        group = self._group(recipe.group_size) if recipe.format == "int4" else GROUPS[0]
        return select_format(recipe.format, group=group, symmetric=bool(recipe.symmetric), scale_dtype=self._dtype)

    def _group(self, asked: int | None) -> int:
        columns = {self._source.shape(f"{module}.weight")[1]: module for module in reversed(self._quantised)}
        if asked is not None and asked not in GROUPS:
            raise ConfigError(f"--group-size {asked}: use one of {', '.join(map(str, GROUPS))}")
        sizes = GROUPS if min(columns) >= SMALL else GROUPS[-1:]
        sizes = sizes if asked is None else (asked,)
        for size in sizes:
            odd = next((count for count in columns if count % size), None)
            if odd is None:
                return size
        named = " or ".join(map(str, sizes))
        raise ConfigError(
            f"--group-size {named} does not divide the {odd} columns of {columns[odd or 0]}: use one of "
            f"{', '.join(map(str, GROUPS))} that does, or leave the module dense with --ignore"
        )

    def num_bytes(self) -> int:
        """About what the new weights take."""
        quantised, total = {f"{module}.weight" for module in self._quantised}, 0
        for name in self._names:
            count = torch.Size(self._source.shape(name)).numel()
            bits = self._format.bits * 1.2 if name in quantised else 8 * self._dtype.itemsize
            total += int(count * bits / 8)
        return total

    def write(self, folder: Path, chunks: Sequence[Tensor]) -> None:
        """Everything that the new checkpoint has."""
        # A matrix becomes four tensors at most, their names longer than its own by that of the longest.
        room = header_room([f"{name}_zero_point" for name in self._names for _ in range(4)])
        writer = SafetensorsWriter(folder, header_room=room)
        run = LayerwiseRun(self.spec, chunks, device=self._device)
        left = set(self._names)
        with Progress("Quantising", total=self.spec.num_layers + 1, unit="parts") as progress:
            for index in range(self.spec.num_layers):
                layer = self._layer(run, index)
                for name, tensor in self._tensors(layer, index):
                    writer.add(name, tensor)
                left -= layer.replaced()
                progress.advance()
            for name in sorted(left):
                writer.add(name, self._read(name))
            progress.advance()
        writer.close()
        self.report.bits = 8 * self._stored_bytes / self._num_weights
        self.report.bytes_after = writer.num_bytes
        write_companions(self._model, folder, self._config())

    def _layer(self, run: LayerwiseRun, index: int) -> QuantisedLayer:
        """Quantise a layer by what reaches it, and go on with what leaves it then."""
        parts = self._parts[index]
        moments = {part.role: Moments() for part in parts}
        for inputs in run.inputs(AsDense(self._source), index):
            for moment, x_TD in zip(moments.values(), inputs, strict=True):
                moment.add(x_TD)
        if not all(bool(moment.gram().isfinite().all()) for moment in moments.values()):
            raise CheckpointError(f"{self._model}: layer {index} gives numbers that are not finite")
        original = Original(parts, moments, matrix=self._source.tensor, vector=self._read, dense=self._dense)
        grids = {part.role: self._format_of(part, index).grid for part in parts}
        layer = quantise_layer(original, grids, scaled=self._format.scaled)
        for why in layer.unscaled:
            self.report.unscaled[why] = self.report.unscaled.get(why, 0) + 1
        if index + 1 < self.spec.num_layers:
            run.advance(AsDense(self._source, layer.dense()), index)
        return layer

    def _format_of(self, part: Part, layer: int) -> Format:
        """The MLPs' outputs hurt most, above all in the first and last layers. Which are finer is as llama.cpp chooses
        for its Q4_K_M: about an eighth of the layers at either end, and every third in between."""
        num, end = self.spec.num_layers, self.spec.num_layers // 8
        is_finer = layer < end or layer >= 7 * num // 8 or (layer - end) % 3 == 2
        return self._fine if is_finer and part.role == "down" else self._format

    def _tensors(self, layer: QuantisedLayer, index: int) -> list[tuple[str, Tensor]]:
        formats = {module: self._format_of(part, index) for part in self._parts[index] for module in part.modules}
        stored = [
            (f"{module}.{suffix}", tensor)
            for module, codes in layer.codes.items()
            for suffix, tensor in formats[module].store(codes).items()
        ]
        self._stored_bytes += sum(tensor.nbytes for _, tensor in stored)
        self._num_weights += sum(codes.codes_FD.numel() for codes in layer.codes.values())
        return [*stored, *layer.changed.items()]

    def _read(self, name: str) -> Tensor:
        """A tensor as the new checkpoint would have it: what a file had in blocks becomes the model's dtype."""
        tensor = self._source.tensor(name)
        is_made = self._model.is_file() or self._source.form(name) is not None
        return tensor.to(self._dtype) if is_made else tensor

    def _config(self) -> dict[str, Any]:
        config = {key: value for key, value in self._source.config.items() if key not in QUANTISED}
        vocabulary = {self.spec.names.embedding, self.spec.names.positions}
        dense = {
            name.removesuffix(".weight")
            for name in self._names
            if name.endswith(".weight") and len(self._source.shape(name)) == 2
        }
        others = {module for module in dense.difference(self._quantised) if not _ends_in(module, vocabulary)}
        groups = {"group_0": self._format.group(["Linear"])}
        if self.report.finer:
            groups["group_1"] = self._fine.group(self.report.finer)
        ignore = sorted({self.spec.names.heads[0], *others})
        return config | {"quantization_config": self._format.config(groups, ignore)}

    def _finer(self) -> list[str]:
        """Modules that have a format of their own."""
        return [
            module
            for index, parts in enumerate(self._parts)
            for part in parts
            for module in part.modules
            if self._format_of(part, index) is not self._format and module not in self._dense
        ]


def _ends_in(module: str, names: set[str | None]) -> bool:
    return any(name is not None and (module == name or module.endswith(f".{name}")) for name in names)


def _matches(patterns: Sequence[str], module: str) -> bool:
    return any(
        re.match(pattern.removeprefix("re:"), module) if pattern.startswith("re:") else pattern == module
        for pattern in patterns
    )


def _check_patterns(patterns: Sequence[str], modules: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            unused = pattern != HEAD and not any(_matches([pattern], module) for module in modules)
        except re.error as error:
            raise ConfigError(f"--ignore {pattern}: not a regular expression: {error}") from None
        if unused:
            raise ConfigError(f"--ignore {pattern}: no such linear layer; there is {modules[0]}, for one")


def _refuse_same(config: dict[str, Any], format: Format) -> None:
    """Writing the same again would only lose."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "compressed-tensors":
        return
    groups = found.get("config_groups") or {}
    bits = [group.get("weights", {}).get("num_bits") or 0 for group in groups.values() if isinstance(group, dict)]
    if found.get("format") == format.layout and min(bits, default=0) == format.bits:
        raise ConfigError(f"--format {format.name}: the model is already quantised so ({format.layout})")


def _size(model: Path) -> int:
    """Bytes of the weights' files."""
    files = [model] if model.is_file() else model.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
