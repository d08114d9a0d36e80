"""Runs a batch through the model: eagerly, or by replaying a captured graph."""

from typing import Protocol

from torch import Tensor

from ..kernels.ops import KVLayer
from .batch import StepBatch
from .models.decoder import Decoder


class Runner(Protocol):
    """The model's forward pass, one implementation for each way of launching it."""

    def hidden(self, batch: StepBatch) -> Tensor:
        """Hidden states [T, D] of the step's tokens; their keys and values are in the cache afterwards."""
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 logits [R, V] of the given hidden states. The caller may overwrite them."""
        ...


class EagerRunner:
    """Launches every operation each step."""

    def __init__(self, decoder: Decoder, cache: list[KVLayer]) -> None:
        self._decoder = decoder
        self._cache = cache

    def hidden(self, batch: StepBatch) -> Tensor:
        return self._decoder.forward(
            batch.token_ids_T, batch.positions_T, batch.kv_slots_T, batch.attention, self._cache
        )

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._decoder.logits(hidden_RD)
