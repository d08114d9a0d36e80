"""Who is next, and who gives way: the scheduler's order, as one key."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from .generation import GenerationRequest

OUTPUT_WEIGHT = 2.0  # a drawn token costs a step of its own, a prompt's shares one with many
_FIRST_GUESS = 256.0  # tokens of an engine's first answer
_SMOOTHING = 0.1  # weight of the newest answer's length in a mean


class Key(NamedTuple):
    """Lower goes first. Unique, for `arrival` is: what stands behind it never decides.

    start: virtual time. expected: what the generation was charged with when it came.
    """

    rank: int
    start: float
    arrival: int
    expected: float = 0.0


class Policy(Protocol):
    """One order for everything: the lowest key is admitted first, the highest is preempted first.

    So nobody is ever preempted for somebody behind him, the first of all always goes on, and a preempted
    generation stands in front of all that came after it.
    """

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        """Fixed for the generation's life and unique: `arrival` counts the requests.

        While there is no room for both, a waiting generation of a lower rank takes the place of a running one
        of a higher rank; inside a rank nobody is displaced by who waits.
        """
        ...

    def ended(self, request: GenerationRequest, key: Key, num_output: int | None) -> None:
        """Once for each generation that was taken in. num_output: tokens it drew here; None where it never ran."""
        ...


class FirstCome:
    """By arrival."""

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        return Key(0, 0.0, arrival)

    def ended(self, request: GenerationRequest, key: Key, num_output: int | None) -> None:
        return


class Priority:
    """By the request's priority, by arrival where it is equal."""

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        return Key(request.priority, 0.0, arrival)

    def ended(self, request: GenerationRequest, key: Key, num_output: int | None) -> None:
        return


class _Account:
    """next: where it stands in virtual time with all that it asked for. last: where its last generation starts.

    `next` falls behind `last` where answers were shorter than expected: those that come now stand close together.
    """

    __slots__ = ("last", "mean_output", "next")

    def __init__(self, mean_output: float) -> None:
        self.next = self.last = 0.0
        self.mean_output = mean_output


class FairShare:
    """By priority, then by virtual time, in which every account that has work moves on at the same pace.

    Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over the costs of the virtual token counter (Sheng et
    al., OSDI 2024): tokens, output weighted, divided by the account's share. A generation starts where the account's
    last one is expected to end, yet never before the time that the engine has reached: idleness saves nothing up. What
    an answer will cost is guessed from the account's answers so far, and put right at its end, for those that follow.
    The tags of one account never fall, so within it, and where there is but one, the order is that of arrival.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._mean_output = _FIRST_GUESS  # of all accounts: what is guessed of a new one
        self._accounts: dict[str, _Account] = {}  # tenants: few, and the operator's to name

    def key(self, request: GenerationRequest, arrival: int) -> Key:
        account = self._accounts.setdefault(request.account, _Account(self._mean_output))
        most = request.params.max_tokens
        output = account.mean_output if most is None else min(account.mean_output, most)
        expected = _cost(request, output)
        account.next = max(self._now, account.next)
        account.last = max(account.next, account.last)
        account.next += expected / request.share
        return Key(request.priority, account.last, arrival, expected)

    def ended(self, request: GenerationRequest, key: Key, num_output: int | None) -> None:
        account = self._accounts[request.account]
        if num_output is None:
            account.next -= key.expected / request.share
            return
        self._now = max(self._now, key.start)
        account.next += (_cost(request, num_output) - key.expected) / request.share
        account.mean_output += _SMOOTHING * (num_output - account.mean_output)
        self._mean_output += _SMOOTHING * (num_output - self._mean_output)


def _cost(request: GenerationRequest, num_output: float) -> float:
    return len(request.prompt) + len(request.tokens) + OUTPUT_WEIGHT * num_output


def select_policy(name: Literal["fcfs", "priority", "fair"]) -> Policy:
    """The policy that `--scheduling-policy` names."""
    policies: dict[str, type[Policy]] = {"fcfs": FirstCome, "priority": Priority, "fair": FairShare}
    return policies[name]()
