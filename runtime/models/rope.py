"""Rotary embeddings: frequencies from a config, and the table of angles that the kernels read."""

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .spec import RopeSpec


def rope_spec(
    c: Any, *, head_dim: int, layer_type: str | None, max_len: int | None, interleaved: bool
) -> RopeSpec | None:
    """Frequencies of one kind of layer from a transformers config; None where the config has none for it."""
    parameters = getattr(c, "rope_parameters", None) or {}
    if layer_type in parameters:
        parameters = parameters[layer_type] or {}
    else:
        layer_type = None  # one set for all layers
    if not parameters:
        return None
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
        inv_freq, scale = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        inv_freq, scale = _scaled(c, rope_type, layer_type, max_len or c.max_position_embeddings)
    return RopeSpec(tuple(inv_freq.tolist()), float(scale), interleaved)


def _scaled(c: Any, rope_type: str, layer_type: str | None, max_len: int) -> tuple[Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(
            f"rope_type {rope_type!r} in config.json is not supported; supported are: "
            f"default, {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    try:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[rope_type](c, torch.device("cpu"), seq_len=max_len, layer_type=layer_type)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"rope_parameters in config.json, rope_type {rope_type!r}: {error!r}") from error
    return inv_freq, scale


def cos_sin_table(rope: RopeSpec, *, num_positions: int, device: torch.device) -> Tensor:
    """[positions, C] float32: C/2 cosines, then C/2 sines (the layout of `Ops.rope`)."""
    inv_freq_c = torch.tensor(rope.inv_freq, dtype=torch.float32)
    angles_Mc = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq_c
    return (torch.cat([angles_Mc.cos(), angles_Mc.sin()], dim=-1) * rope.scale).to(device)
