"""The formats that `shoal quantize` writes: compressed-tensors' layouts and what its config says of them.

Layouts as in https://github.com/vllm-project/compressed-tensors: "pack-quantized" has unsigned codes in int32 words,
the first in the lowest bits; "int-quantized" and "float-quantized" have plain int8 and e4m3 matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize_search import Float8Grid, Grid, Rounded, SymmetricGrid, ZeroPointGrid

FORMATS = {
    "int8": "8-bit weights, 16-bit activations",
    "w8a8": "8-bit integer weights and activations",
    "fp8": "8-bit float (e4m3) weights and activations",
    "int4": "4-bit weights in groups, 16-bit activations",
}
GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Format:
    """One of `FORMATS` for one model."""

    name: str
    layout: str
    grid: Grid
    bits: int
    store: Callable[[Rounded], dict[str, Tensor]]
    """The tensors of a linear layer, by what follows the module's name."""
    weights: dict[str, Any]
    activations: dict[str, Any] | None = None
    scaled: bool = False
    """Whether its steps are so wide that it pays to scale the inputs."""

    def group(self, targets: list[str]) -> dict[str, Any]:
        """What the config says of some modules, by name or class."""
        return {
            "targets": targets,
            "weights": self.weights,
            "input_activations": self.activations,
            "output_activations": None,
        }

    def config(self, groups: dict[str, dict[str, Any]], ignore: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def select_format(name: str, *, group: int, symmetric: bool, scale_dtype: torch.dtype) -> Format:
    """group, symmetric: of "int4"; the others have a scale a row and no zero points."""
    per_token = _arguments("int", 8, strategy="token") | {"dynamic": True}
    match name:
        case "int4":
            grid = SymmetricGrid(4, scale_dtype, group) if symmetric else ZeroPointGrid(4, scale_dtype, group)
            weights = _arguments("int", 4, strategy="group") | {"group_size": group, "symmetric": symmetric}
            return Format(name, "pack-quantized", grid, 4, partial(_packed, bits=4), weights, scaled=True)
        case "int8":
            weights = _arguments("int", 8, strategy="channel")
            return Format(name, "pack-quantized", SymmetricGrid(8, scale_dtype), 8, partial(_packed, bits=8), weights)
        case "w8a8":
            weights = _arguments("int", 8, strategy="channel")
            return Format(name, "int-quantized", SymmetricGrid(8, scale_dtype), 8, _plain, weights, per_token)
        case "fp8":
            weights = _arguments("float", 8, strategy="channel")
            activations = per_token | {"type": "float"}
            return Format(name, "float-quantized", Float8Grid(scale_dtype), 8, _plain, weights, activations)
        case other:
            raise AssertionError(f"format {other!r} is in no table")


def select_finer(format: Format, *, scale_dtype: torch.dtype) -> Format:
    """The format of matrices that would lose too much in this one: 8 bits for 4, else the same."""
    return select_format("int8", group=0, symmetric=True, scale_dtype=scale_dtype) if format.bits < 8 else format


def _arguments(kind: str, bits: int, *, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _plain(codes: Rounded) -> dict[str, Tensor]:
    return {"weight": codes.codes_FD, "weight_scale": codes.scale_FG}


def _packed(codes: Rounded, *, bits: int) -> dict[str, Tensor]:
    stored = {
        "weight_packed": pack_words(codes.codes_FD, bits),
        "weight_scale": codes.scale_FG,
        "weight_shape": torch.tensor(codes.codes_FD.shape),
    }
    if codes.zero_FG is not None:  # packed along the rows
        stored["weight_zero_point"] = pack_words(codes.zero_FG.T, bits).T.contiguous()
    return stored


def pack_words(codes_FD: Tensor, bits: int) -> Tensor:
    """Signed codes of 4 or 8 bits [F, D] -> int32 [F, ceil(D * bits / 32)], made unsigned, lowest bits first."""
    unsigned_FD = (codes_FD.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    unsigned_FD = F.pad(unsigned_FD, (0, -codes_FD.shape[1] % (32 // bits)))
    if bits == 4:
        unsigned_FD = unsigned_FD[:, 0::2] | unsigned_FD[:, 1::2] << 4
    words = unsigned_FD.flatten().view(torch.int32)  # little-endian, as all machines are that we run on
    return words.view(len(codes_FD), -1)
