"""Plans and results between the driver and the ranks of other nodes, over ZeroMQ with CURVE.

The driver binds one socket to its own address, under a key made for this group. The key's public half is known only to
those whom the driver told it over the control line, and no handshake succeeds without it: it is what lets a rank in.
"""

import math
import time
from collections.abc import Sequence

import zmq

from .peer import DRIVER, PeerTimeout, absent, name

_HERE = b"here"


class Hub:
    """The driver's end: sends to all ranks, receives from the one that answers."""

    def __init__(self, address: str, ranks: Sequence[int], *, deadline_s: float) -> None:
        """address: the driver's node's own, to listen on. ranks: those that will connect."""
        self._ranks = tuple(ranks)
        self._deadline_s = deadline_s
        self.key, secret = zmq.curve_keypair()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_secretkey, self._socket.curve_publickey = secret, self.key
        self._socket.linger = 0
        self._socket.ipv6 = ":" in address
        self._socket.router_mandatory = True  # to a rank that is not there: an error, not silence
        self._socket.sndtimeo = int(deadline_s * 1000)
        self.port = self._socket.bind_to_random_port(f"tcp://{_host(address)}")

    def await_ranks(self) -> None:
        """Until all ranks have connected. Raises PeerTimeout."""
        missing = set(self._ranks)
        while missing:
            if not self.poll(self._deadline_s):
                raise absent(min(missing), "connect", self._deadline_s)
            sender, _ = self._socket.recv_multipart()
            missing.discard(_rank(sender))

    def send(self, message: bytes) -> None:
        """To every rank. Raises PeerTimeout where one has gone, or takes nothing in time."""
        for rank in self._ranks:
            try:
                self._socket.send_multipart([_identity(rank), message])
            except zmq.ZMQError as problem:
                raise PeerTimeout(f"send: {name(rank)} cannot be reached: {problem}", peer=rank) from problem

    def poll(self, timeout_s: float) -> bool:
        """Wait until a message is there; False if none has come by then."""
        return bool(self._socket.poll(math.ceil(timeout_s * 1000)))

    def receive(self) -> bytes:
        """The next message, which `poll` has seen."""
        message: bytes = self._socket.recv_multipart()[1]
        return message

    def close(self) -> None:
        self._context.destroy(linger=0)


class Spoke:
    """A rank's end."""

    def __init__(self, address: str, port: int, key: bytes, *, rank: int, deadline_s: float) -> None:
        """Connects to the hub, now or as soon as it can."""
        self._deadline_s = deadline_s
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.curve_serverkey = key
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.identity = _identity(rank)
        self._socket.linger = 0
        self._socket.ipv6 = ":" in address
        self._socket.sndtimeo = int(deadline_s * 1000)
        self._socket.connect(f"tcp://{_host(address)}:{port}")
        self._socket.send(_HERE)

    def send(self, message: bytes) -> None:
        """To the driver. Raises PeerTimeout if it takes nothing in time."""
        try:
            self._socket.send(message)
        except zmq.Again as problem:
            raise absent(DRIVER, "send", self._deadline_s) from problem

    def poll(self, timeout_s: float) -> bool:
        """Wait until a message is there; False if none has come by then. Of short waits: ZeroMQ counts in ms."""
        if not self._socket.poll(0):
            time.sleep(timeout_s)
        return bool(self._socket.poll(0))

    def receive(self) -> bytes:
        """The next message; waits for ever."""
        message: bytes = self._socket.recv()
        return message

    def close(self) -> None:
        self._context.destroy(linger=math.ceil(self._deadline_s * 1000))


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _identity(rank: int) -> bytes:
    return b"rank %d" % rank


def _rank(identity: bytes) -> int:
    return int(identity.split()[1])
