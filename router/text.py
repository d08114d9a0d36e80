"""Station 4, on the way back: events become pieces of text, by `runtime/text.py` and off the engine's hot path."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..runtime.generation import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from ..runtime.text import OutputText


class Piece(msgspec.Struct):
    """What one event added to one choice, as text. `index` counts choices over all prompts.

    skipped: tokens before these that the client has had already.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    skipped: list[int] = []


def merge(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces of one choice as one."""
    if len(pieces) == 1:
        return pieces[0]
    first, last = pieces[0], pieces[-1]
    logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    return Piece(
        first.index,
        "".join([piece.text for piece in pieces]),
        [token for piece in pieces for token in piece.tokens],
        logprobs=logprobs if any(piece.logprobs is not None for piece in pieces) else None,
        prompt_logprobs=next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        skipped=[token for piece in pieces for token in piece.skipped],
    )


class Choice:
    """One log on its way to text."""

    def __init__(self, index: int, request: GenerationRequest, output: OutputText, *, received: int = 0) -> None:
        """received: tokens that the client has had already, and one more if it had the end: not written again."""
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self.stopped_by: str | None = None  # the stop string that ended it, perhaps ahead of the engine
        self.finish_reason: str | None = None  # as the client gets it
        self.first_event: float | None = None  # when its first tokens came, on time.monotonic's clock,
        self.last_event: float | None = None  # and its last ones
        self.attempts: list[str | None] = []  # replicas that worked on it for us; None: the transport's choice
        self._output = output
        self._received = received

    def take(self, event: TokenEvent) -> Piece:
        """The event as text. A stop string ends the choice at the token that completed it, whatever came behind."""
        self.num_cached_tokens = self.num_cached_tokens or event.num_cached_tokens
        # Text is a matter of single tokens, so what the client has had ends exactly where it was cut off.
        had = max(0, min(len(event.tokens), self._received - self.num_tokens))
        if had:
            self._output.push(event.tokens[:had], finished=False)
        text, stop = self._output.push(event.tokens[had:], finished=event.finish_reason is not None)
        used = self._output.num_tokens - self.num_tokens
        self.num_tokens += used
        self.stopped_by = stop
        reason = FinishReason.STOP if stop is not None else event.finish_reason
        self.finished = reason is not None
        self.finish_reason = None if reason is None else reason.value
        if self.finished and self._received > self.num_tokens:
            text = ""  # what was held back to the end, it has had, too
        return Piece(
            self.index,
            text,
            event.tokens[had:used],
            logprobs=None if event.logprobs is None else event.logprobs[had:used],
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._asked_for(event.stop_reason) if stop is None else stop,
            skipped=event.tokens[:had],
        )

    def _asked_for(self, stop_reason: int | str | None) -> int | str | None:
        """As vLLM has it: none where the model's own end ended it."""
        is_own = isinstance(stop_reason, int) and stop_reason not in self.request.params.stop_token_ids
        return None if is_own else stop_reason
