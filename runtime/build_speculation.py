"""Builds what guesses, from the config to a `Speculation`. The object graph behind `--speculative-model`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.select import select_ops
from ..parallel.grid import Grid
from . import kv
from .batch import SequenceTable
from .config import EngineConfig
from .errors import ConfigError
from .hub import resolve_model
from .loader import load_decoder
from .memory import GIB, workspace_bytes
from .models.spec import ModelSpec
from .models.spec_cache import remembered_spec
from .propose_model import DraftModel
from .propose_ngram import NgramProposer
from .rank import DTYPES, open_checkpoint, own_dtype
from .runner import EagerRunner
from .share import Share, deal
from .speculation import NO_SPECULATION, Speculation
from .upload import select_upload
from .weight_plan import StoredIn, plan_weights

NGRAM = "ngram"


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """A draft model that is to be loaded, and what it takes of the device that it shares with rank 0."""

    path: Path
    share: Share
    dtype: torch.dtype
    device: torch.device
    fixed_bytes: int  # weights and workspace
    block_bytes: int  # for each KV block that the ranks have

    def describe(self, num_blocks: int) -> str:
        """For the operator, printed at start."""
        return (
            f"draft model {self.path.name} on {self.device.type}: weights and workspace "
            f"{self.fixed_bytes / GIB:.2f} GiB, KV cache {num_blocks * self.block_bytes / GIB:.2f} GiB"
        )


def plan_draft(config: EngineConfig, spec: ModelSpec) -> DraftPlan | None:
    """What `config`, which is resolved, asks for beside the model; None if no model is to guess.

    Raises:
        ConfigError: it cannot guess for this model.
    """
    name = config.speculative_model
    if name is None or name == NGRAM:
        return None
    path = resolve_model(name)
    checkpoint = open_checkpoint(path)
    draft = remembered_spec(checkpoint.config)
    max_model_len = config.max_model_len or spec.max_len
    if draft.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"--speculative-model {name} has a vocabulary of {draft.vocab_size} tokens and {config.model} one of "
            f"{spec.vocab_size}: a model that guesses must share the tokenizer"
        )
    if draft.max_len < max_model_len:
        raise ConfigError(
            f"--speculative-model {name} is made for {draft.max_len} positions, below the {max_model_len} of "
            f"--max-model-len: lower that, or use another model to guess"
        )
    device = torch.device("cuda" if config.device == "cuda" and torch.cuda.is_available() else "cpu")
    dtype = DTYPES[own_dtype(draft, device) if draft.dtype in DTYPES else config.dtype]
    (share,) = deal(draft, Grid())
    weights = plan_weights(share, StoredIn(checkpoint, draft.names), device=device.type, dtype=dtype)
    return DraftPlan(
        path=path,
        share=share,
        dtype=dtype,
        device=device,
        fixed_bytes=weights.total + workspace_bytes(share, config, dtype, has_codes=weights.has_codes),
        block_bytes=kv.bytes_per_block(share, block_size=config.block_size, dtype=dtype),
    )


def build_speculation(config: EngineConfig, draft: DraftPlan | None, *, num_blocks: int) -> Speculation:
    """Ready to guess. num_blocks: of the ranks' KV caches; a draft model has as many of its own.

    Raises:
        CheckpointError: the draft model cannot be loaded.
    """
    if config.speculative_model is None:
        return NO_SPECULATION
    return Speculation(
        NgramProposer() if draft is None else _load(config, draft, num_blocks=num_blocks),
        num_tokens=config.num_speculative_tokens,
        max_batch=config.speculative_max_batch,
    )


def _load(config: EngineConfig, draft: DraftPlan, *, num_blocks: int) -> DraftModel:
    ops = select_ops(draft.device, deterministic=config.deterministic)
    max_len = config.max_model_len or draft.share.spec.max_len
    with torch.inference_mode():
        decoder = load_decoder(
            open_checkpoint(draft.path), draft.share.spec, ops=ops, dtype=draft.dtype, max_len=max_len
        )
        cache = kv.allocate(
            draft.share, num_blocks=num_blocks, block_size=config.block_size, dtype=draft.dtype, device=ops.device
        )
    table = SequenceTable(num_slots=config.max_num_seqs, max_model_len=max_len, block_size=config.block_size)
    num_threads = config.num_threads or os.cpu_count() or 1
    return DraftModel(
        EagerRunner(decoder, cache, upload=select_upload(ops.device)),
        table,
        ops,
        vocab_size=draft.share.spec.vocab_size,
        block_size=config.block_size,
        num_threads=num_threads if ops.device.type == "cpu" else None,
    )
