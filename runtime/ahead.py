"""Tokens that a device knows before the host does: so a step is launched while the one before it still computes.

The host puts `UNKNOWN` where a token is still being drawn; the device keeps each slot's last one and fills it in. The
host comes by them when it waits for the result, by a copy that was queued right behind the draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..parallel.group import Begun

UNKNOWN = -1
"""A token in the table, and in a batch, that is yet to be drawn."""


class Recall(Protocol):
    """A device's memory of what it drew."""

    def fill(self, token_ids_T: Tensor, slots_T: Tensor) -> Tensor:
        """The tokens, with those that are UNKNOWN replaced by the last ones that were drawn for their slots."""
        ...

    def store(self, slots_R: Tensor, tokens_R: Tensor) -> None:
        """Keep these, as the last ones of their slots. A row that failed (-1) keeps a token that is one."""
        ...


class AllKnown:
    """The null `Recall`: of a rank that knows every token that it embeds, or embeds none."""

    def fill(self, token_ids_T: Tensor, slots_T: Tensor) -> Tensor:
        return token_ids_T

    def store(self, slots_R: Tensor, tokens_R: Tensor) -> None:
        pass


class LastTokens:
    """A column of tokens, one for each slot and one more that rows of no sequence may write to. Captured graphs use it,
    too: nothing here looks at a value."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._tokens_N = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def fill(self, token_ids_T: Tensor, slots_T: Tensor) -> Tensor:
        return torch.where(token_ids_T < 0, self._tokens_N[slots_T], token_ids_T)

    def store(self, slots_R: Tensor, tokens_R: Tensor) -> None:
        self._tokens_N.index_copy_(0, slots_R, tokens_R.clamp(min=0))


def fetch(tokens_R: Tensor) -> Begun[list[int]]:
    """Queue the copy of what is being drawn; the tensor may be overwritten by whatever is launched next."""
    if tokens_R.device.type != "cuda":
        kept_R = tokens_R.clone()
        return Begun(kept_R.tolist)
    host_R = torch.empty(tokens_R.shape, dtype=tokens_R.dtype, pin_memory=True)
    host_R.copy_(tokens_R, non_blocking=True)
    is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    is_there.record()

    def wait() -> list[int]:
        is_there.synchronize()
        tokens: list[int] = host_R.tolist()
        return tokens

    return Begun(wait, is_there.query)


def reached(device: torch.device) -> Callable[[], bool]:
    """Whether a device has come to the end of what was launched so far."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.query
