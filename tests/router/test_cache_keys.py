"""Names of logs: equal for what must be answered alike, different for everything else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.log_key import LogKeys
from shoal.runtime.generation import GenerationRequest, SamplingParams, StructuredOutputs

KEYS = LogKeys(b"s" * 32, model="tiny")
BASE = GenerationRequest(id="r", prompt=[1, 2, 3], params=SamplingParams(), seed=7)

# Another value for every parameter. One that is missing here fails the test below it.
OTHER: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "max_tokens": 17,
    "min_tokens": 1,
    "stop": ["x"],
    "stop_token_ids": [4],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {4: 1.0},
    "logprobs": 0,
    "prompt_logprobs": 0,
    "skip_special_tokens": False,
    "structured_outputs": StructuredOutputs(regex="a"),
}
NOT_CONTENT = {"n", "seed"}  # the request is one choice, and carries its seed itself


def name(request: GenerationRequest = BASE, *, scope: str = "t", is_reproducible: bool = True, **params: Any) -> bytes:
    changed = msgspec.structs.replace(request.params, **params)
    asked = msgspec.structs.replace(request, params=changed)
    return KEYS.content(asked, scope=scope, is_reproducible=is_reproducible)


def test_every_parameter_has_another_value_here():
    assert set(OTHER) | NOT_CONTENT == set(SamplingParams.__struct_fields__)


def test_every_parameter_counts():
    names = {name(), *(name(**{field: value}) for field, value in OTHER.items())}
    assert len(names) == 1 + len(OTHER)
    assert {len(each) for each in names} == {32}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"stop": ["ab", "c"]}, {"stop": ["a", "bc"]}),
        ({"stop": ["a"], "stop_token_ids": []}, {"stop": [], "stop_token_ids": [97]}),
        ({"logprobs": 0}, {"logprobs": None}),
        ({"max_tokens": None}, {"max_tokens": 0}),
        ({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"logit_bias": {1: 2.0}}, {"logit_bias": {2: 1.0}}),
        ({"structured_outputs": StructuredOutputs(regex="a")}, {"structured_outputs": StructuredOutputs(grammar="a")}),
        (
            {"structured_outputs": StructuredOutputs(choice=["a", "b"])},
            {"structured_outputs": StructuredOutputs(choice=["a,b"])},
        ),
    ],
)
def test_what_looks_alike_is_not_the_same(one: dict[str, Any], other: dict[str, Any]):
    assert name(**one) != name(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"presence_penalty": -0.0, "temperature": 0}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop_token_ids": [5, 4, 5]}, {"stop_token_ids": [4, 5]}),
        ({"logit_bias": {1: 2.0, 3: -1}}, {"logit_bias": {3: -1.0, 1: 2}}),
        (
            {"structured_outputs": StructuredOutputs(json={"type": "object"})},
            {"structured_outputs": StructuredOutputs(json='{"type": "object"}')},
        ),
    ],
)
def test_what_means_the_same_is_the_same(one: dict[str, Any], other: dict[str, Any]):
    base = msgspec.structs.replace(BASE, params=SamplingParams(**one))
    assert name(base) == name(msgspec.structs.replace(BASE, params=SamplingParams(**other)))


def test_defaults_may_be_spelled_out():
    defaults = SamplingParams()
    spelled = SamplingParams(**{field: getattr(defaults, field) for field in OTHER})
    assert name(msgspec.structs.replace(BASE, params=spelled)) == name()


def test_what_is_no_part_of_the_question_does_not_count():
    changes = {"id": "x", "timeout_s": 9.0, "priority": 3, "tenant": "x", "account": "x", "share": 2.0, "trial": 2}
    changes["digest"] = "x"  # the model's, which its names hold anyway
    assert {"prompt", "params", "seed", "tokens", *changes} == set(GenerationRequest.__struct_fields__)
    for field, value in changes.items():
        assert name(msgspec.structs.replace(BASE, **{field: value})) == name(), field


def test_the_seed_counts_where_it_was_asked_for_and_matters():
    other = msgspec.structs.replace(BASE, seed=8)
    assert name(other) != name()
    assert name(other, temperature=0.0) == name(temperature=0.0)
    assert name(other, is_reproducible=False) == name(is_reproducible=False)
    assert name(is_reproducible=False) != name()


def test_owners_models_and_secrets_are_kept_apart():
    others = [LogKeys(b"t" * 32, model="tiny"), LogKeys(b"s" * 32, model="tiny2")]
    names = [keys.content(BASE, scope="t", is_reproducible=True) for keys in others]
    assert len({name(), name(scope="u"), *names}) == 4


def test_what_a_client_names_itself_is_kept_apart_too():
    names = [KEYS.idempotent("k", 0, scope="t"), KEYS.idempotent("k", 1, scope="t"), KEYS.idempotent("k", 0, scope="u")]
    names += [KEYS.idempotent("l", 0, scope="t"), KEYS.idempotent("t", 0, scope="k"), name()]
    assert len(set(names)) == 6


prompts = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@given(prompts, prompts)
def test_prompts_are_told_apart(one: list[int], other: list[int]):
    names = [name(msgspec.structs.replace(BASE, prompt=prompt)) for prompt in (one, other)]
    assert (names[0] == names[1]) == (one == other)


@given(st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=8), st.randoms())
def test_a_dicts_order_does_not_count(bias: dict[int, float], rng: Any):
    items = [*bias.items()]
    rng.shuffle(items)
    assert name(logit_bias=bias) == name(logit_bias=dict(items))
