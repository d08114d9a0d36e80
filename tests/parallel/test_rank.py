"""A rank's loop: what it does first, an answer or the next plan. What ends ranks is in test_rank_group.py."""

from collections.abc import Iterator

from shoal.parallel.group import Begun
from shoal.parallel.rank import _obey


class Desk:
    """The wires, and the worker: all plans are there from the start. Says what happened, in order.

    over: when the step of a plan is, in looks at it.
    """

    def __init__(self, plans: bytes, over: dict[str, int]) -> None:
        self.said: list[str] = []
        self._plans = [bytes([plan]) for plan in plans] + [b""]
        self._over = over
        self._answered = 0

    def poll(self, timeout_s: float) -> bool:
        # As the driver does: the end is only sent once everything has been answered.
        return bool(self._plans[0])

    def receive(self) -> bytes:
        return self._plans.pop(0)

    def send(self, result: bytes) -> None:
        self.said.append(f"answer {result.decode()}")

    def begin(self, plan: bytes) -> Begun[bytes | None]:
        name = plan.decode()
        self.said.append(f"begin {name}")
        looks: Iterator[int] = iter(range(self._over[name]))

        def result() -> bytes:
            self.said.append(f"result {name}")
            return plan

        return Begun(result, lambda: next(looks, None) is None)


def said(plans: str, over: dict[str, int], *, answers: bool = True) -> str:
    desk = Desk(plans.encode(), over)
    _obey(desk, desk, answers=answers)  # type: ignore[arg-type]
    return ", ".join(desk.said)


def test_what_is_done_is_answered_before_anything_else() -> None:
    assert said("ab", {"a": 0, "b": 0}) == "begin a, result a, answer a, begin b, result b, answer b"


def test_what_comes_while_a_step_computes_is_begun_behind_it() -> None:
    order = "begin a, begin b, result a, answer a, begin c, result b, answer b, result c, answer c"
    assert said("abc", {"a": 1, "b": 1, "c": 1}) == order
    assert said("abc", {"a": 2, "b": 0, "c": 0}) == order.replace(
        "result a, answer a, begin c", "begin c, result a, answer a"
    )


def test_who_does_not_answer_settles_its_steps_all_the_same() -> None:
    assert said("ab", {"a": 1, "b": 1}, answers=False) == "begin a, begin b, result a, result b"
