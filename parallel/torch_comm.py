"""Both axes over torch.distributed: NCCL between GPUs, gloo between nodes of CPU ranks.

The backends are used as they are, without the process-wide default group: a group is made of its members alone, which
find each other in a TCP store, and there are as many as are needed. Data travels as bytes and is summed here, so that
dtypes, order and rounding are the same as in shared memory.

With gloo every wait has the deadline. With NCCL the host does not wait, the device does; there the deadline is that of
torch's own watchdog, which ends the process, and so the group.
"""

import fcntl
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .peer import CONNECT_S, PeerTimeout, absent, name
from .station import COMPUTE, Station
from .tensors import Operation, as_bytes, fold
from .wire_plan import Wiring

# Up to here every shard gets all parts at once; above, each gets a piece of all and hands its sum round, which moves
# 2 (n - 1) / n of the tensor instead of n - 1, for a second trip.
_GATHER_BYTES = 256 * 1024
_SIOCGIFADDR = 0x8915

_dist: Any = dist  # whose stubs leave out, or are wrong about, the stores and the backends' options


class Backend(Protocol):
    """What is used of `torch.distributed.ProcessGroupGloo` and `ProcessGroupNCCL`, whose own types say too little."""

    def _allgather_base(self, output: Tensor, input: Tensor) -> dist.Work: ...

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_split_sizes: list[int], input_split_sizes: list[int]
    ) -> dist.Work: ...

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> dist.Work: ...


class StoreServer:
    """Where groups meet: a TCP store, for as long as it is held. By itself torch would listen on all addresses."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((address, 0))
            listener.listen()
            self.port: int = listener.getsockname()[1]
            descriptor = listener.detach()
        self._store = _dist.TCPStore(
            address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
        )


class Gathering:
    """The ranks that find each other in the driver's TCP store, and the groups they make."""

    def __init__(self, wiring: Wiring, *, rank: int, local: int) -> None:
        """local: this rank's number among those of its node, which picks its GPU where it sees several."""
        self._rank = rank
        self._deadline_s = wiring.deadline_s
        self._address = wiring.addresses[rank]
        wait = timedelta(seconds=CONNECT_S)
        self._store = _dist.TCPStore(wiring.driver_address, wiring.store_port, timeout=wait, wait_for_workers=False)
        self._make: Callable[[Any, int, int], Any] = self._gloo
        if wiring.device == "cuda":
            self._make = self._nccl
            torch.cuda.set_device(local % torch.cuda.device_count())
            if len(set(wiring.nodes)) > 1:  # NCCL has no other way to be told; by itself it may take another network
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={_interface(self._address)}")

    def group(self, label: str, ranks: tuple[int, ...]) -> "Group":
        """A group of these ranks, this one among them. Each calls it with the same label, which no other group has.

        Waits for all of them. A rank that makes several makes them in an order that all agree on.
        """
        store = _dist.PrefixStore(label, self._store)
        store.set(f"here-{self._rank}", "")
        for rank in ranks:
            try:
                store.wait([f"here-{rank}"])
            except RuntimeError as problem:
                raise absent(rank, "connect", CONNECT_S) from problem
        try:
            backend = self._make(store, ranks.index(self._rank), len(ranks))
        except RuntimeError as problem:
            raise lost(ranks, self._rank, "connect", problem) from problem
        return Group(backend, ranks, self._rank)

    def _gloo(self, store: Any, index: int, size: int) -> Any:
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=self._address)]
        options._timeout = timedelta(seconds=self._deadline_s)
        return _dist.ProcessGroupGloo(store, index, size, options)

    def _nccl(self, store: Any, index: int, size: int) -> Any:
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._deadline_s)
        return _dist.ProcessGroupNCCL(store, index, size, options)


def _interface(address: str) -> str:
    """The network interface that has this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, interface in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return interface
    raise OSError(f"no network interface of this node has the address {address}")


class Group:
    """A backend and who is in it. `index`: this rank's place among `ranks`."""

    def __init__(self, backend: Backend, ranks: tuple[int, ...], rank: int) -> None:
        self.backend = backend
        self.ranks = ranks
        self.index = ranks.index(rank)
        self._rank = rank

    def wait(self, work: dist.Work, station: str) -> None:
        """Until the work is done (CUDA: have the stream wait). Raises PeerTimeout."""
        try:
            work.wait()
        except RuntimeError as problem:
            raise lost(self.ranks, self._rank, station, problem) from problem


def lost(ranks: tuple[int, ...], rank: int, station: str, problem: Exception) -> PeerTimeout:
    others = [other for other in ranks if other != rank]
    who = name(others[0]) if len(others) == 1 else f"one of the ranks {', '.join(map(str, others))}"
    reason = (str(problem).splitlines() or [type(problem).__name__])[0]
    return PeerTimeout(
        f"{station}: {who} did not come in time, or was lost: {reason}", peer=others[0] if len(others) == 1 else None
    )


class TorchComm:
    """A `Comm` over a group. 16-bit floats are summed in float32 and rounded once."""

    def __init__(self, group: Group, station: Station) -> None:
        self.shard = group.index
        self.size = len(group.ranks)
        self._group = group
        self._station = station

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._reduce(x, torch.add)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._reduce(x, torch.maximum)

    def all_gather(self, x: Tensor) -> Tensor:
        self._station.at("all_gather")
        return self._gather(x, "all_gather")

    def _reduce(self, x: Tensor, operation: Operation) -> Tensor:
        self._station.at("all_reduce")
        if self.size == 2 or x.nbytes <= _GATHER_BYTES:
            return fold(operation, self._gather(x, "all_reduce").unbind(), out=x)
        mine = self._scatter(x)
        total = fold(operation, mine.unbind(), out=torch.empty_like(mine[0]))
        self._station.at("all_reduce")
        return x.copy_(self._gather(total, "all_reduce").view(-1)[: x.numel()].view(x.shape))

    def _gather(self, x: Tensor, station: str) -> Tensor:
        """[size, *x.shape], by shard."""
        gathered = x.new_empty((self.size, *x.shape))
        work = self._group.backend._allgather_base(as_bytes(gathered), as_bytes(x.contiguous()))
        self._group.wait(work, station)
        self._station.at(COMPUTE)
        return gathered

    def _scatter(self, x: Tensor) -> Tensor:
        """[size, numel / size rounded up]: this shard's piece of x as each shard has it, by shard."""
        piece = -(-x.numel() // self.size)
        pieces = torch.nn.functional.pad(x.reshape(-1), (0, piece * self.size - x.numel()))
        mine = x.new_empty((self.size, piece))
        self._group.wait(self._group.backend.alltoall_base(as_bytes(mine), as_bytes(pieces), [], []), "all_reduce")
        self._station.at(COMPUTE)
        return mine


class TorchOutlet:
    """Tensors to the other rank of a group of two, which is used in this direction alone.

    A group for each direction, as the stages form a ring: the operations of one group run in order, and a send that
    waits for its receiver must not hold up the receive that the receiver waits for.
    """

    def __init__(self, group: Group, *, capacity: int) -> None:
        """capacity: messages on their way, at most. The tensors stay here until they have arrived."""
        self._group = group
        self._capacity = capacity
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, x: Tensor) -> None:
        while len(self._under_way) >= self._capacity:
            self._group.wait(self._under_way[0][0], "send")
            self._under_way.popleft()
        copy = x.clone(memory_format=torch.contiguous_format)
        self._under_way.append((self._group.backend.send([as_bytes(copy)], 1 - self._group.index, 0), copy))


class TorchInlet:
    """Tensors from the other rank of a group of two."""

    def __init__(self, group: Group, *, device: str) -> None:
        self._group = group
        self._device = device

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.wait(self._group.backend.recv([as_bytes(x)], 1 - self._group.index, 0), "receive")
        return x
