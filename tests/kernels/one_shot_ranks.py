"""Ranks that sum through memory they share, each a process: a script, run by test_one_shot.py with the interpreter on.

    python one_shot_ranks.py SIZE TURNS

A rank is a fork of this process, so the memory lies at the same address in all. Ends with 0 if every rank saw the right
bits in every turn; a rank that still waits after a minute is killed by its own alarm.
"""

import mmap
import os
import random
import signal
import sys
import time

import torch

from shoal.kernels.one_shot import SLOT_BYTES, Peers, memory_bytes
from shoal.parallel.comm import SoloComm
from shoal.parallel.station import Station
from shoal.parallel.symm_comm import OneShotComm
from shoal.parallel.tensors import fold

# Of one tile, of two and of three, so that tiles have had different numbers of turns.
SHAPES = [(1, 576), (3, 700), (5,), (2, 1500), ()]
DTYPES = [torch.float16, torch.float32]


class Shard(SoloComm):
    """Which shard of how many, for a comm that sums all by itself."""

    def __init__(self, shard: int, size: int) -> None:
        self.shard = shard
        self.size = size


def given(turn: int, shard: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + shard)
    shape = SHAPES[turn % len(SHAPES)]
    return (torch.randn(shape, generator=generator) * 10**shard).to(DTYPES[turn // 3 % len(DTYPES)])


def run_rank(peers: Peers, turns: int) -> None:
    shard, size = peers.shard, len(peers.addresses)
    comm = OneShotComm(Shard(shard, size), peers, Station())
    pause = random.Random(shard)  # so that every rank is the last at times
    for turn in range(turns):
        time.sleep(pause.choice([0, 0, 0.002]))
        x = given(turn, shard)
        parts = [given(turn, other) for other in range(size)]
        assert x.nbytes <= SLOT_BYTES
        assert torch.equal(comm.all_reduce(x), fold(torch.add, parts, out=torch.empty_like(x))), (shard, turn)


def main(size: int, turns: int) -> int:
    each = -(-memory_bytes(size) // 4096) * 4096
    memory = torch.frombuffer(mmap.mmap(-1, each * size), dtype=torch.uint8)
    addresses = torch.tensor([memory.data_ptr() + each * shard for shard in range(size)])
    children = []
    for shard in range(size):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            run_rank(Peers(addresses, shard, held=memory), turns)
            os._exit(0)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
