"""One live generation as the scheduler sees it: what is known, what is computed, where it lies, and when it ends."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from .blocks import BlockNames, BlockPool
from .errors import ContextTooLong, InvalidRequest, RowFailed
from .generation import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from .grammar import FREE
from .policy import Key

if TYPE_CHECKING:
    from .grammar import Constraint

NOT_RUNNING = -1
_by_key = attrgetter("key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the operator allow. See `EngineConfig` for the knobs.

    num_microbatches: rows are spread evenly over so many plans. In the "ring" that is the number of pipeline stages, or
    the plans a drawn token needs to come back to the first one: a row goes into every so many-th plan, and plans follow
    each other without end. "gpipe" fills and drains: after so many plans none follows before all of them are back.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    num_microbatches: int = 1
    schedule: Literal["ring", "gpipe"] = "ring"
    prefix_caching: bool = True


class Ending(NamedTuple):
    """How a log ended."""

    reason: FinishReason
    stop_reason: int | None = None
    error: str | None = None


NOT_FINITE = Ending(FinishReason.ERROR, error="the logits were not finite")


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Progress is two counters: tokens that exist, and tokens whose keys and values are in the cache.

    Tokens that exist are those the host has (`tokens`: the prompt, then the output) and `num_pending` that plans still
    in flight will draw. `num_computed` counts planned work as done: ranks execute plans in order. Guesses are neither
    known nor computed until they have turned out right.

        num_published * block_size <= num_computed <= len(tokens) + num_pending <= limit

    While it waits it holds nothing: no slot, no blocks, nothing computed, nothing pending. `epoch` counts the times it
    left its slot, so that results of plans from before can be told and ignored.
    """

    request: GenerationRequest
    limit: int  # tokens in all, prompt and output
    stop_ids: frozenset[int]
    constraint: Constraint
    names: BlockNames
    tokens: list[int]
    deadline: float
    prompt_logprobs: list[TokenLogprob | None] | None
    key: Key = field(init=False)  # drawn last: who has one is counted by the policy until it ends
    prompt_len: int = 0
    free: bool = True  # no constraint: the next row may be planned before the last token is known
    mask: bytes | None = None
    slot: int = NOT_RUNNING
    epoch: int = 0
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    num_guesses: int = 0  # behind the last known token, in a plan in flight; nothing else of it is in flight then
    num_published: int = 0
    last_drawn: int = -1  # the last step that draws for it
    has_taken: bool = False  # a token since it took its slot, so that the results of all its chunks are back
    blocks_short_of: int = 0  # no use to look for room before so many blocks are free
    num_cached: int = 0  # prompt tokens that were in the cache at its first admission
    num_spared: int = 0  # while it waits: blocks that were in the cache when it was last looked for them
    was_admitted: bool = False
    has_spoken: bool = False
    luck: float = 0.5  # share of the guesses at it that were right, the last ones weighing most
    rests_until: int = 0  # before it has so many tokens, nobody guesses at it

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt)
        self.free = self.constraint is FREE

    @property
    def num_known(self) -> int:
        """Tokens that exist once the plans in flight are done."""
        return len(self.tokens) + self.num_pending

    @property
    def num_drawn(self) -> int:
        """Output tokens that were made here, not elsewhere before."""
        return len(self.tokens) - self.prompt_len - len(self.request.tokens)

    @property
    def num_todo(self) -> int:
        """Tokens that could be computed now. The last token of all is drawn and never computed."""
        known = len(self.tokens) + self.num_pending
        if known == self.limit and known > self.prompt_len:
            known -= 1
        return known - self.num_computed

    def prefill_owed(self, pool: BlockPool) -> int:
        """Tokens to compute before the next is drawn, without those that the cache will spare; 0 for a running answer.

        What was found once is taken to stay, so that asking again costs one look-up.
        """
        if self.slot != NOT_RUNNING:
            return self.num_todo if self.num_todo > 1 else 0
        last = (len(self.tokens) - 1) // pool.block_size
        while self.num_spared < last and self.names[self.num_spared] in pool:
            self.num_spared += 1
        return len(self.tokens) - self.num_spared * pool.block_size

    @property
    def reads_prompt_logprobs(self) -> bool:
        """Whether prompt tokens must go through the model for their logprobs, though the cache may have them."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len

    def leave(self) -> None:
        """Forget all that came with the slot; what was said stays."""
        self.slot = NOT_RUNNING
        self.epoch += 1
        self.blocks = []
        self.num_computed = self.num_pending = self.num_guesses = self.num_published = 0
        self.has_taken = False

    def add_prompt_logprobs(self, start: int, entries: Iterable[TokenLogprob]) -> None:
        """Entries of a slice that began at `start`: they belong to the tokens behind it.

        After a preemption the same come again and are left out.
        """
        if self.prompt_logprobs is not None:
            again = len(self.prompt_logprobs) - (start + 1)
            self.prompt_logprobs.extend(list(entries)[again:])

    def ending(self) -> Ending | None:
        """How the log has ended with its last token, if it has. A stop token counts before the length."""
        if len(self.tokens) > self.prompt_len:
            last = self.tokens[-1]
            if last in self.stop_ids:
                return Ending(FinishReason.STOP, last)
            if self.constraint.finished:
                return Ending(FinishReason.STOP)
            if len(self.tokens) >= self.limit:
                return Ending(FinishReason.LENGTH)
        return None

    def take(self, drawn: list[int]) -> Ending | None:
        """Append drawn tokens up to the one that ends the log, if one does; else have the next mask ready."""
        self.has_taken = True
        try:
            for token in drawn:
                if token < 0:
                    return NOT_FINITE
                self.tokens.append(token)
                if not self.free and token not in self.stop_ids:
                    self.constraint.advance(token)
                ending = self.ending()
                if ending is not None:
                    return ending
            if not self.free:
                self.mask = self.constraint.mask()
        except RowFailed as failure:
            return Ending(FinishReason.ERROR, error=str(failure))
        return None

    def find_blocks(self, pool: BlockPool, *, reserve: int, caching: bool) -> tuple[list[int], list[int]] | None:
        """Take blocks for all known tokens, those found by content and those not; None if fewer are free.

        reserve: blocks that must stay free besides. caching: whether to look for content.
        """
        if self.blocks_short_of and pool.num_free < self.blocks_short_of + reserve:
            return None
        num_free = pool.num_free
        found: list[int] = []
        if caching and not self.reads_prompt_logprobs:
            # At least the last token is computed, whatever is known: its logits draw the next.
            found = pool.match(self.names.first((len(self.tokens) - 1) // pool.block_size))
        needed = pool.blocks_for(len(self.tokens)) - len(found)
        if needed + reserve > pool.num_free:
            self.blocks_short_of = needed + num_free - pool.num_free
            pool.release(found)
            return None
        self.blocks_short_of = 0
        return found, pool.allocate(needed)

    def say(self, tokens: list[int], logprobs: list[TokenLogprob] | None, ending: Ending | None) -> TokenEvent:
        """The event for the last tokens of the log. The first one tells of the prompt as well."""
        start = len(self.tokens) - self.prompt_len - len(tokens)
        if self.has_spoken and ending is None:
            return TokenEvent(id=self.request.id, start=start, tokens=tokens, logprobs=logprobs)
        first, self.has_spoken = not self.has_spoken, True
        reason, stop_reason, error = ending or (None, None, None)
        return TokenEvent(
            id=self.request.id,
            start=start,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if first and not self.reads_prompt_logprobs else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=self.num_cached if first else 0,
            error=error,
        )

    def check(self, block_size: int, *, num_guesses: int = 0) -> None:
        """Assert the invariants above. num_guesses: that it may have blocks for besides. For tests."""
        assert 0 <= self.num_published * block_size <= self.num_computed <= self.num_known <= self.limit
        if self.slot == NOT_RUNNING:
            assert not self.blocks, "a waiting sequence holds blocks"
            assert self.num_computed == self.num_pending == 0, "a waiting sequence counts work as done"
        else:
            assert self.num_computed <= len(self.blocks) * block_size, "computed tokens have no block"
            assert len(self.blocks) * block_size < self.num_known + num_guesses + block_size, "spare blocks"


def put_in(queue: list[Sequence], seq: Sequence) -> None:
    """Into its place in a queue, which is in the policy's order."""
    insort(queue, seq, key=_by_key)


def take_out(queue: list[Sequence], seq: Sequence) -> None:
    """Out of the queue it stands in."""
    index = bisect_left(queue, seq.key, key=_by_key)
    assert queue[index] is seq, "the sequence is not in this queue"
    del queue[index]


def check_request(request: GenerationRequest, limits: Limits, *, cache_tokens: int) -> int:
    """The most tokens, prompt and output, that the request may come to.

    Raises:
        InvalidRequest, ContextTooLong: it could never run; the message names value, limit and knob.
    """
    params, prompt_len = request.params, len(request.prompt)
    if not request.prompt:
        raise InvalidRequest("the prompt has no tokens; at least 1 is needed", param="prompt")
    if params.n != 1:
        raise InvalidRequest(f"n is {params.n}; an engine takes one choice at a time", param="n")
    _check_tokens("prompt", request.prompt, limits.vocab_size)
    _check_tokens("tokens", request.tokens, limits.vocab_size)
    _check_tokens("stop_token_ids", params.stop_token_ids, limits.vocab_size)
    _check_tokens("logit_bias", params.logit_bias, limits.vocab_size)

    longest, knob = limits.max_model_len, "--max-model-len"
    if cache_tokens < longest:
        longest, knob = cache_tokens, "--kv-cache-memory-gb"
    num_output = 1 if params.max_tokens is None else params.max_tokens
    if prompt_len + num_output > longest:
        raise ContextTooLong(
            f"the prompt has {prompt_len} tokens and max_tokens is {params.max_tokens}: together at least "
            f"{prompt_len + num_output}, above the {longest} that fit ({knob})",
            param="prompt" if prompt_len >= longest else "max_tokens",
        )
    return longest if params.max_tokens is None else prompt_len + params.max_tokens


def _check_tokens(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    tokens = list(tokens)
    try:
        msgspec.convert(tokens, _ids(vocab_size))  # all in one pass; what follows finds the words
        return
    except msgspec.ValidationError:
        pass
    if set(map(type, tokens)) != {int}:
        raise InvalidRequest(f"{name} holds something that is not an integer", param=name)
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        value = low if low < 0 else high
        raise InvalidRequest(f"{name} holds token id {value}; the vocabulary is 0 to {vocab_size - 1}", param=name)


@cache
def _ids(vocab_size: int) -> Any:
    return list[Annotated[int, msgspec.Meta(ge=0, le=vocab_size - 1)]]
