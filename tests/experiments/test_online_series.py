"""The study online_series: errors at the end, beside what was published, and lag profiles."""

import layout
import numpy as np
import pandas as pd
import pytest
import studies
from omegaconf import OmegaConf

from bptt_study.report import csv_tables
from bptt_study.runner import stories
from bptt_study.validation import SettingError

EXPERIMENT = stories.experiment_module("online_series")


def run(strategy, system, horizon=1, steps=1, losses=(0.1, 0.2, 0.3)):
    """Rows of a run of as many seeds: the loss of each falls to its own at the end."""
    name = f"{strategy}{system}{horizon}{steps}"
    rows = [
        {
            "seed": seed,
            "update": 250 * k,
            "train_loss": loss + (k - 6) / 1e4 if k > 3 else 0.5,
            "diverged": False,
        }
        for seed, loss in enumerate(losses)
        for k in range(9)
    ]
    common = {
        "run": name,
        "task": "series",
        "cell": "elman",
        "strategy": strategy,
        "system": system,
    }
    settings = {
        "horizon": horizon,
        "steps": steps,
        "updates": 15_000 // steps,
        "hidden": 64,
        "logs": 60,
    }
    settings["batch_size"] = 8
    return pd.DataFrame(rows).assign(**common, **settings)


@pytest.fixture
def folder(tmp_path):
    close = (0.0026, 0.0021, 0.0031)  # of the published .0052 ± .0010
    runs = [
        run(name, system, losses=close)
        for system in EXPERIMENT.SYSTEMS
        for name in ("frozen", "snap", "uoro")
    ]
    runs += [run("full", "henon", steps=25), run("full", "henon", steps=50)]
    runs += [run("frozen", "henon", -6), run("rtrl", "henon", -6, losses=(0.01, 0.01, 0.02))]
    runs += [run("full", "henon", -6, steps=50)]
    mass = [
        {
            "run": f"fullhenon{h}50",
            "seed": seed,
            "update": update,
            "lag": lag,
            "mass": 3.0 * 2.0**-lag,
        }
        for h in (1, -6)
        for seed in range(3)
        for update in (0, 2000)
        for lag in range(30)
    ]
    csv_tables.write_table(pd.concat(runs, ignore_index=True), tmp_path / "table.csv.gz")
    csv_tables.write_table(pd.DataFrame(mass), tmp_path / "lag_mass.csv.gz")
    return tmp_path


def test_errors_are_twice_the_last_loss_beside_the_published(folder):
    files = studies.make_tables("online_series", folder)
    assert [f.name for f in files] == ["nmse.csv", "profiles.csv"]
    table = csv_tables.read_table(files[0])
    assert len(table) == 9 + 1 + 2  # no run for a profile
    keys = table.set_index(["system", "horizon", "strategy"]).sort_index()
    snap = keys.loc[("henon", 1, "snap")]
    assert snap["nmse"] == pytest.approx(0.0052)
    assert snap["last_steps"] == 1250
    assert snap["mean"] == pytest.approx(0.0052)
    assert snap["sd"] == pytest.approx(0.001 * np.sqrt(2 / 3), rel=1e-5)  # of the population
    assert (snap["published_mean"], snap["published_sd"]) == (0.0052, 0.0012)
    assert snap["agrees"] == "yes"
    assert keys.loc[("henon", 1, "uoro"), "agrees"] == "no"
    assert pd.isna(keys.loc[("henon", 1, "frozen"), "agrees"])
    assert keys.loc[("henon", -6, "rtrl"), "nmse"] == pytest.approx(0.02)
    assert pd.isna(keys.loc[("henon", -6, "rtrl"), "published_mean"])  # recall is ours alone
    assert keys.loc[("mackey_glass", 1, "snap"), "published_mean"] == 0.005


@pytest.mark.parametrize("other", [{"hidden": 8}, {"updates": 200, "logs": 4}, {"cell": "gru"}])
def test_runs_of_another_size_are_not_held_to_the_published(folder, other):
    """At size smoke, of 8 units after 200 steps, all "disagreed"."""
    rows = csv_tables.read_table(folder / "table.csv.gz").assign(**other)
    table = EXPERIMENT.nmse(rows)
    assert table["published_mean"].isna().all() and set(table["agrees"]) == {""}
    assert "time_steps" not in table


def test_the_last_steps_are_no_more_than_all(folder):
    rows = csv_tables.read_table(folder / "table.csv.gz")
    found = EXPERIMENT.by_seed(rows.assign(logs=2))
    assert found["last_steps"].equals(found["steps"] * found["updates"])


def test_the_last_steps_of_a_run_with_fewer_updates_than_log_points(folder):
    """5 of 20 log points, an update each: 125 of 500 steps of chunks of 25."""
    rows = csv_tables.read_table(folder / "table.csv.gz").assign(updates=20, logs=60)
    found = EXPERIMENT.nmse(rows).set_index("steps")["last_steps"]
    assert (found[1] == 5).all() and found[25] == 125


def test_a_diverged_seed_has_no_error_that_a_mean_could_take(folder):
    """Its last losses are those of earlier steps, or none."""
    rows = csv_tables.read_table(folder / "table.csv.gz")
    lost = (
        rows["run"].eq("snaphenon11") & rows["seed"].eq(2) & rows["update"].eq(rows["update"].max())
    )
    assert lost.sum() == 1
    rows = rows.assign(diverged=lost, train_loss=rows["train_loss"].mask(lost))
    csv_tables.write_table(rows, folder / "table.csv.gz")
    table = csv_tables.read_table(studies.make_tables("online_series", folder)[0]).set_index("run")
    snap = table.loc["snaphenon11"]
    assert (snap["n"], snap["diverged"], snap["agrees"]) == (3, 1, "no")
    assert pd.isna([snap["mean"], snap["sd"]]).all() and np.isposinf(snap["high"])


def test_a_profile_is_shares_of_all_lags(folder):
    table = csv_tables.read_table(studies.make_tables("online_series", folder)[1])
    one = table[(table["horizon"] == 1) & (table["update"] == 0)]
    assert one["share"].sum() == pytest.approx(1, rel=1e-6)
    assert one["share"].iloc[1] == pytest.approx(one["share"].iloc[0] / 2, rel=1e-5)
    assert (table["n"] == 3).all()


def test_figures_can_be_read(folder, kept):
    studies.make_tables("online_series", folder)
    studies.draw("online_series", folder)
    assert sorted(kept) == ["nmse", "profiles"]
    for figure in kept.values():
        layout.check(figure)
        assert "n = 3 seeds; diverged: none" in layout.words(figure)
    assert len(kept["nmse"].axes) == len(kept["profiles"].axes) == 4


def test_estimators_beyond_the_published_come_after_them(folder, kept):
    rows = csv_tables.read_table(folder / "table.csv.gz").assign(cell="leaky")
    one = run("eprop", "henon").assign(cell="leaky")
    csv_tables.write_table(pd.concat([rows, one]), folder / "table.csv.gz")
    table = csv_tables.read_table(studies.make_tables("online_series", folder)[0])
    of_task = table[(table["system"] == "henon") & (table["horizon"] == 1)]
    assert of_task["strategy"].tolist() == ["frozen", "uoro", "snap", "full", "eprop"]
    studies.draw("online_series", folder)
    assert kept["nmse"].axes[0].get_xticklabels()[-1].get_text() == "e-prop"
    assert "Leaky networks of 64 units" in layout.words(kept["nmse"])


@pytest.mark.parametrize(("strategy", "steps"), [("full", 1), ("frozen", 5), ("snap", 25)])
def test_an_update_is_as_often_as_the_caption_says(folder, strategy, steps):
    rows = csv_tables.read_table(folder / "table.csv.gz").assign(truncation_length=np.nan)
    EXPERIMENT.STUDY.check(rows)
    with pytest.raises(SettingError, match=f"budget.steps.*; got {steps} of {strategy}"):
        EXPERIMENT.STUDY.check(pd.concat([rows, run(strategy, "mackey_glass", steps=steps)]))


def test_beside_a_run_are_all_estimators_of_recall():
    config = OmegaConf.create({"budget": {"updates": 15000}})
    lines = [dict(part.split("=") for part in line) for line in EXPERIMENT.more_runs(config)]
    recall = [line for line in lines if line.get("task.horizon") == "-6"]
    assert {line["strategy"] for line in recall} == {*EXPERIMENT.ORDER}
    chunks = [line for line in lines if line.get("budget.steps") == "25"]
    assert [line["budget.updates"] for line in chunks] == ["600"]  # as many time steps
    for line in lines:
        assert (line["strategy"] == "rflo") == ("strategy.leak" in line)


@pytest.mark.slow
def test_the_study_runs(command, monkeypatch, tmp_path):
    """An estimator that carries an influence from update to update, chunks, and a profile of recall."""
    some = EXPERIMENT.STUDY._replace(
        more_runs=lambda cfg: [EXPERIMENT.more_runs(cfg)[n] for n in (0, -1)]
    )
    monkeypatch.setattr(EXPERIMENT, "STUDY", some)
    line = ["-m", "experiment=online_series", "size=smoke", "task.system=henon", "strategy=snap"]
    status, said, errors = command(*line)
    assert status == 0, errors
    assert "census: 29 rows of 3 runs, as expected" in said
    folder = tmp_path / "results" / "online_series"
    table = csv_tables.read_table(folder / "nmse.csv")
    assert table["strategy"].tolist() == ["snap", "full"]
    assert (table["nmse"] < 1.1).all()
    profile = csv_tables.read_table(folder / "profiles.csv")
    assert profile["lag"].max() == 49
