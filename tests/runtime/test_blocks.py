"""The block pool alone: names of blocks, who holds what, and what is evicted when."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.runtime.blocks import SHORT, BlockNames, BlockPool, Changes, tenant_salt

SIZE = 4


def names(tokens: list[int], *, salt: bytes = b"salt") -> BlockNames:
    return BlockNames(tokens, salt=salt, block_size=SIZE)


def filled(pool: BlockPool, digests: list[bytes]) -> list[int]:
    """Blocks with these contents, held once."""
    blocks = pool.allocate(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    return blocks


def test_a_name_is_everything_up_to_the_blocks_end_and_the_tenant() -> None:
    tokens = list(range(12))
    same = names([*range(12), 99, 100, 101])
    assert [names(tokens)[i] for i in range(3)] == [same[i] for i in range(3)]
    assert names([9, *range(1, 12)])[2] != names(tokens)[2], "the chain starts at the first token"
    assert names([*range(11), 9])[1] == names(tokens)[1]
    assert names([*range(11), 9])[2] != names(tokens)[2]
    assert names(tokens, salt=b"other")[0] != names(tokens)[0]
    assert len({tenant_salt(b"secret", "a"), tenant_salt(b"secret", "b"), tenant_salt(b"other", "a")}) == 3


def test_names_follow_a_log_that_grows() -> None:
    tokens = [1, 2, 3, 4]
    growing = names(tokens)
    first = growing[0]
    tokens += [5, 6, 7, 8]
    assert list(growing.first(2)) == [first, names([1, 2, 3, 4, 5, 6, 7, 8])[1]]


def test_names_tell_large_token_ids_apart() -> None:
    assert names([2**31 - 1, 0, 0, 0])[0] != names([2**31 - 2, 0, 0, 0])[0]


def test_what_was_released_is_found_again() -> None:
    pool = BlockPool(4, block_size=SIZE)
    blocks = filled(pool, [b"a", b"b"])
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.match([b"a", b"b", b"c"]) == blocks
    assert pool.num_free == 2
    pool.check([blocks])


def test_a_match_ends_at_the_first_unknown_block() -> None:
    pool = BlockPool(4, block_size=SIZE)
    blocks = filled(pool, [b"a", b"b"])
    assert pool.match([b"a", b"x", b"b"]) == blocks[:1]
    pool.check([blocks, blocks[:1]])


def test_the_oldest_is_evicted_first_and_tails_before_their_prefix() -> None:
    pool = BlockPool(4, block_size=SIZE)
    old, new = filled(pool, [b"a", b"b"]), filled(pool, [b"c", b"d"])
    pool.release(old)
    pool.release(new)
    held = pool.allocate(1)
    assert held == old[1:], "the tail of the older one"
    again = pool.match([b"a", b"b"])
    assert again == old[:1]
    pool.release(again)
    held += pool.allocate(2)
    assert sorted(held[1:]) == sorted(new), "the use of `a` just now made it the youngest"
    pool.check([held])


def test_blank_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(3, block_size=SIZE)
    pool.release(filled(pool, [b"a"]))
    held = pool.allocate(2)
    assert pool.match([b"a"]) != []
    assert len(set(held)) == 2


def test_of_two_equal_blocks_the_first_keeps_the_name() -> None:
    pool = BlockPool(3, block_size=SIZE)
    first, second = filled(pool, [b"a"]), filled(pool, [b"a"])
    pool.release(second)
    assert pool.match([b"a"]) == first
    pool.check([first, first])


def test_what_is_in_doubt_is_not_found() -> None:
    pool = BlockPool(3, block_size=SIZE)
    blocks = filled(pool, [b"a", b"b"])
    pool.forget(blocks)
    assert pool.match([b"a"]) == []
    pool.release(blocks)
    pool.check([])


def test_a_double_release_is_a_bug() -> None:
    pool = BlockPool(3, block_size=SIZE)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def row(*names: bytes) -> bytes:
    return b"".join(name[:SHORT] for name in names)


def split(names: bytes) -> set[bytes]:
    return {names[at : at + SHORT] for at in range(0, len(names), SHORT)}


def test_names_made_ahead_are_those_of_full_blocks_only() -> None:
    tokens = list(range(SIZE * 9 + 1))
    ahead = names(tokens)
    known = [ahead[0], ahead[8]]
    tokens += [7, 8, 9]
    assert [ahead[0], ahead[8], ahead[9]] == [*known, names(tokens)[9]]
    assert ahead[9] != names([*range(SIZE * 9 + 1), 7, 8, 0])[9]


def test_the_journal_tells_what_can_be_found_and_what_no_longer() -> None:
    a, b, c = (letter * 32 for letter in (b"a", b"b", b"c"))
    pool = BlockPool(2, block_size=SIZE)
    assert pool.take_changes() == Changes(True, b"", b"")
    pool.release(filled(pool, [a, b]))
    assert pool.take_changes() == Changes(False, row(a, b), b"")
    assert not pool.take_changes()
    pool.release(filled(pool, [c]))
    assert pool.take_changes() == Changes(False, row(c), row(b)), "the tail was evicted"
    pool.reset()
    assert pool.take_changes() == Changes(True, b"", b"")


def test_a_journal_that_nobody_takes_stays_short_and_begins_anew() -> None:
    pool = BlockPool(4, block_size=SIZE)
    pool.take_changes()
    for i in range(1000):
        pool.release(filled(pool, [i.to_bytes(32, "little")]))
        assert len(pool._journal) <= 2 * pool.num_blocks
    changes = pool.take_changes()
    assert changes.anew
    assert split(changes.added) == {i.to_bytes(SHORT, "little") for i in range(996, 1000)}
    assert changes.removed == b""


@pytest.mark.parametrize("field", ["added", "removed"])
def test_changes_hold_whole_names(field: str) -> None:
    with pytest.raises(ValueError, match="8 bytes each"):
        Changes(**{"anew": False, "added": b"", "removed": b"", field: b"x" * 9})


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model in which content is a string and every holder a list; its journal against its names."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, block_size=SIZE)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.told: set[bytes] = set()

    @rule(text=st.text("ab", min_size=1, max_size=4))
    def hold(self, text: str) -> None:
        """What an admission does: match a prefix, allocate and fill the rest."""
        digests = [text[: i + 1].encode().ljust(SHORT) for i in range(len(text))]
        found = self.pool.match(digests)
        assert all(self.content[block] == digest for block, digest in zip(found, digests, strict=False))
        rest = digests[len(found) :]
        if len(rest) > self.pool.num_free:
            self.pool.release(found)
            return
        fresh = filled(self.pool, rest)
        assert not set(fresh) & {block for blocks in self.holders for block in blocks}, "taken from a holder"
        self.content.update(zip(fresh, rest, strict=True))
        self.holders.append(found + fresh)

    @rule(data=st.data())
    @precondition(lambda self: self.holders)
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(data=st.data())
    @precondition(lambda self: self.holders)
    def forget(self, data: st.DataObject) -> None:
        self.pool.forget(data.draw(st.sampled_from(self.holders)))

    @rule()
    def listen(self) -> None:
        """Whoever heard every change knows every name."""
        changes = self.pool.take_changes()
        self.told = (set() if changes.anew else self.told) - split(changes.removed) | split(changes.added)
        assert self.told == {name[:SHORT] for name in self.pool._by_digest}

    @rule()
    @precondition(lambda self: not self.holders)
    def reset(self) -> None:
        self.pool.reset()

    @invariant()
    def holds(self) -> None:
        self.pool.check(self.holders)

    def teardown(self) -> None:
        while self.holders:
            self.pool.release(self.holders.pop())
        self.pool.check([])
        assert self.pool.num_free == 6


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
