"""The ladder: what holds at which load, and that nobody flaps on a rung."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.router.config import RouterConfig, Rung
from shoal.router.ladder import NOTHING, Degradation, Ladder

RUNGS = (
    Rung(load=0.5, max_tokens=100),
    Rung(load=1.0, truncate_to=512, model="small"),
    Rung(load=1.5, max_tokens=200, shed=True),
)


def test_each_rung_holds_with_all_below_it() -> None:
    ladder = Ladder(RUNGS)
    assert ladder.at(0.49) == NOTHING
    assert ladder.at(0.5) == Degradation(max_tokens=100)
    assert ladder.at(1.2) == Degradation(max_tokens=100, truncate_to=512, model="small")
    assert ladder.at(9.0) == Degradation(max_tokens=100, truncate_to=512, model="small", shed=True)
    assert ladder.at(0.0) == NOTHING


def test_a_rung_is_left_at_nine_tenths_of_it() -> None:
    ladder = Ladder(RUNGS)
    ladder.at(1.0)
    assert ladder.at(0.91).truncate_to == 512
    assert ladder.at(0.89).truncate_to is None
    assert ladder.at(0.99).truncate_to is None


def test_without_rungs_nothing_is_given_up() -> None:
    assert Ladder(()).at(1e9) is NOTHING


@given(st.lists(st.floats(0, 3), max_size=40))
def test_height_is_between_what_load_asks_and_what_hysteresis_allows(loads: list[float]) -> None:
    ladder = Ladder(RUNGS)
    states = [NOTHING, *(Ladder(RUNGS).at(rung.load) for rung in RUNGS)]
    for load in loads:
        height = states.index(ladder.at(load))
        assert sum(rung.load <= load for rung in RUNGS) <= height <= sum(0.9 * rung.load <= load for rung in RUNGS)


@pytest.mark.parametrize(
    ("ladder", "complaint"),
    [
        ([{"load": 1.0, "shed": True}, {"load": 1.0, "max_tokens": 5}], "each rung stands higher"),
        ([{"load": 2.0, "shed": True}, {"load": 1.0, "max_tokens": 5}], "each rung stands higher"),
        ([{"load": 1.0}], "gives something up"),
        ([{"load": 0.0, "shed": True}], "greater than 0"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(ladder: list[dict[str, object]], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        RouterConfig.model_validate({"ladder": ladder})
