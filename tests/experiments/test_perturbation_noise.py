"""The noise of perturbations: the probe against all signs enumerated, the table and the figure by hand."""

from functools import partial

import jax
import layout
import numpy as np
import pandas as pd
import pytest
import studies
from test_perturbed import every_sign, moments, tiny

import bptt_study as bs
from bptt_study import probes
from bptt_study.report import csv_tables
from bptt_study.tasks import corpora
from bptt_study.validation import SettingError


def looked(problem, params, batch, unrolls=None):
    full = bs.strategies.full(problem)
    snapshot = probes.Snapshot(problem, full, None, params, batch, jax.random.key(0), None)
    return probes.perturbation_variance(unrolls).look(snapshot)


@pytest.mark.slow
def test_the_variance_is_that_of_all_signs_enumerated():
    """Four steps of one unit, three parameters; the control: another number of unrolls."""
    problem, params, batch = tiny(steps=4)
    table = looked(problem, params, batch).set_index(["estimator", "unrolls"])
    assert sorted({n for _, n in table.index}) == [1, 2, 4]
    found = {}
    for n in (1, 2, 4):
        pes = partial(bs.strategies.pes, sigma=None, hold=4 // n)
        mean, found[n] = moments(every_sign(pes(problem), params, batch)["cell"])
        row = table.loc[("pes", n)]
        assert row["variance"] == pytest.approx(found[n], rel=1e-9)
        assert row["norm2"] == pytest.approx(mean @ mean, rel=1e-9)
        assert row["noise"] == pytest.approx(row["variance"] / row["norm2"])
        assert table.loc[("nres", n), "noise"] == pytest.approx(3 - 1)
    assert abs(found[2] / found[4] - 1) > 0.01
    assert table.loc[("pes", 1), "variance"] == pytest.approx(table.loc[("nres", 1), "variance"])


def test_a_diverged_seed_is_rows_without_numbers():
    """One whose last update made nan parameters ended the run with "params must be finite"."""
    problem, params, batch = tiny(steps=4)
    found = looked(problem, params, batch)
    lost = looked(problem, jax.tree.map(lambda a: a * np.nan, params), batch)
    assert lost[["variance", "norm2", "noise"]].isna().all(axis=None)
    assert lost[["estimator", "unrolls"]].equals(found[["estimator", "unrolls"]])


def test_without_a_gradient_there_is_no_noise_to_tell():
    problem, params, batch = tiny(steps=2)
    table = looked(problem, params, batch._replace(mask=0 * batch.mask), [2])
    assert table["unrolls"].tolist() == [2, 2]
    assert (table["variance"] == 0).all() and table["noise"].isna().all()


def test_bad_unrolls():
    with pytest.raises(SettingError, match="`unrolls` must be a whole number of at least 1; got 0"):
        probes.perturbation_variance([0])
    with pytest.raises(SettingError, match=r"`unrolls` must be a divisor of .* 4 steps; got 3"):
        looked(*tiny(steps=4), [2, 3])


def test_the_texts_that_are_made():
    """Uniform letters, without a word in common with their neighbours; one letter; the same at every call."""
    drawn = corpora.find("random_letters", None)
    counts = pd.Series(list(drawn.text)).value_counts()
    expected = len(drawn.text) / 27
    assert len(counts) == 27 and (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert corpora.find("random_letters", None) == drawn
    assert set(corpora.find("one_letter", None).text) == {"e"}
    for name in ("random_letters", "one_letter"):
        with pytest.raises(SettingError, match=f"`path` must be null with corpus={name}"):
            corpora.find(name, "a.txt")


@pytest.fixture
def folder(tmp_path):
    """Noise 100 of kept perturbations; anew: 100·n on random text, 100/n on real text; times seed + 1."""
    rows, found = [], []
    for corpus, power in (("stdlib_docs", -1), ("random_letters", 1)):
        common = {
            "run": corpus,
            "task": "char_lm",
            "corpus": corpus,
            "cell": "lstm",
            "strategy": "full",
        }
        for seed in range(3):
            for update in (0, 9):
                at = {"seed": seed, "update": update, "strategy": "full", **common}
                rows.append(
                    {**at, "hidden": 5, "steps": 4, "updates": 9, "truncation_length": None}
                )
                for n in (1, 2, 4):
                    kept = {"unrolls": n, "noise": 100.0 * (seed + 1), "estimator": "nres"}
                    anew = kept | {"noise": kept["noise"] * n**power, "estimator": "pes"}
                    found += [at | kept, at | anew]
    csv_tables.write_table(pd.DataFrame(rows), tmp_path / "table.csv.gz")
    csv_tables.write_table(pd.DataFrame(found), tmp_path / "perturbation_variance.csv.gz")
    return tmp_path


def test_noise_by_hand(folder):
    (file,) = studies.make_tables("perturbation_noise", folder)
    table = csv_tables.read_table(file).set_index(["corpus", "moment", "estimator", "unrolls"])
    assert len(table) == 2 * 2 * 2 * 3 and (table["n"] == 3).all()
    row = table.loc[("stdlib_docs", "end", "pes", 4)]
    assert row[["noise", "ratio", "ratio_low", "ratio_high"]].tolist() == [50, 0.25, 0.25, 0.25]
    assert row["lower"] and not table.loc[("stdlib_docs", "end", "pes", 1), "lower"]
    assert table.loc[("random_letters", "start", "pes", 4), "ratio"] == 4
    assert not table["lower"].xs("random_letters").any()


def test_noise_beside_no_other_has_no_ratio(folder):
    found = csv_tables.read_table(folder / "perturbation_variance.csv.gz")
    gone = (found["estimator"] == "nres") & (found["unrolls"] == 4) & (found["seed"] == 0)
    csv_tables.write_table(found[~gone], folder / "perturbation_variance.csv.gz")
    table = csv_tables.read_table(studies.make_tables("perturbation_noise", folder)[0])
    row = table.set_index(["corpus", "moment", "estimator", "unrolls"]).loc[
        "stdlib_docs", "end", "pes", 4
    ]
    assert (row["n"], row["diverged"], row["noise"], row["ratio_high"]) == (3, 1, 50, np.inf)


def test_one_seed_and_another_strategy_are_told(folder, kept):
    for name in ("table", "perturbation_variance"):
        table = csv_tables.read_table(folder / f"{name}.csv.gz")
        one = table[table["seed"] == 0].assign(strategy="frozen")
        csv_tables.write_table(one, folder / f"{name}.csv.gz")
    (file,) = studies.make_tables("perturbation_noise", folder)
    assert not csv_tables.read_table(file)["lower"].any()  # one seed has no interval
    studies.draw("perturbation_noise", folder)
    assert "9 updates of Frozen past. Line" in layout.words(kept["noise"])


def test_the_figure_can_be_read(folder, kept):
    studies.make_tables("perturbation_noise", folder)
    studies.draw("perturbation_noise", folder)
    (figure,) = kept.values()
    layout.check(figure)
    said = layout.words(figure)
    assert "n = 3 seeds" in said and "lstm of 5 units" in said and "9 updates" in said
    assert [ax.get_title() for ax in figure.axes] == ["real text", "random letters"]
    anew = [line.get_ydata().tolist() for line in figure.axes[1].lines]
    assert [200.0, 400.0, 800.0] in anew and [200.0, 200.0, 200.0] in anew


def test_moments_between_have_their_update_and_those_that_lack_are_not_claimed(folder, kept):
    probed = csv_tables.read_table(folder / "perturbation_variance.csv.gz")
    start = probed[probed["update"] == 0]
    between = [start.assign(update=update) for update in (3, 6)]
    csv_tables.write_table(pd.concat([probed, *between]), folder / "perturbation_variance.csv.gz")
    table = csv_tables.read_table(studies.make_tables("perturbation_noise", folder)[0])
    assert set(table["moment"]) == {"start", "update 3", "update 6", "end"}
    studies.draw("perturbation_noise", folder)
    assert "before and after 9 updates" in layout.words(kept["noise"])
    csv_tables.write_table(start, folder / "perturbation_variance.csv.gz")
    studies.make_tables("perturbation_noise", folder)
    studies.draw("perturbation_noise", folder)
    assert "before 9 updates" in layout.words(kept["noise"])


def test_each_text_has_a_title_of_its_own(folder, kept):
    for name in ("table", "perturbation_variance"):
        table = csv_tables.read_table(folder / f"{name}.csv.gz")
        other = table.replace({"random_letters": "time_machine"})
        csv_tables.write_table(other, folder / f"{name}.csv.gz")
    studies.make_tables("perturbation_noise", folder)
    studies.draw("perturbation_noise", folder)
    assert [ax.get_title() for ax in kept["noise"].axes] == ["real text", "time_machine"]


def test_nothing_is_said_without_snapshots(folder):
    (folder / "perturbation_variance.csv.gz").unlink()
    assert (
        studies.make_tables("perturbation_noise", folder)
        == studies.draw("perturbation_noise", folder)
        == []
    )


@pytest.mark.slow
def test_the_study_runs(command, tmp_path):
    line = ["-m", "experiment=perturbation_noise", "size=smoke", "task.corpus=one_letter"]
    status, said, errors = command(*line, "cell=elman")
    assert status == 0, errors
    assert "census: 4 rows of 1 run, as expected" in said
    table = csv_tables.read_table(tmp_path / "results" / "perturbation_noise" / "noise.csv")
    assert set(table["moment"]) == {"start", "end"}
    first = table[table["unrolls"] == 1]
    np.testing.assert_allclose(first["noise"], 5 * (27 + 5 + 1) - 1, rtol=1e-4)  # P - 1
