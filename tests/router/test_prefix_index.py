"""The map of cached prefixes: against sets that are walked one by one, and its two sides against each other."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal.router.ledger import Ledger
from shoal.router.prefix_index import Catalogue, PrefixIndex, Promise, split
from shoal.runtime.blocks import SHORT, BlockNames, Changes, tenant_salt
from shoal.runtime.generation import GenerationRequest, SamplingParams

SECRET = b"secret"
SIZE = 4


def request(text: str, *, answer: str = "", tenant: str = "", max_tokens: int = 5) -> GenerationRequest:
    """One block a letter, and a token more: the last token is never cached."""
    return GenerationRequest(
        id="a",
        prompt=[*tokens(text), 0],
        tokens=tokens(answer),
        params=SamplingParams(max_tokens=max_tokens),
        seed=1,
        tenant=tenant,
    )


def tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text for _ in range(SIZE)]


def names(text: str, *, tenant: str = "") -> list[bytes]:
    """Of the blocks of a log that begins with `text`."""
    made = BlockNames(tokens(text), salt=tenant_salt(SECRET, tenant), block_size=SIZE)
    return [made[i][:SHORT] for i in range(len(text))]


def added(text: str) -> Changes:
    return Changes(False, b"".join(names(text)), b"")


def removed(text: str) -> Changes:
    return Changes(False, b"", b"".join(names(text)))


def index_of(**texts: str) -> PrefixIndex:
    index = PrefixIndex(secret=SECRET)
    for replica, text in texts.items():
        index.join(replica, block_size=SIZE)
        index.hear(replica, added(text))
    return index


def test_one_walk_finds_the_depth_of_every_replica() -> None:
    index = index_of(r1="abcd", r2="ab", r3="x", r4="abcx")
    assert index.match(request("abcde")) == {"r1": 4, "r2": 2, "r4": 3}
    assert index.match(request("x")) == {"r3": 1}
    assert index.match(request("y")) == index.match(request("")) == {}


def test_the_block_of_the_last_token_is_not_asked_for() -> None:
    index = index_of(r1="ab")
    assert index.match(GenerationRequest(id="a", prompt=tokens("ab"), params=SamplingParams(), seed=1)) == {"r1": 1}


def test_tenants_and_secrets_are_told_apart() -> None:
    index = index_of(r1="ab")
    assert index.match(request("ab", tenant="other")) == {}
    other = PrefixIndex(secret=b"other")
    other.join("r1", block_size=SIZE)
    other.hear("r1", added("ab"))
    assert other.match(request("ab")) == {}


def test_a_log_that_goes_on_elsewhere_is_looked_up_with_its_answer() -> None:
    index = PrefixIndex(secret=SECRET)
    index.join("r1", block_size=SIZE)
    log = GenerationRequest(id="a", prompt=tokens("ab")[:-1], tokens=[ord("b"), 9], params=SamplingParams(), seed=1)
    index.hear("r1", added("ab"))
    assert index.match(log) == {"r1": 2}


def test_what_is_forgotten_is_not_found() -> None:
    index = index_of(r1="abc", r2="abc")
    index.hear("r1", Changes(False, b"", names("abc")[2]))
    assert index.match(request("abc")) == {"r1": 2, "r2": 3}
    index.hear("r2", Changes(True, names("a")[0], b""))
    assert index.match(request("abc")) == {"r1": 2, "r2": 1}
    index.leave("r1")
    index.leave("r1")
    assert index.match(request("abc")) == {"r2": 1}
    index.hear("r1", added("abc"))
    assert index.match(request("abc")) == {"r2": 1}, "of one that has left"
    index.join("r3", block_size=SIZE)
    assert index.match(request("abc")) == {"r2": 1}, "a bit that was another's"


def test_replicas_with_other_blocks_are_left_out() -> None:
    index = index_of(r1="ab")
    index.join("r2", block_size=SIZE * 2)
    index.join("r3", block_size=0)
    for replica in ("r2", "r3"):
        index.hear(replica, added("ab"))
    assert index.match(request("ab")) == {"r1": 2}
    assert index.send(request("ab"), "r2")[0] == 0
    index.leave("r1")
    index.join("r2", block_size=SIZE * 2)
    assert index.block_size == SIZE * 2, "the last of the old ones has left"
    assert index.match(request("abcd")) == {}


def test_what_is_on_its_way_counts_until_its_promise_is_closed() -> None:
    index = index_of(r1="ab", r2="a")
    spared, promise = index.send(request("abcd"), "r2")
    assert spared == SIZE
    assert index.match(request("abcde")) == {"r1": 2, "r2": 4}
    assert index.send(request("abcd"), "r2")[0] == 4 * SIZE
    index.hear("r2", added("abc"))
    promise.close()
    promise.close()
    assert index.match(request("abcde")) == {"r1": 2, "r2": 3}, "what the replica said itself"


def test_a_ledger_keeps_promises_until_the_replica_can_have_spoken() -> None:
    index = index_of(r1="")
    ledger = Ledger("r1", index)
    ledger.sent(1, request("ab"))
    ledger.sent(2, request("ab", max_tokens=7))
    assert (ledger.num_sent, ledger.tokens_sent) == (2, 30)
    assert (ledger.prefill_sent, ledger.prefill_unanswered) == (10, 10), "9, and the token behind two shared blocks"
    ledger.beat(received=1)
    assert (ledger.num_sent, ledger.prefill_sent, ledger.prefill_unanswered) == (1, 1, 10)
    ledger.answered(1)
    ledger.answered(1)
    assert (ledger.prefill_unanswered, ledger.prefill_answered, ledger.prefill_sent) == (1, 9, 1)
    ledger.beat(received=2)
    assert index.match(request("ab")) == {"r1": 2}, "the beat may be older than the answer"
    ledger.beat(received=2)
    assert index.match(request("ab")) == {}, "the replica did not say it"
    ledger.ended(1)
    ledger.ended(2)
    ledger.ended(2)
    assert (ledger.num_ended, ledger.prefill_answered) == (2, 1), "until the replica says so itself"
    ledger.beat(received=2)
    assert sums(ledger) == (0,) * 6


def sums(ledger: Ledger) -> tuple[int, ...]:
    return (
        ledger.num_sent,
        ledger.tokens_sent,
        ledger.prefill_sent,
        ledger.num_ended,
        ledger.prefill_answered,
        ledger.prefill_unanswered,
    )


class LedgerMachine(RuleBasedStateMachine):
    """A ledger against a list of streams, from which each of its sums is taken anew."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger("r1", PrefixIndex(secret=SECRET))  # nothing is spared: a log of `length` costs that
        self.lengths: list[int] = []
        self.received = 0
        self.answered: set[int] = set()
        self.ended: set[int] = set()
        self.answered_before: set[int] = set()
        self.ended_before: set[int] = set()

    @rule(length=st.integers(1, 50))
    def send(self, length: int) -> None:
        self.lengths.append(length)
        params = SamplingParams(max_tokens=5)
        log = GenerationRequest(id="a", prompt=[1] * length, params=params, seed=1)
        self.ledger.sent(len(self.lengths), log)

    @rule(pick=st.randoms(use_true_random=False))
    def answer(self, pick: random.Random) -> None:
        if self.lengths:
            stream = pick.randint(1, len(self.lengths))
            self.ledger.answered(stream)
            self.answered.add(stream)

    @rule(pick=st.randoms(use_true_random=False))
    def end(self, pick: random.Random) -> None:
        if self.lengths:
            stream = pick.randint(1, len(self.lengths))
            self.ledger.ended(stream)
            self.answered.add(stream)
            self.ended.add(stream)

    @rule(more=st.integers(0, 3))
    def beat(self, more: int) -> None:
        self.received = min(self.received + more, len(self.lengths))
        self.ledger.beat(self.received)
        self.answered_before, self.ended_before = set(self.answered), set(self.ended)

    @invariant()
    def holds(self) -> None:
        streams = set(range(1, len(self.lengths) + 1))
        counted = set(range(1, self.received + 1))

        def tokens(chosen: set[int]) -> int:
            return sum(self.lengths[stream - 1] for stream in chosen)

        live = streams - self.ended - counted
        assert sums(self.ledger) == (
            len(live),
            tokens(live) + 5 * len(live),
            tokens(streams - self.answered - counted),
            len(self.ended & counted - self.ended_before),
            tokens(self.answered & counted - self.answered_before),
            tokens(streams - self.answered),
        )


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_never_began_is_not_promised_any_more() -> None:
    index = index_of(r1="")
    ledger = Ledger("r1", index)
    ledger.sent(1, request("ab"))
    ledger.ended(1)
    assert index.match(request("ab")) == {}
    assert ledger.prefill_unanswered == 0


class IndexMachine(RuleBasedStateMachine):
    """The index against sets of names, one a replica, in which each prompt is looked up block by block."""

    texts = st.text("ab", max_size=5)
    replicas = st.sampled_from(["r1", "r2", "r3", "r4"])

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(secret=SECRET)
        self.said: dict[str, set[bytes]] = {}
        self.promised: dict[str, list[tuple[set[bytes], Promise]]] = {}

    @rule(replica=replicas)
    def join(self, replica: str) -> None:
        self.index.join(replica, block_size=SIZE)
        self.said[replica], self.promised[replica] = set(), []

    @rule(replica=replicas)
    def leave(self, replica: str) -> None:
        self.index.leave(replica)
        self.said.pop(replica, None)
        self.promised.pop(replica, None)

    @rule(replica=replicas, gained=texts, lost=texts, anew=st.booleans())
    def hear(self, replica: str, gained: str, lost: str, anew: bool) -> None:
        new = set(names(gained))
        old = set(names(lost)) - new
        self.index.hear(replica, Changes(anew, b"".join(new), b"".join(old)))
        if replica in self.said:
            self.said[replica] = (set() if anew else self.said[replica]) - old | new

    @rule(replica=replicas, text=texts)
    def send(self, replica: str, text: str) -> None:
        known = self.known(replica)
        spared, promise = self.index.send(request(text), replica)
        assert spared == SIZE * depth(text, known)
        if replica in self.said:
            self.promised[replica].append((set(names(text)) - known, promise))

    @rule(replica=replicas)
    def close(self, replica: str) -> None:
        if self.promised.get(replica):
            self.promised[replica].pop(0)[1].close()

    def known(self, replica: str) -> set[bytes]:
        said = self.said.get(replica, set())
        return said.union(*(names for names, _ in self.promised.get(replica, [])))

    @rule(text=texts)
    def match(self, text: str) -> None:
        depths = {replica: depth(text, self.known(replica)) for replica in self.said}
        assert self.index.match(request(text)) == {replica: blocks for replica, blocks in depths.items() if blocks}

    @invariant()
    def holds(self) -> None:
        self.index.check()


def depth(text: str, known: set[bytes]) -> int:
    row = names(text)
    return next((i for i, name in enumerate(row) if name not in known), len(row))


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_catalogue_recites_what_its_pool_said_in_parts_of_bounded_size() -> None:
    rng = random.Random(5)
    catalogue, early, all_names = Catalogue(max_names=7), set[bytes](), set[bytes]()

    def follow(known: set[bytes], parts: list[Changes]) -> set[bytes]:
        for part in parts:
            assert max(len(part.added), len(part.removed)) <= 7 * SHORT
            known = (set() if part.anew else known) - set(split(part.removed)) | set(split(part.added))
        return known

    for step in range(50):
        gone = set(rng.sample(sorted(all_names), len(all_names) // 3))
        new = {rng.randbytes(SHORT) for _ in range(rng.randrange(40))}
        anew = step % 20 == 19
        all_names = new if anew else all_names - gone | new
        changes = Changes(anew, b"".join(new), b"" if anew else b"".join(gone))
        early = follow(early, catalogue.hear(changes))
        assert early == follow({b"stale..."}, catalogue.recite()) == all_names
