"""Census, intervals and aggregates: nothing that was run may vanish on the way to a figure."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import studies

from bptt_study.report import tables
from bptt_study.validation import SettingError


@pytest.mark.parametrize("n", [3, 5, 6, 7])
def test_interval_is_that_of_all_resamples(n, rng):
    """Against the exact bootstrap distribution: all nⁿ resamples, equally likely."""
    sample = rng.normal(size=n)
    indices = np.array(list(product(range(n), repeat=n)))
    medians = np.sort(np.median(sample[indices], axis=1))
    median, low, high = tables.interval(pd.Series(sample))
    assert median == np.median(sample)
    for value, share in (
        (low, 0.025),
        (high, 0.975),
    ):  # 2000 draws: three standard errors are 0.0105
        around = np.quantile(medians, (share - 0.0105, share + 0.0105), method="nearest")
        assert around[0] <= value <= around[1]
        assert np.isclose(medians, value, rtol=0, atol=1e-12).any()


def test_interval_is_the_same_each_time(rng):
    sample = pd.Series(rng.normal(size=9))
    assert tables.interval(sample) == tables.interval(sample.copy())
    orders = [tables.interval(pd.Series(rng.permutation(sample))) for _ in range(20)]
    assert {found[0] for found in orders} == {tables.interval(sample)[0]}
    assert len(set(orders)) > 1, "the order of the values counts, as the docstring says"


@pytest.mark.parametrize("bad", [np.inf, np.nan, -np.inf])
def test_what_is_not_finite_ranks_last(bad):
    median, low, high = tables.interval(pd.Series([1.0, 2.0, bad, 3.0, bad]))
    assert (median, low, high) == (3.0, 1.0, np.inf)
    assert tables.interval(pd.Series([bad, bad, 1.0]))[0] == np.inf


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_diverged_seed_is_the_worst_also_where_larger_is_better(bad):
    rows = pd.DataFrame({"run": "a", "seed": range(3), "diverged": [False, False, True]})
    rows["accuracy"] = rows["validation_loss"] = [0.4, 0.6, bad]
    (accuracy,) = tables.aggregate(rows, ["run"], "accuracy").to_dict("records")
    (loss,) = tables.aggregate(rows, ["run"], "validation_loss").to_dict("records")
    assert (accuracy["median"], accuracy["low"], accuracy["high"]) == (0.4, -np.inf, 0.6)
    assert (loss["median"], loss["low"], loss["high"]) == (0.6, 0.4, np.inf)
    assert (accuracy["n"], accuracy["diverged"]) == (3, 1)


@pytest.mark.parametrize("key", [np.nan, None])
def test_aggregate_keeps_missing_keys_and_the_order_of_rows(key):
    rows = pd.DataFrame(
        {
            "run": ["z", "z", "a", "a", "m", "m"],
            "length": [16, 16, key, key, 4, 4],
            "seed": [0, 1] * 3,
            "diverged": [False, False, True, False, False, False],
            "loss": [1.0, 3.0, 10.0, 20.0, 5.0, 5.0],
        }
    )
    for by in (["run"], ["length"], ["run", "length"]):
        table = tables.aggregate(rows, by, "loss")
        # a diverged seed is the worst, whatever its loss was when it was stopped
        assert table["median"].tolist() == [2.0, np.inf, 5.0]
        assert table["n"].tolist() == [2, 2, 2]
        assert table["diverged"].tolist() == [0, 1, 0]
        assert table[by[0]].isna().tolist() == [False, by[0] == "length", False]


def test_seeds_of_several_runs_are_not_aggregated():
    """They would be one median of other settings, with the number of different seeds as n."""
    rows = pd.DataFrame(
        {
            "run": ["a", "a", "b"],
            "seed": [0, 1, 7],
            "hidden": [4, 4, 8],
            "loss": 1.0,
            "diverged": False,
        }
    )
    said = r"`by` must be columns that tell the runs apart; got seed\. These rows differ in hidden"
    with pytest.raises(SettingError, match=said.replace("seed", "task")):
        tables.aggregate(rows.assign(task="copy"), ["task"], "loss")
    assert tables.aggregate(rows, ["hidden"], "loss")["n"].tolist() == [2, 1]
    assert tables.aggregate(rows, ["run"], "loss")["n"].tolist() == [2, 1]


def test_a_number_of_a_probe_that_is_not_finite_has_diverged():
    probed = pd.DataFrame({"run": "a", "seed": range(3), "x": [1, np.nan, 3], "y": [4, 5, np.inf]})
    (row,) = tables.aggregate_all(probed, ["run"], ["x", "y"]).to_dict("records")
    expected = {"run": "a", "n": 3, "diverged": 1, "x": 3, "x_low": 1, "x_high": np.inf}
    assert row == expected | {"y": 5, "y_low": 4, "y_high": np.inf}


def test_what_ranks_as_the_worst_is_counted():
    """A number of a seed that has not diverged may be 0 ÷ 0; also of the second value."""
    rows = pd.DataFrame({"run": "a", "seed": range(3), "diverged": [False, False, True]})
    rows = rows.assign(x=[1.0, 2, 3], y=[1.0, np.nan, 3])
    (row,) = tables.aggregate_all(rows, ["run"], ["x", "y"]).to_dict("records")
    assert (row["n"], row["diverged"], row["x"], row["y"]) == (3, 2, 2.0, np.inf)
    (none,) = tables.aggregate(rows.assign(diverged=False, y=np.nan), ["run"], "y").to_dict(
        "records"
    )
    assert none["diverged"] == 0 and np.isnan(none["median"]), "control: no seed has it"


def test_a_diverged_seed_ranks_as_the_value_s_own_direction_says():
    """-inf where larger is better, and both ends where none is the worst, whatever its last value was."""
    rows = pd.DataFrame({"run": "a", "seed": range(3), "x": [0.4, 0.6, 0.5]})
    for flag in ("diverged", "stopped"):
        lost = rows.assign(**{flag: [False, False, True]})
        found = [
            tables.aggregate(lost, ["run"], "x", rank)[tables.SPREAD].iloc[0].tolist()
            for rank in (None, -np.inf, np.nan)
        ]
        assert found == [[0.6, 0.4, np.inf], [0.4, -np.inf, 0.6], [0.6, -np.inf, np.inf]]
    last = tables.final(lost.assign(update=1), "x")
    assert last["x"].isna().tolist() == [False, False, True]


def test_a_table_of_many_columns_is_aggregated_without_a_warning():
    rows = pd.DataFrame({"run": "a", "seed": range(2), "diverged": False, "x": 1.0})
    for i in range(97):  # with one more column pandas warns
        rows.insert(0, f"task.setting{i}", i)
    assert tables.aggregate(rows, ["run"], "x")["n"].tolist() == [2]


def test_differences_to_full_are_taken_seed_by_seed():
    rows = pd.concat(
        [
            studies.run("a", studies.TEXT | studies.FULL, [[3.0, 1.0], [3.0, 1.5]]),
            studies.run(
                "b", studies.TEXT | studies.fixed(4), [[2.5, 1.25], [3.0, 2.0], [3.0, 2.0]]
            ),
        ]
    )
    less = tables.less_full(rows, ["seed", "update"], ["validation_loss", "accuracy"])
    assert less["seed"].tolist() == [0, 0, 1, 1]  # the third has no partner
    assert less["validation_loss"].tolist() == [-0.5, 0.25, 0, 0.5]
    assert less["accuracy"].tolist() == [0] * 4
    alone = rows[rows["strategy"] == "fixed"]
    assert tables.less_full(alone, ["seed", "update"], ["validation_loss"]).empty


def test_a_partner_that_has_diverged_leaves_no_difference():
    """The score that it stopped with is of an earlier update."""
    full = studies.run("a", studies.TEXT | studies.FULL, [[3.0, 2.0], [3.0, 1.5]])
    full.loc[(full["seed"] == 0) & (full["update"] > 0), "diverged"] = True
    fixed = studies.run("b", studies.TEXT | studies.fixed(4), [[3.0, 1.5], [3.0, 2.0]])
    less = tables.less_full(pd.concat([full, fixed]), ["seed", "update"], ["validation_loss"])
    assert less["diverged"].tolist() == [False, True, False, False]
    last = tables.aggregate(tables.final(less), ["run"], "validation_loss").iloc[0]
    assert (last["n"], last["diverged"], last["low"], last["high"]) == (2, 1, 0.5, np.inf)


def test_several_runs_of_full_are_no_partner():
    """Their mean is the score of no run."""
    networks = [studies.TEXT | {"hidden": size} for size in (4, 8)]
    rows = pd.concat(
        studies.run(f"{name}{network['hidden']}", network | strategy, [[3.0, 1.0]])
        for network in networks
        for name, strategy in (("a", studies.FULL), ("b", studies.fixed(4)))
    )
    with pytest.raises(SettingError, match="tell its rows apart: hidden"):
        tables.less_full(tables.final(rows), ["seed"], ["validation_loss"])
    with pytest.raises(SettingError, match="tell its rows apart: update, hidden"):
        tables.less_full(rows, ["seed"], ["validation_loss"])
    paired = tables.less_full(tables.final(rows), ["seed", "hidden"], ["validation_loss"])
    assert paired["validation_loss"].tolist() == [0, 0]


def test_several_rows_of_a_seed_are_not_aggregated():
    """They would be one median over log points, with the number of seeds as n."""
    rows = studies.headline()
    said = (
        "`by` must be columns with one row per seed; got run, strategy. These rows differ in update"
    )
    with pytest.raises(SettingError, match=said):
        tables.aggregate(rows, ["run", "strategy"], "validation_loss")
    assert (tables.aggregate(tables.final(rows), ["run"], "validation_loss")["n"] == 3).all()


def test_a_score_that_no_seed_has_is_missing_and_not_the_worst():
    """Accuracy in regression is no accuracy of 0 at the lower edge of a figure."""
    rows = pd.DataFrame(
        {"run": ["a", "a", "b", "b", "c", "c"], "seed": [0, 1] * 3, "accuracy": np.nan}
    )
    rows.loc[:1, "accuracy"] = 0.5
    table = tables.aggregate(rows.assign(diverged=rows["run"] == "c"), ["run"], "accuracy")
    assert table["median"].to_list()[::2] == [0.5, -np.inf]
    assert table.loc[1, tables.SPREAD].isna().all()


def test_aggregate_of_no_rows_has_all_columns():
    rows = pd.DataFrame({"run": ["a"], "seed": [0], "diverged": [False], "loss": [1.0]})
    empty = tables.aggregate(rows[:0], ["run"], "loss")
    assert list(empty) == list(tables.aggregate(rows, ["run"], "loss"))
    assert empty.empty


def test_census_finds_missing_and_incomplete_runs():
    rows = studies.headline()
    expected = dict.fromkeys(rows["run"].unique(), 9)
    assert tables.missing(rows, expected) == []
    assert tables.missing(rows, expected | {"gone": 9}) == ["gone"]
    assert tables.missing(rows.drop(index=rows.index[-1]), expected) == ["t1"]
    assert tables.missing(pd.concat([rows, rows[rows["run"] == "u1"]]), expected) == ["u1"]
    assert tables.missing(pd.DataFrame(), expected) == list(expected)


def test_the_choice_is_the_least_median_and_divergence_the_worst():
    """Candidates 1, 2, 3 for a and b; the least mean is not the choice, nor is a run with lost seeds."""
    losses = {
        ("a", 1): [1.0, 9.0, 9.0], ("a", 2): [2.0, 2.0, 30.0], ("a", 3): [np.inf, 1.0, np.nan],
        ("b", 1): [5.0, 5.0, 5.0], ("b", 2): [4.0, 4.0, 4.0], ("b", 3): [3.0, 3.0, 3.0],
    }  # fmt: skip
    rows = pd.concat(
        studies.run(f"{name}{rate}", studies.TEXT | studies.FULL | {"learning_rate": rate / 10},
                    [[0.0, loss] for loss in values])
        for (name, rate), values in losses.items()
    )  # fmt: skip
    rivals = pd.DataFrame(
        [(f"{name}{rate}", name, rate / 10) for name, rate in losses],
        columns=["run", "candidate_for", "value"],
    )
    grid = tables.choose(rows, rivals, "learning_rate").set_index("run")
    assert grid.index.tolist() == ["a1", "a2", "a3", "b1", "b2", "b3"]
    assert grid.index[grid["chosen"]].tolist() == ["a2", "b3"]
    assert grid.index[grid["at_edge"]].tolist() == ["b3"]
    assert grid["diverged"].tolist() == [0, 0, 2, 0, 0, 0]
    assert grid.loc["a3", "median"] == np.inf
    assert set(grid["setting"]) == {"learning_rate"}


def test_lengths_are_missing_just_where_nothing_is_truncated():
    rows = studies.headline().drop_duplicates("run")
    found = dict(zip(rows["run"], tables.lengths(rows), strict=True))
    assert np.isnan([found.pop("z1"), found.pop("u1")]).all()
    assert found == {"y1": 4, "x1": 16, "w1": 4, "v1": 16, "t1": 4}
    only_full = rows[rows["strategy"] == "full"].drop(columns=["window", "mean_length"])
    assert tables.lengths(only_full).isna().all()


def test_final_scores_hold_every_run_in_order():
    table = tables.final_scores(studies.headline(), "validation_loss")
    assert table["run"].tolist() == ["z1", "y1", "x1", "w1", "v1", "u1", "t1"]
    assert table["median"].tolist() == [1.1, 2.1, 1.5, 1.7, 1.3, 0.5, 1.2]
    assert table["low"].tolist() == [1.0, 2.0, 1.4, 1.3, 1.25, 0.5, 1.2]
    assert table["high"].tolist() == [1.2, 2.2, 1.6, np.inf, 1.35, 0.5, 1.2]
    assert table["diverged"].tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert set(table["n"]) == {3}


def test_curves_hold_every_run_at_every_update():
    rows = studies.headline()
    assert "seconds" not in tables.curves(rows, "validation_loss")
    table = tables.curves(tables.with_costs(rows, studies.costs(rows)), "validation_loss")
    assert len(table) == 7 * 3
    full = table[table["run"] == "z1"]
    assert full[["tokens", "seconds", "median"]].to_numpy().tolist() == [
        [0, 0, 3.4],
        [1000, 2.5, 2.1],
        [2000, 5, 1.1],
    ]
    assert table[table["run"] == "w1"]["diverged"].tolist() == [0, 1, 1]


def test_norms_keep_cells_without_a_spectral_radius():
    rows = studies.networks()
    table = tables.norms(studies.norms(rows), rows)
    assert len(table) == 6 * 2 * 2 * 6  # runs, updates, axes, steps
    gru = table[(table["cell"] == "gru") & (table["axis"] == "lag") & (table["update"] == 10)]
    assert gru["spectral_radius"].isna().all()
    of_full = gru[gru["strategy"] == "full"]
    assert of_full["length"].isna().all()
    np.testing.assert_allclose(of_full["median"], 3 * 2.0 ** -np.arange(6))  # of 2 and 4
    np.testing.assert_allclose(gru[gru["strategy"] == "fixed"]["median"], [3, 1.5, 0.75, 0, 0, 0])


def test_a_norm_that_is_not_finite_counts_as_diverged():
    rows = studies.networks()
    found = studies.norms(rows)
    found.loc[0, "gradient_norm"] = np.inf
    table = tables.norms(found, rows)
    assert table["diverged"].sum() == 1
    assert table["high"].iloc[0] == np.inf


def test_panels_split_by_what_they_show():
    rows = studies.networks()
    parts = tables.panels(rows)
    assert [p["cell"].iloc[0] for p in parts] == ["elman", "elman", "gru"]
    assert sum(map(len, parts)) == len(rows)
    assert len(tables.panels(studies.headline())) == 2


def test_references_are_those_of_the_task():
    text, digits = tables.panels(studies.headline())
    assert tables.references(text, "validation_loss") == {
        "chance": 3.3,
        "1-gram": 2.8,
        "2-gram": 2.3,
    }
    assert tables.references(digits, "validation_loss") == {"chance": 2.3}
    assert tables.references(digits, "accuracy") == {"chance": 0.1}


@pytest.mark.parametrize(
    ("windows", "means", "chosen"),
    [([4, 16], [4, 16], 16), ([4, 8, 16], [8, 4, 32], 8), ([32, 64], [64, 32], 32)],
)
def test_opening_takes_a_shared_length(windows, means, chosen):
    strategies = [studies.FULL, *map(studies.fixed, windows), *map(studies.randomized, means)]
    rows = pd.concat(
        studies.run(f"r{i}", studies.TEXT | s, [[1.0]]) for i, s in enumerate(strategies)
    )
    table = tables.opening(studies.text_cuts(rows), rows, ("randomized", "fixed", "full"))
    assert table["strategy"].drop_duplicates().tolist() == ["randomized", "fixed", "full"]
    assert table.groupby("strategy").size().tolist() == [70] * 3
    assert table["length"].dropna().unique().tolist() == [chosen]
    fixed = table[table["strategy"] == "fixed"]
    assert (fixed["position"][fixed["cut"]].iloc[:2] == [chosen, 2 * chosen]).all()


def test_summary_gives_each_run_its_own_scores():
    rows = studies.headline()
    table = tables.summary(rows)
    assert table["validation_loss"].tolist() == [1.1, 2.1, 1.5, 1.7, 1.3, 0.5, 1.2]
    assert table["strategy"].tolist()[:3] == ["full", "fixed", "fixed"]
    assert table["diverged"].tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert table["learned"].tolist() == [True, True, True, False, True, True, True]
    text = tables.as_text(table, studies.costs(rows))
    assert " 5.000 " in text  # seconds
    assert "1.700 [1.300, inf]" in text
    assert "char_lm: chance 3.300, 1-gram 2.800, 2-gram 2.300 nats" in text


@pytest.mark.parametrize("lost", [1, 2])
def test_a_score_that_a_task_has_not_is_missing_also_where_seeds_diverge(lost):
    """Control: a run with accuracy, all of whose seeds diverge, is the worst."""
    losses = [[1.0, np.inf], [1.0, np.inf if lost == 2 else 0.5]]
    text = studies.run("a", studies.TEXT | studies.FULL, losses, [[0.5, np.nan]] * 2)
    regression = studies.run("b", studies.DIGITS | studies.FULL, losses, [[np.nan] * 2] * 2)
    rows = pd.concat([text, regression])
    table = tables.summary(rows).set_index("run")
    assert table["diverged"].tolist() == [lost, lost]
    assert table.loc["a", "accuracy"] == -np.inf
    assert table.loc["b", ["accuracy", "accuracy_low", "accuracy_high"]].isna().all()
    assert (table["validation_loss_high"] == np.inf).all()
    for drawn in (tables.curves(rows, "accuracy"), tables.final_scores(rows, "accuracy")):
        assert set(drawn["run"]) == {"a"}
    assert set(tables.curves(rows, "validation_loss")["run"]) == {"a", "b"}


def test_a_run_without_a_finite_score_is_said_to_have_diverged():
    losses = [[1.0, np.inf]] * 2
    rows = studies.run("a", studies.TEXT | studies.FULL, losses, [[0.5, np.nan]] * 2)
    text = tables.as_text(tables.summary(rows), studies.costs(rows))
    row = text.splitlines()[2].split()
    assert row.count("diverged") == 2 and "inf" not in text


def test_a_score_that_a_task_has_not_is_missing_and_not_diverged():
    rows = pd.concat(
        [
            studies.run("a", studies.TEXT | studies.FULL, [[2.0]] * 2),
            studies.run("b", studies.DIGITS | studies.FULL, [[1.0]] * 2, [[np.nan]] * 2),
        ]
    )
    table = tables.summary(rows)
    assert table["accuracy"].isna().tolist() == [False, True]
    assert "nan" not in tables.as_text(table, studies.costs(rows))
