"""The model that is planned for: its spec, and how its weights are stored. Weights themselves are not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    from ..runtime.checkpoint import Form
    from ..runtime.models.spec import ModelSpec
    from ..runtime.weight_plan import Stored

QUANTIZATIONS = ("none", "int4", "int8", "w8a8", "fp8")
"""What `--quantization` may say: the formats of `shoal quantize`."""
_GROUP = 128  # columns that share a scale, where the format has groups


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model, as far as a plan has to know it.

    name: what to serve it by. weights: their format, for people. rounds_to: inputs of products are rounded to this type
    of 8 bits; None: they are not. to_quantise: the format that it has to be brought into first.
    """

    name: str
    spec: ModelSpec
    stored: Stored
    weights: str
    rounds_to: str | None
    to_quantise: str | None


def read_model(model: str, *, quantization: str | None, max_len: int | None) -> PlannedModel:
    """A folder with a config.json, a .gguf file, a hub id in the local cache, or a config.json by itself.

    quantization: of `QUANTIZATIONS`; None: as it is stored. max_len: the longest sequence that is planned for.

    Raises:
        ConfigError, CheckpointError: it is none of these, or cannot be read so.
    """
    from ..runtime.model_config import read_json
    from ..runtime.models.spec_cache import remembered_spec
    from ..runtime.rank import open_checkpoint
    from ..runtime.weight_plan import StoredAs, StoredIn

    path = _find(model)
    has_weights = path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.safetensors")))
    checkpoint = open_checkpoint(path) if has_weights else None
    config = read_json(path if path.is_file() else path / "config.json") if checkpoint is None else checkpoint.config
    told, rounds_to = _form(config)
    if quantization is not None and (told is not None or path.suffix == ".gguf"):
        raise ConfigError(
            f"--quantization {quantization}: {model} is quantised already; leave it out, or name what it was made of"
        )
    spec = remembered_spec(config, max_len=max_len)
    name = str(path.parent) if path.name == "config.json" else model
    if quantization is not None:
        form, rounds_to = _forms()[quantization]
        words = quantization if form is not None else spec.dtype or "bfloat16"
        return PlannedModel(name, spec, StoredAs(spec, form), words, rounds_to, None if form is None else quantization)
    stored = StoredAs(spec, told) if checkpoint is None else StoredIn(checkpoint, spec.names)
    return PlannedModel(name, spec, stored, _words(spec, stored), rounds_to, None)


def _find(model: str) -> Path:
    """The folder, the .gguf file or the config.json."""
    from ..runtime.hub import resolve_model

    path = Path(model).expanduser()
    return path.resolve() if path.is_file() and path.suffix == ".json" else resolve_model(model)


def _words(spec: ModelSpec, stored: Stored) -> str:
    """Of the last layer, whose down projection is quantised if anything is."""
    form = stored.form(stored.prefix + spec.names.layer.format(spec.num_layers - 1) + spec.names.down)
    return spec.dtype or "bfloat16" if form is None else form.format


def _forms() -> dict[str, tuple[Form | None, str | None]]:
    """What each of `QUANTIZATIONS` stores, and what inputs are rounded to."""
    from ..parallel.codes import Kind
    from ..runtime.checkpoint import Form

    return {
        "none": (None, None),
        "int4": (Form("int4", _GROUP, Kind.INT4), None),
        "int8": (Form("int8", 1, Kind.INT8), None),
        "w8a8": (Form("w8a8", 1, Kind.INT8), "int8"),
        "fp8": (Form("fp8", 1, Kind.FLOAT8), "fp8"),
    }


def _form(config: dict[str, Any]) -> tuple[Form | None, str | None]:
    """What a config.json says of the weights: their form, and what inputs are rounded to.

    Raises ConfigError: a format that no checkpoint of ours has.
    """
    told = config.get("quantization_config") or config.get("compression_config")
    if not told:
        return None, None
    from ..parallel.codes import Kind
    from ..runtime.checkpoint import Form
    from ..runtime.quantised import FORMATS

    method = told.get("quant_method", "compressed-tensors") if isinstance(told, dict) else None
    if method not in FORMATS:
        raise ConfigError(
            f"config.json: quantization_config.quant_method: expected one of {', '.join(FORMATS)}, found {method!r}"
        )
    assert isinstance(told, dict)
    weights, inputs = told, None
    if method == "compressed-tensors":
        groups = told.get("config_groups")
        first: dict[str, Any] = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
        weights, inputs = first.get("weights") or {}, first.get("input_activations")
    group = weights.get("group_size") or weights.get("q_group_size") or (weights.get("weight_block_size") or [1])[-1]
    bits = weights.get("num_bits") or weights.get("bits") or weights.get("w_bit") or (8 if "fp8" in method else 4)
    is_float = "fp8" in method or method == "modelopt" or weights.get("type") == "float"
    kind = Kind.FLOAT8 if is_float else {4: Kind.INT4, 8: Kind.INT8}.get(bits)
    kind = None if method == "bitsandbytes" else kind
    rounds = (inputs or {}).get("num_bits") == 8 or (is_float and method != "compressed-tensors")
    rounded = None if not rounds else "fp8" if is_float else "int8"
    return Form(f"{method} {bits}-bit", max(int(group), 1), kind), rounded
