"""Which states are kept: against the recursion by brute force, and by running the plan on paper."""

from functools import cache

import numpy as np
import pytest

from bptt_study.backprop.schedules import revolve
from bptt_study.validation import SettingError


@cache
def recursion(units, places):
    if places == 1:
        return units * (units + 1) // 2
    return min(
        (y + recursion(units - y, places - 1) + recursion(y, places) for y in range(1, units)),
        default=1,
    )


@pytest.mark.parametrize("places", [1, 2, 3, 7])
def test_cost_is_that_of_the_recursion(places):
    for units in range(1, 40):
        assert revolve.forward_steps(units, places) == recursion(units, places)


@pytest.mark.parametrize(("places", "work"), [(10, 4.64), (20, 3.75), (32, 3.41), (50, 2.95)])
def test_published_numbers(places, work):
    """Forward work ÷ T at T = 1000; one place less costs more."""
    assert revolve.forward_steps(1000, places) / 1000 == pytest.approx(work, abs=5.1e-3)
    assert revolve.forward_steps(1000, places - 1) > revolve.forward_steps(1000, places)


@pytest.mark.parametrize("units", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("places", [1, 2, 3, 8, 50])
def test_the_plan_goes_back_through_every_unit_from_its_own_state(units, places):
    plan = revolve.plan(units, places)
    stored, at = {0: 0}, None
    pulled = []
    for load, unit, pull, store in zip(*plan, strict=True):
        at = stored[load] if load >= 0 else at
        assert at == unit, "a unit run from the state of another"
        if pull:
            pulled.append(unit)
        else:
            at += 1
        if store >= 0:
            stored[store] = at
    assert pulled == list(range(units))[::-1]
    assert max(stored) < places
    assert len(plan.unit) == revolve.forward_steps(units, places)


@pytest.mark.parametrize(
    ("steps", "states"), [(1000, 50), (1024, 64), (997, 20), (12, 2), (65536, 512)]
)
def test_layout_keeps_to_the_states_and_is_no_worse_than_single_steps(steps, states):
    length, places = revolve.layout(steps, states)
    assert steps % length == 0
    assert 2 <= length + places <= states
    work = length * revolve.forward_steps(steps // length, places)
    assert work <= revolve.forward_steps(steps, states - 1)


def test_twice_the_root_runs_every_step_twice_at_most():
    length, places = revolve.layout(1024, 64)
    assert (length, places) == (32, 32)
    assert length * revolve.forward_steps(1024 // length, places) < 2 * 1024
    assert np.sum(~revolve.plan(32, 32).pull) == 31


def test_a_state_alone_is_too_few():
    with pytest.raises(SettingError, match=r"`states` must be a whole number of at least 2; got 1"):
        revolve.layout(10, 1)
