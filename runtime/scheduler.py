"""Decides what each step computes, and turns what comes back into events. Pure: no I/O, no threads, no wall clock.

It knows no phases. A sequence has tokens that exist and tokens that are computed, and each step lets the first be
caught up with under one token budget: rows that lack one token first, so that running answers flow evenly, then whoever
lacks more, running or waiting, in the policy's order. Chunked prompts, prefix hits, preemption and resume all follow.

A sequence is admitted when the pool holds all its known tokens, so only the growth of answers can run out of blocks.
Then the last in the policy's order is preempted: it keeps what it said and computes it again later. The first in the
order never gives way, so some sequence always goes on, and each in its turn becomes the first.

Several plans may be in flight. Ranks execute plans in order, so a block or slot given up now may be used by
the very next plan; only results must be told apart, by the sequence's epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from itertools import count

from .blocks import BlockNames, BlockPool, tenant_salt
from .errors import InvalidRequest, QueueFull
from .generation import POISON, FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from .grammar import FREE, Constraint
from .outline import Flight, Outline
from .plan import StepPlan, StepResult, drawn_by
from .policy import Policy
from .quarantine import Quarantine, Verdict
from .sequence import NOT_FINITE, Ending, Limits, Sequence, check_request, put_in, take_out
from .speculation import NO_SPECULATION, Speculation
from .stats import Counters

_NEVER = float("inf")
Logprobs = list[TokenLogprob] | None


class Scheduler:
    """All live generations of one engine: `_waiting` and `_running`, both in the policy's order."""

    def __init__(
        self,
        limits: Limits,
        *,
        pool: BlockPool,
        policy: Policy,
        clock: Callable[[], float],
        secret: bytes,
        speculation: Speculation = NO_SPECULATION,
    ) -> None:
        """`secret` salts the names of blocks; `clock` gives seconds and never goes back."""
        self.limits = limits
        self.pool = pool
        self.counters = Counters()
        self.quarantine = Quarantine()
        self._policy = policy
        self._clock = clock
        self._secret = secret
        self._speculation = speculation
        self._arrivals = count()
        self._live: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._flights: deque[Flight] = deque()
        self._num_steps = 0
        self._fill_began = 0  # the first step since nothing was in flight
        self._next_deadline = _NEVER
        self._events: list[TokenEvent] = []

    # What comes in

    def add(self, request: GenerationRequest, constraint: Constraint = FREE) -> None:
        """Take in a log. `constraint` stands behind `request.tokens`. A log that has ended already ends at once.

        Raises:
            InvalidRequest, ContextTooLong: it could never run. QueueFull: `max_queued` wait already.
            RowFailed: the constraint gave up.
        """
        limit = check_request(request, self.limits, cache_tokens=self.pool.num_blocks * self.pool.block_size)
        if request.id in self._live:
            raise InvalidRequest(f"a generation with the id {request.id!r:.80} is live", param="id")
        self.check_queue()
        seq = self._sequence(request, constraint, limit)
        ending = seq.ending()
        if ending is None:
            seq.mask = constraint.mask()
        seq.key = self._policy.key(request, next(self._arrivals))
        self._live[request.id] = seq
        put_in(self._waiting, seq)
        self._next_deadline = min(self._next_deadline, seq.deadline)
        if ending is not None:
            self._end(seq, ending)

    def check_queue(self, num_coming: int = 0) -> None:
        """Reads three numbers, so any thread may ask. `num_coming`: requests on their way to `add`.

        Raises:
            QueueFull: one more would wait, and as many wait as may. Who finds a slot does not count as waiting.
        """
        waiting, running = len(self._waiting) + num_coming, len(self._running)
        blocked = any(seq.blocks_short_of > 0 for seq in self._waiting[:1])
        slots = 0 if blocked else self.limits.max_num_seqs - running
        if waiting + 1 - slots > self.limits.max_queued:
            raise QueueFull(
                f"{waiting} generations wait and {running} run; "
                f"at most {self.limits.max_queued} may wait (--max-queued)"
            )

    def _sequence(self, request: GenerationRequest, constraint: Constraint, limit: int) -> Sequence:
        params, limits = request.params, self.limits
        tokens = [*request.prompt, *request.tokens]
        salt = tenant_salt(self._secret, request.tenant)
        # A log with output has had its prompt's logprobs delivered with its first event.
        wants_prompt_logprobs = params.prompt_logprobs is not None and not request.tokens
        return Sequence(
            request=request,
            limit=limit,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else limits.eos_token_ids),
            constraint=constraint,
            names=BlockNames(tokens, salt=salt, block_size=self.pool.block_size),
            tokens=tokens,
            deadline=_NEVER if request.timeout_s is None else self._clock() + request.timeout_s,
            prompt_logprobs=[None] if wants_prompt_logprobs else None,
        )

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a live log now and give its terminal event, which nobody else will get; None if there is no such log."""
        seq = self._live.get(request_id)
        if seq is not None:
            self._end(seq, Ending(FinishReason.ABORT))
        last = [event for event in self._events if event.id == request_id]
        self._events = [event for event in self._events if event.id != request_id]
        return last[-1] if last else None

    def end_all(self, ending: Ending) -> list[TokenEvent]:
        """End every live log in the same way, and give all events that are not yet delivered."""
        for seq in list(self._live.values()):
            self._end(seq, ending)
        return self.take_events()

    def take_events(self) -> list[TokenEvent]:
        """Events since they were last taken."""
        events, self._events = self._events, []
        return events

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: a log is live, a plan is out, or an event is not taken."""
        return bool(self._live or self._flights or self._events)

    def tokens_owed(self) -> int:
        """The most that live logs may still cost. O(live)."""
        return sum(seq.limit - seq.num_computed for seq in self._live.values())

    def prefill_owed(self) -> int:
        """Tokens that exist and are yet to be computed, without what the cache spares, about. O(live)."""
        return sum(seq.prefill_owed(self.pool) for seq in self._live.values())

    # What goes out

    def schedule(self) -> StepPlan | None:
        """The next step, counted as done from here on; None if nothing can be planned before a result is back."""
        self._expire()
        if not self._flights:
            self._fill_began = self._num_steps
        if self.limits.schedule == "gpipe" and self._num_steps - self._fill_began >= self.limits.num_microbatches:
            return None
        outline = Outline(self._num_steps, self.limits.max_num_batched_tokens)
        suspect = self.quarantine.suspect
        if suspect is None:
            self._make_room()
            behind = self._plan_singles(outline)
            self._speculation.extend(outline, self.pool, num_running=len(self._running))
            self._plan_rest(outline, behind)
        else:
            self._plan_alone(outline, suspect)
        if not outline.rows:
            return None
        self._num_steps += 1
        flight = Flight(outline.plan(), outline.rows)
        self._flights.append(flight)
        return flight.plan

    def _expire(self) -> None:
        now = self._clock()
        if now < self._next_deadline:
            return
        for seq in [seq for seq in self._live.values() if seq.deadline <= now]:
            self._end(seq, Ending(FinishReason.TIMEOUT, error=f"the deadline of {seq.request.timeout_s} s has passed"))
        self._next_deadline = min((seq.deadline for seq in self._live.values()), default=_NEVER)

    def _make_room(self) -> None:
        """A waiting sequence of a lower class takes the place of the last running ones."""
        while self._waiting and self._running:
            first, last = self._waiting[0], self._running[-1]
            if first.key.rank >= last.key.rank:
                return
            blocks = self._take_blocks(first) if self._free_slots else None
            if blocks is not None:
                self.pool.release([*blocks[0], *blocks[1]])
                return
            self._preempt(last)

    def _plan_singles(self, outline: Outline) -> list[Sequence]:
        """Plan running sequences that lack one token; give those that lack more."""
        running, behind = self._running, []
        # Over any `num_microbatches` plans these add up to all rows, so that no plan goes short and none waits.
        num_plans = self.limits.num_microbatches
        most = max(1, (len(running) + num_plans - 1 - self._num_steps % num_plans) // num_plans)
        index = 0
        while index < len(running) and outline.budget:  # _grow takes away sequences behind `index`, no others
            seq = running[index]
            index += 1
            num_todo = seq.num_todo
            if num_todo > 1:
                behind.append(seq)
            elif num_todo == 1 and len(outline.singles) < most and self._is_ready(seq) and self._grow(outline, seq):
                self._plan(outline, seq, 1)
        return behind

    def _is_ready(self, seq: Sequence) -> bool:
        if self.limits.schedule == "gpipe":
            return seq.last_drawn < self._fill_began
        if seq.num_pending == 0:
            return True
        if not seq.free or seq.num_guesses or self._speculation.wants(seq, len(self._running)):
            return False
        return self._num_steps - seq.last_drawn >= self.limits.num_microbatches

    def _grow(self, outline: Outline, seq: Sequence) -> bool:
        """See that the sequence has a block for one more token; False if it had to give way itself."""
        if seq.num_computed < len(seq.blocks) * self.pool.block_size:
            return True
        while self.pool.num_free == 0:
            victim = self._running[-1]
            outline.out_of_blocks = True
            self._preempt(victim)
            if victim is seq:
                return False
        grown = self.pool.allocate(1)
        seq.blocks += grown
        outline.blocks.append((seq.slot, grown))
        return True

    def _plan_rest(self, outline: Outline, behind: list[Sequence]) -> None:
        """Spend what is left of the budget on running and waiting sequences in the policy's order."""
        admits = not outline.out_of_blocks
        index = 0
        while outline.budget:
            seq = behind[index] if index < len(behind) else None
            if admits and self._waiting and (seq is None or self._waiting[0].key < seq.key):
                seq = self._waiting[0]
                admits = self._admit(outline, seq)
                if not admits:
                    continue
            elif seq is None:
                return
            else:
                index += 1
            self._plan(outline, seq, min(seq.num_todo, outline.budget))

    def _plan_alone(self, outline: Outline, seq: Sequence) -> None:
        """Quarantine: nothing else is in any plan in flight, and nothing of it once it has drawn what clears it."""
        if seq.slot < 0:
            if self._flights:
                return  # of a suspect before it, which has ended
            admitted = self._admit(outline, seq)
            assert admitted, "nobody else holds anything, and alone every log fits"
        if seq.num_todo > 0 and seq.num_pending == 0 and self._grow(outline, seq):
            self._plan(outline, seq, min(seq.num_todo, outline.budget))

    def _plan(self, outline: Outline, seq: Sequence, num_tokens: int) -> None:
        outline.advance(seq, num_tokens)
        # Known tokens may be found at once, even by this step: a layer stores all its keys before it reads any.
        if num_tokens > 1:
            self._publish(seq)

    def _publish(self, seq: Sequence) -> None:
        """Name the blocks that are full of known, computed tokens."""
        num_full = min(seq.num_computed, len(seq.tokens)) // self.pool.block_size
        if num_full <= seq.num_published:
            return
        if self.limits.prefix_caching:
            for index in range(seq.num_published, num_full):
                self.pool.publish(seq.blocks[index], seq.names[index])
        seq.num_published = num_full

    # Into a slot and out of it

    def _admit(self, outline: Outline, seq: Sequence) -> bool:
        """Give a waiting sequence a slot and blocks for all its tokens, if there are."""
        blocks = self._take_blocks(seq) if self._free_slots else None
        if blocks is None:
            return False
        found, blank = blocks
        seq.blocks = found + blank
        seq.num_published = len(found)
        seq.num_computed = len(found) * self.pool.block_size
        seq.slot = self._free_slots.pop()
        take_out(self._waiting, seq)
        put_in(self._running, seq)
        if not seq.was_admitted:
            seq.was_admitted = True
            seq.num_cached = min(seq.num_computed, seq.prompt_len)
            self.counters.prompt_tokens += seq.prompt_len
            self.counters.prefix_query_tokens += len(seq.tokens)
            self.counters.prefix_hit_tokens += seq.num_computed
        outline.admit(seq)
        return True

    def _take_blocks(self, seq: Sequence) -> tuple[list[int], list[int]] | None:
        """One block for each running sequence is left to grow into, lest the newcomer is preempted at once."""
        return seq.find_blocks(self.pool, reserve=len(self._running), caching=self.limits.prefix_caching)

    def _preempt(self, seq: Sequence) -> None:
        self._put_back(seq)
        self.counters.preemptions += 1

    def _put_back(self, seq: Sequence) -> None:
        """Back into the queue, to be computed again; in front of all that came after it."""
        self._leave_slot(seq)
        put_in(self._waiting, seq)

    def _leave_slot(self, seq: Sequence) -> None:
        take_out(self._running, seq)
        self.pool.release(seq.blocks)
        self._free_slots.append(seq.slot)
        seq.leave()

    # What comes back

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Take in the result of the oldest plan in flight; gives every event since the last were taken."""
        flight = self._flights.popleft()
        assert flight.plan.step == plan.step == result.step, "results come in the order of their plans"
        self._speculation.follow(plan, result)
        for part, (seq, epoch), (drawn, logprobs) in zip(plan.slices, flight.rows, drawn_by(plan, result), strict=True):
            if seq.epoch != epoch:
                continue  # it has ended or given way since
            if part.slot in result.prompt_logprobs:
                seq.add_prompt_logprobs(part.start, result.prompt_logprobs[part.slot])
            if part.samples:
                self._append(seq, drawn, logprobs)
            elif part.start + part.count == seq.limit:
                self._end(seq, Ending(FinishReason.LENGTH))  # max_tokens is 0: the prompt was all
        for seq in self.quarantine.release():
            self._put_back(seq)
        return self.take_events()

    def _append(self, seq: Sequence, tokens: list[int], logprobs: Logprobs) -> None:
        known = len(seq.tokens)
        ending = seq.take(tokens)
        if ending is not None:  # maybe before the last of them
            tokens = seq.tokens[known:]
            logprobs = logprobs[: len(tokens)] or None if logprobs else None
        seq.num_pending -= 1
        self.counters.generation_tokens += len(tokens)
        if seq.num_guesses:
            num_right = max(0, len(tokens) - 1)
            seq.num_computed += num_right  # they were in this step's slice
            self._speculation.learn(seq, self.counters, num_right=num_right)
        if ending is NOT_FINITE:
            self.pool.forget(seq.blocks)  # nobody else shall read what led here
        else:
            self._publish(seq)
        if ending is None:
            self._events.append(seq.say(tokens, logprobs, None))
        else:
            self._end(seq, ending, tokens, logprobs)

    def _end(self, seq: Sequence, ending: Ending, tokens: list[int] | None = None, logprobs: Logprobs = None) -> None:
        """The log's terminal event, with the last tokens if this step drew them; the sequence leaves everything."""
        self._events.append(seq.say(tokens or [], logprobs, ending))
        del self._live[seq.request.id]
        self.quarantine.discharge(seq)
        if seq.slot >= 0:
            self._leave_slot(seq)
        else:
            take_out(self._waiting, seq)
        self._policy.ended(seq.request, seq.key, seq.num_drawn if seq.was_admitted else None)
        reason = ending.reason.value
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def recover(self, *, is_suspect: bool, slots: Collection[int] = ()) -> Verdict:
        """The ranks have failed and start anew with empty caches: all logs but the guilty ones go on from their tokens.

        Plans in flight are lost. is_suspect, slots: see `GroupFailure`.
        """
        verdict = self.quarantine.judge(self._flights, is_suspect=is_suspect, slots=slots, live=self._live)
        self.counters.quarantined += len(verdict.suspects)
        self.counters.poisoned += len(verdict.guilty)
        for seq in verdict.guilty:
            self._end(seq, Ending(FinishReason.ERROR, error=POISON))
        self._flights.clear()
        for seq in list(self._running):
            self._put_back(seq)
        for seq in self._waiting:
            seq.blocks_short_of = seq.num_spared = 0
        self.pool.reset()
        return verdict

    def check(self) -> None:
        """Assert every invariant. For tests: O(everything)."""
        self.pool.check([seq.blocks for seq in self._running])
        for queue in (self._waiting, self._running):
            assert [seq.key for seq in queue] == sorted({seq.key for seq in queue}), "a queue is out of order"
        queued = [seq.request.id for seq in (*self._waiting, *self._running)]
        assert sorted(queued) == sorted(self._live), "a live sequence is not in exactly one queue"
        slots = [*self._free_slots, *(seq.slot for seq in self._running)]
        assert sorted(slots) == list(range(self.limits.max_num_seqs)), "a slot is lost, or has two holders"
        for seq in self._live.values():
            seq.check(self.pool.block_size, num_guesses=self._speculation.num_tokens)
