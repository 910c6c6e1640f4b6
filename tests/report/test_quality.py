"""Relative numbers of the probe estimator_quality, their medians and their moments, for any study."""

import numpy as np
import pandas as pd
import pytest
import studies
from matplotlib.figure import Figure

from bptt_study.report import quality, snapshots


@pytest.fixture
def medians():
    return quality.medians(quality.by_seed(studies.quality("char_lm", "a")))


def test_errors_are_relative_to_the_gradient_and_costs_to_full(medians):
    keys = medians.set_index(["over", "moment", "estimator", "length"]).sort_index()
    row = keys.loc[("draws", "middle", "uoro", 4)]
    assert (row["n"], row["diverged"], row["relative_mse"]) == (3, 0, 0.25)
    assert (row["relative_arithmetic"], row["relative_numbers"]) == (0.8, 0.4)
    both = keys.loc[("both", "end", "uoro", 4)]
    assert both["relative_variance"] == both["relative_mse"] == 0.25 + 0.125
    assert np.isnan(both["cosine"]) and row["cosine"] == 1
    assert quality.noise(medians[medians["moment"] == "end"]).to_dict() == {"char_lm": 0.125}


def test_each_run_is_relative_to_its_own_full():
    """Two runs of one task, of which the second does five times the arithmetic."""
    runs = [studies.quality("char_lm", name) for name in "ab"]
    runs[1]["arithmetic"] *= 5
    table = quality.by_seed(pd.concat(runs))
    assert table.groupby(["estimator", "length"])["relative_arithmetic"].nunique().eq(1).all()
    assert table["over"].value_counts().to_dict() == dict.fromkeys(
        ("draws", "batches", "both"), sum(map(len, runs)) / 2
    )


def test_arithmetic_that_differs_between_seeds_is_their_median():
    """As of random horizons: a row of the medians has all three seeds."""
    found = studies.quality("char_lm", "a")
    own = found["estimator"] == "uoro"
    found["arithmetic"] = found["arithmetic"].where(~own, found["arithmetic"] * (1 + found["seed"]))
    seeds = quality.by_seed(found)
    table = quality.medians(seeds).set_index(["over", "moment", "estimator", "length"]).sort_index()
    row = table.loc[("draws", "middle", "uoro", 4)]
    assert (row["relative_arithmetic"], row["n"]) == (1.6, 3)


def test_a_diverged_seed_is_counted_and_named():
    found = studies.quality("char_lm", "a")
    lost = (found["seed"] == 1) & (found["update"] == 10)
    seeds = quality.by_seed(found.assign(stopped=lost))
    table = quality.medians(seeds)
    end = table[table["moment"] == "end"]
    assert (end["diverged"] == 1).all() and np.isposinf(end["relative_mse_high"]).all()
    assert np.isneginf(end.loc[end["over"] == "draws", "cosine_low"]).all()
    assert (table.loc[table["moment"] != "end", "diverged"] == 0).all()
    rows = studies.run("a", studies.TEXT | studies.FULL, [[3.0, 2.0]] * 3)
    assert "Diverged on char_lm." in quality.caption(end, rows, found)


def test_a_caption_has_the_runs_that_the_probe_saw():
    strategies = {"a": studies.fixed(4) | {"hidden": 64}, "b": studies.FULL}
    runs = [studies.run(n, studies.TEXT | s, [[3.0, 2.0]] * 3) for n, s in strategies.items()]
    found = studies.quality("char_lm", "a")
    table = quality.medians(quality.by_seed(found))
    said = quality.caption(table, pd.concat(runs), found, "Marker", "bar")
    assert said.startswith("Marker: median; bar: its 95 % bootstrap interval over n = 3 seeds")
    assert "Trained by Fixed (chunks) 4." in said and "64 units" in said
    assert "8 units" not in said and "Diverged" not in said


@pytest.mark.parametrize(
    ("updates", "names"),
    [
        ([0, 5, 10], ["start", "middle", "end"]),
        ([0, 6, 9], ["start", "update 6", "end"]),  # of three log points
        ([0, 3, 6, 9], ["start", "update 3", "update 6", "end"]),
        ([0, 9], ["start", "end"]),
        ([0], ["start"]),
    ],
)
def test_a_moment_in_the_middle_is_half_way(updates, names):
    runs = [pd.DataFrame({"run": name, "update": updates}) for name in "ab"]
    other = pd.DataFrame({"run": "c", "update": [0, 100]})
    found = snapshots.moments(pd.concat([*runs, other], ignore_index=True))
    assert found.tolist() == [*names, *names, "start", "end"]


def test_a_figure_for_each_moment_has_the_rows_of_it():
    seen = {}

    @snapshots.each_moment
    def draw(rows, medians):
        seen[snapshots.when(medians)] = len(rows), len(medians), set(medians["moment"])
        return Figure()

    table = pd.DataFrame({"moment": ["start", "update 6", "update 6", "end"]})
    names = [
        name for name, _ in draw(rows=table[["moment"]].set_axis(["x"], axis=1), medians=table)
    ]
    assert names == ["start", "update_6", "end"]
    assert seen == {
        "before training": (4, 1, {"start"}),
        "update 6": (4, 2, {"update 6"}),
        "after training": (4, 1, {"end"}),
    }
    assert snapshots.last_moment(table)["moment"].tolist() == ["end"]
