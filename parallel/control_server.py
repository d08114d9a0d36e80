"""The driver's end of the control lines: it listens until every rank is there, and hears when one ends."""

import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Generator

import msgspec

from .control import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    ControlError,
    FromRank,
    Hello,
    Wire,
    frame,
    prove,
    watch_for_vanished_peer,
)

GUEST_TIMEOUT_S = 10.0  # for the proof and Hello
MAX_GUESTS = 64  # connections that have not said who they are
SEND_TIMEOUT_S = 5.0
READ_BYTES = 65536

_decode = msgspec.msgpack.Decoder(FromRank).decode

# Yields how many bytes it wants, is sent exactly those.
Conversation = Generator[int, bytes, None]


class _Peer:
    """A connection: a guest until its Hello."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rank: int | None = None
        self.since = time.monotonic()
        self.unread = bytearray()
        self.wanted = 0


class ControlServer:
    """Ranks come, prove that they know the secret, and talk. Used by one thread at a time.

    A peer that cannot prove it, sends anything malformed, or dawdles, is cut; it disturbs nobody.
    """

    def __init__(self, address: str, *, secret: bytes, size: int) -> None:
        """Listen on a free port of `address`, for ranks 0 to `size - 1`. Raises OSError."""
        self._secret = secret
        self._size = size
        self._guests: set[_Peer] = set()
        self._ranks: dict[int, _Peer] = {}
        self._events: list[tuple[int, FromRank | None]] = []
        self._talks: dict[_Peer, Conversation] = {}
        self._selector = selectors.DefaultSelector()
        self._door: socket.socket | None = socket.create_server((address, 0), family=_family(address))
        self._door.setblocking(False)
        self.port: int = self._door.getsockname()[1]
        self._selector.register(self._door, selectors.EVENT_READ)

    def poll(self, timeout_s: float) -> list[tuple[int, FromRank | None]]:
        """Wait until something happens, at most so long: (rank, its message), or (rank, None) when its line ended."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._welcome()
            elif key.data in self._talks:  # not cut in this very round
                self._read(key.data)
        now = time.monotonic()
        for guest in [guest for guest in self._guests if now - guest.since > GUEST_TIMEOUT_S]:
            self._cut(guest)
        events, self._events = self._events, []
        return events

    def send(self, rank: int, message: Wire) -> None:
        """To a rank that said Hello. One that does not take it in time loses its line, which `poll` tells."""
        peer = self._ranks.get(rank)
        if peer is None:
            return
        data = frame(message)
        try:
            peer.sock.settimeout(SEND_TIMEOUT_S)
            peer.sock.sendall(data)
            peer.sock.setblocking(False)
        except OSError:
            self._cut(peer)

    def shut_door(self) -> None:
        """Everybody is there: stop listening, and send the guests away."""
        if self._door is not None:
            self._selector.unregister(self._door)
            self._door.close()
            self._door = None
        for guest in list(self._guests):
            self._cut(guest)

    def close(self) -> None:
        """Cut all lines. Idempotent."""
        self.shut_door()
        for peer in list(self._ranks.values()):
            self._cut(peer)
        self._selector.close()

    def _welcome(self) -> None:
        assert self._door is not None
        try:
            sock, _ = self._door.accept()
        except OSError:
            return  # it left again before we looked
        if len(self._guests) >= MAX_GUESTS:
            sock.close()
            return
        sock.setblocking(False)
        watch_for_vanished_peer(sock)
        peer = _Peer(sock)
        self._guests.add(peer)
        self._talks[peer] = self._talk(peer)
        peer.wanted = next(self._talks[peer])
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(READ_BYTES)
            if not data:
                raise ControlError("the end")
            peer.unread += data
            while len(peer.unread) >= peer.wanted:
                piece = bytes(peer.unread[: peer.wanted])
                del peer.unread[: peer.wanted]
                peer.wanted = self._talks[peer].send(piece)
        except BlockingIOError:
            return
        except (ControlError, OSError, msgspec.MsgspecError):
            self._cut(peer)

    def _talk(self, peer: _Peer) -> Conversation:
        """One rank's side of the conversation, in the order it comes."""
        theirs = yield NONCE_BYTES
        mine = secrets.token_bytes(NONCE_BYTES)
        peer.sock.sendall(mine + prove(self._secret, b"driver", theirs, mine))
        proof = yield PROOF_BYTES
        if not hmac.compare_digest(proof, prove(self._secret, b"rank", theirs, mine)):
            raise ControlError("a wrong secret")
        while True:
            (size,) = LENGTH.unpack((yield LENGTH.size))
            if size > MAX_MESSAGE_BYTES:
                raise ControlError("a message that is too long")
            self._take(peer, _decode((yield size)))

    def _take(self, peer: _Peer, message: FromRank) -> None:
        if isinstance(message, Hello):
            if peer.rank is not None or message.rank in self._ranks or not 0 <= message.rank < self._size:
                raise ControlError("a rank that is there already, or that nobody waits for")
            peer.rank = message.rank
            self._ranks[message.rank] = peer
            self._guests.discard(peer)
        elif peer.rank is None:
            raise ControlError("no Hello")
        assert peer.rank is not None
        self._events.append((peer.rank, message))

    def _cut(self, peer: _Peer) -> None:
        self._talks.pop(peer).close()
        self._guests.discard(peer)
        self._selector.unregister(peer.sock)
        peer.sock.close()
        if peer.rank is not None:
            del self._ranks[peer.rank]
            self._events.append((peer.rank, None))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
