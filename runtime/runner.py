"""Runs a batch through the rank's share of the model: eagerly, or by replaying a captured graph (`graphs.py`)."""

from typing import Protocol

from torch import Tensor

from ..kernels.ops import KVLayer
from .ahead import AllKnown, Recall
from .batch import StepBatch
from .models.decoder import Decoder, Step
from .upload import Upload, as_it_is


class Runner(Protocol):
    """The model's forward pass, one implementation for each way of launching it.

    A step goes through `upload`, `embed` where the stage is the first, `layers`, and what its exit asks for. All that
    it is given is good until the next `upload`.
    """

    def upload(self, batch: StepBatch) -> StepBatch:
        """The batch, from the host's memory to the device's. The other methods take what this returns."""
        ...

    def embed(self, batch: StepBatch) -> Tensor:
        """Hidden states [T, D], float32, that enter the first layer: for `layers`, which may be what computes them."""
        ...

    def layers(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        """The stage's layers over hidden states, which are overwritten; keys and values are in the cache afterwards."""
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits [R, V] of the given hidden states. The caller may overwrite them."""
        ...

    def row_logits(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        """`logits` of the batch's rows that sample. hidden_TD: what `layers` returned."""
        ...

    def drawn(self, batch: StepBatch) -> Tensor | None:
        """[R] tokens, as `Ops.sample` draws them from `row_logits` as they are; None: the step has not drawn any.

        They are good until the next `upload`, and the runner's `Recall` has them already.
        """
        ...


class EagerRunner:
    """Launches every operation each step."""

    def __init__(
        self, decoder: Decoder, cache: list[KVLayer], *, upload: Upload = as_it_is, recall: Recall | None = None
    ) -> None:
        """recall: of tokens that a batch may not know; default: it knows them all."""
        self._decoder = decoder
        self._cache = cache
        self._upload = upload
        self._recall: Recall = recall or AllKnown()

    def upload(self, batch: StepBatch) -> StepBatch:
        return self._upload(batch)

    def embed(self, batch: StepBatch) -> Tensor:
        return self._decoder.embed(self._recall.fill(batch.token_ids_T, batch.seq_slots_T), batch.positions_T)

    def layers(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        return self._decoder.run(hidden_TD, Step(batch.positions_T, batch.kv_slots_T, batch.attention), self._cache)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._decoder.logits(hidden_RD)

    def row_logits(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        return self._decoder.logits(hidden_TD[batch.rows_R])

    def drawn(self, batch: StepBatch) -> Tensor | None:
        return None
