"""A line of messages in shared memory: a ring of bytes with one writer, and readers who each read everything.

Positions count bytes from the start, for ever; the ring holds those from the slowest reader's to the writer's. A
message is its length and its bytes, and may be longer than the ring: it goes through in pieces as the readers make
room. Plans, results and the hidden states between two stages of a node travel this way. Nothing here needs torch.
"""

import math

from .layout import LinePlan
from .peer import absent
from .shm import Cell, Patience, Segment

_WORD = 8
# Long messages are announced piece by piece: the reader copies one, from the cache, while the next is written.
_PIECE = 256 * 1024


class LineWriter:
    """The end that messages go in."""

    def __init__(self, segment: Segment, plan: LinePlan, *, patience: Patience, deadline_s: float) -> None:
        assert plan.capacity % _WORD == 0
        self._plan = plan
        self._deadline_s = deadline_s
        self._data = memoryview(segment.memory)[plan.data : plan.end]
        self._lengths = self._data.cast("Q")
        self._written = Cell(segment, plan.written)
        self._readers = [Cell(segment, offset, patience=patience) for offset in plan.read]
        self._at = 0
        self._limit = plan.capacity  # the position up to which there is room for certain

    def send(self, message: bytes | memoryview) -> None:
        """Put a message on the line. message: bytes, or a contiguous memoryview of them.

        Waits only while the line is full. Raises PeerTimeout, which names a reader, if no room is made in time.
        """
        size = len(message)
        self._room(_WORD)
        self._lengths[self._at % self._plan.capacity // _WORD] = size
        self._at += _WORD
        if size <= self._limit - self._at and size <= self._plan.capacity - self._at % self._plan.capacity:
            start = self._at % self._plan.capacity
            self._data[start : start + size] = message
            self._at += size
        else:
            self._send_pieces(memoryview(message))
        self._at += -self._at % _WORD
        self._written.publish(self._at)

    def _send_pieces(self, message: memoryview) -> None:
        done = 0
        while done < len(message):
            room = self._room(1)
            start = self._at % self._plan.capacity
            count = min(len(message) - done, room, self._plan.capacity - start, _PIECE)
            self._data[start : start + count] = message[done : done + count]
            done += count
            self._at += count
            self._written.publish(self._at)

    def _room(self, least: int) -> int:
        """Bytes that may be written, at least `least`."""
        if self._limit - self._at < least:
            target = self._at + least - self._plan.capacity
            for rank, cell in zip(self._plan.readers, self._readers, strict=True):
                if not cell.wait_for(target, self._deadline_s):
                    raise absent(rank, "send", self._deadline_s)
            self._limit = min(cell.read() for cell in self._readers) + self._plan.capacity
        return self._limit - self._at


class LineReader:
    """An end that messages come out of."""

    def __init__(
        self, segment: Segment, plan: LinePlan, *, reader: int, patience: Patience, deadline_s: float = math.inf
    ) -> None:
        """reader: this process's rank among the plan's readers."""
        index = plan.readers.index(reader)
        self._plan = plan
        self._deadline_s = deadline_s
        self._data = memoryview(segment.memory)[plan.data : plan.end]
        self._lengths = self._data.cast("Q")
        self._written = Cell(segment, plan.written, waiter=index, patience=patience)
        self._read = Cell(segment, plan.read[index])
        self._at = 0
        self._known = 0  # the position up to which there are bytes for certain

    def poll(self, timeout_s: float) -> bool:
        """Wait until a message is there; False if none has come by then."""
        return self._come(_WORD, timeout_s)

    def receive(self) -> bytes:
        """The next message. Raises PeerTimeout if it does not come within the deadline."""
        message = bytearray(self._length())
        self._fill(memoryview(message))
        return bytes(message)

    def receive_into(self, out: memoryview) -> None:
        """The next message, whose length both sides know: contiguous bytes."""
        size = self._length()
        assert size == len(out), f"the sender's message has {size} bytes, the receiver's {len(out)}"
        self._fill(out)

    def _length(self) -> int:
        self._wait(_WORD)
        size = self._lengths[self._at % self._plan.capacity // _WORD]
        self._at += _WORD
        return size

    def _fill(self, out: memoryview) -> None:
        done = 0
        while done < len(out):
            self._wait(1)
            start = self._at % self._plan.capacity
            count = min(len(out) - done, self._known - self._at, self._plan.capacity - start, _PIECE)
            out[done : done + count] = self._data[start : start + count]
            done += count
            self._at += count
            if done < len(out):
                self._read.publish(self._at)
        self._at += -self._at % _WORD
        self._read.publish(self._at)

    def _wait(self, least: int) -> None:
        if not self._come(least, self._deadline_s):
            raise absent(self._plan.writer, "receive", self._deadline_s)

    def _come(self, least: int, timeout_s: float) -> bool:
        if self._known - self._at < least:
            if not self._written.wait_for(self._at + least, timeout_s):
                return False
            self._known = self._written.read()
        return True
