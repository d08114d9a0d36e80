"""What a rank must know to talk to the others, and what lies where in the memory that the ranks of a node share.

Nothing here needs torch: the driver makes it, and a rank reads it, before torch is imported.
"""

from collections.abc import Sequence

import msgspec

from .grid import Grid
from .layout import CommPlan, LinePlan
from .peer import DRIVER
from .shm import CELL_BYTES

_SLOT_BYTES = 2**20  # larger tensors are reduced in pieces of this, and shards that share cores meet once for each
_LEAST_LINE, _LONGEST_LINE = 64 * 1024, 64 * 2**20


class WireSizes(msgspec.Struct, frozen=True, kw_only=True):
    """What the wires are made for. Longer messages get through too, but wait for their readers on the way.

    max_hidden_bytes: the largest tensor between two stages: tokens in a step x hidden size x 4.
    max_plan_bytes: the largest plan that is usual.
    """

    max_hidden_bytes: int = 2**20
    max_plan_bytes: int = 2**20


class Wiring(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank must know to reach the others, and nobody else may: it goes over an authenticated connection.

    nodes, addresses: of each rank, its node's id and how others reach it. driver_address: where the driver listens.
    segment: how the names of the nodes' segments begin.
    """

    tp: int
    pp: int
    nodes: tuple[str, ...]
    addresses: tuple[str, ...]
    driver_node: str
    driver_address: str
    device: str
    sizes: WireSizes
    deadline_s: float
    segment: str
    hub_port: int = 0
    hub_key: bytes = b""
    store_port: int = 0

    @property
    def grid(self) -> Grid:
        return Grid(self.tp, self.pp)

    @property
    def output_rank(self) -> int:
        return next(place.rank for place in self.grid if place.answers)

    @property
    def far_ranks(self) -> tuple[int, ...]:
        """Those to whom the driver talks over the network."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node != self.driver_node)

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each stage that reduce together, by shard."""
        if self.tp == 1:
            return ()
        return tuple(tuple(range(stage * self.tp, (stage + 1) * self.tp)) for stage in range(self.pp))

    @property
    def links(self) -> tuple[tuple[int, int], ...]:
        """(from, to) in the ring of stages, by the sender's rank."""
        return tuple((place.rank, place.next_rank) for place in self.grid) if self.pp > 1 else ()

    @property
    def needs_torch(self) -> bool:
        """Whether any two ranks exchange tensors over torch.distributed."""
        return any(not self.share_memory(ranks) for ranks in (*self.stages, *self.links))

    def share_memory(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks exchange tensors in shared memory: CPU ranks of one node."""
        return self.device == "cpu" and len({self.nodes[rank] for rank in ranks}) == 1

    def ranks_on(self, node: str) -> tuple[int, ...]:
        return tuple(rank for rank, its in enumerate(self.nodes) if its == node)


class NodeLayout:
    """The shared segment of one node. It follows from the wiring alone, so no offsets are told.

    cells: of each local rank, which it sets once it maps the segment. plans, results: the driver's lines, where it is
    here. comms: by the stage's ranks. links: by (from, to).
    """

    def __init__(self, wiring: Wiring, node: str) -> None:
        nodes = sorted({*wiring.nodes, wiring.driver_node})
        self.name = f"{wiring.segment}-{nodes.index(node)}"
        self.ranks = wiring.ranks_on(node)
        self.cells = {rank: CELL_BYTES * index for index, rank in enumerate(self.ranks)}
        self.size = CELL_BYTES * len(self.ranks)
        self.plans: LinePlan | None = None
        self.results: LinePlan | None = None
        if node == wiring.driver_node and self.ranks:
            self.plans = self._line(wiring.sizes.max_plan_bytes, DRIVER, self.ranks)
        if wiring.nodes[wiring.output_rank] == wiring.driver_node == node:
            self.results = self._line(wiring.sizes.max_plan_bytes, wiring.output_rank, (DRIVER,))

        def is_mine(ranks: Sequence[int]) -> bool:
            return wiring.nodes[ranks[0]] == node and wiring.share_memory(ranks)

        self.comms = {ranks: self._comm(ranks) for ranks in wiring.stages if is_mine(ranks)}
        hidden = wiring.sizes.max_hidden_bytes
        self.links = {link: self._line(hidden, link[0], link[1:]) for link in wiring.links if is_mine(link)}

    @property
    def is_needed(self) -> bool:
        return bool(self.plans or self.results or self.comms or self.links)

    def _line(self, message_bytes: int, writer: int, readers: tuple[int, ...]) -> LinePlan:
        capacity = min(max(2 * message_bytes, _LEAST_LINE), _LONGEST_LINE)  # one is read while the next is written
        plan = LinePlan(self.size, -(-capacity // CELL_BYTES) * CELL_BYTES, writer, readers)
        self.size = plan.end
        return plan

    def _comm(self, ranks: tuple[int, ...]) -> CommPlan:
        plan = CommPlan(self.size, _SLOT_BYTES, ranks)
        self.size = plan.end
        return plan
