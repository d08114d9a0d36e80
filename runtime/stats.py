"""What an engine has done and is doing, as plain numbers; the router turns them into metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec


@dataclass(slots=True)
class Counters:
    """Totals the scheduler keeps as it goes."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    quarantined: int = 0
    poisoned: int = 0
    spec_drafts: int = 0
    spec_drafted_tokens: int = 0
    spec_accepted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """One engine at one moment. The first part are gauges, the second totals since the start.

    tokens_owed: the most that live generations may still cost: tokens to compute, prompt and output.
    prefill_tokens_owed: those of them that exist and are yet to be computed, without what the cache spares.
    prefix_query_tokens, prefix_hit_tokens: tokens looked up in the prefix cache, and found there.
    host_s, device_s: seconds spent scheduling and updating, a draft model's among them, and those the ranks reported.
    restarts: of all ranks. rank_failures: "cause,rank,station" of what led to them (see `GroupFailure`) -> how often.
    quarantined, poisoned: generations that ran alone after a failure, and those that ended as its cause.
    spec_drafts, spec_drafted_tokens, spec_accepted_tokens: rows with guesses, their guesses, and those that were right.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_held: int = 0
    block_size: int = 0
    tokens_owed: int = 0
    prefill_tokens_owed: int = 0

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    restarts: int = 0
    rank_failures: dict[str, int] = {}
    quarantined: int = 0
    poisoned: int = 0
    spec_drafts: int = 0
    spec_drafted_tokens: int = 0
    spec_accepted_tokens: int = 0
    finished: dict[str, int] = {}
    steps: int = 0
    host_s: float = 0.0
    device_s: float = 0.0

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that somebody holds, 0 to 1."""
        return self.num_blocks_held / self.num_blocks if self.num_blocks else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens that a row with guesses has brought on average, 1 to num_speculative_tokens + 1; 0 without any."""
        return 1 + self.spec_accepted_tokens / self.spec_drafts if self.spec_drafts else 0.0

    @property
    def num_tokens_free(self) -> int:
        """Tokens that the KV blocks nobody holds have room for."""
        return (self.num_blocks - self.num_blocks_held) * self.block_size
