"""One line a request that says how it went, and never what was said."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.cluster.logs import JsonLines
from shoal.router.cache import Reading
from shoal.router.config import RouterConfig
from shoal.router.flight import Flight
from shoal.router.prepare import Job, Prompt
from shoal.router.request_log import Exchange, facts
from shoal.router.text import Choice
from shoal.runtime.errors import QueueFull, RowFailed
from shoal.runtime.generation import GenerationRequest, SamplingParams

from .fakes import ANSWER, MODEL, Server, byte_level_text, request_bytes, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY, PROMPT, SALT, SECRET = "sesame-street", "zanzibar", "salted-caramel", "cluster-secret" * 3
CONFIG = RouterConfig(served_model_name=(MODEL,), api_keys=(KEY,), secret=SECRET)
AUTH = {"authorization": f"Bearer {KEY}"}
HI = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}


class Log:
    """What was written, line by line."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream = stream

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def of(self, request_id: str) -> dict[str, Any]:
        """The one line of a request. It is written a moment after the client has its answer."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines() if line.get("request_id") == request_id]

        wait_for(found, f"the line of {request_id}")
        (line,) = found()
        return line


@pytest.fixture
def log() -> Iterator[Log]:
    """All records of ours from INFO on, and of anybody else from DEBUG on."""
    ours, root, stream = logging.getLogger("shoal"), logging.getLogger(), io.StringIO()
    before = ours.level, root.level
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    ours.setLevel(logging.INFO)
    yield Log(stream)
    root.removeHandler(handler)
    ours.level, root.level = before
    logging.getLogger("shoal.requests").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    with Server(CONFIG) as server:
        yield server


@pytest.fixture
def server(keyed: Server) -> Server:
    keyed.backend.reset()
    return keyed


def test_one_line_says_how_it_went(server: Server, log: Log) -> None:
    reply = server.post(COMPLETIONS, {"model": MODEL, "prompt": [PROMPT, "b"], "n": 2, "max_tokens": 5}, **AUTH)
    line = log.of(reply.headers["x-request-id"])
    assert line.pop("time").endswith("Z")
    assert line.pop("e2e_ms") >= line.pop("ttft_ms") > 0
    assert line == {
        "level": "info",
        "logger": "shoal.requests",
        "message": "request",
        "request_id": reply.headers["x-request-id"],
        "method": "POST",
        "route": COMPLETIONS,
        "status": 200,
        "tenant": "key-1",
        "model": MODEL,
        "variant": "stable",
        "stream": False,
        "cache": "bypass",
        "choices": 4,
        "prompt_tokens": reply.json["usage"]["prompt_tokens"],
        "cached_tokens": 4,
        "output_tokens": 20,
        "finish_reasons": ["length"] * 4,
        "replicas": [],
        "attempts": 4,
    }


def test_what_is_refused_is_logged_with_a_code(server: Server, log: Log) -> None:
    def full(request: GenerationRequest, i: int) -> None:
        raise QueueFull(f"no room for {PROMPT}", retry_after=1.0)

    for id, status, error, param, body, headers in (
        ("wrong", 401, "invalid_api_key", None, HI, {"authorization": "Bearer wrong"}),
        ("unknown", 404, "model_not_found", "model", HI | {"model": PROMPT}, AUTH),
        ("bad", 400, "invalid_type", "temperature", HI | {"temperature": "warm"}, AUTH),
        ("below", 400, "invalid_type", "metadata", HI | {"metadata": {PROMPT: 1}}, AUTH),
        ("full", 429, "queue_full", None, HI, AUTH),
    ):
        server.backend.before = full if id == "full" else None
        assert server.post(CHAT, body, x_request_id=id, **headers).status == status
        line = log.of(id)
        assert (line["status"], line["error"], line.get("param")) == (status, error, param)
        assert ("tenant" in line) == (id != "wrong")
        assert ("output_tokens" in line) == (id == "full")


def test_what_is_no_route_is_logged_as_such(server: Server, log: Log) -> None:
    assert server.get(f"/v1/{PROMPT}", x_request_id="lost", **AUTH).status == 404
    assert server.get(CHAT, x_request_id="got", **AUTH).status == 405
    assert [log.of(id)["error"] for id in ("lost", "got")] == ["route_not_found", "method_not_allowed"]


def test_streams_that_end_early(server: Server, log: Log) -> None:
    def fail(request: GenerationRequest, i: int) -> None:
        if i == 3:
            raise RowFailed("a NaN in the logits")

    server.backend.before = fail
    server.post(CHAT, HI | {"stream": True}, x_request_id="failed", **AUTH)
    line = log.of("failed")
    assert (line["status"], line["stream"], line["error"], line["output_tokens"]) == (200, True, "RowFailed", 3)

    server.backend.reset()
    server.backend.delay_s = 0.01
    with server.connect() as sock:
        body = json.dumps(HI | {"stream": True}).encode()
        sock.sendall(request_bytes("POST", CHAT, body, x_request_id="left", **AUTH))
        assert b"200" in sock.recv(100)
    line = log.of("left")
    assert line["error"] == "client_gone"
    assert line["output_tokens"] <= len(ANSWER)


@pytest.mark.parametrize("id", ["a", "Trace_1.2-3", "x" * 128])
def test_a_sane_id_is_the_client_s(server: Server, log: Log, id: str) -> None:
    assert server.post(CHAT, HI, x_request_id=id, **AUTH).headers["x-request-id"] == id
    assert log.of(id)["status"] == 200


@pytest.mark.parametrize("id", ["x" * 129, 'a"b', "a b", "a\tb", "é", "{{7*7}}"])
def test_any_other_is_replaced(server: Server, log: Log, id: str) -> None:
    ours = server.post(CHAT, HI, x_request_id=id, **AUTH).headers["x-request-id"]
    assert ours.startswith("req-")
    assert log.of(ours)["status"] == 200
    assert id not in log.stream.getvalue()


def test_probes_are_for_debugging_only(server: Server, log: Log) -> None:
    server.get("/health", x_request_id="quiet")
    assert log.of(server.get("/nope", x_request_id="next", **AUTH).headers["x-request-id"])
    logging.getLogger("shoal.requests").setLevel(logging.DEBUG)
    server.get("/ready", x_request_id="loud")
    assert log.of("loud")["level"] == "debug"
    server.backend.ready_problem = "no replica is connected"
    logging.getLogger("shoal.requests").setLevel(logging.INFO)
    server.get("/ready", x_request_id="unready")
    assert (log.of("unready")["level"], log.of("unready")["error"]) == ("info", "Unavailable")
    assert not [line for line in log.lines() if line.get("request_id") == "quiet"]


def test_nothing_secret_in_any_record(server: Server, log: Log) -> None:
    """Of ours or of any library's, whatever goes wrong."""

    def bug(request: GenerationRequest, i: int) -> None:
        raise ValueError(f"cannot take {PROMPT} of {KEY}")

    def chained(request: GenerationRequest, i: int) -> None:
        try:
            bug(request, i)
        except ValueError as error:
            raise KeyError(request.tenant) from error

    secrets = {PROMPT, KEY, SALT, SECRET, ANSWER}
    for before in (None, bug, chained):
        server.backend.before = before
        for stream in (False, True):
            body = HI | {"stream": stream, "cache_salt": SALT, "stop": [PROMPT], "user": PROMPT}
            server.post(CHAT, body, **AUTH, idempotency_key=SALT)
    secrets |= {request.tenant for request in server.backend.requests}
    server.backend.before = None
    for body in (
        HI | {"temperature": PROMPT},
        HI | {"n": PROMPT},
        HI | {"model": PROMPT},
        f'{{"x": "{PROMPT}'.encode(),
        f'{{"{PROMPT}": 1, "{PROMPT}": 2}}'.encode(),
        HI | {"logit_bias": {PROMPT: "x"}},
    ):
        assert server.post(CHAT, body, **AUTH).status in (400, 404)
    server.post(CHAT, HI | {"surplus": PROMPT}, authorization=f"Bearer {KEY}")
    server.post(CHAT, HI, authorization=f"Bearer {PROMPT}")
    server.post(CHAT, HI, authorization=f"Basic {KEY}")
    server.get(f"/{PROMPT}?{PROMPT}={KEY}", **AUTH)
    server.post("/tokenize", {"model": MODEL, "prompt": PROMPT}, **AUTH)
    server.raw(request_bytes(PROMPT.upper(), CHAT, None, **AUTH))
    server.post(CHAT, HI, x_request_id="last", **AUTH)
    assert log.of("last")
    text = log.stream.getvalue()
    assert "ValueError" in text  # the bug itself is there
    assert len(log.lines()) >= 15
    assert [secret for secret in secrets if secret.lower() in text.lower()] == []


def test_prompts_are_logged_where_they_are_asked_for(log: Log) -> None:
    with Server(CONFIG.model_copy(update={"log_prompts": True})) as server:
        server.post(CHAT, HI, x_request_id="whole", **AUTH)
        server.post(CHAT, HI | {"user": "x" * 100_000}, x_request_id="long", **AUTH)
    line = log.of("whole")
    assert json.loads(line["request"]) == HI
    assert json.loads(line["response"])["choices"][0]["message"]["content"] == ANSWER
    assert len(log.of("long")["request"]) == 2**16
    assert KEY not in log.stream.getvalue()


def test_which_replicas_served_it() -> None:
    choices = [Choice(i, request(), byte_level_text().output(SamplingParams())) for i in range(2)]
    choices[0].attempts += ["r1", "r2"]
    choices[1].attempts += ["r2", None]
    exchange = Exchange("x", "POST")
    flight = Flight(choices, _unread, on_event=lambda *_: None, on_end=lambda: None)
    exchange.launched(Job(prompts=[Prompt([1])], requests=[], n=2), flight, model=MODEL, part="stable", stream=False)
    known = facts(exchange, exchange.started + 1.5)
    assert (known["replicas"], known["attempts"], known["e2e_ms"]) == (["r1", "r2"], 4, 1500.0)
    assert (known["finish_reasons"], known["output_tokens"]) == (["incomplete", "incomplete"], 0)
    assert "ttft_ms" not in known


def _unread(choice: Choice) -> Reading:
    raise AssertionError("it never took off")


def request() -> GenerationRequest:
    return GenerationRequest(id="x", prompt=[1], params=SamplingParams(), seed=0)
