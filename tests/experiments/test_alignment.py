"""The study alignment: cosines along a trajectory, beside the losses of the estimators' own runs."""

import layout
import numpy as np
import pandas as pd
import pytest
import studies
from omegaconf import OmegaConf

import bptt_study as bs
from bptt_study.report import csv_tables
from bptt_study.runner import stories
from bptt_study.validation import SettingError

EXPERIMENT = stories.experiment_module("alignment")
# the better aligned, the lower the loss, but for snap, which diverged with two of three seeds
COSINES = {"full": 1.0, "fixed": 0.8, "frozen": 0.5, "uoro": 0.1, "snap": 0.9}
LOSSES = {"full": 0.45, "fixed": 0.5, "frozen": 0.6, "uoro": 0.65, "snap": np.inf}


@pytest.fixture
def folder(tmp_path):
    common = {
        "task": "add", "cell": "elman", "hidden": 8, "t1": 4, "t2": 12, "steps": 16, "batch_size": 4,
        "updates": 10, "loss_unit": "nats",
    }  # fmt: skip
    rows = [
        {
            "run": name, "strategy": name, "seed": seed, "update": update, "snapshots": 2 * (name == "full"),
            "validation_loss": (loss if seed else 0.6) + 0.01 * seed if update else 0.7,
            "diverged": bool(update and seed and not np.isfinite(loss)), "window": 5.0,
            "truncation_length": 5, **common,
        }
        for name, loss in LOSSES.items()
        for seed in range(3)
        for update in (0, 10)
    ]  # fmt: skip
    probed = [
        {
            "run": "full", "task": "add", "strategy": "full", "seed": seed, "update": update,
            "first": a, "second": b,
            "cosine": 1.0 if a == b else COSINES[a] * COSINES[b] + 0.05 * (update > 0) + 0.01 * seed,
        }
        for seed in range(3)
        for update in (0, 10)
        for a in COSINES
        for b in COSINES
    ]  # fmt: skip
    csv_tables.write_table(pd.DataFrame(rows), tmp_path / "table.csv.gz")
    csv_tables.write_table(pd.DataFrame(probed), tmp_path / "alignment.csv.gz")
    return tmp_path


def test_tables_are_means_along_the_trajectory_and_medians_over_seeds(folder):
    files = studies.make_tables("alignment", folder)
    assert [f.name for f in files] == ["matrix.csv", "learning.csv", "correlation.csv"]
    pairs, learned, rho = map(csv_tables.read_table, files)
    one = pairs.set_index(["first", "second"]).loc[("fixed", "frozen")]
    assert one["cosine"] == pytest.approx(0.4 + 0.025 + 0.01)
    assert (one["low"], one["high"]) == pytest.approx((0.425, 0.445))
    row = learned.set_index("strategy").loc["uoro"]
    assert row["cosine"] == pytest.approx(0.135)
    assert row["validation_loss"] == pytest.approx(0.66)
    assert learned.set_index("strategy").loc["snap", "diverged"] == 2
    assert rho["estimators"].tolist() == [4]  # the exact one is no point
    # ranks of cosine .1 .5 .8 .9 and of loss 3 2 1 4
    assert rho["rho"].iloc[0] == pytest.approx(0.2)
    assert rho["rho_low"].iloc[0] <= rho["rho"].iloc[0] <= rho["rho_high"].iloc[0]


def test_a_seed_whose_trajectory_ended_has_no_mean(folder):
    found = csv_tables.read_table(folder / "alignment.csv.gz")
    stopped = found["seed"].eq(2) & found["update"].eq(10)
    csv_tables.write_table(found.assign(stopped=stopped), folder / "alignment.csv.gz")
    pairs = csv_tables.read_table(studies.make_tables("alignment", folder)[0])
    assert set(pairs["diverged"]) == {1} and np.isneginf(pairs["low"]).all()


def test_without_a_cosine_an_estimator_is_aligned_worst(folder):
    """With the losses 2 1 3 1.5 of the others it is no point in favour of alignment."""
    found = csv_tables.read_table(folder / "alignment.csv.gz")
    found.loc[found[["first", "second"]].eq("uoro").any(axis=1), "cosine"] = np.nan
    csv_tables.write_table(found, folder / "alignment.csv.gz")
    _, learned, rho = map(csv_tables.read_table, studies.make_tables("alignment", folder))
    lost = learned.set_index("strategy").loc["uoro"]
    assert lost[["cosine", "cosine_low", "cosine_high"]].tolist() == [-np.inf] * 3
    # ranks as before: of cosine (uoro frozen fixed snap) 1 2 3 4, and of loss 3 2 1 4
    assert rho["rho"].iloc[0] == pytest.approx(0.2)


def test_an_estimator_without_a_run_and_a_run_without_a_cosine_are_shown(folder, kept):
    for name, gone in (("table", "uoro"), ("alignment", "frozen")):
        table = csv_tables.read_table(folder / f"{name}.csv.gz")
        names = table.reindex(columns=["run", "first", "second"])
        kept_rows = table[~names.eq(gone).any(axis=1)]
        csv_tables.write_table(kept_rows, folder / f"{name}.csv.gz")
    _, learned, rho = map(csv_tables.read_table, studies.make_tables("alignment", folder))
    learned = learned.set_index("strategy")[["cosine", "validation_loss"]].isna()
    assert learned.loc["uoro"].tolist() == [False, True]
    assert learned.loc["frozen"].tolist() == [True, False]
    assert rho["estimators"].tolist() == [2]
    studies.draw("alignment", folder)
    layout.check(kept["learning"])


def test_rank_correlation():
    rising = np.array([[1.0, 2.0], [2.0, 30.0], [3.0, 400.0]])
    assert EXPERIMENT.spearman(rising) == pytest.approx(1)
    assert EXPERIMENT.spearman(rising * [1, -1]) == pytest.approx(-1)
    assert np.isnan(EXPERIMENT.spearman(np.ones((3, 2))))


def test_figures_can_be_read(folder, kept):
    studies.make_tables("alignment", folder)
    studies.draw("alignment", folder)
    assert sorted(kept) == ["learning", "matrix_add"]
    for figure in kept.values():
        layout.check(figure)
        caption = " ".join(figure.texts[1].get_text().split())
        assert "mean over batches and 2 updates" in caption, "those at which the probe looked"
        said = layout.words(figure)
        assert "n = 3 seeds" in said and "t1 = 4, t2 = 12" in said
    assert "ρ = 0.20" in kept["learning"].axes[0].get_title()
    assert kept["learning"].axes[0].get_ylabel() == "validation loss\n(nats per time step)"
    rows = csv_tables.read_table(folder / "table.csv.gz").assign(loss_unit=None)  # a squared error
    csv_tables.write_table(rows, folder / "table.csv.gz")
    studies.draw("alignment", folder)
    assert kept["learning"].axes[0].get_ylabel() == "validation loss"


def test_the_captions_name_the_strategy_that_trains(folder, kept):
    for name in ("table", "alignment"):
        table = csv_tables.read_table(folder / f"{name}.csv.gz")
        rtrl = table["strategy"].replace({"full": "rtrl"})
        csv_tables.write_table(table.assign(strategy=rtrl), folder / f"{name}.csv.gz")
    studies.make_tables("alignment", folder)
    studies.draw("alignment", folder)
    assert "along which RTRL 5 trains" in layout.words(kept["matrix_add"])
    assert "trajectory of RTRL 5, mean" in layout.words(kept["learning"])


def test_each_of_the_probe_s_estimators_has_a_run():
    estimators = {"full": {}, "fixed": {}, "uoro": {}}
    config = OmegaConf.create({"probes": {"alignment": {"estimators": estimators}}})
    assert EXPERIMENT.more_runs(config) == [
        ["strategy=fixed", "snapshots=0"],
        ["strategy=uoro", "snapshots=0"],
    ]


@pytest.mark.slow
def test_the_study_runs(command, tmp_path):
    """With two of the estimators: the probe's are the strategies of these names."""
    kept = ("full", "fixed", "frozen")
    gone = [
        n for n in bs.compose("experiment=alignment").probes.alignment.estimators if n not in kept
    ]
    line = ["-m", "experiment=alignment", "size=smoke", "task=copy", "snapshots=2"]
    line += [f"~probes.alignment.estimators.{name}" for name in gone]
    status, said, errors = command(*line)
    assert status == 0, errors
    assert "census: 30 rows of 3 runs, as expected" in said
    table = csv_tables.read_table(tmp_path / "results" / "alignment" / "learning.csv")
    table = table.set_index("strategy")
    assert list(table.index) == ["full", "fixed", "frozen"]
    assert table.loc["full", "cosine"] == pytest.approx(1, abs=1e-5)
    assert 0 < table.loc["frozen", "cosine"] < table.loc["fixed", "cosine"] < 1


def test_two_trajectories_are_not_averaged(folder):
    rows = csv_tables.read_table(folder / "table.csv.gz")
    EXPERIMENT.STUDY.check(rows)
    with pytest.raises(SettingError, match=r"one with snapshots on add.* got full, frozen"):
        EXPERIMENT.STUDY.check(rows.assign(snapshots=2 * rows["run"].isin(["full", "frozen"])))
