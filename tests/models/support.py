"""A model of transformers beside the folder it was saved in, and a paged run of ours to hold against it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.ops import AttentionBatch, KVLayer
from shoal.kernels.reference import ReferenceOps
from shoal.runtime.checkpoint import Checkpoint
from shoal.runtime.loader import load_decoder
from shoal.runtime.models.decoder import Decoder
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.rank import open_checkpoint

PAGE = 4
NUM_PAGES = 64
CPU = torch.device("cpu")

TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def randomise(model: torch.nn.Module) -> None:
    """Every parameter random: with weights of ones and biases of zeros a missing norm or bias would go unseen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.2 * noise)


@dataclass
class Tiny:
    """A model of transformers and the folder it was saved in."""

    model: Any
    folder: Path

    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    def decoder(self, *, max_len: int | None = None, **options: Any) -> Decoder:
        checkpoint = self.checkpoint()
        spec = ModelSpec.from_config(checkpoint.config, max_len=max_len)
        options = {"ops": ReferenceOps(CPU), "dtype": torch.float32, "max_len": max_len} | options
        return load_decoder(checkpoint, spec, **options)

    def expected(self, tokens: list[int]) -> Tensor:
        """Logits [T, V] of transformers."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0].float()


@dataclass
class Sequence:
    prompt: list[int]
    produced: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.produced


class PagedRun:
    """Greedy decoding of several sequences over one shuffled paged cache, prompts in chunks."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        kv_shape: tuple[int, int] | None = None,
        whole: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        """whole: makes whole rows of a rank's columns of the logits."""
        heads, dim = kv_shape or decoder.spec.kv_shape()
        shape = (NUM_PAGES, heads, PAGE, dim)
        self.decoder = decoder
        self.whole = whole
        # Rubbish where nothing was written yet: reading it would show.
        self.cache = [KVLayer(torch.full(shape, 1e4), torch.full(shape, 1e4)) for _ in decoder.layers]
        self.free = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(3)).tolist()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], *, produce: int, chunk: int = 5) -> list[Sequence]:
        sequences = [Sequence(list(prompt)) for prompt in prompts]
        while active := [s for s in sequences if len(s.produced) < produce]:
            self.step([(s, min(chunk, len(s.tokens) - s.computed)) for s in active])
        return sequences

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        work.sort(key=lambda item: item[1] > 1)  # decodes first
        ids, positions, slots = [], [], []
        for sequence, count in work:
            end = sequence.computed + count
            while len(sequence.pages) * PAGE < end:
                sequence.pages.append(self.free.pop())
            ids += sequence.tokens[sequence.computed : end]
            new = range(sequence.computed, end)
            positions += new
            slots += [sequence.pages[p // PAGE] * PAGE + p % PAGE for p in new]
        batch = self.batch(work)
        hidden = self.decoder.forward(
            torch.tensor(ids), torch.tensor(positions), torch.tensor(slots), batch, self.cache
        )
        logits = self.whole(self.decoder.logits(hidden))
        for (sequence, count), rows in zip(work, logits.split(list(batch.query_lens)), strict=True):
            sequence.logits.append(rows)
            sequence.computed += count
            if sequence.computed == len(sequence.tokens):
                sequence.produced.append(int(rows[-1].argmax()))

    def batch(self, work: list[tuple[Sequence, int]]) -> AttentionBatch:
        counts = [count for _, count in work]
        lens = [sequence.computed + count for sequence, count in work]
        width = max(len(sequence.pages) for sequence, _ in work)
        table = [sequence.pages + [0] * (width - len(sequence.pages)) for sequence, _ in work]
        starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return AttentionBatch(
            query_start_S1=starts,
            kv_lens_S=torch.tensor(lens, dtype=torch.int32),
            block_table_SP=torch.tensor(table, dtype=torch.int32),
            num_decodes=counts.count(1),
            max_query_len=max(counts),
            max_kv_len=max(lens),
            query_lens=tuple(counts),
            kv_lens=tuple(lens),
        )


def prompts_of(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in (1, 11, 22)]
