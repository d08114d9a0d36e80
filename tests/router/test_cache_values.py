"""Logs as bytes: what was written is read again, and nothing else is; and tapes, which only ever grow."""

from __future__ import annotations

import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.backend import Failure
from shoal.router.live_log import Differs, Tape
from shoal.router.log_value import VERSION, Ending, Head, Kept, Part, Seal, Unreadable
from shoal.runtime.errors import EngineError
from shoal.runtime.generation import FinishReason, TokenEvent, TokenLogprob

KEY, OTHER_KEY = b"shoal:{aa}:v", b"shoal:{ab}:v"
SEAL = Seal(b"s" * 32, max_bytes=2**20)
END = Ending(FinishReason.STOP, 17)
LOG = Part(
    0,
    [5, 6, 17],
    logprobs=[TokenLogprob(-0.5, 1, [(5, -0.5)])] * 3,
    prompt_logprobs=[None, TokenLogprob(-1.0, 3, [(1, -0.1), (2, -0.2)])],
    num_cached_tokens=16,
    end=END,
    head=Head(2**63 - 1, b"f" * 32),
)
KEPT = Kept(1_700_000_000.5, LOG)


def packed(kept: Kept = KEPT, seal: Seal = SEAL) -> bytes:
    data = seal.pack(KEY, kept)
    assert data is not None
    return data


def test_a_finished_log_is_read_as_it_was_written():
    assert SEAL.unpack(KEY, packed()) == KEPT


@pytest.mark.parametrize(
    "part", [LOG, Part(3, [1]), Part(0, gave_up=True), Part(0, failure=Failure(kind="RowFailed", message="m"))]
)
def test_a_part_is_read_as_it_was_written(part: Part):
    assert SEAL.unpack_part(KEY, SEAL.pack_part(KEY, part)) == part


def test_no_other_bytes_are_a_log():
    data = packed()
    for i in range(len(data)):
        with pytest.raises(Unreadable):
            SEAL.unpack(KEY, data[:i])
        with pytest.raises(Unreadable):
            SEAL.unpack(KEY, data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])


@given(st.binary(max_size=200))
def test_garbage_is_no_log(data: bytes):
    for garbage in (data, VERSION + data):
        with pytest.raises(Unreadable):
            SEAL.unpack(KEY, garbage)
        with pytest.raises(Unreadable):
            SEAL.unpack_part(KEY, garbage)


def test_nor_is_what_was_sealed_for_another_key_by_another_secret_or_as_something_else():
    for data, key in (
        (packed(), OTHER_KEY),
        (packed(seal=Seal(b"t" * 32, max_bytes=2**20)), KEY),
        (b"\x00" + packed()[1:], KEY),
        (SEAL.pack_part(KEY, LOG), KEY),
    ):
        with pytest.raises(Unreadable):
            SEAL.unpack(key, data)
    with pytest.raises(Unreadable):
        SEAL.unpack_part(KEY, packed())


@pytest.mark.parametrize("end", [None, Ending(FinishReason.ABORT), Ending(FinishReason.ERROR, error="x")])
def test_nor_is_one_without_its_end(end: Ending | None):
    with pytest.raises(Unreadable):
        SEAL.unpack(KEY, packed(Kept(0.0, msgspec.structs.replace(LOG, end=end))))


def test_sizes_are_bounded_both_ways():
    small = Seal(b"s" * 32, max_bytes=1024)
    noisy = msgspec.structs.replace(LOG, tokens=[(i * 7919) % 50_000 for i in range(2000)], logprobs=None)
    even = msgspec.structs.replace(LOG, tokens=[7] * 100_000, logprobs=None)
    assert small.pack(KEY, Kept(0.0, noisy)) is None
    assert small.pack(KEY, Kept(0.0, even)) is None  # small as bytes, large once it is read
    assert len(zlib.compress(msgspec.msgpack.encode(even))) < 1024
    with pytest.raises(Unreadable):
        small.unpack(KEY, packed(Kept(0.0, even)))


# Tapes


def event(start: int, tokens: list[int]) -> TokenEvent:
    return TokenEvent(id="r", start=start, tokens=tokens)


@given(
    st.lists(st.integers(0, 9), max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)
)
def test_parts_in_any_order_and_number_make_the_log_or_leave_it_as_it_was(log: list[int], cuts: list[tuple[int, int]]):
    tape = Tape(Head(1))
    for start, end in cuts:
        before = [*tape.tokens]
        try:
            tape.absorb(Part(start, log[start:end]))
        except Differs:
            assert start > len(before), "a gap is the only thing that can be wrong with parts of one log"
        assert tape.tokens[: len(before)] == before
        assert tape.tokens == log[: len(tape.tokens)]


def test_a_part_that_says_otherwise_changes_nothing():
    tape = Tape(Head(1))
    tape.append(event(0, [1, 2, 3]))
    for part in (Part(1, [2, 4, 5]), Part(4, [1]), Part(3, [4], logprobs=[])):
        assert not tape.holds(part)
        with pytest.raises(Differs):
            tape.absorb(part)
    assert tape.tokens == [1, 2, 3]
    assert tape.holds(Part(1, [2, 3]))
    assert not tape.holds(Part(1, [2, 3, 4]))


def test_a_generation_goes_on_where_the_log_ends():
    tape = Tape(Head(1))
    tape.append(event(0, [1, 2]))
    for start in (1, 3):
        with pytest.raises(EngineError):
            tape.append(event(start, [9]))
    assert tape.tokens == [1, 2]


def test_an_end_cuts_what_was_made_behind_it():
    tape = Tape(Head(1))
    tape.append(event(0, [1, 2, 3, 4]))
    assert tape.absorb(Part(2, [], end=Ending(FinishReason.STOP, "x")))
    assert (tape.tokens, tape.end) == ([1, 2], Ending(FinishReason.STOP, "x"))


def test_a_tape_is_written_and_read_as_it_is():
    tape, copy = Tape(Head(5, b"f")), Tape(Head(6))
    assert tape.absorb(LOG)
    assert copy.absorb(tape.part(0))
    assert (copy.tokens, copy.logprobs, copy.prompt_logprobs) == (LOG.tokens, LOG.logprobs, LOG.prompt_logprobs)
    assert (copy.num_cached_tokens, copy.end) == (16, END)
    assert tape.part(2) == Part(2, [17], logprobs=LOG.logprobs[:1] if LOG.logprobs else None, end=END)
