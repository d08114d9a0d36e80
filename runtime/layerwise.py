"""Runs texts through a model one layer at a time: in memory are one layer's weights, and the texts' hidden states.

For work on models outside of serving (`quantize.py`, `perplexity.py`): in float32 and by the plainest kernels, so that
what is measured is the weights and nothing else.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.ops import AttentionBatch, KVLayer
from ..kernels.reference import ReferenceOps
from .checkpoint import Checkpoint, Cut
from .loader import load_decoder
from .models.decoder import Decoder, Step
from .models.spec import ModelSpec
from .tokenizer import Tokenizer

CHUNK = 512  # tokens of a text that are run together, each chunk a sequence of its own
PAGE = 64
QUANTISED = ("quantization_config", "compression_config")  # keys of config.json: not of a dense model


def cut_text(tokenizer: Tokenizer, text: str, *, max_len: int) -> list[Tensor]:
    """The text's token ids in chunks of at most CHUNK and `max_len`; each begins as a prompt does (BOS, if any)."""
    head = [id for id in tokenizer.encode("") if id not in tokenizer.eos_ids]
    ids = tokenizer.encode(text, add_special_tokens=False)
    step = min(CHUNK, max_len) - len(head)
    return [torch.tensor(head + ids[at : at + step]) for at in range(0, len(ids), step)]


class AsDense:
    """A `Checkpoint` as if it were not quantised, some tensors replaced."""

    def __init__(self, source: Checkpoint, changed: dict[str, Tensor] | None = None) -> None:
        self.config = {key: value for key, value in source.config.items() if key not in QUANTISED}
        self._source = source
        self._changed = changed or {}

    def names(self) -> list[str]:
        return self._source.names()

    def file_of(self, name: str) -> str:
        return self._source.file_of(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def tensor(self, name: str, cut: Cut = ()) -> Tensor:
        changed = self._changed.get(name)
        return self._source.tensor(name, cut) if changed is None else changed[cut].cpu()

    def form(self, name: str) -> None:
        return None

    def codes(self, name: str, cut: Cut = ()) -> None:
        return None


class ListeningOps(ReferenceOps):
    """Plain kernels that keep what linear layers are given."""

    def __init__(self, on: torch.device) -> None:
        super().__init__(on)
        self.heard: list[Tensor] = []

    def linear(self, x_TD: Tensor, weight_FD: Tensor, dtype: torch.dtype | None = None, /) -> Tensor:
        self.heard.append(x_TD)
        return super().linear(x_TD, weight_FD, dtype)


class LayerwiseRun:
    """Chunks of tokens on their way through one model. Layers are taken in turn, each from the checkpoint given."""

    def __init__(self, spec: ModelSpec, chunks: Sequence[Tensor], *, device: torch.device) -> None:
        self._spec = spec
        self._ops = ListeningOps(device)
        self._chunks = [chunk.to(device) for chunk in chunks]
        self._hidden: list[Tensor] = []
        self._last: Decoder | None = None

    @torch.inference_mode()
    def advance(self, checkpoint: Checkpoint, layer: int) -> None:
        """Every chunk goes through the layer."""
        decoder = self._load(checkpoint, layer)
        for ids_T, hidden_TD in zip(self._chunks, self._hidden, strict=True):
            decoder.run(hidden_TD, _one_prompt(ids_T), [self._empty_cache(len(ids_T))])
            self._ops.heard.clear()
        self._last = decoder if layer == self._spec.num_layers - 1 else None

    @torch.inference_mode()
    def inputs(self, checkpoint: Checkpoint, layer: int) -> Iterator[list[Tensor]]:
        """What each linear layer of the layer is given, in the decoder's order, chunk by chunk. No chunk goes on."""
        decoder = self._load(checkpoint, layer)
        for ids_T, hidden_TD in zip(self._chunks, self._hidden, strict=True):
            decoder.run(hidden_TD.clone(), _one_prompt(ids_T), [self._empty_cache(len(ids_T))])
            yield list(self._ops.heard)
            self._ops.heard.clear()

    @torch.inference_mode()
    def logits(self, chunk: int, rows: slice) -> Tensor:
        """Rows of a chunk's logits [rows, V], float32, once all layers are done."""
        assert self._last is not None, "the last layer has not been run"
        logits_RV = self._last.logits(self._hidden[chunk][rows])
        self._ops.heard.clear()
        return logits_RV

    def _load(self, checkpoint: Checkpoint, layer: int) -> Decoder:
        decoder = load_decoder(
            checkpoint,
            self._spec,
            ops=self._ops,
            dtype=torch.float32,
            max_len=min(CHUNK, self._spec.max_len),
            layers=range(layer, layer + 1),
            show_progress=False,  # a bar for each layer
        )
        if layer == 0 and not self._hidden:
            self._hidden = [decoder.embed(ids_T, _positions(ids_T)) for ids_T in self._chunks]
        return decoder

    def _empty_cache(self, num_tokens: int) -> KVLayer:
        heads, dim = self._spec.kv_shape()
        shape = (-(-num_tokens // PAGE), heads, PAGE, dim)
        return KVLayer(*(torch.zeros(shape, device=self._ops.device) for _ in range(2)))


def _positions(ids_T: Tensor) -> Tensor:
    return torch.arange(len(ids_T), device=ids_T.device)


def _one_prompt(ids_T: Tensor) -> Step:
    """A prompt that is computed whole, in pages 0, 1, 2, ..."""
    count, positions_T = len(ids_T), _positions(ids_T)
    batch = AttentionBatch(
        query_start_S1=torch.tensor([0, count], dtype=torch.int32, device=ids_T.device),
        kv_lens_S=torch.tensor([count], dtype=torch.int32, device=ids_T.device),
        block_table_SP=torch.arange(-(-count // PAGE), dtype=torch.int32, device=ids_T.device)[None],
        num_decodes=0,
        max_query_len=count,
        max_kv_len=count,
        query_lens=(count,),
        kv_lens=(count,),
    )
    return Step(positions_T, positions_T, batch)
