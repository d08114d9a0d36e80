"""What a wait for another process ends in where that process does not come."""

DRIVER = -1  # the driver's number where ranks are numbered
# Ranks come to their wires seconds apart: each has torch to import. Whoever starts them has a shorter deadline.
CONNECT_S = 300.0


class PeerTimeout(Exception):
    """A process of the group did not come within the deadline, or its connection broke.

    peer: its rank, `DRIVER`, or None where one of several may be it.
    """

    def __init__(self, message: str, *, peer: int | None) -> None:
        super().__init__(message)
        self.peer = peer


def name(peer: int) -> str:
    """A process of the group as users read it."""
    return "the driver" if peer == DRIVER else f"rank {peer}"


def absent(peer: int, station: str, seconds: float) -> PeerTimeout:
    """The error of a wait at `station` that lasted for `seconds`."""
    return PeerTimeout(f"{station}: {name(peer)} did not come within {seconds:g} s", peer=peer)
