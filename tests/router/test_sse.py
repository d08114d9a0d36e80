"""Streams: the order of events, one terminal event whatever happens, and whole characters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from shoal.router.backend import ReplicaLost
from shoal.router.text import Piece, merge
from shoal.runtime.errors import RowFailed
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent, TokenLogprob

from .fakes import ANSWER, MODEL, Reply, Server, read_reply, request_bytes, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def stream(server: Server, path: str = CHAT, **fields: Any) -> Reply:
    body: dict[str, Any] = {"model": MODEL, "stream": True}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi", "max_tokens": 100}
    return server.post(path, body | fields)


def test_headers(server: Server) -> None:
    headers = stream(server).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_a_chat_stream(server: Server) -> None:
    reply = stream(server)
    assert reply.events[-1] == "[DONE]"
    first, *middle, last = reply.chunks
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == ANSWER
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert {chunk["object"] for chunk in reply.chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in reply.chunks}) == 1


def test_the_last_chunk_carries_text_and_reason(server: Server) -> None:
    last = stream(server, max_tokens=3).chunks[-1]["choices"][0]
    assert last == {"index": 0, "delta": {"content": "e"}, "finish_reason": "length"}


def test_a_completion_stream_with_echo(server: Server) -> None:
    chunks = stream(server, COMPLETIONS, echo=True, logprobs=0).chunks
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hi" + ANSWER
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets[: 2 + len(ANSWER)] == list(range(2 + len(ANSWER)))
    assert chunks[0]["choices"][0]["logprobs"]["token_logprobs"][0] is None


def test_usage_comes_last_and_alone(server: Server) -> None:
    *chunks, usage = stream(server, stream_options={"include_usage": True}).chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ANSWER) + 1
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["id"] == chunks[0]["id"]
    assert all("usage" not in chunk for chunk in chunks)


def test_choices_side_by_side(server: Server) -> None:
    chunks = stream(server, n=3, stop="of").chunks
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:3]] == ["assistant"] * 3
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "The capital "
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert mine[-1]["stop_reason"] == "of"


def test_characters_come_whole(server: Server) -> None:
    server.backend.answer = "日本 🦈 é"
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream(server).chunks]
    assert "".join(texts) == server.backend.answer
    assert "�" not in "".join(texts)


def test_text_is_escaped(server: Server) -> None:
    server.backend.answer = '"\\\n\r\t\x00\u2028</script>data: [DONE]\n\n'
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream(server).chunks]
    assert "".join(texts) == server.backend.answer


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("error", "message", "type_"),
    [
        (ReplicaLost("the replica was lost before the answer's end"), "the replica was lost", "server_error"),
        (RowFailed("a NaN in the logits"), "a NaN in the logits", "server_error"),
        (RuntimeError("secret"), "internal error", "server_error"),
    ],
)
def test_an_error_in_mid_stream_is_an_event(
    server: Server, *, path: str, error: Exception, message: str, type_: str
) -> None:
    def before(request: GenerationRequest, i: int) -> None:
        if i == 5:
            raise error

    server.backend.before = before
    reply = stream(server, path)
    assert reply.status == 200
    *chunks, last = reply.chunks
    assert all("error" not in chunk for chunk in chunks)
    assert message in last["error"]["message"]
    assert "secret" not in last["error"]["message"]
    assert (set(last["error"]), last["error"]["type"]) == ({"message", "type", "param", "code"}, type_)
    assert reply.events.count("[DONE]") == 1


def test_a_replica_that_falls_silent_is_an_error_not_an_end(server: Server) -> None:
    server.backend.after_n = 3
    last = stream(server).chunks[-1]
    assert "after 3 tokens" in last["error"]["message"]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (FinishReason.TIMEOUT, "timeout"),
        (FinishReason.ABORT, "unavailable"),
        (FinishReason.ERROR, "internal_error"),
    ],
)
def test_incomplete_ends_are_errors(server: Server, reason: FinishReason, code: str) -> None:
    plain = server.backend._events

    def events(request: GenerationRequest) -> Iterator[TokenEvent]:
        for event in plain(request):
            if event.start == 4:
                yield TokenEvent(id=event.id, start=4, tokens=[], finish_reason=reason)
                return
            yield event

    server.backend._events = events  # type: ignore[method-assign]
    assert stream(server).chunks[-1]["error"]["code"] == code


def test_a_bug_in_the_first_chunk_is_a_terminal_event(server: Server) -> None:
    plain = server.backend._events

    def events(request: GenerationRequest) -> Iterator[TokenEvent]:
        for event in plain(request):
            yield msgspec.structs.replace(event, logprobs=[])  # fewer than there are tokens

    server.backend._events = events  # type: ignore[method-assign]
    assert stream(server, COMPLETIONS, logprobs=1).chunks[-1]["error"]["code"] == "internal_error"


def test_a_replica_that_loses_count_is_not_believed(server: Server) -> None:
    plain = server.backend._events

    def events(request: GenerationRequest) -> Iterator[TokenEvent]:
        return (event for event in plain(request) if event.start != 3)

    server.backend._events = events  # type: ignore[method-assign]
    reply = stream(server)
    assert "token 4 of a log of 3" in reply.chunks[-1]["error"]["message"]


def test_draining_ends_every_stream_with_an_event() -> None:
    with Server() as server, server.connect() as sock:
        server.backend.delay_s = 0.01
        body = b'{"model":"tiny","prompt":"hi","max_tokens":400,"ignore_eos":true,"stream":true}'
        sock.sendall(request_bytes("POST", COMPLETIONS, body))
        wait_for(lambda: server.backend.live == 1, "the stream")
        asyncio.run_coroutine_threadsafe(server.ingress.drain(0.1), server.loop).result(5)
        reply = read_reply(sock)
        assert "shutting down" in reply.chunks[-1]["error"]["message"]
        refused = server.post(COMPLETIONS, {"model": MODEL, "prompt": "hi"})
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert server.get("/ready").status == 503
        assert server.get("/health").status == 200


def test_a_client_that_reads_nothing_is_given_up() -> None:
    from shoal.router.config import RouterConfig

    config = RouterConfig(served_model_name=(MODEL,), send_timeout_s=0.3)
    with Server(config) as server, server.connect() as sock:
        server.backend.answer = "x" * 50
        prompts = b",".join([b'"hi"'] * 64)
        body = b'{"model":"tiny","prompt":[%b],"max_tokens":500,"ignore_eos":true,"stream":true,"logprobs":20,"n":8}'
        sock.sendall(request_bytes("POST", COMPLETIONS, body % prompts))
        wait_for(lambda: server.backend.live, "the generations to start")
        wait_for(lambda: server.ingress.admission.in_flight == 0, "the client to be given up", timeout_s=20)


def test_pieces_of_one_choice_merge() -> None:
    logprob = TokenLogprob(-1.0, 1, [])
    parts = [
        Piece(1, "a", [1], logprobs=[logprob], prompt_logprobs=[None]),
        Piece(1, "", [2], logprobs=[logprob]),
        Piece(1, "b", [3], logprobs=[logprob], finish_reason="stop", stop_reason="x"),
    ]
    assert merge(parts) == Piece(1, "ab", [1, 2, 3], [logprob] * 3, [None], "stop", "x")
    assert merge([Piece(0, "a", [1]), Piece(0, "b", [2])]).logprobs is None
