"""What the study of bias and variance makes of its probe's table."""

import numpy as np
import pandas as pd
import pytest

from bptt_study.backprop.schedules import revolve
from bptt_study.runner import stories

T, FORWARD, NOISE, BIAS2 = 16, 0.25, 2.0, 0.5


def one(estimator, length, bias2, arithmetic=1.0):
    """A seed's numbers, noise and draws together."""
    return {
        **dict.fromkeys(["run", "task", "moment"], "a"),
        **{"seed": 0, "update": 1, "estimator": estimator, "length": length, "over": "both"},
        **{"relative_bias2": bias2, "relative_variance": NOISE, "relative_mse": bias2 + NOISE},
        **{"relative_arithmetic": arithmetic, "relative_forward": FORWARD},
    }


@pytest.fixture(scope="module")
def table():
    seeds = [one("full", np.nan, 0), one("randomized", 4, 0)]
    seeds += [one("fixed", n, BIAS2 if n < T else 0) for n in (1, 4, 8, T)]
    seeds += [one("sliding", n, 0, arithmetic=3) for n in (4, T)]
    found = stories.experiment_module("bias_variance").memory(pd.DataFrame(seeds))
    return found.set_index(["estimator", "states", "budget"]).sort_index()


@pytest.mark.parametrize("budget", [1, 32])
def test_what_states_cost_is_the_steps_that_are_run_again(table, budget):
    for states in (4, 8):
        unit, places = revolve.layout(T, states)
        assert unit + places <= states
        # all that the pass does: forward once over the stretch of each operation, and back over its own
        run = unit * len(revolve.plan(T // unit, places).unit)
        row = table.loc["checkpointed", states, budget]
        assert row["relative_arithmetic"] == pytest.approx(1 + (run - T) / T * FORWARD)
        assert row["relative_mse"] == pytest.approx(NOISE * row["relative_arithmetic"] / budget)
    assert run > T
    full = table.loc["checkpointed", T, budget]
    assert full["relative_arithmetic"] == 1
    assert full["relative_mse"] == table.loc["fixed", T, budget]["relative_mse"] == NOISE / budget


def test_windows_hold_what_they_are_long_and_random_cuts_are_not_there(table):
    assert table.loc["fixed", 4, 32]["relative_mse"] == pytest.approx(BIAS2 + NOISE / 32)
    assert table.loc["sliding", 4, 32]["relative_mse"] == pytest.approx(3 * NOISE / 32)
    assert set(table.index.get_level_values("estimator")) == {"fixed", "sliding", "checkpointed"}
