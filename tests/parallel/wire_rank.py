"""The ranks of the wires' tests: each connects, runs one of the programs below and tells what came of it.

Started as `python wire_rank.py SOCKET`, with the number of a socket to its parent. Each message on it is an order for
one rank and comes with a pipe to answer on. A rank is a fork of this process, which has imported torch and no more.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec
import torch

from shoal.parallel.grid import Place
from shoal.parallel.peer import PeerTimeout
from shoal.parallel.station import Station
from shoal.parallel.wiring import RankWires, Wiring, connect

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
# Nothing, a scalar, odd, a decode step's, more than goes at once over a network, more than a slot holds.
SHAPES = ((0,), (), (3, 5), (1, 576), (300, 577), (1200, 576))


def given(shard: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What `shard` puts into a collective: any rank can work it out."""
    generator = torch.Generator().manual_seed(1000 * shard + len(shape))
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 10 ** (2 * shard)).to(dtype)
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)


def expected_sum(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In the order of the shards; of 16-bit floats in float32, rounded once."""
    total = given(0, shape, dtype)
    total = total.float() if dtype.itemsize == 2 else total
    for shard in range(1, size):
        total = total + given(shard, shape, dtype)
    return total.to(dtype)


def collectives(wires: RankWires, place: Place) -> object:
    """Every operation on every dtype and shape: the names of those that were wrong."""
    comm, wrong = wires.comm, []
    for shape in SHAPES:
        for dtype in DTYPES:
            parts = [given(shard, shape, dtype) for shard in range(comm.size)]
            x = parts[comm.shard].clone()
            checks = {
                "in place": comm.all_reduce(x) is x,
                "sum": torch.equal(x, expected_sum(comm.size, shape, dtype)),
                "max": torch.equal(comm.all_reduce_max(parts[comm.shard].clone()), torch.stack(parts).amax(0)),
                "gather": torch.equal(comm.all_gather(parts[comm.shard]), torch.stack(parts)),
            }
            wrong += [f"{name} {shape} {dtype}" for name, is_right in checks.items() if not is_right]
    for shape in ((6, 4), (800, 600)):  # in place, also of what is not contiguous
        base = torch.zeros(shape)
        base.t().copy_(given(comm.shard, shape[::-1], torch.float32))
        comm.all_reduce(base.t())
        if not torch.equal(base.t(), expected_sum(comm.size, shape[::-1], torch.float32)):
            wrong.append(f"transposed {shape}")
    return wrong


def relay(wires: RankWires, place: Place) -> object:
    """Plans are numbers of rows: hidden states go down the stages, each adds to them, tokens go back to the first."""
    answers = []
    while plan := wires.receive():
        rows = int(plan)
        if place.is_first:
            x = torch.full((rows, 64), 1.0)
        else:
            x = wires.ring.receive((rows, 64), torch.float32)
        x += 1
        if place.is_last:
            wires.ring.send(x[:, 0].to(torch.int64))
            if place.answers:
                wires.send(str(int(x.sum())).encode())
        else:
            wires.ring.send(x)
            x.fill_(-1)  # must not be what arrives
        if place.is_first:
            answers.append(wires.ring.receive((rows,), torch.int64).tolist())
    return answers


def rush(wires: RankWires, place: Place) -> object:
    """The first stage sends everything before it receives anything, as do the others: only what is on its way helps."""
    for number in range(4):
        wires.ring.send(torch.full((8,), 100 * place.rank + number))
    return [wires.ring.receive((8,), torch.int64).tolist()[0] for _ in range(4)]


def echo(wires: RankWires, place: Place) -> object:
    """Answer plans with themselves. What each rank has seen is digested."""
    seen = 0
    while plan := wires.receive():
        seen = (seen * 31 + sum(plan) + len(plan)) % 2**31
        if place.answers:
            wires.send(plan)
    return seen


def sleepy(wires: RankWires, place: Place) -> object:
    """Rank 0 never comes to the collective."""
    if place.rank == 0:
        wires.receive()
        return None
    began = time.monotonic()
    try:
        wires.comm.all_reduce(torch.ones(4))
    except PeerTimeout as timeout:
        return {"peer": timeout.peer, "message": str(timeout), "seconds": time.monotonic() - began}
    return "it came"


def starved(wires: RankWires, place: Place) -> object:
    """Rank 0 never sends."""
    if place.rank == 0:
        wires.receive()
        return None
    try:
        wires.ring.receive((4,), torch.float32)
    except PeerTimeout as timeout:
        return {"peer": timeout.peer, "message": str(timeout)}
    return "it came"


def stuffed(wires: RankWires, place: Place) -> object:
    """Rank 1 never receives."""
    if place.rank == 1:
        wires.receive()
        return None
    try:
        for _ in range(100):
            wires.ring.send(torch.zeros(100_000))
    except PeerTimeout as timeout:
        return {"peer": timeout.peer, "message": str(timeout)}
    return "all were taken"


def idle(wires: RankWires, place: Place) -> object:
    """CPU seconds that waiting for a plan took."""
    began = time.process_time()
    wires.receive()
    return time.process_time() - began


PROGRAMS: dict[str, Callable[[RankWires, Place], object]] = {
    f.__name__: f for f in (collectives, relay, rush, echo, sleepy, starved, stuffed, idle)
}


class Order(msgspec.Struct):
    """What a rank is to do."""

    program: str
    rank: int
    wiring: Wiring


def be_rank(order: Order, pipe: int) -> None:
    """Answers with lines: the process, that it is connected, and the program's report in JSON."""
    os.write(pipe, b"%d\n" % os.getpid())
    place = order.wiring.grid.place(order.rank)
    wires = connect(order.wiring, place, Station())
    os.write(pipe, b"connected\n")
    with torch.inference_mode():
        report = PROGRAMS[order.program](wires, place)
    with os.fdopen(pipe, "w") as out:
        out.write(json.dumps(report) + "\n")
    wires.close()
    signal.pause()  # until it is killed: its end could take with it what another has not read yet


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    parent = socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, pipes, _, _ = socket.recv_fds(parent, 65536, 1)
        if not message:
            return
        if os.fork() == 0:
            parent.close()
            be_rank(msgspec.msgpack.decode(message, type=Order), pipes[0])
            os._exit(0)
        os.close(pipes[0])


if __name__ == "__main__":
    main()
