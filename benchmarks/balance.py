"""What the choice of a replica is worth: real engines behind the real line, the same load for each balancer in one run.

    python benchmarks/balance.py [--loads repeating unique] [--replicas 2] [--conversations 16] [--rate 0.25]

Each replica runs the demo model in a process of its own with one thread, and a KV cache that holds only a part of all
prefixes. "repeating": conversations of several tenants, each tenant with a long system prompt, each conversation
growing turn by turn; they begin at random (Poisson), and a turn follows the answer after a pause. "unique": as long
prompts, none like another, fewer a second, for each is computed whole. Every balancer gets the same prompts at the same
moments, under salts of its own, so that it finds nothing of the others'. Before, each tenant has asked once.
"""

import argparse
import asyncio
import logging
import multiprocessing
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from shoal.cluster.demo import need_demo_model
from shoal.router.backend import ModelInfo
from shoal.router.balance import Balancer, BalancerName, select_balancer
from shoal.router.line_client import Address, LineBackend
from shoal.router.prefix_index import PrefixIndex
from shoal.router.replica import Parts, Replica
from shoal.runtime.async_engine import AsyncEngine
from shoal.runtime.build import build_replica
from shoal.runtime.config import EngineConfig
from shoal.runtime.generation import GenerationRequest, SamplingParams, StructuredOutputs
from shoal.runtime.grammar import FREE, Constraint

LINE_SECRET, SECRET = b"l" * 32, b"s" * 32
VOCAB = 49_000
BALANCERS: tuple[BalancerName, ...] = ("round-robin", "p2c", "prefix")
NONE: frozenset[str] = frozenset()


class Load(msgspec.Struct, frozen=True):
    """Lengths in tokens, times in seconds. rate: conversations that begin in a second."""

    conversations: int
    rate: float
    seed: int
    tenants: int = 12
    system: int = 512
    turns: int = 5
    question: int = 32
    answer: int = 12
    pause_s: float = 2.0


class Turn(msgspec.Struct):
    """One request: when it was due and answered, in seconds since the start."""

    due: float
    first: float = 0.0
    last: float = 0.0


class NoGrammars:
    async def acheck(self, spec: StructuredOutputs) -> None: ...

    def constraint(self, spec: StructuredOutputs, tokens: list[int] | None = None) -> Constraint:
        return FREE

    def close(self) -> None: ...


# Replicas


def serve(name: str, config: dict[str, Any], pipe: Connection) -> None:
    """A replica's process: says where it listens, and ends with the pipe."""

    async def run() -> None:
        replica = Replica(build, LINE_SECRET)
        pipe.send((await replica.listen(name, "127.0.0.1")).port)
        await asyncio.to_thread(pipe.poll, None)
        await replica.shutdown()

    def build() -> Parts:
        built = build_replica(EngineConfig(**config), secret=SECRET)
        info = ModelInfo(
            model="m",
            max_model_len=built.max_model_len,
            vocab_size=built.spec.vocab_size,
            block_size=config["block_size"],
        )
        engine = AsyncEngine(built.engine)
        return Parts(engine, NoGrammars(), info, changes=engine.take_cache_changes)

    asyncio.run(run())


@asynccontextmanager
async def replicas(count: int, config: dict[str, Any]) -> AsyncIterator[list[Address]]:
    context = multiprocessing.get_context("spawn")
    started = []
    for i in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(f"r{i}", config, theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        ports = [await asyncio.to_thread(pipe.recv) for _, pipe in started]
        yield [Address(f"r{i}", "127.0.0.1", port) for i, port in enumerate(ports)]
    finally:
        for process, pipe in started:
            pipe.close()
            await asyncio.to_thread(process.join, 20)
            process.kill()


# Loads


class Client:
    """Follows logs from a choice to their end, and notes when what came."""

    def __init__(self, backend: LineBackend, balancer: Balancer, *, salt: str) -> None:
        self._backend = backend
        self._balancer = balancer
        self._salt = salt
        self._began = time.perf_counter()
        self.turns: list[Turn] = []

    def now(self) -> float:
        return time.perf_counter() - self._began

    async def sleep_until(self, due: float) -> None:
        await asyncio.sleep(max(0.0, due - self.now()))

    async def ask(self, prompt: list[int], *, tenant: int, answer: int) -> list[int]:
        turn = Turn(self.now())
        self.turns.append(turn)
        request = GenerationRequest(
            id=f"{self._salt}-{len(self.turns)}",
            prompt=prompt,
            params=SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True),
            seed=1,
            tenant=f"{self._salt}-{tenant}",
        )
        tokens: list[int] = []
        async for events in self._backend.generate(request, self._balancer.choose(request, lost=NONE)):
            turn.first = turn.first or self.now()
            tokens += [token for event in events for token in event.tokens]
        turn.last = self.now()
        return tokens


async def repeating(client: Client, load: Load) -> None:
    rng, systems = random.Random(load.seed), system_prompts(load)

    async def converse(due: float, tenant: int, questions: list[list[int]], pauses: list[float]) -> None:
        await client.sleep_until(due)
        log = list(systems[tenant])
        for question, pause in zip(questions, pauses, strict=True):
            log += question
            log += await client.ask(list(log), tenant=tenant, answer=load.answer)
            await asyncio.sleep(pause)

    await asyncio.gather(
        *(
            converse(
                due,
                rng.randrange(load.tenants),
                [words(rng, load.question) for _ in range(load.turns)],
                [rng.expovariate(1 / load.pause_s) for _ in range(load.turns)],
            )
            for due in arrivals(rng, load.conversations, load.rate)
        )
    )


async def warm(client: Client, load: Load) -> None:
    """One question of each tenant, one after the other."""
    rng = random.Random(load.seed + 1)
    for tenant, system in enumerate(system_prompts(load)):
        await client.ask(system + words(rng, load.question), tenant=tenant, answer=1)


def system_prompts(load: Load) -> list[list[int]]:
    rng = random.Random(load.seed - 1)
    return [words(rng, load.system) for _ in range(load.tenants)]


async def unique(client: Client, load: Load) -> None:
    rng = random.Random(load.seed)
    count, rate = load.conversations * load.turns // 2, load.rate * load.turns / 2
    longest = load.system + load.turns * (load.question + load.answer)

    async def one(due: float, prompt: list[int]) -> None:
        await client.sleep_until(due)
        await client.ask(prompt, tenant=0, answer=load.answer)

    dues = arrivals(rng, count, rate)
    await asyncio.gather(*(one(due, words(rng, rng.randint(load.system // 2, longest))) for due in dues))


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def arrivals(rng: random.Random, count: int, rate: float) -> list[float]:
    due, at = [], 0.0
    for _ in range(count):
        at += rng.expovariate(rate)
        due.append(at)
    return due


LOADS: dict[str, Callable[[Client, Load], Any]] = {"repeating": repeating, "unique": unique}


# Figures


async def measure(
    name: BalancerName, run: Callable[[Client, Load], Any], load: Load, addresses: Sequence[Address]
) -> None:
    async def find() -> Sequence[Address]:
        return addresses

    index = PrefixIndex(secret=SECRET)
    backend = LineBackend(find, secret=LINE_SECRET, index=index)
    backend.start()
    while len(backend.replicas()) < len(addresses):
        await asyncio.sleep(0.01)
    balancer = select_balancer(name, backend.replicas, index, rng=random.Random(load.seed))
    salt = f"{name}-{run.__name__}"
    await warm(Client(backend, balancer, salt=salt), load)
    await asyncio.sleep(1.5)  # the last word of each replica
    before = await totals(backend)
    client = Client(backend, balancer, salt=salt)
    await run(client, load)
    took = client.now()
    await asyncio.sleep(1.5)
    queries, hits = (after - was for after, was in zip(await totals(backend), before, strict=True))
    await backend.close()
    waits = sorted(1000 * (turn.first - turn.due) for turn in client.turns)
    ends = [1000 * (turn.last - turn.due) for turn in client.turns]
    print(
        f"{run.__name__:10} {name:12} {len(waits):5} {100 * hits / queries:7.1f} %  "
        f"{' '.join(f'{quantile(waits, q):8.0f}' for q in (0.5, 0.9, 0.99))} {statistics.mean(ends):10.0f} {took:6.1f}",
        flush=True,
    )


async def totals(backend: LineBackend) -> tuple[int, int]:
    stats = (await backend.stats()).values()
    return sum(one.prefix_query_tokens for one in stats), sum(one.prefix_hit_tokens for one in stats)


def quantile(values: Sequence[float], q: float) -> float:
    return values[min(len(values) - 1, int(q * len(values)))]


async def compare(args: argparse.Namespace) -> None:
    # 30 layers, keys and values, 3 heads of 64 numbers of 2 bytes
    config = {
        "model": str(args.model or need_demo_model()),
        "device": "cpu",
        "num_threads": 1,
        "max_model_len": 2048,
        "max_num_batched_tokens": 256,
        "block_size": 32,
        "kv_cache_memory_gb": args.kv_tokens * 30 * 2 * 3 * 64 * 2 / 2**30,
    }
    load = Load(conversations=args.conversations, rate=args.rate, seed=args.seed)
    async with replicas(args.replicas, config) as addresses:
        print(f"{args.replicas} replicas, {args.kv_tokens} tokens of KV cache each; {load}")
        print("load       balancer     turns  hit rate  TTFT p50      p90      p99   end mean     in s")
        for run in (LOADS[name] for name in args.loads):
            for name in args.balancers:
                await measure(name, run, load, addresses)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="default: the demo model; another needs another --kv-tokens")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kv-tokens", type=int, default=4608, help="of each replica")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.25, help="conversations that begin in a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--balancers", nargs="+", default=BALANCERS)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    logging.getLogger("shoal").setLevel(logging.ERROR)  # each run leaves its line
    asyncio.run(compare(parser.parse_args()))


if __name__ == "__main__":
    main()
