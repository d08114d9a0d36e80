"""One-shot sums: the kernel beside peers that have already laid their parts, and ranks that really wait for another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal.kernels.one_shot import SLOT_BYTES, Peers, memory_bytes, one_shot_sum
from shoal.parallel.station import Station
from shoal.parallel.symm_comm import OneShotComm
from shoal.parallel.tensors import as_bytes, fold

RANKS = Path(__file__).with_name("one_shot_ranks.py")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Memories:
    """What the shards map, on one device: all but `shard` have laid their part of its next turn."""

    def __init__(self, parts: list[torch.Tensor], *, shard: int, before: int = 0) -> None:
        self.size = len(parts)
        self.bytes = torch.zeros(self.size, memory_bytes(self.size), dtype=torch.uint8, device=parts[0].device)
        self.flags = self.bytes[:, 2 * SLOT_BYTES :].view(torch.int32).view(self.size, -1, self.size)
        turn = torch.tensor(before).add(1).int()
        for other, part in enumerate(parts):
            if other != shard:
                begin = int(turn & 1) * SLOT_BYTES
                self.bytes[other, begin : begin + part.nbytes] = as_bytes(part.contiguous())
        self.flags[shard] = turn
        self.flags[shard, :, shard] = before
        addresses = torch.tensor([memory.data_ptr() for memory in self.bytes], device=parts[0].device)
        self.peers = Peers(addresses, shard, held=self.bytes)


def parts_of(size: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [(torch.randn(shape, device=device) * 10 ** (shard % 3)).to(dtype) for shard in range(size)]


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if expected.dtype == torch.bfloat16 and not expected.is_cuda:  # the interpreter cuts, where it should round
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(as_bytes(actual), as_bytes(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "shape"), [(2, ()), (2, (0, 4)), (3, (3, 5)), (4, (1, 576)), (8, (2, 1025)), (3, (5, 1024))]
)
def test_sums_in_the_order_of_the_shards(
    device: torch.device, size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    parts = parts_of(size, shape, dtype, device)
    expected = fold(torch.add, parts, out=torch.empty_like(parts[0]))
    for shard in (0, size - 1):
        memories, x = Memories(parts, shard=shard), parts[shard].clone()
        one_shot_sum(x, memories.peers)
        same_bits(x, expected)


def test_fills_a_slot_and_no_more(device: torch.device) -> None:
    parts = parts_of(2, (SLOT_BYTES // 2,), torch.float16, device)
    memories, x = Memories(parts, shard=1), parts[1].clone()
    one_shot_sum(x, memories.peers)
    same_bits(x, fold(torch.add, parts, out=torch.empty_like(x)))
    assert torch.equal(memories.bytes[1, SLOT_BYTES : 2 * SLOT_BYTES], as_bytes(parts[1]))  # the first turn is odd
    assert not memories.bytes[1, :SLOT_BYTES].any()
    assert (memories.flags[0, :, 1] == 1).all()


def test_tells_the_peers_of_its_tiles_alone(device: torch.device) -> None:
    parts = parts_of(3, (1500,), torch.float32, device)  # two tiles
    memories = Memories(parts, shard=1)
    one_shot_sum(parts[1].clone(), memories.peers)
    for other in (0, 2):
        assert memories.flags[other, :3].tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_keeps_the_sign_of_zero(device: torch.device) -> None:
    parts = [torch.full((4,), -0.0, device=device)] * 2
    memories, x = Memories(parts, shard=0), parts[0].clone()
    one_shot_sum(x, memories.peers)
    assert torch.signbit(x).all()


def test_a_peer_may_be_a_turn_ahead(device: torch.device) -> None:
    """It can be: what it waits for in this turn is there before what this shard waits for has been seen."""
    parts = parts_of(3, (600,), torch.float32, device)
    memories, x = Memories(parts, shard=1), parts[1].clone()
    memories.flags[1, :, 2] += 1
    one_shot_sum(x, memories.peers)
    same_bits(x, fold(torch.add, parts, out=torch.empty_like(x)))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_turns_wrap(device: torch.device) -> None:
    parts = parts_of(2, (600,), torch.float32, device)
    memories, x = Memories(parts, shard=0, before=2**31 - 1), parts[0].clone()
    one_shot_sum(x, memories.peers)
    same_bits(x, parts[0] + parts[1])
    assert memories.flags[1, 0, 0] == -(2**31)


def test_ranks_wait_for_each_other(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the ranks' memory is the host's")
    command = [sys.executable, str(RANKS), "3", "40"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


class Recorder:
    """A `Comm` that notes what it is asked for."""

    shard, size = 0, 2

    def __init__(self) -> None:
        self.asked: list[str] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("all_reduce")
        return x

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("all_reduce_max")
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("all_gather")
        return x[None]


def test_comm_leaves_what_it_cannot_sum_to_the_wrapped_one(device: torch.device) -> None:
    parts = parts_of(2, (4, 6), torch.float32, device)
    wrapped, memories = Recorder(), Memories(parts, shard=0)
    comm = OneShotComm(wrapped, memories.peers, Station())
    comm.all_reduce(torch.zeros(SLOT_BYTES // 4 + 1, device=device))
    comm.all_reduce(torch.zeros(3, dtype=torch.int64, device=device))
    comm.all_reduce_max(parts[0])
    comm.all_gather(parts[0])
    assert wrapped.asked == ["all_reduce", "all_reduce", "all_reduce_max", "all_gather"]


def test_comm_sums_in_place_whatever_the_strides(device: torch.device) -> None:
    parts = parts_of(2, (4, 6), torch.float32, device)
    wrapped, memories = Recorder(), Memories(parts, shard=0)
    comm = OneShotComm(wrapped, memories.peers, Station())
    x = parts[0].t().contiguous().t()
    assert comm.all_reduce(x) is x
    assert torch.equal(x, parts[0] + parts[1])
    assert not wrapped.asked
