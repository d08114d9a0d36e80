"""A small sum over GPUs that read each other's memory: one launch, every shard adds all parts itself.

Each shard has a memory that all map (layout below). A tile of the tensor is a small communicator of its own: its
program lays the shard's part into the shard's slot, tells every peer, waits for all of them and sums the parts in the
order of the shards. No program waits for another one of its GPU, so there is no grid-wide barrier.

    two slots, SLOT_BYTES each | flags: int32 [tiles, size], by the shard that writes: the last turn it has laid

A tile's turns alternate between the slots. Who lays turn t has met the others in turn t - 1, and they had by then read
what lay there in turn t - 2. A flag is thus at most one turn ahead or behind, so turns may wrap, and a shard's flag to
itself is its counter: nothing of a call lives on the host, and a captured graph replays. One-shot as in Triton's and
vLLM's custom all-reduce; flags by release and acquire at system scope, which between GPUs wants NVLink's atomics.

Never run on GPUs: its arithmetic and its flags ran in Triton's interpreter, and it compiles for sm_80 and sm_90.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PLR0917 (what a kernel is passed)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOT_BYTES = 256 * 1024
SUMMED = (torch.float32, torch.float16, torch.bfloat16)
# 16 bytes a thread and part. The 64 programs of a full slot find room on every GPU at once.
_TILE_BYTES = 4096
_WARPS = 8


def memory_bytes(size: int) -> int:
    """What each of `size` shards maps; zero it before the first call, and ahead of showing it to the others."""
    return 2 * SLOT_BYTES + SLOT_BYTES // _TILE_BYTES * size * 4


@dataclass(frozen=True, slots=True)
class Peers:
    """addresses: int64 [size] on the device, of each shard's memory as this one maps it (16-byte aligned).

    held: whatever keeps these addresses mapped.
    """

    addresses: Tensor
    shard: int
    held: object


@triton.jit
def _slot(addresses_ptr, peer, turn, x_ptr, SLOT_BYTES: tl.constexpr):
    """Where `peer` lays this turn, as a pointer like x_ptr."""
    slot = tl.load(addresses_ptr + peer) + (turn & 1) * SLOT_BYTES
    return tl.multiple_of(slot.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)  # else it moves 2 bytes at a time


@triton.jit(do_not_specialize=["shard"])
def _one_shot_kernel(
    x_ptr,
    addresses_ptr,
    numel,
    shard,
    SIZE: tl.constexpr,
    SIZE_P2: tl.constexpr,
    TILE: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
):
    tile = tl.program_id(0)
    at = tile * TILE + tl.arange(0, TILE)
    mask = at < numel
    peer = tl.arange(0, SIZE_P2)
    flags = tl.load(addresses_ptr + peer, mask=peer < SIZE, other=0) + 2 * SLOT_BYTES + tile * SIZE * 4
    to_peers = flags.to(tl.pointer_type(tl.int32)) + shard
    mine = tl.load(addresses_ptr + shard) + 2 * SLOT_BYTES + tile * SIZE * 4
    from_peers = mine.to(tl.pointer_type(tl.int32)) + peer

    before = tl.load(mine.to(tl.pointer_type(tl.int32)) + shard)
    turn = before + 1
    tl.store(_slot(addresses_ptr, shard, turn, x_ptr, SLOT_BYTES) + at, tl.load(x_ptr + at, mask=mask), mask=mask)
    tl.debug_barrier()  # a release covers what its own thread knows of: the whole tile, from here
    tl.atomic_xchg(to_peers, turn, mask=peer < SIZE, sem="release", scope="sys")
    missing = 1
    while missing > 0:
        flag = tl.atomic_add(from_peers, 0, mask=peer < SIZE, sem="acquire", scope="sys")
        missing = tl.sum(((flag == before) & (peer < SIZE)).to(tl.int32), axis=0)
    tl.debug_barrier()

    total = tl.load(_slot(addresses_ptr, 0, turn, x_ptr, SLOT_BYTES) + at, mask=mask).to(tl.float32)
    for other in tl.static_range(1, SIZE):
        total += tl.load(_slot(addresses_ptr, other, turn, x_ptr, SLOT_BYTES) + at, mask=mask).to(tl.float32)
    tl.store(x_ptr + at, total.to(x_ptr.dtype.element_ty), mask=mask)


def one_shot_sum(x: Tensor, peers: Peers) -> None:
    """Sum x over the shards, in place and in their order, in float32, rounded once.

    x: contiguous, of a dtype in SUMMED, at most SLOT_BYTES. Every shard calls it for equal shapes in the same order, on
    one stream. The device waits for the peers without end: who watches the rank must end it when a peer is lost.
    """
    assert x.is_contiguous()
    assert x.dtype in SUMMED
    assert x.nbytes <= SLOT_BYTES
    if x.numel() == 0:
        return
    size, tile = peers.addresses.numel(), _TILE_BYTES // x.itemsize
    _one_shot_kernel[(triton.cdiv(x.numel(), tile),)](
        x,
        peers.addresses,
        x.numel(),
        peers.shard,
        SIZE=size,
        SIZE_P2=triton.next_power_of_2(size),
        TILE=tile,
        SLOT_BYTES=SLOT_BYTES,
        num_warps=_WARPS,
    )
