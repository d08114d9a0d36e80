"""The KV cache as plain numbers: which blocks are held, which are free, and which full ones can be found by content.

A block is a page number; the tensors behind it live in `kv.py`. Every block is in exactly one of three states:

    held     references > 0                       by that many sequences; found by content if it has a digest
    cached   references 0 and a digest            kept for who asks next, evicted oldest first
    blank    references 0 and no digest           taken first

A full block is named by a SHA-256 chain over everything before it and in it, and the chain starts from a secret
per-tenant salt: equal names mean equal content of the same tenant. What is not full is never named, so nobody ever
writes into a block that somebody else may read.

The pool keeps a journal of the names that could be found and no longer can, for whoever sends requests to where their
prefixes are (`router/prefix_index.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

import msgspec

Digest = bytes
SHORT = 8  # bytes of a name in `Changes`: two of a million are equal with a chance of 3 in 100 million
_RUN = 8  # names made at a time


def tenant_salt(secret: bytes, tenant: str) -> Digest:
    """What the first block's name is chained to. Without the secret nobody can tell what a tenant has cached."""
    return hmac.digest(secret, tenant.encode(), "sha256")


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """What became of a pool's names since it was asked last, as a set: short names, one behind the other.

    anew: the set is empty before; whatever was said earlier is void.
    """

    anew: bool
    added: bytes
    removed: bytes

    def __post_init__(self) -> None:
        if len(self.added) % SHORT or len(self.removed) % SHORT:
            raise ValueError(f"names have {SHORT} bytes each")

    def __bool__(self) -> bool:
        return bool(self.anew or self.added or self.removed)


class BlockNames:
    """The digests of one log's full blocks, each made once and only when it, or one just before, is asked for."""

    __slots__ = ("_digests", "_salt", "_size", "_tokens")

    def __init__(self, tokens: list[int], *, salt: Digest, block_size: int) -> None:
        """`tokens` is the live log: it may grow, what is in it never changes."""
        self._tokens = tokens
        self._salt = salt
        self._size = block_size
        self._digests: list[Digest] = []

    def __getitem__(self, index: int) -> Digest:
        """The name of block `index`, whose tokens must all be there."""
        if index >= len(self._digests):
            self._extend(index + 1)
        return self._digests[index]

    def _extend(self, count: int) -> None:
        """Have at least `count`: a few more where their tokens are there, which costs less than one at a time."""
        digests, tokens, size, sha256 = self._digests, self._tokens, self._size, hashlib.sha256
        last = digests[-1] if digests else self._salt
        end = max(count, min(count - count % -_RUN, len(tokens) // size))
        run = tokens[len(digests) * size : end * size]
        assert len(run) == (end - len(digests)) * size, "a block that is not full has no name"
        content = struct.pack(f"<{len(run)}I", *run)
        for at in range(0, len(content), 4 * size):
            last = sha256(last + content[at : at + 4 * size]).digest()
            digests.append(last)

    def first(self, count: int) -> Iterator[Digest]:
        """The names of the first `count` blocks, made as they are asked for."""
        known = self._digests[:count]
        yield from known
        for index in range(len(known), count):
            yield self[index]


class BlockPool:
    """Reference counts, the content index and the order of eviction. Every operation is O(1) a block."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._digests: list[Digest | None] = [None] * num_blocks
        self._by_digest: dict[Digest, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._journal: dict[Digest, bool] = {}  # name -> whether it can be found, of those whose state has changed
        self._begins_anew = True  # the journal is useless: too long, or all was forgotten

    def __contains__(self, digest: Digest) -> bool:
        """Whether a block of this name would be found."""
        return digest in self._by_digest

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds: blank or cached."""
        return len(self._blank) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, digests: Iterable[Digest]) -> list[int]:
        """Take a reference on each block of the longest prefix of `digests` that is known."""
        found = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of no known content, with one reference each. At least `count` must be free."""
        assert count <= self.num_free, "the caller looks at num_free first"
        taken = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._references[block] = 1
            taken.append(block)
        return taken

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def release(self, blocks: list[int]) -> None:
        """Give back one reference on each block, of one sequence in order.

        The last one goes first and is so evicted first: a prefix without its tail is still of use, not the reverse.
        """
        for block in reversed(blocks):
            references = self._references[block] - 1
            assert references >= 0, "a block was released twice"
            self._references[block] = references
            if references == 0:
                if self._digests[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, digest: Digest) -> None:
        """Let a held, full block be found by its content. Of two equal blocks the first keeps the name."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest
            self._journal[digest] = True
            if len(self._journal) > self.num_blocks:  # nobody asks: a list of all names would be as short
                self._journal.clear()
                self._begins_anew = True

    def forget(self, blocks: list[int]) -> None:
        """Let held blocks be found no more: their content is in doubt."""
        for block in blocks:
            if self._digests[block] is not None:
                self._forget(block)

    def reset(self) -> None:
        """The cache is empty: no block is found by content any more. Nobody may hold one."""
        assert self.num_free == self.num_blocks, "a block is held"
        self._blank += self._cached
        self._cached.clear()
        self._by_digest.clear()
        self._digests = [None] * self.num_blocks
        self._journal.clear()
        self._begins_anew = True

    def take_changes(self) -> Changes:
        """What became of the names since the last call. O(what changed), or O(blocks) where that was forgotten."""
        anew, journal = self._begins_anew, self._journal
        added = self._by_digest if anew else [digest for digest, is_there in journal.items() if is_there]
        removed = [] if anew else [digest for digest, is_there in journal.items() if not is_there]
        self._journal, self._begins_anew = {}, False
        return Changes(anew, _short(added), _short(removed))

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digests[block] = None
        self._journal[digest] = False

    def check(self, holders: Iterable[list[int]]) -> None:
        """Assert every invariant, given what each holder believes to hold. For tests: O(blocks)."""
        held = Counter(block for blocks in holders for block in blocks)
        assert all(self._references[block] == held[block] for block in range(self.num_blocks)), (
            "references are not the holders"
        )
        free = [*self._blank, *self._cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == set(range(self.num_blocks)) - set(held), "free is not what nobody holds"
        named = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert named == self._by_digest, "the index is not the blocks' names"
        assert len(named) == sum(digest is not None for digest in self._digests), "two blocks have one name"
        assert all(self._digests[block] is None for block in self._blank), "a blank block has a name"
        assert all(self._digests[block] is not None for block in self._cached), "a cached block has no name"


def _short(digests: Iterable[Digest]) -> bytes:
    return b"".join(digest[:SHORT] for digest in digests)
