"""A stream that broke off goes on where it was: event ids, `Last-Event-ID`, and what makes no sense of them."""

import json
from typing import Any

import pytest

from .fakes import Reply, Server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "stream": True}
COMPLETION = {"model": "tiny", "prompt": "hi", "temperature": 0, "stream": True}


def events(reply: Reply) -> list[tuple[str, Any]]:
    """(id, data) of each event but the last, which is [DONE]."""
    assert reply.status == 200, reply.body
    blocks = reply.body.decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    found = []
    for block in blocks[:-2]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("id", ""), json.loads(fields["data"])))
    return found


def texts(chunks: list[tuple[str, Any]]) -> dict[int, str]:
    out: dict[int, str] = {}
    for _, chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            out[choice["index"]] = out.get(choice["index"], "") + piece
    return out


def finishes(chunks: list[tuple[str, Any]]) -> dict[int, str]:
    return {
        choice["index"]: choice["finish_reason"]
        for _, chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }


def test_events_have_ids_where_they_are_asked_for(server: Server) -> None:
    plain = events(server.post("/v1/chat/completions", CHAT))
    assert {id for id, _ in plain} == {""}, "clients that read lines take an id for data"
    numbered = events(server.post("/v1/chat/completions", CHAT, idempotency_key="k1"))
    counts = [int(id) for id, _ in numbered if id]
    assert counts == sorted(counts)
    assert counts[-1] == len(server.backend.answer) + 2, "every token, the end token, and one for the end"


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "n": 2}),
    ("/v1/chat/completions", {**CHAT, "stop": "Paris"}),
    ("/v1/chat/completions", {**CHAT, "stop": ["of Fra!", "Paris."], "include_stop_str_in_output": True}),
    ("/v1/completions", {**COMPLETION, "max_tokens": 20, "echo": True}),
    ("/v1/completions", {**COMPLETION, "max_tokens": 12, "prompt": ["a", "b"], "n": 2}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_cut_anywhere_and_continued_it_is_the_same_text(server: Server, path: str, body: dict[str, Any]) -> None:
    server.backend.answer = "Grüße: the capital of France is Paris. 東京"
    whole = events(server.post(path, body, idempotency_key="k"))
    for cut in range(len(whole) + 1):
        id = next((id for id, _ in reversed(whole[:cut]) if id), "")
        had = whole[:cut]
        rest = events(server.post(path, body, idempotency_key="k", last_event_id=id))
        if not id:  # nothing but openings: all of it comes again
            had = []
        assert not had or "role" not in str(rest), "a stream that goes on does not open again"
        joined = {i: texts(had).get(i, "") + texts(rest).get(i, "") for i in texts(whole)}
        assert joined == texts(whole)
        assert finishes(had) | finishes(rest) == finishes(whole)


def test_logprobs_go_on_where_they_were(server: Server) -> None:
    body = {**COMPLETION, "max_tokens": 10, "echo": True, "logprobs": 2}
    whole = events(server.post("/v1/completions", body, idempotency_key="k"))
    rest = events(server.post("/v1/completions", body, idempotency_key="k", last_event_id=whole[3][0]))

    def offsets(chunks: list[tuple[str, Any]]) -> list[int]:
        return [at for _, c in chunks for choice in c["choices"] for at in choice["logprobs"]["text_offset"]]

    assert offsets(whole[:4]) + offsets(rest) == offsets(whole)


@pytest.mark.parametrize(
    ("body", "id", "param"),
    [
        (CHAT, "x", "last-event-id"),
        (CHAT, "1.", "last-event-id"),
        (CHAT, "99999999999", "last-event-id"),
        (CHAT, "1.2", "last-event-id"),
        ({**CHAT, "n": 2}, "1", "last-event-id"),
        ({**CHAT, "stream": False}, "1", "last-event-id"),
        ({**CHAT, "temperature": 1}, "1", "last-event-id"),
    ],
)
def test_ids_that_make_no_sense(server: Server, body: dict[str, Any], id: str, param: str) -> None:
    reply = server.post("/v1/chat/completions", body, last_event_id=id)
    assert reply.status == 400
    assert reply.json["error"]["param"] == param
    assert not server.backend.requests


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x_shoal_cache", "sometimes"),
        ("idempotency_key", "k" * 256),
        ("x_shoal_timeout", "0"),
        ("x_shoal_timeout", "nan"),
        ("x_shoal_timeout", "soon"),
        ("x_shoal_deadline", "1"),
    ],
)
def test_malformed_headers(server: Server, header: str, value: str) -> None:
    reply = server.post("/v1/chat/completions", CHAT, **{header: value})
    assert reply.status == 400
    assert reply.json["error"]["param"] == header.replace("_", "-")


def test_an_answer_says_where_it_came_from(server: Server) -> None:
    assert server.post("/v1/chat/completions", CHAT).headers["x-shoal-cache"] == "bypass"
    assert server.post("/v1/chat/completions", {**CHAT, "stream": False}).headers["x-shoal-cache"] == "bypass"
