"""The benchmark client against a server with quirks: who is counted, who waits for whom, which kind an error is of."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from shoal.cluster.bench_load import FileLoad, RandomLoad, Range, SharedPrefixLoad, Turn
from shoal.cluster.bench_serve import Pace, Run, ServeBench, ServePlan
from shoal.cluster.progress import Progress
from shoal.runtime.errors import ConfigError, EngineError, RequestError

from .bench_server import BenchServer, Quirks, bench_server, bench_server_thread, events, plain

LOAD = RandomLoad(Range(10, 20), Range(3, 6))
CLOSED = (Pace("concurrency", 4),)


def measured(quirks: Quirks | None = None, **plan: Any) -> tuple[ServeBench, BenchServer]:
    """A benchmark that has run against a server of its own."""

    async def main() -> tuple[ServeBench, BenchServer]:
        async with bench_server(quirks) as server, asyncio.timeout(20):
            told = {"load": LOAD, "paces": CLOSED, "requests": 12, "warmup": 0, **plan}
            bench = ServeBench(ServePlan(url=server.url, **told), Progress(io.StringIO()))
            await bench.run()
            return bench, server

    return asyncio.run(main())


def only(bench: ServeBench) -> Run:
    (run,) = bench.runs
    return run


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("chunked", [True, False])
def test_tokens_are_counted_as_the_server_counts_them(endpoint: str, newline: str, chunked: bool) -> None:
    bench, server = measured(Quirks(newline=newline, chunked=chunked), endpoint=endpoint)
    summary = only(bench).summary()
    assert (summary.ok, summary.errors, summary.unended) == (12, {}, 0)
    # Every prompt and every answer was as long as asked for. The server's work counts as the client's here.
    assert [note for note in summary.notes if not note.startswith("THE CLIENT")] == []
    asked = server.bodies[1:]  # the first finds out what the server takes
    assert summary.output_tokens == sum(body["max_tokens"] for body in asked)
    assert summary.prompt_tokens == sum(server.count(body) for body in asked)
    for record in only(bench).records:
        assert len(record.moments) == record.num_output  # the role of a chat, and its end, are no text
        assert 0 < record.ttft_s <= record.e2e_s <= record.end_s - record.sent_s
    assert summary.ttft.count == 12
    assert summary.itl.count == summary.output_tokens - 12
    assert bench.server["model"] == "stub"
    assert bench.server["version"] == "7"


def test_answers_are_as_long_as_asked_for_and_never_from_a_cache() -> None:
    _, server = measured()
    for body in server.bodies[1:]:
        assert body["ignore_eos"]
        assert body["min_tokens"] == body["max_tokens"]
    assert len({body["cache_salt"] for body in server.bodies[1:]}) == 1  # prefixes are shared within a run
    assert all("x-shoal-cache: bypass" in head for head in server.headers)


def test_what_one_run_left_in_a_prefix_cache_helps_no_other() -> None:
    _, server = measured(paces=(Pace("concurrency", 1), Pace("concurrency", 2)))
    first, second = ({body["cache_salt"] for body in server.bodies[at : at + 12]} for at in (1, 13))
    assert len(first) == len(second) == 1
    assert first != second


def test_the_key_is_sent() -> None:
    _, server = measured(api_key="k1")
    assert all("authorization: Bearer k1" in head for head in server.headers)


@pytest.mark.parametrize(
    ("refuses", "kept", "word"),
    [
        (("cache_salt",), "min_tokens", "cache_salt"),
        (("cache_salt", "ignore_eos"), "stream_options", "ignore_eos"),
        (("ignore_eos", "stream_options"), "max_tokens", "stream_options"),
        (("cache_salt", "min_tokens", "max_tokens"), "max_completion_tokens", "max_tokens"),
    ],
)
def test_fields_that_a_server_refuses_are_left_out_and_said(refuses: tuple[str, ...], kept: str, word: str) -> None:
    bench, server = measured(Quirks(refuses=refuses))
    assert only(bench).summary().ok == 12
    assert all(kept in body and not set(refuses) & set(body) for body in server.bodies)
    assert any(f"refuses {word}" in note for note in bench.notes)


def test_a_server_that_refuses_everything() -> None:
    with pytest.raises(RequestError, match="unknown field model"):
        measured(Quirks(refuses=("model",)))


def test_without_usage_pieces_of_text_are_tokens() -> None:
    bench, server = measured(Quirks(has_usage=False, has_done=False))
    summary = only(bench).summary()
    assert summary.output_tokens == sum(body["max_tokens"] for body in server.bodies[1:])
    assert any("without usage" in note for note in summary.notes)


def test_without_a_tokenizer_prompts_are_counted_in_words() -> None:
    bench, server = measured(Quirks(has_tokenize=False), load=RandomLoad(Range(10, 10), Range(3, 3)))
    assert {len(body["prompt"].split()) for body in server.bodies[1:]} == {10}
    assert any("in common words" in note for note in bench.notes)
    assert any("prompts had 13.0 tokens in the mean, where 10.0 were meant" in n for n in only(bench).summary().notes)


ANSWER = '{"choices": [{"text": " a"}]}'


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (plain(429, {"error": {"message": "slow down"}}), "status 429", "slow down"),
        (plain(500, "oh"), "status 500", "oh"),
        (events(ANSWER, '{"error": {"message": "rank 1 died"}}', "[DONE]"), "error event", "rank 1 died"),
        (events(ANSWER, '{"object": "error", "message": "old"}'), "error event", "old"),
        (events(ANSWER), "cut off", "[DONE]"),
        (events(ANSWER, "{oops"), "malformed event", "oops"),
        (events('{"choices": 3}'), "malformed event", "choices"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n", "cut off", "closed"),
        (b"", "cut off", "closed"),
        (b"220 ftp\r\n\r\n", "not HTTP", "220 ftp"),
    ],
)
def test_failures_are_told_apart_and_tried_once(answer: bytes, kind: str, words: str) -> None:
    bench, server = measured(Quirks(fail={3: answer, 7: answer}))
    summary = only(bench).summary()
    assert summary.errors == {kind: 2}
    assert words in summary.examples[kind]
    assert summary.ok == 10
    assert len(server.bodies) == 13  # with the first


def test_a_request_that_takes_too_long() -> None:
    async def gate(body: dict[str, Any]) -> None:
        if len(body["prompt"].split()) == 10:
            await asyncio.sleep(60)

    load = FileLoad([[Turn(" ".join(["a"] * size), size, "", 3)] for size in (9, 10, 11)])
    bench, _ = measured(Quirks(gate=gate), load=load, requests=3, timeout_s=0.5)
    assert only(bench).summary().errors == {"timeout": 1}
    assert "--timeout-s" in only(bench).summary().examples["timeout"]


def test_nobody_there() -> None:
    bench = ServeBench(ServePlan(url="http://127.0.0.1:1", load=LOAD, paces=CLOSED), Progress(io.StringIO()))
    with pytest.raises(EngineError, match="connection refused"):
        asyncio.run(bench.run())


def test_an_unknown_model_names_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="--model other: the server has stub"):
        measured(model="other")


def test_a_load_that_the_model_cannot_take() -> None:
    with pytest.raises(ConfigError, match=r"have 5006 tokens.*takes 4096.*--input-tokens"):
        measured(load=RandomLoad(Range(10, 5000), Range(6, 6)))


def together(count: int) -> Callable[[dict[str, Any]], Any]:
    """A gate that opens when so many have come, but for the very first one."""
    come, opened = [0], asyncio.Event()

    async def gate(body: dict[str, Any]) -> None:
        come[0] += 1
        if come[0] == count + 1:
            opened.set()
        if come[0] > 1:
            await opened.wait()

    return gate


def test_a_closed_loop_has_as_many_requests_in_flight_as_clients() -> None:
    bench, server = measured(Quirks(gate=together(4)))  # with fewer at once it would never open
    assert server.peak == 4
    assert only(bench).summary().peak_concurrency == 4


def test_an_open_loop_waits_for_nobody() -> None:
    bench, server = measured(Quirks(gate=together(12)), paces=(Pace("rate", 500.0),))
    assert server.peak == 12
    assert only(bench).summary().ok == 12
    dues = [record.due_s for record in only(bench).records]
    assert all(record.sent_s >= record.due_s for record in only(bench).records)
    assert len(set(dues)) == 12


def test_a_turn_waits_for_the_answer_before_it() -> None:
    running: set[str] = set()

    async def gate(body: dict[str, Any]) -> None:
        opening = body["prompt"].split("\n")[0]
        assert opening not in running
        running.add(opening)
        await asyncio.sleep(0.01)
        running.discard(opening)

    load = SharedPrefixLoad(1, 10, Range(5, 5), Range(3, 3), 3)
    bench, server = measured(Quirks(gate=gate), load=load, paces=(Pace("rate", 5000.0),), requests=48)
    summary = only(bench).summary()
    assert summary.ok == 48
    assert summary.client.held > 0
    assert any("waited for the answer" in note for note in summary.notes)
    assert max(body["prompt"].count("\n") for body in server.bodies) == 4


def test_nothing_is_sent_after_the_duration() -> None:
    bench, server = measured(requests=None, duration_s=0.2, paces=(Pace("rate", 100.0),))
    records = only(bench).records
    assert max(record.due_s for record in records) <= 0.2
    assert len(records) == len(server.bodies) - 1 > 0


def test_every_server_is_asked_the_same_and_every_pace_something_else() -> None:
    def prompts() -> tuple[list[str], list[str]]:
        bench, server = measured(paces=(Pace("concurrency", 1), Pace("concurrency", 2)))
        return [body["prompt"] for body in server.bodies[1:]], [run.digest for run in bench.runs]

    (one, digests), (other, again) = prompts(), prompts()
    assert sorted(one) == sorted(other)
    assert len(set(one)) == 24
    assert digests == again
    assert len(set(digests)) == 2


def test_warm_up_is_not_counted() -> None:
    bench, server = measured(warmup=5)
    assert len(server.bodies) == 1 + 5 + 12
    assert only(bench).summary().ok == 12


def test_an_interrupted_run_shows_what_there_is() -> None:
    async def gate(body: dict[str, Any]) -> None:
        if body["max_tokens"] == 7:
            await asyncio.sleep(60)

    rows = "\n".join(json.dumps({"prompt": "a b", "output_tokens": n}) for n in (5, 6, 7))
    with bench_server_thread(Quirks(gate=gate)) as server:
        code = (
            "import signal, sys; from shoal.cluster.cli import main; sys.argv[0] = 'shoal'\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which whoever runs the tests may ignore
            "main()"
        )
        flags = ["--url", server.url, "--load", "sharegpt", "--file", "/dev/stdin", "--requests", "3", "--warmup", "0"]
        command = [sys.executable, "-c", code, "bench", "serve", *flags, "--concurrency", "3"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        process.stdin.write(rows)
        process.stdin.close()
        process.stdin = None
        for _ in range(600):
            if len(server.bodies) == 4 and server.running == 1:
                break
            time.sleep(0.05)
        time.sleep(0.3)  # the two answers are read
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "1 were in flight at the end and are not counted" in out
    assert "2 requests" in out
