"""The wires of a replica: laid by the driver, connected to by every rank (beside station 11).

- plans go to the ranks of the driver's node in shared memory, to others over ZeroMQ; results come back likewise;
- the shards of a stage reduce in shared memory where they are CPU ranks of one node, else over torch.distributed;
- neighbouring stages hand on hidden states in the same two ways.

A node has one shared segment. Nothing here imports torch until a rank connects.
"""

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import msgspec

from .channel import Hub, Spoke
from .grid import Grid, Place
from .peer import CONNECT_S, DRIVER, PeerTimeout, absent
from .shm import Cell, Patience, Segment, unlink
from .shm_line import LineReader, LineWriter
from .station import Station
from .wire_plan import NodeLayout, WireSizes, Wiring

if TYPE_CHECKING:
    from .comm import Comm
    from .ring import Ring
    from .shm_ring import Inlet, Outlet
    from .torch_comm import Gathering, StoreServer

__all__ = ["DriverWires", "PeerTimeout", "RankWires", "WireSizes", "Wiring", "connect", "lay_wires"]

# Looking beats sleeping by 20 us a wait, but only on a core that nobody else needs. Where processes share cores a short
# while of yielding still halves a step of 4 ranks on 2 cores; a longer one takes the cores from those that compute.
_ALONE = Patience(spin_s=20e-6, yield_s=2e-3)
_CROWDED = Patience(yield_s=50e-6)


class _Out(Protocol):
    def send(self, message: bytes) -> None: ...


class _In(Protocol):
    def receive(self) -> bytes: ...


class _PolledIn(_In, Protocol):
    def poll(self, timeout_s: float) -> bool: ...


def lay_wires(
    grid: Grid,
    nodes: Sequence[str],
    *,
    driver_node: str,
    address: str,
    device: str,
    sizes: WireSizes,
    deadline_s: float,
    addresses: Sequence[str] | None = None,
) -> "DriverWires":
    """Make what the driver makes: its node's segment, and where there are other nodes the sockets they connect to.

    nodes: by rank. address: the driver's own node's, to bind to. addresses: by rank, its node's as others reach it;
    needed where there are several nodes. device: "cpu" or "cuda". deadline_s: of every wait but that for a plan.
    Raises OSError where shared memory or the address cannot be had.
    """
    if addresses is None and len({*nodes, driver_node}) > 1:
        raise ValueError("a group on several nodes needs the addresses of its ranks' nodes")
    wiring = Wiring(
        tp=grid.tp,
        pp=grid.pp,
        nodes=tuple(nodes),
        addresses=tuple(addresses or [address] * grid.size),
        driver_node=driver_node,
        driver_address=address,
        device=device,
        sizes=sizes,
        deadline_s=deadline_s,
        segment=f"shoal-{secrets.token_hex(8)}",
    )
    with ExitStack() as undo:
        hub, store = None, None
        if wiring.far_ranks:
            hub = Hub(address, wiring.far_ranks, deadline_s=deadline_s)
            undo.callback(hub.close)
            wiring = msgspec.structs.replace(wiring, hub_port=hub.port, hub_key=hub.key)
        if wiring.needs_torch:
            from .torch_comm import StoreServer

            store = StoreServer(address)
            wiring = msgspec.structs.replace(wiring, store_port=store.port)
        wires = DriverWires(wiring, hub, store)
        undo.pop_all()
    return wires


class DriverWires:
    """The driver's end; for one thread at a time. `wiring` is what the ranks must know."""

    def __init__(self, wiring: Wiring, hub: Hub | None, store: "StoreServer | None") -> None:
        """Use `lay_wires`."""
        self.wiring = wiring
        self._hub = hub
        self._store = store  # serves for as long as it is held
        self._outs: list[_Out] = []
        self._in: _PolledIn | None = None
        self._layout = layout = NodeLayout(wiring, wiring.driver_node)
        patience = _patience(len(layout.ranks))
        if layout.is_needed:
            segment = Segment.create(layout.name, layout.size)
            if layout.plans:
                writer = LineWriter(segment, layout.plans, patience=patience, deadline_s=wiring.deadline_s)
                self._outs.append(writer)
            if layout.results:
                self._in = LineReader(segment, layout.results, reader=DRIVER, patience=patience)
        if hub is not None:
            self._outs.append(hub)
            self._in = self._in or hub

    def attached(self) -> None:
        """Call once all ranks have connected: takes the segment's name away, so that it ends with its last process.

        Raises PeerTimeout where a rank of another node has not come.
        """
        unlink(self._layout.name)
        if self._hub is not None:
            self._hub.await_ranks()

    def send(self, plan: bytes) -> None:
        """To every rank, in order. Raises PeerTimeout, which names a rank, if there is no room within the deadline."""
        for out in self._outs:
            out.send(plan)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next result of the output rank, in order; None if nothing has come by then."""
        assert self._in is not None, "closed"
        return self._in.receive() if self._in.poll(timeout_s) else None

    def close(self) -> None:
        """Let go of sockets and memory. Idempotent."""
        unlink(self._layout.name)
        if self._hub is not None:
            self._hub.close()
        self._outs, self._in, self._hub, self._store = [], None, None, None


def _patience(num_ranks: int) -> Patience:
    """How the processes of a node wait: its ranks, and the driver where it is here."""
    return _ALONE if num_ranks <= len(os.sched_getaffinity(0)) else _CROWDED


# The ranks' side


@dataclass(frozen=True, slots=True)
class RankWires:
    """A rank's end."""

    comm: "Comm"
    ring: "Ring"
    _plans: _PolledIn
    _results: _Out
    _station: Station
    _ends: ExitStack

    def poll(self, timeout_s: float) -> bool:
        """Wait until a plan is there; False if none has come by then. The rank is where it was: it waits for more."""
        return self._plans.poll(timeout_s)

    def receive(self) -> bytes:
        """The next plan, in order. Waits for ever: the one wait without a deadline."""
        self._station.at("plan")
        plan = self._plans.receive()
        self._station.at("step")
        return plan

    def send(self, result: bytes) -> None:
        """To the driver. Of the output rank alone. Raises PeerTimeout."""
        self._station.at("send")
        self._results.send(result)

    def close(self) -> None:
        """Let go, after what was sent is out. Idempotent."""
        self._ends.close()


def connect(wiring: Wiring, place: Place, station: Station) -> RankWires:
    """Find the others. Returns when this rank's neighbours have come too; raises PeerTimeout, and OSError."""
    station.at("connect")
    with ExitStack() as undo:
        end = _RankEnd(wiring, place, station)
        plans, results = end.lines(undo)
        comm = end.comm()
        wires = RankWires(comm, end.ring(), plans, results, station, undo.pop_all())
    station.at("start")
    return wires


class _RankEnd:
    """What a rank makes its wires from."""

    def __init__(self, wiring: Wiring, place: Place, station: Station) -> None:
        self._wiring = wiring
        self._place = place
        self._station = station
        self._node = wiring.nodes[place.rank]
        self._layout = NodeLayout(wiring, self._node)
        self._patience = _patience(len(self._layout.ranks))
        self._memory = self._attach() if self._layout.is_needed else None

    @property
    def _segment(self) -> Segment:
        assert self._memory is not None, "the layout says who shares memory"
        return self._memory

    def _attach(self) -> Segment:
        """Map the node's segment. Where the driver is elsewhere the node's first rank creates it, and unlinks it."""
        layout, rank = self._layout, self._place.rank
        creator = DRIVER if self._node == self._wiring.driver_node else layout.ranks[0]
        if creator == rank:
            segment = Segment.create(layout.name, layout.size)
        else:
            found = Segment.open(layout.name, layout.size, timeout_s=CONNECT_S)
            if found is None:
                raise absent(creator, "connect", CONNECT_S)
            segment = found
        Cell(segment, layout.cells[rank]).publish(1)
        if creator == rank:
            try:
                for other, offset in layout.cells.items():
                    if not Cell(segment, offset).wait_for(1, CONNECT_S):
                        raise absent(other, "connect", CONNECT_S)
            finally:
                unlink(layout.name)
        return segment

    def lines(self, undo: ExitStack) -> tuple[_PolledIn, _Out]:
        """Where plans come from and results go to. Of ranks that do not answer nothing goes there."""
        wiring, rank, layout = self._wiring, self._place.rank, self._layout
        if layout.plans is None:
            address, port, key = wiring.driver_address, wiring.hub_port, wiring.hub_key
            spoke = Spoke(address, port, key, rank=rank, deadline_s=wiring.deadline_s)
            undo.callback(spoke.close)
            return spoke, spoke
        plans = LineReader(self._segment, layout.plans, reader=rank, patience=self._patience)
        if not self._place.answers:
            return plans, _Nowhere()
        assert layout.results is not None
        results = LineWriter(self._segment, layout.results, patience=self._patience, deadline_s=wiring.deadline_s)
        return plans, results

    def comm(self) -> "Comm":
        from .comm import SoloComm

        ranks = next((ranks for ranks in self._wiring.stages if self._place.rank in ranks), None)
        if ranks is None:
            return SoloComm()
        if ranks in self._layout.comms:
            from .shm_comm import SharedMemoryComm

            return SharedMemoryComm(
                self._segment,
                self._layout.comms[ranks],
                shard=self._place.shard,
                patience=self._patience,
                station=self._station,
                deadline_s=self._wiring.deadline_s,
            )
        from .torch_comm import TorchComm

        return TorchComm(self._gathering.group(f"stage-{self._place.stage}", ranks), self._station)

    def ring(self) -> "Ring":
        """The two ends in the order of all links, so that ranks that wait for each other wait for the same one."""
        from .shm_ring import Joined, NoRing

        inlet: Inlet | None = None
        outlet: Outlet | None = None
        for link in self._wiring.links:
            if link[1] == self._place.rank:
                inlet = self._inlet(link)
            elif link[0] == self._place.rank:
                outlet = self._outlet(link)
        return Joined(inlet, outlet, self._station) if inlet and outlet else NoRing()

    def _inlet(self, link: tuple[int, int]) -> "Inlet":
        if link in self._layout.links:
            from .shm_ring import SharedMemoryInlet

            plan, deadline_s = self._layout.links[link], self._wiring.deadline_s
            reader = LineReader(self._segment, plan, reader=link[1], patience=self._patience, deadline_s=deadline_s)
            return SharedMemoryInlet(reader)
        from .torch_comm import TorchInlet

        return TorchInlet(self._gathering.group(f"link-{link[0]}", link), device=self._wiring.device)

    def _outlet(self, link: tuple[int, int]) -> "Outlet":
        if link in self._layout.links:
            from .shm_ring import SharedMemoryOutlet

            plan, deadline_s = self._layout.links[link], self._wiring.deadline_s
            return SharedMemoryOutlet(LineWriter(self._segment, plan, patience=self._patience, deadline_s=deadline_s))
        from .torch_comm import TorchOutlet

        # Every plan in flight may leave one message here before the next stage takes the first.
        return TorchOutlet(self._gathering.group(f"link-{link[0]}", link), capacity=2 * self._wiring.pp + 2)

    @cached_property
    def _gathering(self) -> "Gathering":
        from .torch_comm import Gathering

        return Gathering(self._wiring, rank=self._place.rank, local=self._layout.ranks.index(self._place.rank))


class _Nowhere:
    """The results of ranks that do not answer."""

    def send(self, message: bytes) -> None:
        raise AssertionError("the output rank alone answers")
