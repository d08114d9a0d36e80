"""What it costs the processes of a replica to talk: a step's plan and result, and a sum over the shards of a stage.

    python benchmarks/transport.py [--no-ray]

Ours beside pipes, gloo and Ray actor calls, in the same run. Medians; read them as ratios where other work shares the
machine. The step: a plan of 600 bytes goes to 4 ranks, one answers with 200 bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from shoal.parallel.comm import Comm
from shoal.parallel.grid import Grid
from shoal.parallel.station import Station
from shoal.parallel.wiring import WireSizes, Wiring, connect, lay_wires

if TYPE_CHECKING:
    from torch import Tensor

PLAN, RESULT = bytes(600), bytes(200)
NUM_RANKS = 4
LOOPBACK = "127.0.0.1"
SHAPES = ((1, 576), (32, 576), (2048, 576))


def microseconds(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """(median, 99th percentile) of the calls that follow a tenth of them for warmth."""
    for _ in range(rounds // 10):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    return times[len(times) // 2], times[len(times) * 99 // 100]


def row(name: str, times: tuple[float, float]) -> None:
    print(f"{name:52s} {times[0]:10.1f} us   99 % {times[1]:10.1f} us", flush=True)


# What the started processes do


def rank_of_wires(settings: dict[str, str]) -> None:
    """Answers plans."""
    wiring = msgspec.msgpack.decode(bytes.fromhex(settings["wiring"]), type=Wiring)
    place = wiring.grid.place(int(settings["rank"]))
    wires = connect(wiring, place, Station())
    tell("connected")
    meet = meeting_of(wires.comm) if settings["meet"] else lambda: None
    while wires.receive():
        meet()
        if place.answers:
            wires.send(RESULT)


def meeting_of(comm: Comm) -> Callable[[], object]:
    """A call that ends when all shards have come to it."""
    import torch

    one = torch.zeros(1)
    return lambda: comm.all_reduce(one)


def rank_of_pipes(settings: dict[str, str]) -> None:
    """Reads plans from its standard input; the last one answers on its standard output."""
    del settings
    tell("connected")
    while sys.stdin.buffer.read(len(PLAN)):
        sys.stdout.buffer.write(RESULT)
        sys.stdout.buffer.flush()


def rank_of_gloo(settings: dict[str, str]) -> None:
    """Broadcast from rank 0, a send back from the last: with torch.distributed as it comes."""
    import torch
    import torch.distributed as dist

    rank, size = int(settings["rank"]), NUM_RANKS + 1
    dist.init_process_group("gloo", init_method=settings["meet"], rank=rank, world_size=size)
    plan, result = torch.zeros(len(PLAN), dtype=torch.uint8), torch.zeros(len(RESULT), dtype=torch.uint8)

    def step() -> None:
        dist.broadcast(plan, 0)
        if rank == 0:
            dist.recv(result, size - 1)
        elif rank == size - 1:
            dist.send(result, 0)

    tell(microseconds(step, 200))


def shard_of_wires(settings: dict[str, str]) -> None:
    """Our sums."""
    import torch

    torch.set_num_threads(1)
    wiring = msgspec.msgpack.decode(bytes.fromhex(settings["wiring"]), type=Wiring)
    wires = connect(wiring, wiring.grid.place(int(settings["rank"])), Station())
    time_sums(wires.comm.all_reduce, (2000, 500, 30))


def shard_of_gloo(settings: dict[str, str]) -> None:
    """Gloo's sums."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    size = int(settings["size"])
    dist.init_process_group("gloo", init_method=settings["meet"], rank=int(settings["rank"]), world_size=size)
    time_sums(dist.all_reduce, (200, 100, 30))


def time_sums(all_reduce: Callable[["Tensor"], object], rounds: Sequence[int]) -> None:
    import torch

    with torch.inference_mode():
        for shape, count in zip(SHAPES, rounds, strict=True):
            x = torch.zeros(shape)
            tell(microseconds(lambda x=x: all_reduce(x), count))  # type: ignore[misc]


def tell(value: object) -> None:
    print(json.dumps(value), flush=True)


ROLES = {f.__name__: f for f in (rank_of_wires, rank_of_pipes, rank_of_gloo, shard_of_wires, shard_of_gloo)}

# What the driver does


@contextmanager
def started(role: str, num: int, **settings: str) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes with this role, ended at the end."""
    command = [sys.executable, __file__, "--role", role]
    processes = [
        subprocess.Popen(
            [*command, json.dumps({**settings, "rank": str(rank)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(num)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def told(process: "subprocess.Popen[bytes]") -> object:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def pair(process: "subprocess.Popen[bytes]") -> tuple[float, float]:
    value = told(process)
    assert isinstance(value, list)
    return value[0], value[1]


def step_over_wires(nodes: list[str], meet: str = "") -> tuple[float, float]:
    """meet: not empty where the ranks wait for each other before one answers."""
    wires = lay_wires(
        Grid(NUM_RANKS, 1),
        nodes,
        driver_node="here",
        address=LOOPBACK,
        device="cpu",
        sizes=WireSizes(),
        deadline_s=60.0,
        addresses=[LOOPBACK] * NUM_RANKS,
    )
    try:
        wiring = msgspec.msgpack.encode(wires.wiring).hex()
        with started("rank_of_wires", NUM_RANKS, wiring=wiring, meet=meet) as processes:
            for process in processes:
                told(process)
            wires.attached()

            def step() -> None:
                wires.send(PLAN)
                assert wires.receive(60.0) is not None

            return microseconds(step, 3000)
    finally:
        wires.close()


def step_over_pipes() -> tuple[float, float]:
    with started("rank_of_pipes", NUM_RANKS) as processes:
        for process in processes:
            told(process)

        def step() -> None:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(PLAN)
                process.stdin.flush()
            for process in processes[::-1]:
                assert process.stdout is not None
                process.stdout.read(len(RESULT))

        return microseconds(step, 3000)


def step_over_gloo() -> tuple[float, float]:
    with started("rank_of_gloo", NUM_RANKS + 1, meet=meeting()) as processes:
        return pair(processes[0])


def step_over_ray() -> tuple[float, float]:
    import ray

    @ray.remote(num_cpus=0)
    class Rank:
        def step(self, plan: bytes) -> bytes:
            return RESULT if plan else b""

    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        ranks = [Rank.remote() for _ in range(NUM_RANKS)]
        return microseconds(lambda: ray.get([rank.step.remote(PLAN) for rank in ranks]), 200)
    finally:
        ray.shutdown()


def meeting() -> str:
    """An address for torch.distributed that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return f"tcp://{LOOPBACK}:{probe.getsockname()[1]}"


def sums(size: int) -> None:
    wires = lay_wires(
        Grid(size, 1),
        ["here"] * size,
        driver_node="here",
        address=LOOPBACK,
        device="cpu",
        sizes=WireSizes(),
        deadline_s=60.0,
    )
    try:
        with started("shard_of_wires", size, wiring=msgspec.msgpack.encode(wires.wiring).hex()) as processes:
            ours = [pair(processes[0]) for _ in SHAPES]
    finally:
        wires.close()
    with started("shard_of_gloo", size, meet=meeting(), size=str(size)) as processes:
        theirs = [pair(processes[0]) for _ in SHAPES]
    for shape, own, gloo in zip(SHAPES, ours, theirs, strict=True):
        row(f"all_reduce {shape[0]} x {shape[1]} float32, {size} shards: ours", own)
        row("    gloo", gloo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--no-ray", action="store_true", help="leave Ray's actor calls out")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="?", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        ROLES[options.role](options.settings)
        return
    print(f"{len(os.sched_getaffinity(0))} cores")
    row("step, 4 ranks: shared memory (ours, one node)", step_over_wires(["here"] * 4))
    row("    and all ranks have met before", step_over_wires(["here"] * 4, meet="yes"))
    row("step, 4 ranks: ZeroMQ with CURVE (ours, other nodes)", step_over_wires(["there"] * 4))
    row("step, 4 ranks: pipes, all answer", step_over_pipes())
    row("step, 4 ranks: gloo broadcast", step_over_gloo())
    if options.no_ray:
        print("step, 4 ranks: Ray actor calls: left out (--no-ray)")
    else:
        row("step, 4 ranks: Ray actor calls", step_over_ray())
    for size in (2, 3, 4):
        sums(size)


if __name__ == "__main__":
    main()
