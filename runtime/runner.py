"""Runs a batch through the rank's share of the model: eagerly, or by replaying a captured graph."""

from typing import Protocol

from torch import Tensor

from ..kernels.ops import KVLayer
from .batch import StepBatch
from .models.decoder import Decoder, Step


class Runner(Protocol):
    """The model's forward pass, one implementation for each way of launching it."""

    def embed(self, batch: StepBatch) -> Tensor:
        """Hidden states [T, D], float32, that enter the first layer. Fresh."""
        ...

    def layers(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        """The stage's layers over hidden states, which are overwritten; keys and values are in the cache afterwards."""
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits [R, V] of the given hidden states. The caller may overwrite them."""
        ...


class EagerRunner:
    """Launches every operation each step."""

    def __init__(self, decoder: Decoder, cache: list[KVLayer]) -> None:
        self._decoder = decoder
        self._cache = cache

    def embed(self, batch: StepBatch) -> Tensor:
        return self._decoder.embed(batch.token_ids_T, batch.positions_T)

    def layers(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        return self._decoder.run(hidden_TD, Step(batch.positions_T, batch.kv_slots_T, batch.attention), self._cache)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._decoder.logits(hidden_RD)
