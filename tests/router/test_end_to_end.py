"""HTTP down to the scheduler and back, without Ray and without a model: all stations but the rank are the real ones."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal.router.replica import Parts, Replica
from shoal.runtime.async_engine import AsyncEngine
from shoal.runtime.blocks import BlockPool
from shoal.runtime.engine import Engine
from shoal.runtime.generation import GenerationRequest, SamplingParams
from shoal.runtime.grammar import GrammarCompiler
from shoal.runtime.policy import FirstCome
from shoal.runtime.scheduler import Scheduler
from shoal.runtime.sequence import Limits
from shoal.runtime.text import choice_seed

from ..runtime.fakes import POISON, FakeGroup, FakeWorker, isolated
from ..tiny import EOS, byte_text
from .fakes import (
    LINE_LIMITS,
    MAX_MODEL_LEN,
    MODEL,
    SECRET,
    VOCAB_SIZE,
    ModelInfo,
    Server,
    line_backend,
    request_bytes,
    wait_for,
)

COMPLETIONS = "/v1/completions"
LIMITS = Limits(
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_queued=64,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset([EOS]),
)


def parts() -> Parts:
    pool = BlockPool(400, block_size=16)
    scheduler = Scheduler(LIMITS, pool=pool, policy=FirstCome(), clock=time.monotonic, secret=b"")
    group = FakeGroup(FakeWorker(block_size=16, vocab=VOCAB_SIZE, reads=False), depth=1)
    info = ModelInfo(model=MODEL, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS])
    return Parts(AsyncEngine(Engine(scheduler, group)), GrammarCompiler(byte_text(), VOCAB_SIZE, (EOS,)), info)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    replica = Replica(parts, SECRET, limits=LINE_LIMITS)
    backend = line_backend(replica)
    with Server(backend=backend) as running:
        running.loop.call_soon_threadsafe(backend.start)
        wait_for(backend.replicas, "the line")
        yield running
        asyncio.run_coroutine_threadsafe(backend.close(), running.loop).result(5)
        asyncio.run_coroutine_threadsafe(replica.shutdown(), running.loop).result(5)


def stats(server: Server) -> dict[str, float]:
    lines = server.get("/metrics").body.decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if 'replica="r1"' in line]
    return {name.partition("{")[0]: float(value) for name, value in pairs}


def expected(prompt: list[int], **params: Any) -> list[int]:
    seed = choice_seed(params["seed"], 0, 0)
    request = GenerationRequest(id="x", prompt=prompt, params=SamplingParams(**params), seed=seed)
    return isolated(request, limits=LIMITS).tokens


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_the_log_s(server: Server, stream: bool) -> None:
    asked = {"seed": 5, "max_tokens": 40, "ignore_eos": True}
    body = {"model": MODEL, "prompt": [65, 66, 67], "stream": stream, "logprobs": 0, "return_tokens_as_token_ids": True}
    reply = server.post(COMPLETIONS, body | asked)
    answers = reply.chunks if stream else [reply.json]
    tokens = [token for answer in answers for token in answer["choices"][0]["logprobs"]["tokens"]]
    assert tokens == [f"token_id:{token}" for token in expected([65, 66, 67], **asked)]
    assert answers[-1]["choices"][0]["finish_reason"] == "length"


def test_many_clients_at_once(server: Server) -> None:
    def ask(i: int) -> tuple[str, str]:
        body = {"model": MODEL, "prompt": [65, 66 + i], "seed": i, "max_tokens": 30, "ignore_eos": True, "n": 2}
        first, second = server.post(COMPLETIONS, body).json["choices"]
        return first["text"], second["text"]

    with ThreadPoolExecutor(12) as pool:
        many = list(pool.map(ask, range(24)))
    assert many == [ask(i) for i in range(24)]
    assert len(set(many)) == 24
    assert server.ingress.admission.in_flight == 0


def test_json_as_its_schema_has_it(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    for seed in range(5):
        content = server.post("/v1/chat/completions", body | {"seed": seed}).json["choices"][0]["message"]["content"]
        value = json.loads(content)
        assert isinstance(value["ok"], bool)
        assert value["n"] in range(10)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "spec", [{"regex": "("}, {"grammar": "start: nope"}, {"json": '{"type": 5}'}, {"json": "{"}, {"choice": []}]
)
def test_a_bad_constraint_is_the_client_s_fault(server: Server, spec: dict[str, Any], stream: bool) -> None:
    reply = server.post(COMPLETIONS, {"model": MODEL, "prompt": "a", "structured_outputs": spec, "stream": stream})
    assert reply.status == 400, reply.body
    assert reply.json["error"]["param"].startswith("structured_outputs")


def test_a_schema_is_refused_under_the_name_of_the_field_that_it_came_in(server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "florb"}}}
    reply = server.post(COMPLETIONS, {"model": MODEL, "prompt": "a", "response_format": wanted})
    assert (reply.status, reply.json["error"]["param"]) == (400, "response_format")
    assert server.post(COMPLETIONS, {"model": MODEL, "prompt": "a"}).status == 200


def test_shared_prefixes_are_counted(server: Server) -> None:
    body = {"model": MODEL, "prompt": "shared prefix " * 10, "max_tokens": 1}
    server.post(COMPLETIONS, body)
    again = server.post(COMPLETIONS, body).json["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] >= 128
    other = server.post(COMPLETIONS, body | {"cache_salt": "mine"}).json["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


def test_scoring(server: Server) -> None:
    body = {"model": MODEL, "prompt": [65, 66, 67, 68], "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = server.post(COMPLETIONS, body).json["choices"][0]
    assert choice["text"] == "ABCD"
    scores = choice["logprobs"]["token_logprobs"]
    assert scores[0] is None
    assert [type(score) for score in scores[1:]] == [float] * 3


def test_a_stop_string_frees_the_engine(server: Server) -> None:
    asked = {"seed": 1, "max_tokens": 400, "ignore_eos": True}
    text = bytes(token for token in expected([65], **asked) if token < 256).decode("utf-8", "replace")
    stop = next(character for character in text[5:] if character.isascii())
    body = {"model": MODEL, "prompt": [65], "stop": stop} | asked
    choice = server.post(COMPLETIONS, body).json["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    wait_for(lambda: stats(server)["shoal_num_requests_running"] == 0, "the abort")


def test_leaving_frees_the_engine(server: Server) -> None:
    body = {"model": MODEL, "prompt": ["a"] * 20, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with server.connect() as sock:
        sock.sendall(request_bytes("POST", COMPLETIONS, json.dumps(body).encode()))
        wait_for(lambda: stats(server)["shoal_num_requests_running"] > 0, "the generations to run")
    wait_for(lambda: stats(server)["shoal_num_requests_running"] == 0, "the abort")
    found = stats(server)
    assert found["shoal_num_requests_waiting"] == 0
    assert server.ingress.admission.in_flight == 0


def test_a_full_queue_is_429(server: Server) -> None:
    body = {"model": MODEL, "prompt": ["a"] * 100, "max_tokens": 500, "ignore_eos": True}
    reply = server.post(COMPLETIONS, body)
    assert reply.status == 429
    assert "64" in reply.json["error"]["message"]
    assert int(reply.headers["retry-after"]) >= 1
    wait_for(lambda: server.post(COMPLETIONS, {"model": MODEL, "prompt": "a"}).status == 200, "room again")


def test_a_bad_row_fails_alone(server: Server) -> None:
    good = {"model": MODEL, "prompt": [65], "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.post, COMPLETIONS, good) for _ in range(3)]
        bad = server.post(COMPLETIONS, {"model": MODEL, "prompt": [65, POISON]})
        assert bad.status == 500
        assert bad.json["error"]["type"] == "server_error"
        assert [other.result().status for other in others] == [200] * 3
