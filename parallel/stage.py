"""The ends of the pipeline: `Embed` turns token ids into hidden states, `Head` turns hidden states into logits."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .linear import Layer


class Embed:
    """Stage entry of the first stage. The result is fresh and float32: the layers add to it in place."""

    def __init__(self, tokens: Layer, *, positions_MD: Tensor | None = None, scale: float = 1.0) -> None:
        self._tokens = tokens
        self._positions_MD = positions_MD
        self._scale = scale

    def __call__(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        x_TD = self._tokens(token_ids_T).float()
        if self._scale != 1.0:
            x_TD *= self._scale
        if self._positions_MD is not None:
            x_TD += F.embedding(positions_T, self._positions_MD)
        return x_TD


class Head:
    """Stage exit of the last stage: final norm, vocabulary, and what a family does to its logits."""

    def __init__(
        self, norm: Callable[[Tensor], Tensor], logits: Layer, *, scale: float = 1.0, softcap: float | None = None
    ) -> None:
        self._norm = norm
        self._logits = logits
        self._scale = scale
        self._softcap = softcap

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        logits_RV = self._logits(self._norm(hidden_RD))
        if self._scale != 1.0:
            logits_RV *= self._scale
        if self._softcap is not None:
            for logits_V in logits_RV:  # row by row: torch's tanh rounds by a number's place in the tensor
                logits_V.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits_RV
