"""What is asked: the same from the same seed, as long as was said, in an order that conversations can keep."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.bench_flags import LoadFlags, check_requests, make_load, make_paces
from shoal.cluster.bench_load import (
    Ask,
    FileLoad,
    Load,
    RandomLoad,
    Range,
    SharedPrefixLoad,
    ShareGptLikeLoad,
    arrivals,
    asks,
    read_file,
)
from shoal.cluster.bench_words import COMMON, Words, measure_words
from shoal.runtime.errors import ConfigError, EngineError

LOADS: list[Load] = [
    RandomLoad(Range(20, 40), Range(3, 9)),
    SharedPrefixLoad(3, 30, Range(5, 8), Range(3, 9), 3),
    ShareGptLikeLoad(700),
]


def first(load: Load, count: int, *, seed: str = "0", words: Words | None = None, at_once: int = 4) -> list[Ask]:
    return list(islice(asks(load, words or Words(), seed, at_once=at_once), count))


def num_words(ask: Ask) -> int:
    return sum(len(text.split()) for text in ask.texts)


@pytest.mark.parametrize("load", LOADS, ids=lambda load: type(load).__name__)
def test_a_seed_is_a_load(load: Load) -> None:
    assert first(load, 50) == first(load, 50)
    assert {ask.texts for ask in first(load, 50)}.isdisjoint(ask.texts for ask in first(load, 50, seed="1"))


@pytest.mark.parametrize("load", LOADS, ids=lambda load: type(load).__name__)
def test_prompts_have_the_tokens_that_they_say(load: Load) -> None:
    for ask in first(load, 60):
        assert num_words(ask) == ask.prompt_tokens
        assert load.longest is not None
        assert ask.prompt_tokens + ask.output_tokens <= load.longest
    for ask in first(load, 60, words=Words(base=4, pair=3)):  # a server that puts its own tokens around
        assert num_words(ask) + 4 + 3 * ask.turn == ask.prompt_tokens


def test_lengths_are_within_their_ranges() -> None:
    load = RandomLoad(Range(20, 40), Range(3, 9))
    found = first(load, 300)
    assert {ask.prompt_tokens for ask in found} == set(range(20, 41))
    assert {ask.output_tokens for ask in found} == set(range(3, 10))


def test_turns_come_in_order_and_hold_what_was_said() -> None:
    found = first(LOADS[1], 60, at_once=5)
    by_conversation: dict[int, list[Ask]] = {}
    for ask in found:
        by_conversation.setdefault(ask.conversation, []).append(ask)
    for turns in by_conversation.values():
        assert [ask.turn for ask in turns] == list(range(len(turns)))
        for early, late in pairwise(turns):
            assert late.texts[: len(early.texts)] == early.texts
            assert len(late.texts[len(early.texts)].split()) == early.output_tokens  # the answer that was asked for
    # So many conversations take turns: a turn is as many requests behind the one before it.
    places = {(ask.conversation, ask.turn): place for place, ask in enumerate(found)}
    gaps = {place - places[c, t - 1] for (c, t), place in places.items() if t}
    assert gaps == {5}


def test_groups_share_their_prefix_and_nothing_else() -> None:
    found = first(SharedPrefixLoad(3, 30, Range(8, 8), Range(4, 4), 1), 60)
    assert len({tuple(ask.texts[0].split()[:30]) for ask in found}) == 3
    assert len({tuple(ask.texts[0].split()[30:]) for ask in found}) == 60


def test_share_gpt_like_lengths_are_those_of_the_paper() -> None:
    found = [turn for c in islice(ShareGptLikeLoad(100_000).conversations(Words(), "0"), 2000) for turn in c]
    assert 140 < statistics.fmean(turn.message_tokens for turn in found) < 175
    assert 300 < statistics.fmean(turn.output_tokens for turn in found) < 350


def test_arrivals_keep_their_rate_and_burstiness() -> None:
    def gaps(burstiness: float) -> list[float]:
        moments = list(islice(arrivals(4.0, burstiness, "0"), 20_000))
        return [late - early for early, late in pairwise(moments)]

    for burstiness in (0.25, 1.0, 16.0):
        found = gaps(burstiness)
        assert statistics.fmean(found) == pytest.approx(0.25, rel=0.05)
        variation = statistics.stdev(found) / statistics.fmean(found)
        assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_words_are_measured_by_the_server_that_counts_them() -> None:
    long_words, base, pair = {"people", "world", "possible"}, 5, 2

    async def count(texts: Sequence[str]) -> int:
        found = [word for text in texts for word in text.split()]
        return base + pair * (len(texts) // 2) + len(found) + sum(word in long_words for word in found)

    words = asyncio.run(measure_words(count))
    assert set(words.words) == set(COMMON) - long_words
    assert (words.base, words.pair) == (base, pair)
    assert asyncio.run(count([words.text(random.Random(0), 50)])) == 50 + base


def test_a_tokenizer_of_bytes_is_no_help() -> None:
    async def count(texts: Sequence[str]) -> int:
        return sum(map(len, texts))

    with pytest.raises(EngineError, match="more than one token of common words"):
        asyncio.run(measure_words(count))


def share_gpt(*lengths: int) -> dict[str, object]:
    who = ("human", "gpt")
    return {"conversations": [{"from": who[i % 2], "value": "x" * size} for i, size in enumerate(lengths)]}


def test_share_gpt_files(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    rows = [share_gpt(40, 80, 12, 4), share_gpt(40, 4000), share_gpt(8, 8, 4000, 8), {"conversations": []}]
    file.write_text(json.dumps(rows))
    load = read_file(file, 100)
    # Of the third only the first turn fits, of the second and the fourth none.
    assert [[(t.message_tokens, t.output_tokens) for t in turns] for turns in load.found] == [
        [(10, 20), (3, 1)],
        [(2, 2)],
    ]
    assert len(first(load, 10)) == 3
    check_requests(load, 3)
    with pytest.raises(ConfigError, match="--requests 4: the file has 3"):
        check_requests(load, 4)


def test_files_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Say hi", "output_tokens": 7}\n\n{"prompt": "Bye", "output_tokens": 2}\n')
    found = first(read_file(file, 100), 10)
    assert {(ask.texts, ask.output_tokens) for ask in found} == {(("Say hi",), 7), (("Bye",), 2)}
    assert [ask.prompt_tokens for ask in found] == [None, None]  # nobody has counted them


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"\xff", "utf-8"),
        (b"[1,", "not JSON"),
        (b'{"prompt": "a", "output_tokens": 1}\n{', "line 2 is not JSON"),
        (b'[{"text": 1}]', "none of its 1 rows"),
        (b'{"prompt": "a", "output_tokens": 500}', "at most 100 tokens"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "f"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="--file") as error:
        read_file(file, 100)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("load", "flags", "words"),
    [
        ("random", {"input_tokens": "x"}, "--input-tokens x: expected a number"),
        ("random", {"input_tokens": "9:3"}, "--input-tokens 9:3"),
        ("random", {"output_tokens": "0"}, "--output-tokens 0: expected at least 1"),
        ("random", {"turns": 3}, "--turns 3: --load random does not have it, --load shared-prefix does"),
        ("sharegpt", {"input_tokens": "9"}, "--input-tokens 9: --load sharegpt does not have it"),
    ],
)
def test_flags_that_do_not_fit_the_load(load: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_load(load, LoadFlags(**flags))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("rate", "concurrency", "words"),
    [
        ("2", "8", "--rate 2 and --concurrency 8"),
        ("0", None, "--rate 0: '0' is not a number above 0"),
        ("1,,2", None, "'' is not a number"),
        ("nan", None, "'nan'"),
        (None, "1.5", "'1.5' is not a whole number"),
        (None, "64", "--concurrency 64: above --requests 10"),
    ],
)
def test_paces_that_are_none(rate: str | None, concurrency: str | None, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_paces(rate, concurrency, 10)
    assert words in str(error.value)


def test_paces() -> None:
    assert [(p.kind, p.value) for p in make_paces("0.5,2", None, 10)] == [("rate", 0.5), ("rate", 2.0)]
    assert [(p.kind, p.value) for p in make_paces(None, "1,4", None)] == [("concurrency", 1), ("concurrency", 4)]
    assert [str(p) for p in make_paces(None, None, 3)] == ["3 at once"]


def test_a_file_load_ends() -> None:
    assert first(FileLoad([]), 3) == []
