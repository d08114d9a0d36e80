"""What the router itself costs: requests a second and latency of one ingress process, answers cached or not.

    python benchmarks/router.py [--requests 3000] [--connections 8]

The ingress runs as in a deployment, on uvicorn, over a stand-in for replicas that answers at once, so that what is
left is HTTP, validation, text and the cache. It has one core; the client and Redis share the other. The same body is
asked for over kept-alive connections; p50 is of one connection, so without queueing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path

from shoal.cluster.demo import demo_model
from shoal.router.backend import ModelInfo, ReplicaState
from shoal.router.config import RouterConfig
from shoal.router.ingress import Ingress
from shoal.router.log_cache import LogCache
from shoal.router.metrics import RouterMetrics
from shoal.router.redis_store import RedisStore
from shoal.router.redis_url import parse_redis_url
from shoal.runtime.generation import FinishReason, GenerationRequest, TokenEvent
from shoal.runtime.stats import Stats
from shoal.runtime.text import Text

MODEL = "stand-in"
ANSWER_TOKENS = 64
SECRET = "benchmark " * 8
INFO = ModelInfo(model=MODEL, digest="0" * 64, max_model_len=8192, vocab_size=49_152)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--connections", type=int, default=8)
    args = parser.parse_args()
    from shoal.cluster.redis_server import embedded_redis

    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, embedded_redis(Path(folder)) as url:
        ours, theirs = mp.get_context("spawn").Pipe()
        server = mp.get_context("spawn").Process(target=_serve, args=(theirs, url, cores[0]), daemon=True)
        server.start()
        port = ours.recv()
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])
        try:
            _report(port, args.requests, args.connections)
        finally:
            ours.send(None)
            server.join()


def _report(port: int, num: int, connections: int) -> None:
    print(f"{'what':34} {'requests/s':>10} {'p50 ms, 1 connection':>22} {'p99':>8}")
    for what, path, body, headers in (
        ("GET /health", "/health", None, {}),
        ("tokenize", "/tokenize", {"model": MODEL, "prompt": "hello"}, {}),
        ("chat, made anew (bypass)", "/v1/chat/completions", _chat(stream=False), {"x-shoal-cache": "bypass"}),
        ("chat, a hit", "/v1/chat/completions", _chat(stream=False), {}),
        ("chat, a hit, streamed", "/v1/chat/completions", _chat(stream=True), {}),
    ):
        raw = _raw(path, body, headers)
        asyncio.run(_load(port, raw, num=50, connections=1))
        rate, _ = asyncio.run(_load(port, raw, num=num, connections=connections))
        _, times = asyncio.run(_load(port, raw, num=num // 4, connections=1))
        p50, p99 = statistics.median(times) * 1e3, statistics.quantiles(times, n=100)[98] * 1e3
        print(f"{what:34} {rate:10.0f} {p50:22.2f} {p99:8.2f}", flush=True)


def _chat(*, stream: bool) -> dict[str, object]:
    messages = [{"role": "user", "content": "Tell me about the sea. " * 20}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS, "stream": stream}


def _raw(path: str, body: object, headers: dict[str, str]) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: x"]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def _load(port: int, raw: bytes, *, num: int, connections: int) -> tuple[float, list[float]]:
    """(requests a second, seconds each)."""
    left, times = num, []

    async def ask() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            began = time.perf_counter()
            writer.write(raw)
            await _answer(reader)
            times.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(connections)))
    return num / (time.perf_counter() - began), times


async def _answer(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert head.startswith(b"http/1.1 200"), head
    if b"content-length: " in head:
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        return
    while await reader.readline() != b"0\r\n":  # chunked
        pass
    await reader.readline()


def _serve(pipe: Connection, url: str, core: int) -> None:
    """The ingress's process."""
    os.sched_setaffinity(0, {core})
    import uvicorn
    import uvloop

    from shoal.router.api import create_app

    async def run() -> None:
        ingress = await _ingress(url)
        config = uvicorn.Config(create_app(ingress), port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        server.should_exit = True
        await serving

    uvloop.run(run())  # what Ray Serve runs it on


class StandIn:
    """A backend of one replica that has every answer ready."""

    async def generate(self, request: GenerationRequest, replica: str | None = None) -> AsyncIterator[list[TokenEvent]]:
        tokens = [500 + i for i in range(request.params.max_tokens or 0)]
        yield [TokenEvent(id=request.id, start=0, tokens=tokens, finish_reason=FinishReason.LENGTH)]

    async def info(self) -> ModelInfo:
        return INFO

    async def ready(self) -> None:
        return

    async def stats(self) -> dict[str, Stats]:
        return {}

    def replicas(self) -> dict[str, ReplicaState]:
        return {}


async def _ingress(url: str) -> Ingress:
    config = RouterConfig(served_model_name=(MODEL,), secret=SECRET)
    metrics = RouterMetrics()
    store = RedisStore(parse_redis_url(url), metrics.store)
    ingress = Ingress(StandIn(), config, store=store, metrics=metrics)
    cache = LogCache(store, model=INFO.digest, secret=SECRET.encode(), config=config, meter=metrics.cache)
    model = demo_model()
    assert model is not None, "make demo installs the model"
    ingress.open(INFO, Text.load(model, INFO.max_model_len, INFO.vocab_size), cache=cache)
    return ingress


if __name__ == "__main__":
    main()
