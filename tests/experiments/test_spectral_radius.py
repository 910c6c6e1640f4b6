"""The study spectral_radius: the variance of one loss's gradient, how it grows, and that it all runs."""

from functools import partial

import jax
import jax.numpy as jnp
import layout
import numpy as np
import pandas as pd
import pytest
import studies
from jax.flatten_util import ravel_pytree

import bptt_study as bs
from bptt_study import probes
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.instruments import measure
from bptt_study.report import csv_tables
from bptt_study.runner import stories
from bptt_study.testing import examples
from bptt_study.types import Batch
from bptt_study.validation import SettingError

LAWS = {
    "randomized": partial(bs.strategies.randomized_constant, mean_length=3),
    "randomized_power_law": partial(bs.strategies.randomized_power_law, mean_length=3, alpha=4),
}


@pytest.fixture(scope="module")
def snapshot():
    ex = examples.example("elman_tanh", steps=8, sequences=3)
    full = bs.strategies.full(ex.problem)
    return probes.Snapshot(ex.problem, full, None, ex.params, ex.batch, jax.random.key(0), None)


@pytest.fixture(scope="module")
def table(snapshot):
    return probes.cut_variance(mean_length=3, alpha=4, draws=4000).look(snapshot)


def of_one_loss(snapshot, horizon):
    """The batch up to the horizon, with the loss of its last step alone."""
    inputs, targets, mask = (a[:horizon] for a in snapshot.batch)
    last = jnp.arange(horizon)[:, None] == horizon - 1
    return Batch(inputs, targets, last * jnp.ones_like(mask))


@pytest.mark.slow
def test_the_variance_is_that_of_all_draws_enumerated(snapshot, table):
    assert table["horizon"].tolist() == [2, 2, 4, 4, 8, 8]
    for _, row in table.iterrows():
        strategy = LAWS[row["law"]](snapshot.problem)
        batch = of_one_loss(snapshot, row["horizon"])
        exact = measure.exact_quality(strategy, snapshot.problem, snapshot.params, batch)
        assert row["variance"] == pytest.approx(3 * exact.variance, rel=1e-9)  # of 3 sequences
        assert row["sampled_variance"] == pytest.approx(row["variance"], rel=0.3)
    of_law = table.set_index(["horizon", "law"])["variance"]  # negative control
    assert abs(of_law[8, "randomized"] / of_law[8, "randomized_power_law"] - 1) > 0.01


@pytest.mark.slow
def test_the_signal_is_the_squared_gradient_of_each_sequence(snapshot, table):
    for horizon, row in table.groupby("horizon").first().iterrows():
        batch, squares = of_one_loss(snapshot, horizon), []
        for b in range(3):
            one = Batch(*(a[:, b : b + 1] for a in batch))
            state = snapshot.problem.cell.zeros(1)
            grads = backpropagate(snapshot.problem, snapshot.params, state, one)[0].grads
            squares.append(jnp.sum(ravel_pytree(grads["cell"])[0] ** 2))
        assert row["signal"] == pytest.approx(np.mean(squares), rel=1e-9)


def test_losses_that_do_not_count_are_left_out(snapshot):
    """The numbers of a batch without the sequence, and no row for a step at which no loss counts."""
    inputs, targets, _ = snapshot.batch
    counts = [[t != 3 and b != 0 for b in range(3)] for t in range(8)]
    mask = 1.0 * jnp.asarray(counts)
    look = probes.cut_variance(mean_length=3, alpha=4, draws=2).look
    found = look(snapshot._replace(batch=Batch(inputs, targets, mask)))
    alone = look(snapshot._replace(batch=Batch(inputs[:, 1:], targets[:, 1:], mask[:, 1:] * 0 + 1)))
    assert found["horizon"].tolist() == [2, 2, 8, 8]
    exact = ["law", "horizon", "second_moment", "signal", "variance"]
    expected = alone.loc[alone["horizon"] != 4, exact].reset_index(drop=True)
    pd.testing.assert_frame_equal(found[exact], expected, rtol=1e-12)
    empty = look(snapshot._replace(batch=Batch(inputs, targets, 0 * mask)))
    assert empty.empty and list(empty) == list(found)


def test_the_second_moment_is_that_of_the_longest_lag(table):
    moment = table.set_index(["law", "horizon"])["second_moment"]
    for horizon in (2, 4, 8):
        assert moment["randomized", horizon] == pytest.approx(1.5 ** (horizon - 1))
        links = np.arange(1, horizon)  # the power law's, from the first step on
        keep = 1 - 3 / (2 * 3 + links)
        assert moment["randomized_power_law", horizon] == pytest.approx(np.prod(1 / keep))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean_length": 1}, "`mean_length` must be a finite number greater than 1; got 1"),
        ({"alpha": 2}, "`alpha` must be a finite number greater than 2; got 2"),
        ({"draws": 1}, "`draws` must be a whole number of at least 2; got 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        probes.cut_variance(**settings)


def test_the_variance_of_a_linear_mode_grows_as_predicted():
    """One unit, W_hh = ρ, c = 1/4: finite below ρ² = 3/4, and ρ²/(1 - c) per step above."""
    problem = bs.Problem(bs.cells.linear(1, 1), bs.readouts.linear(1, 1), bs.losses.squared_error)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 4, 1)))
    batch = Batch(x, jnp.full((64, 4, 1), 1e9), jnp.ones((64, 4)))  # a loss that is all but linear
    look = probes.cut_variance(mean_length=4, alpha=4, draws=2).look

    def growth(radius, law):
        params = {
            "cell": {
                "W_xh": jnp.ones((1, 1)),
                "W_hh": jnp.full((1, 1), radius),
                "b_h": jnp.ones(1),
            },
            "readout": {"W_hq": jnp.ones((1, 1)), "b_q": jnp.zeros(1)},
        }
        full = bs.strategies.full(problem)
        rows = look(probes.Snapshot(problem, full, None, params, batch, jax.random.key(0), None))
        found = rows[rows["law"] == law].set_index("horizon")["variance"]
        return (found[64] / found[32]) ** (1 / 32)

    assert growth(0.6, "randomized") == pytest.approx(1, abs=0.02)
    assert growth(0.95, "randomized") == pytest.approx(0.95**2 * 4 / 3, abs=0.02)
    assert growth(0.95, "randomized_power_law") < 1.1  # a power of T, and 1.2 for the constant law


RADII = (0.9, 1.1)


@pytest.fixture
def folder(tmp_path):
    """Three seeds on each cell and radius: variance 2^T for the constant law, T² for the power law."""
    rows, norms, variances = [], [], []
    for cell in ("linear", "elman"):
        for radius in RADII:
            common = {"run": f"{cell}{radius}", "cell": cell, "spectral_radius": radius}
            common |= {"task": "add", "strategy": "full", "truncation_length": 16}
            settings = {"hidden": 8, "steps": 16, "batch_size": 4, "diverged": False}
            for seed in range(3):
                rows.append({**common, **settings, "seed": seed, "update": 0})
                for lag in range(16):
                    norm = radius**lag * (seed + 1)
                    norms.append(
                        {"seed": seed, "update": 0, "axis": "lag", "step": lag}
                        | {"gradient_norm": norm, **common}
                    )
                for T in (2, 4, 8, 16):
                    for law, moment, variance in (
                        ("randomized", 1.25 ** (T - 1), 2.0**T),
                        ("randomized_power_law", T, T**2),
                    ):
                        numbers = {"law": law, "horizon": T, "second_moment": moment, "signal": 4.0}
                        numbers |= {"variance": variance * (seed + 1), "sampled_variance": 8.0}
                        variances.append({"seed": seed, "update": 0, **numbers, **common})
    csv_tables.write_table(pd.DataFrame(rows), tmp_path / "table.csv.gz")
    csv_tables.write_table(pd.DataFrame(norms), tmp_path / "gradient_norms.csv.gz")
    csv_tables.write_table(pd.DataFrame(variances), tmp_path / "cut_variance.csv.gz")
    return tmp_path


def test_growth_by_hand(folder):
    (file,) = studies.make_tables("spectral_radius", folder)
    table = csv_tables.read_table(file)
    assert list(table["law"]) == ["randomized", "randomized_power_law"] * 4
    row = table[(table["cell"] == "linear") & (table["spectral_radius"] == 1.1)].set_index("law")
    assert row.loc["randomized", "growth"] == pytest.approx(2)
    assert row.loc["randomized", "predicted"] == pytest.approx(1.21 * 1.25)
    assert row.loc["randomized_power_law", "growth"] == pytest.approx(4 ** (1 / 8), rel=1e-6)
    assert row.loc["randomized_power_law", "predicted"] == pytest.approx(1.21 * 2 ** (1 / 8))
    assert row.loc["randomized", "variance"] == 2 * 2.0**16
    assert row.loc["randomized", "noise"] == 2 * 2.0**14
    assert row.loc["randomized", "sampled"] == pytest.approx(8 / 2**17)
    assert table["predicted"].min() == 1  # what is predicted to fade is predicted to stay finite
    assert (table["n"] == 3).all()


def test_figures_can_be_read_and_show_the_predictions(folder, kept):
    studies.make_tables("spectral_radius", folder)
    studies.draw("spectral_radius", folder)
    assert sorted(kept) == ["growth", "norms", "variance"]
    for figure in kept.values():
        layout.check(figure)
        said = layout.words(figure)
        assert "n = 3 seeds; diverged: none. 4 sequences each; 8 units" in said
    linear = kept["norms"].axes[0]
    measured, theory = linear.lines[:2]
    np.testing.assert_allclose(measured.get_ydata(), theory.get_ydata(), rtol=1e-5)  # the median
    bars = kept["variance"].axes[0].containers[-1]
    np.testing.assert_allclose(bars[0].get_xydata()[:, 1], [2 * 2.0**T / 4 for T in (2, 4, 8, 16)])
    (ends,) = bars[2]
    np.testing.assert_allclose(ends.get_segments()[0][:, 1], [2.0**2 / 4, 3 * 2.0**2 / 4])
    lines = [set(line.get_xdata()) for line in kept["growth"].axes[0].lines]
    assert [x.pop() for x in lines if len(x) == 1] == pytest.approx([1.25**-0.5])


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("strategy", "fixed", "`strategy` must be full in this study; got fixed"),
        ("task", "copy", "`task` must be add in this study; got copy"),
        ("spectral_radius", None, "`cell` must be one with a spectral radius; got linear"),
    ],
)
def test_what_the_captions_do_not_say_is_refused(folder, name, value, line):
    rows = csv_tables.read_table(folder / "table.csv.gz")
    rows = rows[(rows["cell"] == "linear") & (rows["spectral_radius"] == 0.9)]
    check = stories.shipped("spectral_radius").check
    check(rows)
    with pytest.raises(SettingError, match=f"^{line}"):
        check(rows.assign(**{name: value}))


def test_runs_of_other_steps_are_refused(folder):
    """Growth is from half the steps to all, and these are those of all runs in the captions."""
    rows = csv_tables.read_table(folder / "table.csv.gz")
    rows.loc[rows["cell"] == "elman", "steps"] = 8
    with pytest.raises(SettingError, match=r"^`steps` must be 16 in this study; got 8"):
        stories.shipped("spectral_radius").check(rows)


def test_growth_that_is_0_by_0_is_counted(folder):
    found = csv_tables.read_table(folder / "cut_variance.csv.gz")
    found.loc[(found["seed"] == 0) & (found["cell"] == "linear"), ["variance", "signal"]] = 0.0
    csv_tables.write_table(found, folder / "cut_variance.csv.gz")
    (file,) = studies.make_tables("spectral_radius", folder)
    table = csv_tables.read_table(file)
    assert set(table.loc[np.isposinf(table["growth_high"]), "diverged"]) == {1}
    assert (table["diverged"] == (table["cell"] == "linear")).all()


def test_growth_needs_two_lengths(folder):
    found = csv_tables.read_table(folder / "cut_variance.csv.gz")
    found = found[found["horizon"] == found["horizon"].max()]
    csv_tables.write_table(found, folder / "cut_variance.csv.gz")
    assert studies.make_tables("spectral_radius", folder) == []


def test_variances_are_those_before_training(folder, kept):
    before = csv_tables.read_table(folder / "cut_variance.csv.gz")
    later = before.assign(update=9, variance=1.0)
    csv_tables.write_table(pd.concat([before, later]), folder / "cut_variance.csv.gz")
    test_growth_by_hand(folder)
    test_figures_can_be_read_and_show_the_predictions(folder, kept)


def test_nothing_is_said_without_snapshots(folder):
    (folder / "cut_variance.csv.gz").unlink()
    assert studies.make_tables("spectral_radius", folder) == []
    assert studies.draw("spectral_radius", folder) == [folder / "norms.png"]
    (folder / "gradient_norms.csv.gz").unlink()
    assert studies.draw("spectral_radius", folder) == []


@pytest.mark.slow
def test_the_study_runs(command, tmp_path):
    line = ["-m", "experiment=spectral_radius", "size=smoke", "cell=linear", "spectral_radius=0.9"]
    status, said, errors = command(*line)
    assert status == 0, errors
    assert "census: 4 rows of 1 run, as expected" in said
    table = csv_tables.read_table(tmp_path / "results" / "spectral_radius" / "growth.csv")
    assert table["law"].tolist() == ["randomized", "randomized_power_law"]
    assert table["n"].tolist() == [2, 2]
