"""The verdict's tables from made-up runs whose answers are known, and its runs from the command line."""

import layout
import numpy as np
import pandas as pd
import pytest
import studies
from omegaconf import OmegaConf

from bptt_study.report import csv_tables, plots
from bptt_study.runner import stories


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = studies.write(tmp_path_factory.mktemp("v") / "book_verdict", **studies.verdict())
    files = studies.make_tables("book_verdict", folder)
    return {file.stem: csv_tables.read_table(file) for file in files}


def test_every_question_is_answered_in_one_family(found):
    table = found["comparisons"]
    assert len(table) == 2 * 18  # tasks × questions
    asked = table.groupby("question", sort=False).size().to_dict()
    assert asked == {
        "verdict": 4, "window": 6, "variance alone": 10, "bias alone": 4, "gap": 8, "little data": 4,
    }  # fmt: skip
    assert (table["n"] == 12).all()
    text = table[table["task"] == "char_lm"].set_index(["question", "first"])
    assert text.loc[("verdict", "randomized 4"), "difference"] == pytest.approx(0.3, rel=0.02)
    assert text.loc[("window", "fixed 16"), "difference"] == pytest.approx(0.01, rel=0.02)
    assert text.loc[("window", "fixed 16"), "verdict"] == "alike"
    assert text.loc[("window", "fixed 1"), "verdict"] == "worse"
    smallest = 2 / 2**12
    np.testing.assert_allclose(table["p"].min(), smallest, 1e-6)
    assert (table["p_holm"] >= table["p"]).all()
    little = text.loc[("little data", "randomized 4")]
    assert (little["n"], little["diverged_first"], little["diverged_second"]) == (12, 1, 0)


def test_a_pair_is_compared_over_the_seeds_that_both_have(tmp_path):
    """And a pair without any is left out, not the whole table."""
    made = studies.verdict()
    rows = made["table"]
    gone = (rows["run"] == "char_lmfixed40.1") & (rows["seed"] == 0)
    gone |= (rows["run"] == "char_lmfixed160.1") & (rows["seed"] < 12)
    folder = studies.write(tmp_path / "book_verdict", **made | {"table": rows[~gone]})
    studies.make_tables("book_verdict", folder)
    table = csv_tables.read_table(folder / "comparisons.csv").query("task == 'char_lm'")
    window = table[table["question"] == "window"].set_index("first")["n"]
    assert window.to_dict() == {"fixed 1": 12, "fixed 4": 11}


def test_the_draws_that_match_the_variance_are_measured(found):
    errors = found["errors"]
    of = errors[(errors["task"] == "digits") & (errors["data"] == "all") & (errors["update"] == 10)]
    of = of.set_index("name")
    assert of.loc["randomized 4", "variance_median"] == 8
    assert of.loc["randomized 4 × 16", "variance_median"] == 0.5
    assert (of["bias2_median"] == 0.25).all()
    bias = found["comparisons"][found["comparisons"]["question"] == "bias alone"]
    assert set(bias["second"]) == {"full", "randomized 4 × 4"}


def test_shares_are_those_of_the_geometric_mass(found):
    table = found["shares"]
    part = table[(table["data"] == "all") & (table["update"] == 10) & (table["task"] == "char_lm")]
    for name, window in (("fixed 1", 1), ("fixed 4", 4), ("full", 64)):
        expected = (1 - 2.0**-window) / (1 - 2.0**-64)
        np.testing.assert_allclose(part.loc[part["name"] == name, ["share", "own"]], expected, 1e-6)


def test_gaps_are_validation_less_training(found):
    little = found["gaps"][found["gaps"]["data"] == "little"].groupby(["task", "name"])["gap"]
    medians = little.median().to_dict()
    assert medians["digits", "full"] == pytest.approx(0.3, rel=1e-5)
    assert medians["digits", "fixed 4"] == pytest.approx(0.2 + 0.1 / 16, rel=1e-5)


@pytest.mark.slow
def test_figures_show_differences_to_full_of_the_same_seed(kept, tmp_path):
    folder = studies.write(tmp_path / "book_verdict", **studies.verdict())
    studies.make_tables("book_verdict", folder)
    studies.draw("book_verdict", folder)

    def marks(name, marker):
        lines = kept[name].axes[0].lines
        return np.array([line.get_xydata()[0] for line in lines if line.get_marker() == marker])

    shares = [1 - 2.0**-window for window in (1, 4, 16)]
    windows = marks("reason_1_window", "s")
    np.testing.assert_allclose(windows, np.transpose([shares, [1.0, 0.2, 0.01]]), rtol=0.01)
    variance = marks("reason_2_variance", "o")
    np.testing.assert_allclose(variance[:, 0], [0.5, 0.3, 0.1, 0.05], rtol=0.01)
    assert variance[:, 1].tolist() == [0, 1, 2, 3]
    ticks = [tick.get_text() for tick in kept["reason_2_variance"].axes[0].get_yticklabels()]
    assert ticks[0] == "randomized 4, variance 8\n− full"
    # with little data full has a gap of 0.3, and chunks of 4 one of 0.2 + 0.1 · 4/64
    expected = [[0.2, 0.2], [0.2 + 0.1 - 0.1 / 16, 0.2]]
    np.testing.assert_allclose(marks("reason_3_gap", "s"), expected, rtol=0.01)
    assert "Learning rates are tuned" not in layout.words(kept["reason_3_gap"])
    runs = csv_tables.read_table(folder / "table.csv.gz")["run"].unique()
    for tuned in (runs, runs[:1]):
        tuning = pd.DataFrame({"candidate_for": tuned, "chosen": True})
        csv_tables.write_table(tuning, folder / "tuning.csv")
        studies.draw("book_verdict", folder)
        said = "Learning rates are tuned for each strategy." in layout.words(kept["reason_3_gap"])
        assert said == (len(tuned) == len(runs)), "also if full BPTT alone was tuned"
    fills = [n.get_mfc() for n in kept["reason_3_gap"].axes[0].lines if n.get_marker() == "s"]
    assert fills == [plots.LOOKS["fixed"].color, "white"]


def test_more_runs_belong_to_full_and_to_the_short_lengths():
    def more(task, **strategy):
        node = {"task": {"_target_": f"bptt_study.tasks.{task}"}, "strategy": strategy}
        return stories.shipped("book_verdict").more_runs(OmegaConf.create(node))

    assert more("digits") == [["task.validation_fraction=0.8"]]
    assert more("copy") == []
    drawn = {"compensate": True, "draws": 1}
    assert more("digits", window=16) == more("char_lm", mean_length=16, **drawn) == []
    assert more("digits", mean_length=16, **drawn) == [["strategy.draws=20"]]
    assert more("char_lm", window=4) == [
        ["task.validation_fraction=0.97"],
        ["strategy.window=1"],
    ]
    little, *others = more("char_lm", mean_length=4, **drawn)
    assert little == ["task.validation_fraction=0.97"]
    assert others == [
        ["strategy.draws=4"],
        ["strategy.draws=16"],
        ["strategy.draws=64"],
        ["strategy=randomized_uncompensated"],
        ["strategy=discounted"],
    ]
    assert more("copy", mean_length=4) == []  # discounted has no draws


@pytest.mark.parametrize(
    ("left", "figures"),
    [
        (["randomized", "randomized_uncompensated", "discounted"], {"reason_2_variance"}),
        (["full", "fixed"], {"reason_1_reach", "reason_1_window", "reason_3_gap"}),
        (["full"], {"reason_1_reach"}),
        (["discounted"], set()),
    ],
)  # fmt: skip
def test_a_part_of_the_study_has_its_tables_and_the_figures_that_can_be_drawn(
    tmp_path, left, figures
):
    tables = studies.verdict()
    rows = tables["table"]
    tables["table"] = rows[rows["strategy"].isin(left) & (rows["task"] == "digits")]
    folder = studies.write(tmp_path / "book_verdict", **tables)
    files = {file.stem for file in studies.make_tables("book_verdict", folder)}
    assert files == {"shares", "errors", "gaps", *["comparisons"] * (len(left) > 1)}
    assert {file.stem for file in studies.draw("book_verdict", folder)} == figures


@pytest.mark.slow
def test_without_a_snapshot_after_training_nothing_is_said_of_it(tmp_path):
    """With snapshots=1 the probes have looked at the start alone; the final losses still compare."""
    named = studies.verdict()
    for probe in ("lag_mass", "gradient_error", "generalisation"):
        named[probe] = (
            named[probe]
            .assign(update=0)
            .drop_duplicates([c for c in named[probe] if c in ("run", "seed", "lag", "part")])
        )
    folder = studies.write(tmp_path / "book_verdict", **named)
    files = {f.stem: f for f in studies.make_tables("book_verdict", folder)}
    assert files.keys() == {"shares", "errors", "comparisons"}
    assert "gap" not in set(csv_tables.read_table(files["comparisons"])["question"])
    assert {file.stem for file in studies.draw("book_verdict", folder)} == {"reason_1_reach"}


def test_a_task_without_a_share_held_out_has_all_data():
    rows = pd.DataFrame({
        "run": ["a"], "task": "copy", "strategy": "full", "update": 1, "truncation_length": 4,
    })  # fmt: skip
    assert stories.experiment_module("book_verdict").last(rows)["data"].tolist() == ["all"]


def test_close_lengths_have_names_of_their_own():
    """The control: six digits do not tell them apart."""
    rows = pd.DataFrame({
        "run": ["a", "b"], "task": "copy", "strategy": "fixed", "update": 1,
        "window": 1.0, "truncation_length": [1234567.0, 1234568.0],
    })  # fmt: skip
    names = stories.experiment_module("book_verdict").last(rows)["name"].tolist()
    assert names == ["fixed 1234567", "fixed 1234568"]


@pytest.mark.parametrize(("asked", "name"), [(2.0, "randomized 64"), (np.inf, "randomized 4")])
def test_no_variance_is_near_to_that_of_cuts_that_diverged(asked, name):
    """A distance that is infinite for all is none; any strategy was taken for the nearest."""
    named = {"randomized 16": 9.0, "randomized 64": 1.0, "randomized_uncompensated 4": asked}
    errors = pd.DataFrame({"name": list(named), "variance_median": list(named.values())})
    module = stories.experiment_module("book_verdict")
    assert module.matched(errors.assign(update=10)) == name
