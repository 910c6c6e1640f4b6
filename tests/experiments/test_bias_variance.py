"""What the study of bias and variance makes of its probes' tables."""

import layout
import numpy as np
import pandas as pd
import pytest
import studies

from bptt_study.backprop.schedules import revolve
from bptt_study.report import csv_tables, quality
from bptt_study.runner import stories

T, FORWARD, NOISE, BIAS2 = 16, 0.25, 2.0, 0.5


def one(estimator, length, bias2, arithmetic=1.0):
    """A seed's numbers, noise and draws together."""
    return {
        **dict.fromkeys(["run", "task", "moment"], "a"),
        **{"seed": 0, "update": 1, "estimator": estimator, "length": length, "over": "both"},
        **{"relative_bias2": bias2, "relative_variance": NOISE, "relative_mse": bias2 + NOISE},
        **{"relative_arithmetic": arithmetic, "relative_forward": FORWARD, "states": T},
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


def test_windows_short_of_all_steps_leave_the_costs_of_full_as_they_are(table):
    seeds = pd.DataFrame([one("full", np.nan, 0), *(one("fixed", n, BIAS2) for n in (4, 8))])
    found = stories.experiment_module("bias_variance").memory(seeds)
    found = found.set_index(["estimator", "states", "budget"])["relative_arithmetic"]
    assert sorted(found["checkpointed"].index.unique("states")) == [4, 8, T]
    expected = table["relative_arithmetic"]["checkpointed"]
    assert found["checkpointed"].to_dict() == expected.to_dict()


def test_windows_hold_what_they_are_long_and_random_cuts_are_not_there(table):
    assert table.loc["fixed", 4, 32]["relative_mse"] == pytest.approx(BIAS2 + NOISE / 32)
    assert table.loc["sliding", 4, 32]["relative_mse"] == pytest.approx(3 * NOISE / 32)
    assert set(table.index.get_level_values("estimator")) == {"fixed", "sliding", "checkpointed"}


EXPERIMENT = stories.experiment_module("bias_variance")


def test_a_diverged_seed_is_counted_in_every_table_and_its_band_leaves_the_axes(tmp_path, kept):
    """Parameters that are not finite have costs and no numbers, over the draws and over the batches."""
    found = studies.quality("char_lm", "a").assign(setting=None)
    found["estimator"] = found["estimator"].replace({"uoro": "randomized"})
    lost = (found["seed"] == 1) & (found["update"] == 10)
    found.loc[lost, ["relative_bias2", "relative_variance", "relative_mse", "cosine"]] = np.nan
    csv_tables.write_table(
        studies.run("a", studies.TEXT | studies.FULL | {"hidden": 64}, [[3.0, 2.0]] * 3),
        tmp_path / "table.csv.gz",
    )
    csv_tables.write_table(found, tmp_path / "estimator_quality.csv.gz")
    for file in studies.make_tables("bias_variance", tmp_path):
        table = csv_tables.read_table(file)
        table = table[table["moment"] == "end"]
        assert (table["n"] == 3).all()
        if file.stem != "crossings":
            assert (table["diverged"] == 1).all() and np.isposinf(table["relative_mse_high"]).all()
        if file.stem == "moments":
            one = table[table["over"] != "both"]
            assert np.isneginf(one["cosine_low"]).all() and (one["cosine_high"] == 1).all()
    studies.draw("bias_variance", tmp_path)
    mse = kept["length_end"].axes[-1]
    paths = [path for band in mse.collections for path in band.get_paths()]
    tops = [path.vertices[:, 1].max() for path in paths]
    assert len(tops) == 2 and min(tops) > mse.get_ylim()[1]


def crossing(numbers):
    """The row of two estimators with these biases², variances and arithmetic."""
    names = ["relative_bias2", "relative_variance", "relative_arithmetic"]
    same = dict.fromkeys(["run", "task", "moment"], "x") | {"seed": 0, "update": 0, "over": "both"}
    each = [
        same | {"estimator": name, "length": 4} | dict(zip(names, found, strict=True))
        for name, found in numbers.items()
    ]
    (row,) = EXPERIMENT.crossings(pd.DataFrame(each)).to_dict("records")
    return row


@pytest.mark.parametrize("bias2", [0.5, 0.0, -0.01])
def test_what_has_less_noise_wins_at_every_budget_and_a_diverged_seed_at_none(bias2):
    """Also where the estimate of a small bias² is below 0, or the rival has none and costs more."""
    rival = {"sliding": (bias2, 1.0, 4.0)}
    assert crossing({"randomized": (0.0, 2.0, 1.0)} | rival)["budget"] == 0
    assert crossing({"randomized": (0.0, np.nan, 1.0)} | rival)["budget"] == np.inf
    never = crossing({"randomized": (0.0, 5.0, 1.0)} | rival)["budget"]
    assert (never == np.inf) == (bias2 <= 0)


def test_at_a_crossing_both_buy_the_same_error_for_the_budget():
    """2/n = 0.5 + 0.1/n', where n batches of the first cost as much as n' of the second, which is dearer."""
    numbers = {"randomized": (0.0, 2.0, 1.0), "sliding": (0.5, 0.1, 4.0)}
    row = crossing(numbers)
    first, second = (
        bias2 + variance * arithmetic / row["budget"]
        for bias2, variance, arithmetic in numbers.values()
    )
    assert first == pytest.approx(second)
    assert row["budget"] == pytest.approx(3.2)


def test_no_estimator_is_the_best_if_all_diverged():
    found = studies.quality("char_lm", "a")
    parts = ["relative_bias2", "relative_variance", "relative_mse"]
    for lost, best in ((found["seed"] < 0, 1), (found["seed"] >= 0, 0)):
        seeds = quality.by_seed(found.assign(**{p: found[p].mask(lost) for p in parts}))
        table = EXPERIMENT.frontier(seeds)
        assert (table.groupby(["moment", "budget"])["best"].sum() == best).all()


def test_the_last_moment_and_what_trains_are_in_the_captions(kept, tmp_path):
    """One snapshot, of a run that fixed windows train."""
    for update, when in ((0, "before training"), (10, "after training")):
        found = studies.quality("char_lm", "a")
        found = found[found["update"] <= update].assign(setting=None)
        rows = studies.run("a", studies.TEXT | studies.fixed(4), [[3.0, 2.0]] * 3)
        csv_tables.write_table(rows, tmp_path / "table.csv.gz")
        csv_tables.write_table(found, tmp_path / "estimator_quality.csv.gz")
        studies.make_tables("bias_variance", tmp_path)
        studies.draw("bias_variance", tmp_path)
        for name in ("frontier", "memory"):
            assert when in layout.words(kept[name]).lower()
            assert "Trained by Fixed (chunks) 4." in layout.words(kept[name])
