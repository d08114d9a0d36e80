"""Between stations 7 and 8: our own line from an ingress to a replica. This file is what its two ends share.

One TCP connection carries all generations between the two. Both prove that they know the secret before either reads a
message of the other (HMAC-SHA256 over both nonces; the roles differ, so no proof can be sent back):

    replica -> ingress   MAGIC, nonce
    ingress -> replica   MAGIC, nonce, proof
    replica -> ingress   proof

Then come frames: four bytes of length, most significant first, and one message in msgpack. Proofs keep strangers out;
frames are neither encrypted nor signed, so the network between nodes is trusted as Ray's own is. A peer that breaks any
rule is cut, which ends its generations and nobody else's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import socket
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, TypeVar, cast

import msgspec

from ..runtime.blocks import Changes
from ..runtime.errors import ShoalError
from ..runtime.generation import TokenEvent
from .backend import Failure, ModelInfo, Status

logger = logging.getLogger("shoal.router")

MAGIC = b"shoal/1\n"
_NONCE = 32
_PROOF = 32
_LENGTH = 4


class LineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds and bytes. Both ends must agree on `max_frame`.

    beat_s: between two heartbeats of a replica. silence_s: a peer that says, or takes, nothing for so long is cut.
    max_backlog: so is one that leaves so much unread.
    """

    handshake_s: float = 2.0
    beat_s: float = 0.5
    silence_s: float = 10.0
    max_frame: int = 64 * 2**20
    max_backlog: int = 128 * 2**20


class LineError(ShoalError):
    """The peer broke a rule of the line; the message is for our log."""


# What an ingress says.


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """`request` is msgpack, read where only its own generation can fail of it. Streams are numbered upwards."""

    stream: int
    request: bytes


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Nobody listens to the stream any more. One that has ended is none of the replica's concern."""

    stream: int


class Release(msgspec.Struct, frozen=True, array_like=True, tag="release"):
    """The answer to a goodbye, once another replica takes this ingress's work: nothing new comes over this line.

    is_last: no replica stays that could go on with what runs here; said again where that has changed.
    """

    is_last: bool = False


class Recite(msgspec.Struct, frozen=True, array_like=True, tag="recite"):
    """A `Cached` was missed: say from the start what is cached."""


class Queue(msgspec.Struct, frozen=True, array_like=True, tag="queue"):
    """Generations for the replica's part that wait at the ingress for a place, and how long the first of them has."""

    count: int = 0
    longest_s: float = 0.0


# What a replica says.


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """The first message."""

    replica: str
    info: ModelInfo


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """The replica lives. received: the last stream that was submitted before."""

    status: Status
    received: int


class Cached(msgspec.Struct, frozen=True, array_like=True, tag="cached"):
    """What the replica's cache has gained and lost since the one before; `number` counts them, upwards by one."""

    number: int
    changes: Changes


class Events(msgspec.Struct, frozen=True, array_like=True, tag="events"):
    """A stream's events since its last ones. The finish reason of the last ends the stream."""

    stream: int
    events: list[TokenEvent]


class Begun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    """A suspect's trial begins: until then it waits for other ingresses' trials, and is not the cause of anything."""

    stream: int


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """Ends a stream."""

    stream: int
    failure: Failure


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag="goodbye"):
    """The replica is to go. What runs goes on, and until it is released it takes what nobody else can take."""


FromIngress = Submit | Abort | Release | Recite | Queue
FromReplica = Welcome | Beat | Cached | Begun | Events | Failed | Goodbye


# Who is there. A handshake is a generator: it yields what to send and how many bytes to wait for, is sent those, and
# returns what to send last. No I/O, and nothing of the peer's is parsed.
Handshake = Generator[tuple[bytes, int], bytes, bytes]


def replica_handshake(secret: bytes) -> Handshake:
    """Raises LineError: the peer does not know the secret."""
    ours = secrets.token_bytes(_NONCE)
    answer = yield MAGIC + ours, len(MAGIC) + _NONCE + _PROOF
    theirs, proof = answer[len(MAGIC) : -_PROOF], answer[-_PROOF:]
    _check(answer, proof, _proof(secret, b"ingress", ours + theirs))
    return _proof(secret, b"replica", ours + theirs)


def ingress_handshake(secret: bytes) -> Handshake:
    """Raises LineError: the peer does not know the secret."""
    greeting = yield b"", len(MAGIC) + _NONCE
    ours = secrets.token_bytes(_NONCE)
    nonces = greeting[len(MAGIC) :] + ours
    proof = yield MAGIC + ours + _proof(secret, b"ingress", nonces), _PROOF
    _check(greeting, proof, _proof(secret, b"replica", nonces))
    return b""


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, MAGIC + role + nonces, hashlib.sha256)


def _check(greeting: bytes, proof: bytes, expected: bytes) -> None:
    if not greeting.startswith(MAGIC):
        raise LineError("the peer speaks another protocol")
    if not hmac.compare_digest(proof, expected):
        raise LineError("the peer does not know the secret")


Heard = TypeVar("Heard", contravariant=True)


class Party(Protocol[Heard]):
    """What stands behind one end of a connection."""

    def opened(self) -> None:
        """Both know each other; `send` works from now on."""
        ...

    def heard(self, message: Heard) -> None:
        """One message. LineError cuts the connection."""
        ...

    def closed(self, reason: str) -> None:
        """Called once for a connection, opened or not."""
        ...


class Wire(asyncio.Protocol):
    """One end of one connection: handshake, frames, limits. Messages go to and come from a `Party`.

    is_open: both ends have proven themselves. heard_at: when something came last, on the loop's clock.
    """

    def __init__(self, party: Party[Any], handshake: Handshake, *, hears: object, limits: LineLimits) -> None:
        """hears: the union of the messages that the peer may send."""
        self.is_open = False
        self.heard_at = 0.0
        self._party = party
        self._limits = limits
        self._handshake = handshake
        self._wanted = 0  # bytes of the handshake's next part
        self._decode: Callable[[bytearray], Any] = msgspec.msgpack.Decoder(hears).decode
        self._encode = msgspec.msgpack.Encoder().encode_into
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # of the handshake
        self._reason = "the peer closed the connection"

    def send(self, messages: Iterable[object]) -> None:
        """All of them in one write; not at all where the connection is gone.

        Raises:
            LineError: one is over the limit, and nothing was sent.
        """
        out = bytearray()
        for message in messages:
            start = len(out)
            self._encode(message, out, start + _LENGTH)
            size = len(out) - start - _LENGTH
            if size > self._limits.max_frame:
                raise LineError(f"a message has {size} bytes; at most {self._limits.max_frame} may cross the line")
            out[start : start + _LENGTH] = size.to_bytes(_LENGTH, "big")
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(out)
            if self._transport.get_write_buffer_size() > self._limits.max_backlog:
                self.cut("the peer does not keep up")

    def cut(self, reason: str) -> None:
        """Close now, whatever is still to be sent."""
        if self._transport is not None and not self._transport.is_closing():
            self._reason = reason
            self._transport.abort()

    def end(self) -> None:
        """Close once everything is sent."""
        if self._transport is not None:
            self._transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._timer = self._loop.call_later(self._limits.handshake_s, self.cut, "no proof in time")
        greeting, self._wanted = next(self._handshake)
        self._transport.write(greeting)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        self._buffer += data
        try:
            while not self.is_open:
                if len(self._buffer) < self._wanted:
                    return
                self._shake_hands()
            self._read_frames()
        except (LineError, msgspec.MsgspecError) as error:
            self._buffer.clear()
            self.cut(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self._cancel_timer()
        self._buffer.clear()
        self.is_open = False
        if error is not None:
            self._reason = f"the connection broke: {error}"
        self._party.closed(self._reason)

    def _shake_hands(self) -> None:
        assert self._transport is not None
        part = bytes(self._buffer[: self._wanted])
        del self._buffer[: self._wanted]
        try:
            answer, self._wanted = self._handshake.send(part)
        except StopIteration as end:
            self._transport.write(end.value)
            self._cancel_timer()
            self.is_open = True
            self._party.opened()
        else:
            self._transport.write(answer)

    def _read_frames(self) -> None:
        buffer, start = self._buffer, 0
        while self.is_open and len(buffer) - start >= _LENGTH:
            size = int.from_bytes(buffer[start : start + _LENGTH], "big")
            if size > self._limits.max_frame:
                raise LineError(f"a frame of {size} bytes; at most {self._limits.max_frame} are taken")
            end = start + _LENGTH + size
            if end > len(buffer):
                break
            self._party.heard(self._decode(buffer[start + _LENGTH : end]))
            start = end
        del buffer[:start]

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def set_socket(sock: socket.socket, limits: LineLimits) -> None:
    """Send at once. The kernel cuts a peer that takes nothing for `silence_s`: stopped, or gone with its machine."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.silence_s * 1000))


def family_of(host: str) -> socket.AddressFamily:
    """Of a numeric address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
