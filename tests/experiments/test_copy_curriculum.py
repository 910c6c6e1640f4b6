"""The study copy_curriculum: the largest length over tokens, from rows made by hand."""

import layout
import numpy as np
import pandas as pd
import pytest
import studies

from bptt_study.report import csv_tables
from bptt_study.runner import figures, stories


def run(strategy, lengths, window=np.nan):
    """Rows of a run: lengths[seed][log point]; None: the seed has diverged and stays at its last length."""
    rows = []
    for seed, reached in enumerate(lengths):
        filled = pd.Series(reached, dtype=float).ffill()
        for n, longest in enumerate(filled):
            diverged = reached[n] is None
            scores = {"longest": longest, "validation_loss": 1.0, "diverged": diverged}
            rows.append({"seed": seed, "update": 10 * n, **scores})
    table = pd.DataFrame(rows)
    settings = {"task": "copy_curriculum", "cell": "elman", "hidden": 32, "task.mean_over": 10}
    settings |= {"task.bound": 0.15, "steps": 64, "batch_size": 8, "learning_rate": 0.003}
    settings |= {"optimizer": "adam"}
    settings |= {"truncation_length": window, "spectral_radius": np.nan, "window": window}
    name = f"{strategy}{window}"
    return table.assign(run=name, strategy=strategy, tokens=512 * table["update"], **settings)


@pytest.fixture
def folder(tmp_path):
    rows = pd.concat(
        [
            run("full", [[1, 5, 9], [1, 6, 10], [1, 7, 11]]),
            run("fixed", [[1, 4, 6]] * 3, window=4),
            run("uoro", [[1, 3, 4], [1, 2, None], [1, 2, 5]]),
        ]
    )
    csv_tables.write_table(rows, tmp_path / "table.csv.gz")
    studies.make_tables("copy_curriculum", tmp_path)
    return tmp_path


def test_a_diverged_seed_keeps_the_length_that_it_reached(folder):
    table = csv_tables.read_table(folder / "reached.csv").set_index(["strategy", "update"])
    assert table.loc[("full", 20), "longest"] == 10
    end = table.loc[("uoro", 20)]
    assert (end["longest"], end["longest_low"], end["longest_high"]) == (4, 2, 5)
    assert (end["n"], end["diverged"]) == (3, 1)
    assert table.loc[("uoro", 10), "diverged"] == 0


def test_another_task_has_the_figures_of_any_sweep(folder, kept):
    rows = csv_tables.read_rows(folder).drop(columns="longest").assign(task="copy")
    csv_tables.write_table(rows, folder / "table.csv.gz")
    made = figures.make(stories.shipped("copy_curriculum"), folder)
    assert "`task` must be copy_curriculum in this study; got copy." in made.left_out
    assert not made.failed and "learning_curves_validation_loss" in kept


def test_a_seed_whose_last_row_has_no_length_keeps_the_one_before(folder):
    rows = csv_tables.read_rows(folder).astype({"longest": float})
    lost = (rows["strategy"] == "full") & (rows["update"] == 20)
    rows.loc[lost, "longest"] = [9, np.nan, np.nan]
    csv_tables.write_table(rows, folder / "table.csv.gz")
    studies.make_tables("copy_curriculum", folder)
    table = csv_tables.read_table(folder / "reached.csv").set_index(["strategy", "update"])
    assert table.loc[("full", 20), "longest"] == 7  # of 9, 6, 7


def test_the_figure_can_be_read_and_names_each_line_at_its_end(folder, kept):
    studies.draw("copy_curriculum", folder)
    layout.check(kept["reached"])
    (ax,) = kept["reached"].axes
    assert {t.get_text() for t in ax.texts} == {"Full: 10", "Fixed (chunks) of 4: 6", "UORO: 4"}
    assert "n = 3 seeds; diverged: 1" in layout.words(kept["reached"])
    assert "Optimizer adam, rate 0.003." in layout.words(kept["reached"])


def test_the_caption_is_true_of_all_runs(folder, kept):
    rows = csv_tables.read_rows(folder)
    full = rows["strategy"] == "full"
    rows["optimizer"], rows["learning_rate"] = np.where(full, "sgd", "adam"), np.where(full, 1, 0.1)
    csv_tables.write_table(rows, folder / "table.csv.gz")
    studies.draw("copy_curriculum", folder)
    assert "Optimizer sgd and adam, rate 1 and 0.1." in layout.words(kept["reached"])


def test_a_sweep_over_one_more_setting_has_the_figures_of_any_sweep(folder, kept):
    rows = csv_tables.read_rows(folder)
    more = rows.assign(run=rows["run"] + "x", learning_rate=0.1)
    csv_tables.write_table(pd.concat([rows, more]), folder / "table.csv.gz")
    made = figures.make(stories.shipped("copy_curriculum"), folder)
    (line,) = [line for line in made.left_out if "must be the same" in line]
    assert "`learning_rate` must be the same in all runs of one strategy, truncation_length" in line
    assert "reached" not in kept and "learning_curves_validation_loss" in kept


@pytest.mark.slow
def test_the_study_runs(command, monkeypatch, tmp_path):
    """With an easy bound, so that the length grows within a few updates."""
    alone = stories.shipped("copy_curriculum")._replace(more_runs=lambda config: [])
    monkeypatch.setattr(stories, "shipped", lambda experiment: alone)
    line = ["-m", "experiment=copy_curriculum", "size=smoke", "hidden=4", "strategy=full"]
    status, said, errors = command(*line, "task.bound=2", "task.mean_over=2")
    assert status == 0, errors
    assert "census: 6 rows of 1 run, as expected" in said
    table = csv_tables.read_table(tmp_path / "results" / "copy_curriculum" / "reached.csv")
    assert table["longest"].tolist() == [1, 3, 5]  # at updates 0, 4 and 8
