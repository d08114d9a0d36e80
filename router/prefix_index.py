"""Station 6's map: which replica has which blocks cached, so that one walk along a prompt finds where its prefix is.

Replicas say what their block pools can find (`runtime.blocks.Changes`, over the line); what this ingress has just sent
counts as there too, for as long as it is on its way. A name is the first 8 bytes of a block's, a mask has one bit for
each replica. Pure: messages come in, numbers go out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..runtime.blocks import SHORT, BlockNames, Changes, tenant_salt
from ..runtime.generation import GenerationRequest


class Catalogue:
    """The replica's side: what it has cached, for those who come later. What it gives is cut into parts.

    max_names: in a part, so that none keeps the line, or who reads it, for long.
    """

    def __init__(self, *, max_names: int = 4096) -> None:
        self._names: set[bytes] = set()
        self._max_bytes = max_names * SHORT

    def hear(self, changes: Changes) -> list[Changes]:
        """Take in what is new; gives the same in parts."""
        if changes.anew:
            self._names.clear()
        self._names.update(split(changes.added))
        self._names.difference_update(split(changes.removed))
        return self._parts(changes)

    def recite(self) -> list[Changes]:
        """All of it from the start."""
        return self._parts(Changes(True, b"".join(self._names), b""))

    def _parts(self, changes: Changes) -> list[Changes]:
        size = self._max_bytes
        return [
            Changes(changes.anew and at == 0, changes.added[at : at + size], changes.removed[at : at + size])
            for at in range(0, max(len(changes.added), len(changes.removed), 1), size)
        ]


class Promise:
    """Blocks that a replica does not have yet, but will once it has computed what it was sent."""

    def __init__(self, index: PrefixIndex, replica: str, names: list[bytes]) -> None:
        self._index = index
        self._replica = replica
        self._names = names

    def close(self) -> None:
        """From here on only what the replica itself says counts. Idempotent."""
        names, self._names = self._names, []
        self._index._withdraw(self._replica, names)


class PrefixIndex:
    """name -> mask of the replicas that have the block.

    Invariant: bit r of `_masks[name]` is set exactly if the name is in `_said[r]` or in a promise of r's that is open.
    Memory: about 140 bytes for each name, and 80 more for each further replica that has it.
    """

    def __init__(self, *, secret: bytes) -> None:
        """secret: what the engines salt their names with."""
        self.block_size = 0  # tokens; 0 before any replica publishes
        self._secret = secret
        self._masks: dict[bytes, int] = {}
        self._bits: dict[str, int] = {}
        self._replicas: dict[int, str] = {}  # the inverse
        self._said: dict[str, set[bytes]] = {}
        self._promised: dict[str, set[bytes]] = {}
        self._last: tuple[GenerationRequest, BlockNames] | None = None  # asked for again when it is sent

    # What replicas say

    def join(self, replica: str, *, block_size: int) -> None:
        """From now on the replica publishes. One with blocks of another size than the others' is left out."""
        self.leave(replica)
        if not self._bits:
            self.block_size, self._last = block_size, None
        if block_size and block_size == self.block_size:
            taken = sum(self._bits.values())
            self._bits[replica] = bit = ~taken & (taken + 1)  # the lowest that is free
            self._replicas[bit] = replica
            self._said[replica], self._promised[replica] = set(), set()

    def leave(self, replica: str) -> None:
        """Forget a replica. O(its blocks)."""
        if replica in self._bits:
            self._clear(replica, self._said.pop(replica) | self._promised.pop(replica))
            del self._replicas[self._bits.pop(replica)]

    def hear(self, replica: str, changes: Changes) -> None:
        if replica not in self._bits:
            return
        said, masks, bit = self._said[replica], self._masks, self._bits[replica]
        if changes.anew:
            gone, self._said[replica] = said - self._promised[replica], set()
            self._clear(replica, gone)
            said = self._said[replica]
        for name in split(changes.added):
            said.add(name)
            masks[name] = masks.get(name, 0) | bit
        removed = set(split(changes.removed))
        said -= removed
        self._clear(replica, removed - self._promised[replica])

    # What an ingress asks

    def names(self, request: GenerationRequest) -> BlockNames:
        """The names of the log's blocks, those of its last answer too, made as they are asked for."""
        if self._last is None or not _is_same_log(self._last[0], request):
            tokens = [*request.prompt, *request.tokens] if request.tokens else request.prompt
            salt = tenant_salt(self._secret, request.tenant)
            self._last = request, BlockNames(tokens, salt=salt, block_size=self.block_size)
        return self._last[1]

    def match(self, request: GenerationRequest) -> dict[str, int]:
        """Replica -> how many of the log's first blocks it has, where it has any. O(blocks that the best one has)."""
        names, masks = self.names(request), self._masks
        found: dict[str, int] = {}
        alive, depth = 0, 0
        for depth, name in enumerate(names.first(self._num_shareable(request))):
            mask = masks.get(name[:SHORT], 0)
            if depth:
                mask &= alive
                if mask != alive:
                    self._tell(found, alive & ~mask, depth)
            alive = mask
            if not alive:
                return found
        self._tell(found, alive, depth + 1)
        return found

    def _tell(self, found: dict[str, int], mask: int, blocks: int) -> None:
        while mask:
            lowest = mask & -mask
            found[self._replicas[lowest]] = blocks
            mask ^= lowest

    def send(self, request: GenerationRequest, replica: str) -> tuple[int, Promise]:
        """The log goes to the replica: how many of its tokens the cache there spares, and the promise of the rest."""
        if replica not in self._bits:
            return 0, Promise(self, replica, [])
        bit, masks, names = self._bits[replica], self._masks, self.names(request)
        row = [name[:SHORT] for name in names.first(self._num_shareable(request))]
        fresh = [name for name in row if not masks.get(name, 0) & bit]
        for name in fresh:
            masks[name] = masks.get(name, 0) | bit
        self._promised[replica].update(fresh)
        spared = row.index(fresh[0]) if fresh else len(row)
        return spared * self.block_size, Promise(self, replica, fresh)

    def _num_shareable(self, request: GenerationRequest) -> int:
        """Blocks that a cache may spare: the last token is always computed, its logits draw the next."""
        return (len(request.prompt) + len(request.tokens) - 1) // self.block_size if self._bits else 0

    def _withdraw(self, replica: str, names: list[bytes]) -> None:
        if replica in self._bits:
            self._promised[replica].difference_update(names)
            self._clear(replica, set(names) - self._said[replica])

    def _clear(self, replica: str, names: Iterable[bytes]) -> None:
        masks, others = self._masks, ~self._bits[replica]
        for name in names:
            mask = masks.get(name, 0) & others
            if mask:
                masks[name] = mask
            else:
                masks.pop(name, None)

    def check(self) -> None:
        """Assert the invariant. For tests."""
        expected: dict[bytes, int] = {}
        for replica, bit in self._bits.items():
            for name in self._said[replica] | self._promised[replica]:
                expected[name] = expected.get(name, 0) | bit
        assert expected == self._masks, "a mask is not what replicas said and were promised"


def _is_same_log(one: GenerationRequest, other: GenerationRequest) -> bool:
    """Also of two choices of one prompt. Compares no tokens: an answer is another log's."""
    fresh = one.prompt is other.prompt and one.tenant == other.tenant and not one.tokens and not other.tokens
    return fresh or one is other


def split(names: bytes) -> Iterator[bytes]:
    """The short names in a row of them."""
    return (names[start : start + SHORT] for start in range(0, len(names), SHORT))
