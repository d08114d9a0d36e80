"""Output constraints: which tokens may come next in a log, and whether anything may (beside station 9, per sequence)."""

from __future__ import annotations

from typing import Protocol


class Constraint(Protocol):
    """What one log may still say. Made of the grammar and the tokens so far, so any engine can rebuild it."""

    @property
    def finished(self) -> bool:
        """Nothing more may follow: the log ends here with `stop`."""

    def mask(self) -> bytes | None:
        """Allowed next tokens as a bitmask of ceil(V / 32) little-endian 32-bit words; None: all of them.

        Raises:
            RowFailed: the grammar engine gave up on this log.
        """

    def advance(self, token: int) -> None:
        """Append one token to the log.

        Raises:
            RowFailed: the token is not allowed here, or the grammar engine gave up on this log.
        """


class FreeConstraint:
    """No constraint."""

    finished = False

    def mask(self) -> bytes | None:
        return None

    def advance(self, token: int) -> None:
        pass


FREE = FreeConstraint()
