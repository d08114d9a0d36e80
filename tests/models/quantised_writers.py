"""Checkpoints in the formats of other projects, from dense ones: small writers, each held once against the real one.

A writer turns a weight [out, in] into the tensors that store it, by suffix, and the numbers those stand for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.runtime.safetensors_checkpoint import SINGLE

Tensors = dict[str, Tensor]
Written = tuple[Tensors, Tensor]
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.7230, 1.0]  # fmt: skip


@dataclass(frozen=True)
class Format:
    """The quantization_config and the writer of one matrix."""

    config: dict[str, Any]
    write: Callable[[Tensor], Written]


def write(folder: Path, format: Format, *, only: Callable[[str], bool] = lambda name: "_proj" in name) -> Tensors:
    """Rewrites a saved checkpoint, modules of which `only` is true quantised. Gives all weights as numbers."""
    stored: Tensors = {}
    numbers: Tensors = {}
    for name, tensor in load_file(folder / SINGLE).items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and only(module):
            parts, numbers[name] = format.write(tensor.float())
            stored |= {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = numbers[name] = tensor
    save_file(stored, folder / SINGLE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": format.config}))
    return numbers


# Integers


@dataclass(frozen=True)
class Integers:
    """Unsigned codes [F, D], scales and zeros [F, G], and each column's group."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor

    def numbers(self) -> Tensor:
        scale, zero = self.scale.float(), self.zero.float()
        return (self.codes.float() - zero[:, self.group_of]) * scale[:, self.group_of]


def rounded(weight: Tensor, bits: int, group: int, *, symmetric: bool, order: bool = False) -> Integers:
    """Round to nearest. order: columns belong to groups at random, as they do where they are sorted by activations."""
    columns = weight.shape[1]
    group_of = torch.arange(columns) // group
    if order:
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    groups = range(int(group_of.max()) + 1)
    low = torch.stack([weight[:, group_of == g].amin(1) for g in groups], 1).clamp(max=0)
    high = torch.stack([weight[:, group_of == g].amax(1) for g in groups], 1).clamp(min=0)
    top = (1 << bits) - 1
    scale = (2 * torch.maximum(-low, high) if symmetric else high - low) / top
    scale = scale.clamp(min=1e-6).half()
    middle = torch.full_like(low, 1 << bits - 1)
    zero = middle if symmetric else (-low / scale.float()).round().clamp(0, top)
    codes = (weight / scale.float()[:, group_of] + zero[:, group_of]).round().clamp(0, top)
    return Integers(codes.int(), scale, zero.int(), group_of)


def packed(integers: Tensor, bits: int) -> Tensor:
    """Rows of integers as streams of bits in int32 words, lowest first."""
    bit = (integers.numpy()[..., None] >> np.arange(bits)) & 1
    raw = np.packbits(bit.reshape(len(integers), -1).astype(np.uint8), axis=1, bitorder="little")
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4)))
    return torch.from_numpy(raw.view(np.int32).copy())


def gptq(bits: int, group: int, *, symmetric: bool = True, order: bool = False, version: int = 1) -> Format:
    def write(weight: Tensor) -> Written:
        whole = rounded(weight, bits, group if group > 0 else weight.shape[1], symmetric=symmetric, order=order)
        less = 1 if version == 1 else 0
        tensors = {
            "qweight": packed(whole.codes, bits).T,
            "qzeros": packed(whole.zero.T - less & (1 << bits) - 1, bits),
            "scales": whole.scale.T,
            "g_idx": whole.group_of.int(),
        }
        return tensors, whole.numbers()

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": symmetric}
    return Format(config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), write)


def awq(group: int) -> Format:
    interleaved = [0, 2, 4, 6, 1, 3, 5, 7]

    def write(weight: Tensor) -> Written:
        whole = rounded(weight, 4, group, symmetric=False)

        def words(rows_last: Tensor) -> Tensor:
            return packed(rows_last.unflatten(1, (-1, 8))[..., interleaved].flatten(1), 4)

        tensors = {"qweight": words(whole.codes.T), "qzeros": words(whole.zero.T), "scales": whole.scale.T}
        return tensors, whole.numbers()

    return Format({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}, write)


def _compressed(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*never.*"],
    }


def pack_quantized(bits: int, group: int | None, *, symmetric: bool = True, order: bool = False) -> Format:
    """group None: one scale a row."""

    def write(weight: Tensor) -> Written:
        whole = rounded(weight, bits, group or weight.shape[1], symmetric=symmetric, order=order)
        tensors = {
            "weight_packed": packed(whole.codes, bits),
            "weight_scale": whole.scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = packed(whole.zero.T, bits).T
        if order:
            tensors["weight_g_idx"] = whole.group_of.int()
        return tensors, whole.numbers()

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
    return Format(_compressed("pack-quantized", weights | {"strategy": "group" if group else "channel"}), write)


def int_quantized(*, inputs: dict[str, Any] | None = None, symmetric: bool = True) -> Format:
    def write(weight: Tensor) -> Written:
        whole = rounded(weight, 8, weight.shape[1], symmetric=symmetric)
        tensors = {"weight": (whole.codes - 128).to(torch.int8), "weight_scale": whole.scale}
        if not symmetric:
            tensors["weight_zero_point"] = (whole.zero - 128).to(torch.int8)
        return tensors, whole.numbers()

    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    return Format(_compressed("int-quantized", weights, inputs), write)


# Floats


def _float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and numbers, with a scale for each block."""
    rows, columns = weight.shape
    at_FD = torch.meshgrid(torch.arange(rows) // block[0], torch.arange(columns) // block[1], indexing="ij")
    scale = torch.zeros(int(at_FD[0].max()) + 1, int(at_FD[1].max()) + 1)
    scale.index_put_(at_FD, torch.zeros(()), accumulate=False)
    for row, column in np.ndindex(*scale.shape):
        inside = (at_FD[0] == row) & (at_FD[1] == column)
        scale[row, column] = weight[inside].abs().max() / 448
    codes = (weight / scale[at_FD]).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale[at_FD]


def float_quantized(strategy: str, *, static: bool = False) -> Format:
    def write(weight: Tensor) -> Written:
        block = (len(weight) if strategy == "tensor" else 1, weight.shape[1])
        codes, scale, numbers = _float8(weight, block)
        tensors = {"weight": codes, "weight_scale": scale.flatten() if strategy == "tensor" else scale}
        return tensors | ({"input_scale": torch.tensor([0.5])} if static else {}), numbers

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "dynamic": not static, "strategy": "tensor" if static else "token"}
    return Format(_compressed("float-quantized", weights, inputs), write)


def fp8_blocks(block: tuple[int, int]) -> Format:
    def write(weight: Tensor) -> Written:
        codes, scale, numbers = _float8(weight, block)
        return {"weight": codes, "weight_scale_inv": scale}, numbers

    return Format({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}, write)


def nf4(block: int, *, nested: bool) -> Format:
    def write(weight: Tensor) -> Written:
        table = torch.tensor(NF4)
        blocks = weight.reshape(-1, block)
        absmax = blocks.abs().amax(1)
        tensors = {"weight.quant_map": table}
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": weight.shape}
        if nested:
            # The real table is another one, but any is as good.
            offset, inner = absmax.mean(), torch.linspace(-1, 1, 256)
            scales = torch.stack([part.abs().max() for part in (absmax - offset).split(256)])
            by_block = scales.repeat_interleave(256)[: len(absmax)]
            stored = ((absmax - offset) / by_block)[:, None].sub(inner).abs().argmin(1)
            absmax = inner[stored] * by_block + offset
            tensors |= {"weight.absmax": stored.to(torch.uint8), "weight.nested_absmax": scales}
            tensors["weight.nested_quant_map"] = inner
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        else:
            tensors["weight.absmax"] = absmax
        codes = (blocks / absmax[:, None])[..., None].sub(table).abs().argmin(-1)
        pairs = codes.reshape(-1, 2)
        tensors["weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8)
        said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors["weight.quant_state.bitsandbytes__nf4"] = said
        return tensors, (table[codes] * absmax[:, None]).view(weight.shape)

    return Format({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, write)


def bitsandbytes_int8() -> Format:
    def write(weight: Tensor) -> Written:
        scale = weight.abs().amax(1)
        codes = (weight * 127 / scale[:, None]).round()
        tensors = {"weight": codes.to(torch.int8), "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, codes * (scale[:, None] / 127)

    return Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, write)


TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FORMATS = {
    "pack-quantized 4 bits, groups of 128": pack_quantized(4, 128),
    "pack-quantized 4 bits, groups of 32, zeros": pack_quantized(4, 32, symmetric=False),
    "pack-quantized 4 bits, groups of 64, act-order": pack_quantized(4, 64, order=True),
    "pack-quantized 4 bits, rows": pack_quantized(4, None),
    "pack-quantized 8 bits, groups of 64": pack_quantized(8, 64),
    "pack-quantized 8 bits, rows, zeros": pack_quantized(8, None, symmetric=False),
    "pack-quantized 3 bits, groups of 64, zeros": pack_quantized(3, 64, symmetric=False),
    "int-quantized": int_quantized(),
    "int-quantized, inputs in 8 bits": int_quantized(inputs=TOKENS),
    "int-quantized, zeros": int_quantized(symmetric=False),
    "float-quantized, matrices": float_quantized("tensor"),
    "float-quantized, rows": float_quantized("channel"),
    "float-quantized, matrices, static": float_quantized("tensor", static=True),
    "awq, groups of 32": awq(32),
    "awq, groups of 128": awq(128),
    "gptq 4 bits, groups of 32": gptq(4, 32),
    "gptq 4 bits, groups of 128, zeros": gptq(4, 128, symmetric=False),
    "gptq 4 bits, groups of 64, act-order": gptq(4, 64, order=True),
    "gptq 4 bits, rows": gptq(4, -1),
    "gptq 4 bits, v2": gptq(4, 64, symmetric=False, version=2),
    "gptq 8 bits, groups of 64": gptq(8, 64),
    "gptq 8 bits, zeros": gptq(8, 64, symmetric=False),
    "gptq 3 bits, groups of 64": gptq(3, 64, symmetric=False),
    "gptq 2 bits, groups of 64": gptq(2, 64, symmetric=False),
    "fp8, blocks of 128": fp8_blocks((128, 128)),
    "fp8, oblong blocks": fp8_blocks((32, 64)),
    "nf4": nf4(64, nested=False),
    "nf4, nested": nf4(64, nested=True),
    "bitsandbytes int8": bitsandbytes_int8(),
}
