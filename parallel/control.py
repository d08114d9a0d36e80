"""The control line between a replica's driver and each of its ranks (beside station 11): one TCP connection a rank.

It brings the rank up and carries its heartbeat; steps never travel on it. Its end is the sign of death that works
everywhere: the kernel closes it as the process ends, on any node, and whichever side sees the end, ends too.

    rank                                                      driver
    nonce R                                              ->
                                                         <-   nonce D, HMAC(secret, "driver" R D)
    HMAC(secret, "rank" R D)                             ->
    Hello                                                ->
                                                         <-   Wire
    Wired, Progress ..., Ready, then Beat, Beat, ...     ->

and `Failed` before an exception ends the rank. A message is its length (4 bytes, big-endian) and msgpack. Nothing is
parsed before both sides have proved that they know the group's secret, which is made anew at each start.
"""

import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
from importlib import metadata
from platform import python_version_tuple

import msgspec

from .station import Station

NONCE_BYTES = 32
PROOF_BYTES = 32
LENGTH = struct.Struct(">I")
MAX_MESSAGE_BYTES = 2**20
MAX_TEXT = 4096  # characters of a message to the operator
BEAT_S = 0.25
DIAL_TIMEOUT_S = 10.0
VANISHED_MS = 10_000  # what was sent is not acknowledged: the other node is gone without a word


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank must be given to find its driver. `node`: the id of the node that it runs on."""

    host: str
    port: int
    secret: bytes
    rank: int
    node: str = "local"
    device: str = "cpu"

    def __repr__(self) -> str:  # the secret belongs in no log
        return f"RankStart(rank={self.rank}, node={self.node!r}, driver={self.host}:{self.port})"


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A rank is there. address: its node's own, as seen on the way to the driver. device: what it has found."""

    rank: int
    node: str
    address: str
    pid: int
    device: str
    versions: dict[str, str]


class Wire(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What to become. wiring: a `Wiring` in msgpack. factory: "module:function", a `rank.WorkerFactory`."""

    tp: int
    pp: int
    wiring: bytes
    factory: str
    argument: bytes


class Wired(msgspec.Struct, frozen=True, tag=True):
    """The rank holds all its wires."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A line for the operator."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The rank waits for plans. `details` are `RankInfo.details`."""

    details: dict[str, int | str]


class Beat(msgspec.Struct, frozen=True, tag=True):
    """`Station.read()`, four times a second."""

    station: str
    count: int


class Failed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """An exception ends the rank. slots: the rows it blames.

    is_victim: it waited in vain for another; peer: for whom, if it knows.
    """

    kind: str
    message: str
    station: str
    slots: tuple[int, ...] = ()
    is_victim: bool = False
    peer: int | None = None


FromRank = Hello | Wired | Progress | Ready | Beat | Failed


class ControlError(Exception):
    """The other side is not who it should be, or does not speak as it should."""


def prove(secret: bytes, role: bytes, rank_nonce: bytes, driver_nonce: bytes) -> bytes:
    """The proof that `role` (b"driver" or b"rank") knows the secret; good for this one connection."""
    return hmac.digest(secret, role + rank_nonce + driver_nonce, "sha256")


def frame(message: msgspec.Struct) -> bytes:
    """A message as it is sent."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ControlError(f"a {type(message).__name__} of {len(body)} bytes; at most {MAX_MESSAGE_BYTES} are carried")
    return LENGTH.pack(len(body)) + body


def watch_for_vanished_peer(sock: socket.socket) -> None:
    """Break the connection when the other node disappears without closing it (Linux; elsewhere TCP's own hours)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_MS)


def versions() -> dict[str, str]:
    """What must be the same on both sides of the line. Reads metadata; imports nothing."""
    found = {"python": ".".join(python_version_tuple()[:2])}
    for name in ("shoal", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class ControlLine:
    """The rank's end."""

    def __init__(self, start: RankStart) -> None:
        """Connect, and prove both sides. Raises ControlError or OSError."""
        self._sock = socket.create_connection((start.host, start.port), timeout=DIAL_TIMEOUT_S)
        try:
            watch_for_vanished_peer(self._sock)
            self._shake_hands(start.secret)
        except BaseException:
            self._sock.close()
            raise
        self._sock.settimeout(None)
        self._sending = threading.Lock()
        self._is_closed = False

    @property
    def address(self) -> str:
        """This node's own address on the way to the driver."""
        return str(self._sock.getsockname()[0])

    def send(self, message: FromRank) -> None:
        """Any thread may send. Raises OSError once the driver is gone."""
        data = frame(message)
        with self._sending:
            self._sock.sendall(data)

    def progress(self, text: str) -> None:
        """Tell the operator how it goes."""
        self.send(Progress(text[:MAX_TEXT]))

    def receive(self) -> Wire:
        """Wait for the one message that the driver sends. Raises ControlError, OSError, msgspec.MsgspecError."""
        (size,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if size > MAX_MESSAGE_BYTES:
            raise ControlError(f"a message of {size} bytes; at most {MAX_MESSAGE_BYTES} are carried")
        return msgspec.msgpack.decode(self._exactly(size), type=Wire)

    def keep(self, station: Station) -> None:
        """From now on send a heartbeat, and end this process at once if the driver ends."""
        threading.Thread(target=self._beat, args=(station,), name="shoal-heartbeat", daemon=True).start()

    def close(self) -> None:
        self._is_closed = True
        self._sock.shutdown(socket.SHUT_RDWR)  # wakes the heartbeat's thread, which lets go of the socket

    def _shake_hands(self, secret: bytes) -> None:
        mine = secrets.token_bytes(NONCE_BYTES)
        self._sock.sendall(mine)
        theirs = self._exactly(NONCE_BYTES)
        if not hmac.compare_digest(self._exactly(PROOF_BYTES), prove(secret, b"driver", mine, theirs)):
            raise ControlError("whoever listens at the driver's address does not know the group's secret")
        self._sock.sendall(prove(secret, b"rank", mine, theirs))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._sock.recv(min(size - len(data), 65536))
            if not part:
                raise ControlError("the driver has ended")
            data += part
        return bytes(data)

    def _beat(self, station: Station) -> None:
        with selectors.DefaultSelector() as selector, self._sock:
            selector.register(self._sock, selectors.EVENT_READ)
            # The driver says nothing after Wire: what can be read is the end.
            while not selector.select(BEAT_S):
                try:
                    self.send(Beat(*station.read()))
                except OSError:
                    break
            if not self._is_closed:
                # Not an exception: the main thread may be deep in a wait that nobody will end.
                os._exit(1)
