"""The tensor-parallel axis between GPUs of a node, for small tensors: one-shot sums in symmetric memory.

Every shard maps the memory of the others (torch's symmetric memory, over NVLink) and sums what all have laid there, in
one launch (kernels/one_shot.py): NCCL's rounds cost more than the bytes do while a step decodes. Larger tensors,
maxima and gathers go to the `Comm` that it wraps, whose sums have the same order and rounding.

Off by default: nothing makes one. It was never run on GPUs. What ran is its arithmetic and its protocol of flags, in
Triton's interpreter with CPU memory in place of the GPUs', and its kernel compiles for sm_80 and sm_90; `meet` did
not run past its first lines. Nothing of a call lives on the host, so it may be captured in a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from ..kernels.one_shot import SLOT_BYTES, SUMMED, Peers, memory_bytes, one_shot_sum
from .comm import Comm
from .station import COMPUTE, Station

_c10d: Any = c10d  # whose stubs are wrong about what is used here


def meet(store: Any, label: str, *, shard: int, size: int) -> Peers:
    """Map the memory of all shards of a group on this rank's current GPU. Each calls it; waits for all of them.

    store: torch's, where they meet, for this group alone. label: the group's, which no other group of this process
    has. Raises RuntimeError where they do not come, or where a GPU cannot reach another's memory.
    """
    # Torch finds who meets in one of two places, by its version. The group has no backend: it is a name and a store.
    group = _c10d.ProcessGroup(store, shard, size)
    _c10d._register_process_group(label, group)
    _c10d._SymmetricMemory.set_group_info(label, shard, size, store)
    device = torch.device("cuda", torch.cuda.current_device())
    # Not by torch's `empty`, which cuts it out of a pool: the addresses below are those of whole allocations.
    memory = _c10d._SymmetricMemory.empty_strided_p2p((memory_bytes(size),), (1,), torch.uint8, device)
    memory.zero_()
    torch.cuda.synchronize(device)  # the flags must be down before a peer can raise one
    mapping = _c10d._SymmetricMemory.rendezvous(memory, label)
    addresses = torch.tensor(mapping.buffer_ptrs, dtype=torch.int64, device=device)
    return Peers(addresses, shard, held=(memory, mapping))


class OneShotComm:
    """A `Comm` that sums up to SLOT_BYTES by itself. 16-bit floats are summed in float32 and rounded once.

    The deadline of such a sum is not on the device, which waits on: the host then stands at its next look at a result,
    its station with it, and who watches the rank ends the group.
    """

    def __init__(self, wrapped: Comm, peers: Peers, station: Station) -> None:
        """wrapped: of the same shards. peers: from `meet`."""
        self.shard = wrapped.shard
        self.size = wrapped.size
        self._wrapped = wrapped
        self._peers = peers
        self._station = station

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.nbytes > SLOT_BYTES or x.dtype not in SUMMED:
            return self._wrapped.all_reduce(x)
        self._station.at("all_reduce")
        flat = x.contiguous()
        one_shot_sum(flat, self._peers)
        self._station.at(COMPUTE)
        return x if flat is x else x.copy_(flat)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._wrapped.all_reduce_max(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._wrapped.all_gather(x)
