"""The routes' answers, errors and side effects, as a client sees them."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal.router.backend import ReplicaLost
from shoal.router.config import RouterConfig
from shoal.runtime.errors import (
    ContextTooLong,
    EngineDead,
    InvalidRequest,
    QueueFull,
    RequestTimeout,
    RowFailed,
    Unavailable,
)
from shoal.runtime.generation import GenerationRequest
from shoal.runtime.stats import Stats

from .fakes import ANSWER, MAX_MODEL_LEN, MODEL, FakeBackend, Server, read_reply, request_bytes, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def chat(server: Server, **fields: Any) -> Any:
    reply = server.post(CHAT, {"model": MODEL, "messages": HI} | fields)
    assert reply.status == 200, reply.body
    return reply.json


def complete(server: Server, **fields: Any) -> Any:
    reply = server.post(COMPLETIONS, {"model": MODEL, "prompt": "hi"} | fields)
    assert reply.status == 200, reply.body
    return reply.json


def raising(error: Exception, at: int = 0) -> Any:
    def before(request: GenerationRequest, i: int) -> None:
        if i == at:
            raise error

    return before


def test_chat(server: Server) -> None:
    answer = chat(server)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert abs(answer["created"] - time.time()) < 10
    assert answer["model"] == MODEL
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    ]
    num_prompt = len("user\nhi") + len("assistant\n") + 3  # and three special tokens
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(ANSWER) + 1,
        "total_tokens": num_prompt + len(ANSWER) + 1,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_chat_takes_the_rest_of_the_context(server: Server) -> None:
    answer = chat(server, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


def test_completions_stop_at_sixteen_tokens(server: Server) -> None:
    assert complete(server)["choices"][0]["text"] == ANSWER[:16]
    near_the_end = complete(server, prompt="a" * (MAX_MODEL_LEN - 5))
    assert near_the_end["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_by_either_name(server: Server, name: str) -> None:
    choice = chat(server, **{name: 3})["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The", "length")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "cd"], ["ab", "cd"]), ([97, 98], ["ab"]), ([[97, 98], [99]], ["ab", "c"])],
)
def test_all_four_prompt_forms(server: Server, prompt: Any, texts: list[str]) -> None:
    answer = complete(server, prompt=prompt, echo=True, max_tokens=3, n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts) * 2))
    assert [choice["text"] for choice in answer["choices"]] == [text + "The" for text in texts for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    assert answer["usage"]["completion_tokens"] == 3 * 2 * len(texts)


def test_scoring_a_prompt_as_lm_eval_does(server: Server) -> None:
    choice = complete(server, prompt=[97, 98, 99], echo=True, max_tokens=0, logprobs=1)["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert "prompt_logprobs" not in choice


def test_completion_logprobs(server: Server) -> None:
    logprobs = complete(server, max_tokens=2, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["T", "h"]
    assert logprobs["top_logprobs"] == [{"T": -0.5, "U": -1.5}, {"h": -0.5, "i": -1.5}]
    assert logprobs["text_offset"] == [0, 1]


def test_chat_logprobs(server: Server) -> None:
    content = chat(server, max_tokens=1, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    top = [{"token": "T", "logprob": -0.5, "bytes": [84]}, {"token": "U", "logprob": -1.5, "bytes": [85]}]
    assert content == [top[0] | {"top_logprobs": top}]
    assert chat(server, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_no_top_logprobs_ask_for_nothing(server: Server) -> None:
    assert "logprobs" not in chat(server, logprobs=False, top_logprobs=0)["choices"][0]


def test_half_a_character_has_its_bytes(server: Server) -> None:
    server.backend.answer = "é"
    first, second = chat(server, max_tokens=2, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])


def test_tokens_as_ids(server: Server) -> None:
    logprobs = complete(server, max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:84"]


def test_prompt_logprobs(server: Server) -> None:
    entry = {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}
    choice = complete(server, prompt=[97, 98], prompt_logprobs=1, max_tokens=1)["choices"][0]
    assert choice["prompt_logprobs"] == [None, entry]
    assert len(chat(server, prompt_logprobs=0, max_tokens=1)["prompt_logprobs"]) > 1


def test_stop_strings_end_the_answer_and_the_generation(server: Server) -> None:
    answer = chat(server, stop=["of", "zzz"], ignore_eos=True)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "The capital "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "of")
    assert answer["usage"]["completion_tokens"] == len("The capital of")
    wait_for(lambda: server.backend.aborted == 1, "the abort")
    assert chat(server, stop="of", include_stop_str_in_output=True)["choices"][0]["message"]["content"].endswith("of")


def test_the_engine_gets_what_was_asked_for(server: Server) -> None:
    schema = {"name": "x", "schema": {"maximum": 10**30}}
    chat(
        server, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=7, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1, logit_bias={"65": 5}, min_tokens=2, max_tokens=5, stop_token_ids=[3], priority=4,
        timeout=12.5, response_format={"type": "json_schema", "json_schema": schema},
    )  # fmt: skip
    request = server.backend.requests[-1]
    params = request.params
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 0.5, 0.9, 0, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.1)
    assert (params.logit_bias, params.min_tokens, params.max_tokens, params.stop_token_ids) == ({65: 5.0}, 2, 5, [3])
    assert (request.priority, request.timeout_s) == (4, pytest.approx(12.5, abs=1))
    assert params.structured_outputs is not None
    assert params.structured_outputs.json == '{"maximum": ' + str(10**30) + "}"


def test_defaults_are_openai_s(server: Server) -> None:
    chat(server)
    params = server.backend.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (1.0, 1.0, 0, [])
    assert server.backend.requests[-1].timeout_s == pytest.approx(600, abs=5)


def test_seeds(server: Server) -> None:
    complete(server, prompt=["a", "b"], n=2, seed=5)
    first = [request.seed for request in server.backend.requests]
    complete(server, prompt=["a", "b"], n=2, seed=5)
    again = [request.seed for request in server.backend.requests[4:]]
    complete(server, n=1)
    complete(server, n=1)
    drawn = [request.seed for request in server.backend.requests[8:]]
    assert len(set(first)) == 4
    assert sorted(first) == sorted(again)
    assert drawn[0] != drawn[1]


def test_cache_salts_make_tenants(server: Server) -> None:
    for salt in ("a", "a", "b", None):
        complete(server, cache_salt=salt)
    one, same, other, plain = [request.tenant for request in server.backend.requests]
    assert one == same
    assert len({one, other, plain}) == 3
    assert all(len(tenant) == 64 for tenant in (one, other, plain))


def test_prompts_can_be_cut_from_the_left(server: Server) -> None:
    complete(server, prompt="abcdef", truncate_prompt_tokens=2)
    assert server.backend.requests[-1].prompt == [101, 102]
    complete(server, prompt=[97] * 1000, truncate_prompt_tokens=-1, max_tokens=12)
    assert len(server.backend.requests[-1].prompt) == MAX_MODEL_LEN - 12


def test_text_parts_and_roles(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    roles = ("developer", "user", "assistant", "user")
    chat(server, messages=[{"role": role, "content": parts} for role in roles], max_tokens=1)
    prompt = server.ingress.model.text.decode(server.backend.requests[-1].prompt)
    assert prompt == "system\na\nbuser\na\nbassistant\na\nbuser\na\nbassistant\n"


def test_harmless_fields_pass(server: Server) -> None:
    idle = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "safety_identifier": "x", "prompt_cache_key": "y", "tools": [], "tool_choice": "none", "modalities": ["text"],
        "best_of": 1, "logprobs": None, "stop": None, "response_format": {"type": "text"}, "verbosity": "medium",
        "stream_options": None, "reasoning_effort": None, "use_beam_search": False,
    }  # fmt: skip
    assert chat(server, **idle)["choices"][0]["message"]["content"] == ANSWER


def test_unknown_fields_are_logged_by_name(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shoal.router"):
        chat(server, flavour="secret", **{f"f{i}": 1 for i in range(1000)})
    assert "1001 unknown request fields: 'flavour', 'f0'" in caplog.text
    assert "secret" not in caplog.text
    assert len(caplog.text) < 1000


def test_small_routes(server: Server) -> None:
    assert server.get("/health").json == {"status": "ok"}
    assert server.get("/ready").json == {"status": "ready"}
    with server.connect() as sock:
        sock.sendall(request_bytes("HEAD", "/health", None, connection="close"))
        assert sock.makefile("rb").read().startswith(b"HTTP/1.1 200 OK")
    assert server.get("/version").json["version"]
    models = server.get("/v1/models").json
    assert [card["id"] for card in models["data"]] == [MODEL, "alias"]
    assert server.get(f"/v1/models/{MODEL}").json == models["data"][0]
    assert models["data"][0]["max_model_len"] == MAX_MODEL_LEN
    assert server.get("/docs").status == 200
    assert "ChatRequest" in server.get("/openapi.json").json["components"]["schemas"]


def test_a_model_name_with_slashes() -> None:
    with Server(RouterConfig(served_model_name=("org/name",))) as server:
        assert server.get("/v1/models/org/name").json["id"] == "org/name"
        reply = server.post(CHAT, {"model": "org/name", "messages": HI})
        assert reply.json["model"] == "org/name"


def test_tokenize_and_back(server: Server) -> None:
    reply = server.post("/tokenize", {"model": MODEL, "prompt": "aé", "return_token_strs": True}).json
    assert reply == {
        "count": 3,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [97, 195, 169],
        "token_strs": ["a", "�", "�"],
    }
    assert server.post("/detokenize", {"model": MODEL, "tokens": reply["tokens"]}).json == {"prompt": "aé"}
    conversation = server.post("/tokenize", {"model": MODEL, "messages": HI}).json
    chat(server)
    assert conversation["tokens"] == server.backend.requests[-1].prompt


def test_continue_final_message(server: Server) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well"}]
    chat(server, messages=messages, continue_final_message=True)
    assert server.ingress.model.text.decode(server.backend.requests[-1].prompt).endswith("assistant\nWell")


def test_detokenize_takes_what_the_context_holds(server: Server) -> None:
    assert server.post("/detokenize", {"model": MODEL, "tokens": [97] * MAX_MODEL_LEN}).status == 200
    reply = server.post("/detokenize", {"model": MODEL, "tokens": [97] * (MAX_MODEL_LEN + 1)})
    assert reply.status == 400
    assert reply.json["error"]["param"] == "tokens"


def test_scrapes_at_once_do_not_overtake_each_other() -> None:
    """An older answer behind a newer one would count as a replica that started anew."""
    asked: list[int] = []

    class Slow(FakeBackend):
        async def stats(self) -> dict[str, Stats]:
            asked.append(steps := 10 * (len(asked) + 1))
            await asyncio.sleep(0.2 / len(asked))
            return {"r1": Stats(steps=steps, generation_tokens=steps)}

    with Server(backend=Slow()) as server, ThreadPoolExecutor(2) as pool:
        list(pool.map(server.get, ["/metrics"] * 2))
        text = server.get("/metrics").body.decode()
    assert 'shoal_generation_tokens_total{replica="departed"} 0.0' in text


def test_metrics() -> None:
    with Server() as server:
        chat(server)
        server.get("/nope")
        text = server.get("/metrics").body.decode()
    assert 'shoal_generation_tokens_total{replica="r1"} 42.0' in text
    assert 'shoal_kv_cache_usage_perc{replica="r1"} 0.4' in text
    assert 'shoal_time_to_first_token_seconds_count{variant="stable"} 1.0' in text
    assert f'shoal_inter_token_latency_seconds_count{{variant="stable"}} {len(ANSWER)}.0' in text
    assert 'shoal_e2e_request_latency_seconds_count{variant="stable"} 1.0' in text
    assert 'shoal_http_responses_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'shoal_http_responses_total{route="other",status="404"} 1.0' in text
    assert "shoal_router_in_flight 0.0" in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "type_"),
    [
        (InvalidRequest("regex is bad", param="structured_outputs"), 400, "invalid_request_error"),
        (ContextTooLong("too long"), 400, "invalid_request_error"),
        (RequestTimeout("too late"), 408, "timeout_error"),
        (QueueFull("1024 wait; at most 1024 may", retry_after=2.5), 429, "rate_limit_error"),
        (EngineDead("the engine died"), 503, "server_error"),
        (ReplicaLost("the replica was lost"), 503, "server_error"),
        (Unavailable("draining", retry_after=3), 503, "server_error"),
        (RowFailed("a NaN in the logits"), 500, "server_error"),
        (RuntimeError("secret text of a bug"), 500, "server_error"),
    ],
)
def test_errors_before_the_first_token(
    server: Server, *, error: Exception, status: int, type_: str, stream: bool
) -> None:
    server.backend.before = raising(error)
    reply = server.post(CHAT, {"model": MODEL, "messages": HI, "stream": stream})
    assert reply.status == status
    assert reply.json["error"]["type"] == type_
    assert "secret" not in reply.body.decode()
    if status in (429, 503):
        assert int(reply.headers["retry-after"]) >= 1
        assert int(reply.headers["retry-after-ms"]) == getattr(error, "retry_after", 1.0) * 1000
    server.backend.before = None
    assert chat(server)["choices"][0]["message"]["content"] == ANSWER


def test_one_failing_choice_fails_the_answer_and_aborts_the_others(server: Server) -> None:
    server.backend.delay_s = 0.005

    def before(request: GenerationRequest, i: int) -> None:
        if request.id.endswith("-1") and i == 5:
            raise RowFailed("a NaN in the logits")

    server.backend.before = before
    reply = server.post(CHAT, {"model": MODEL, "messages": HI, "n": 3, "ignore_eos": True})
    assert (reply.status, reply.json["error"]["message"]) == (500, "a NaN in the logits")
    wait_for(lambda: server.backend.live == 0, "the others to end")
    assert server.ingress.admission.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_generation(server: Server, stream: bool) -> None:
    server.backend.delay_s = 0.01
    body = b'{"model":"tiny","prompt":"hi","max_tokens":400,"ignore_eos":true,"n":2,"stream":%s}'
    with server.connect() as sock:
        sock.sendall(request_bytes("POST", COMPLETIONS, body % (b"true" if stream else b"false")))
        wait_for(lambda: server.backend.live == 2, "the generations to start")
        if stream:
            sock.recv(100)
    left = time.monotonic()
    wait_for(lambda: server.backend.live == 0, "the abort")
    assert time.monotonic() - left < 0.25  # 100 ms, and what a busy machine adds
    assert server.backend.aborted == 2
    assert server.ingress.admission.in_flight == 0


def test_ready_says_why_not(server: Server) -> None:
    server.backend.ready_problem = "the engine has stopped making steps"
    reply = server.get("/ready")
    assert reply.status == 503
    assert "stopped making steps" in reply.json["error"]["message"]
    assert reply.headers["retry-after"] == "1"
    assert server.get("/health").status == 200


def test_cluster_shows_every_replica_and_its_ranks(server: Server) -> None:
    (replica,) = server.get("/v1/cluster").json["replicas"]
    assert (replica["id"], replica["ready"], replica["state"], replica["running"]) == ("r1", True, "ready", 2)
    (rank,) = replica["ranks"]
    assert (rank["node"], rank["pid"], rank["details"]) == ("n1", 77, {"layers": "0-3 of 4"})
    server.backend.ready_problem = "restarting the ranks after: rank 0 was killed"
    (replica,) = server.get("/v1/cluster").json["replicas"]
    assert (replica["ready"], replica["state"]) == (False, "restarting the ranks after: rank 0 was killed")


def test_a_body_that_does_not_come_is_given_up() -> None:
    with Server(RouterConfig(served_model_name=(MODEL,), body_timeout_s=0.2)) as server, server.connect() as sock:
        sock.sendall(request_bytes("POST", CHAT, b"{}")[:-1])
        reply = read_reply(sock)
        assert reply.status == 408
        assert "0.2 s" in reply.json["error"]["message"]


def test_a_client_that_leaves_in_its_body(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(request_bytes("POST", CHAT, b"{}")[:-1])
    assert chat(server)["choices"][0]["message"]["content"] == ANSWER


def test_a_generation_that_never_ends_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.router.flight.GRACE_S", 0.1)
    server.backend.delay_s = 30
    reply = server.post(CHAT, {"model": MODEL, "messages": HI, "timeout": 0.1})
    assert reply.status == 408
    assert "0.1 s" in reply.json["error"]["message"]
    wait_for(lambda: server.backend.live == 0, "the abort")


def test_overload_is_refused_at_once() -> None:
    backend = FakeBackend()
    backend.delay_s = 0.02
    config = RouterConfig(served_model_name=(MODEL,), max_in_flight=4, max_waiting=0)
    with Server(config, backend) as server:
        busy: list[socket.socket] = []
        for _ in range(2):
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            sock.sendall(request_bytes("POST", COMPLETIONS, b'{"model":"tiny","prompt":"hi","n":2}'))
            busy.append(sock)
        wait_for(lambda: backend.live == 4, "the load")
        took: list[float] = []
        for _ in range(3):  # the best of three: the machine may be busy with something else
            started = time.monotonic()
            reply = server.post(COMPLETIONS, {"model": MODEL, "prompt": "hi"})
            took.append(time.monotonic() - started)
        assert min(took) < 0.05
        assert reply.status == 429
        assert "4 generations are in flight" in reply.json["error"]["message"]
        assert int(reply.headers["retry-after"]) >= 1
        assert [read_reply(sock).status for sock in busy] == [200, 200]
        for sock in busy:
            sock.close()
        assert server.post(COMPLETIONS, {"model": MODEL, "prompt": "hi"}).status == 200


def test_stop_token_ids(server: Server) -> None:
    choice = complete(server, stop_token_ids=[ord("c")])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("The ", "stop", ord("c"))


def test_the_models_own_end_is_no_stop_reason(server: Server) -> None:
    choice = complete(server, max_tokens=99)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (ANSWER, "stop")
    assert "stop_reason" not in choice


def test_keep_alive_serves_many_requests_on_one_connection(server: Server) -> None:
    with server.connect() as sock:
        for path, status in (("/health", 200), ("/nope", 404), ("/v1/models", 200), (CHAT, 405)):
            sock.sendall(request_bytes("GET", path, None))
            assert read_reply(sock).status == status


def test_the_product_of_all_tokens_is_bounded() -> None:
    with Server(RouterConfig(served_model_name=(MODEL,), max_total_tokens=100)) as server:
        body = {"model": MODEL, "prompt": ["a", "b"], "n": 3, "max_tokens": 17}
        reply = server.post(COMPLETIONS, body)
        assert reply.status == 400
        assert "102 tokens; at most 100" in reply.json["error"]["message"]
        assert server.post(COMPLETIONS, body | {"max_tokens": 16}).status == 200


def test_long_requests_are_read_off_the_loop(server: Server) -> None:
    body = {"model": MODEL, "prompt": ["a" * 500] * 100, "max_tokens": 1, "padding": "x" * 300_000}
    assert len(server.post(COMPLETIONS, body).json["choices"]) == 100
    many = {"model": MODEL, "prompt": [[5] * 500] * 20, "max_tokens": 1}
    assert len(server.post(COMPLETIONS, many).json["choices"]) == 20


def test_logs_hold_nothing_of_what_was_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        server.backend.answer = "sesame"
        chat(server, messages=[{"role": "user", "content": "open"}], strange="sesame")
        server.post(CHAT, {"model": MODEL, "messages": "sesame"})
        server.post(CHAT, b'{"sesame')
        server.get("/sesame", authorization="Bearer sesame")
    assert "sesame" not in caplog.text
