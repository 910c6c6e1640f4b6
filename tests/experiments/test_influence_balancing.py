"""Influence balancing: the system, what lag windows predict of it, and what training makes of that.

The oracles are A and v as matrices, lag windows by their definitions, and the numbers of Tallec & Ollivier
2017, section 5.1, as computed elsewhere (23 states, 10 of them +1).
"""

import sys
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import studies
from omegaconf import OmegaConf

import bptt_study as bs
from bptt_study.backprop.forward import evaluate
from bptt_study.report import csv_tables
from bptt_study.runner import cli, stories
from bptt_study.tasks import influence_balancing
from bptt_study.training.budget import Budget
from bptt_study.training.train import make_train
from bptt_study.validation import SettingError

SYSTEMS = [(23, 10), (9, 3), (5, 4), (1, 1)]
study = stories.experiment_module("influence_balancing")


def matrices(states, positive):
    A = 0.5 * np.eye(states) + 0.5 * np.eye(states, k=1)
    return A, np.where(np.arange(states) < positive, 1.0, -1.0)


def response(states, positive, lags):
    """(Aᵏv)_1, power by power."""
    A, v = matrices(states, positive)
    return np.array([(np.linalg.matrix_power(A, k) @ v)[0] for k in range(lags)])


def problem_of(states, positive, **settings):
    task = influence_balancing(states, positive, **settings)
    return task, bs.Problem(bs.cells.influence(1, states, positive), task.readout, task.loss)


# The cell and the task


@pytest.mark.parametrize(("states", "positive"), SYSTEMS)
def test_a_step_is_the_matrix_product(states, positive, rng):
    A, v = matrices(states, positive)
    s, x = rng.standard_normal((4, states)), rng.standard_normal((4, 1))
    actual = bs.cells.influence(1, states, positive).step({"theta": 0.7}, s, x)
    np.testing.assert_allclose(actual, s @ A.T + 0.7 * x * v, atol=1e-15)


@pytest.mark.parametrize(("states", "positive"), [(7, 3), (1, 1)])
def test_gradient_is_that_of_the_unrolled_matrices(states, positive, rng, key):
    A, v = matrices(states, positive)
    task, problem = problem_of(states, positive, burn_in=3)
    batch, _ = task.sampler(12, 2).sample((), key, 0)
    start = jnp.asarray(rng.standard_normal((2, states)))

    def loss(theta):
        s, total = start, 0.0
        for t in range(12):
            s = s @ A.T + theta * v
            total += (t >= 3) * 0.5 * jnp.sum((s[:, 0] - 1) ** 2)
        return total / (9 * 2)

    strategy = bs.strategies.full(problem)
    params = {"cell": {"theta": jnp.asarray(0.3)}, "readout": {}}
    estimate, _ = jax.jit(strategy.estimate)(params, start, batch, key)
    value, slope = jax.jit(jax.value_and_grad(loss))(0.3)
    np.testing.assert_allclose(estimate.loss, value, rtol=1e-14)
    np.testing.assert_allclose(estimate.grads["cell"]["theta"], slope, rtol=1e-13)
    assert abs(slope) > 0.01


@pytest.mark.parametrize(("states", "positive"), SYSTEMS)
def test_the_optimum_is_known(states, positive, key):
    """s¹ settles at 2 (2·positive - states) θ, so θ* is one over that; -1/6 for 23 and 10."""
    task, problem = problem_of(states, positive)
    best = 1 / (2 * (2 * positive - states))
    for theta, expected in ((best, 0.0), (0.0, 0.5), (3 * best, 2.0)):
        params = {"cell": {"theta": jnp.asarray(theta)}, "readout": {}}
        scores = evaluate(problem, params, task.validation)
        np.testing.assert_allclose(
            scores["validation_loss"], expected, atol=0.01 * (states < 3) + 1e-4
        )
    assert task.references == {"nothing": 0.5}
    if (states, positive) == (23, 10):
        assert best == -1 / 6


def test_updates_continue_each_other_and_begin_with_silence(key):
    sampler = influence_balancing(5, 2, burn_in=4).sampler(7, 3)
    batch, fresh = jax.vmap(sampler.sample, in_axes=(None, None, 0))((), key, jnp.arange(3))
    assert fresh.tolist() == [True, False, False]
    assert sampler.continues
    assert batch.inputs.shape == batch.targets.shape == (3, 7, 3, 1)
    assert (batch.inputs == 1).all() and (batch.targets == 1).all()
    assert (batch.mask == np.array([0, 0, 0, 0, 1, 1, 1])[:, None]).all()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: influence_balancing(8, 4),
            "`positive` must be between 1 and states (8), and not half of them; got 4",
        ),
        (lambda: influence_balancing(8, 9), "`positive` must be *; got 9."),
        (
            lambda: influence_balancing(8, 0),
            "`positive` must be a whole number of at least 1; got 0",
        ),
        (lambda: influence_balancing(0, 1), "`states` must be *; got 0."),
        (lambda: influence_balancing(8, 2.5), "`positive` must be *; got 2.5."),
        (lambda: influence_balancing(burn_in=-1), "`burn_in` must be *; got -1."),
        (lambda: influence_balancing(burn_in=9).sampler(9, 1), "`budget.steps` must be *; got 9."),
        (lambda: influence_balancing().sampler(9, 0), "`budget.batch_size` must be *; got 0."),
        (lambda: bs.cells.influence(2, 8, 3), "`inputs` must be 1; got 2"),
        (lambda: bs.cells.influence(1, 8, 9), "`positive` must be between 1 and states (8); got 9"),
        (lambda: bs.cells.influence(1, -8, 1), "`states` must be *; got -8."),
        (lambda: bs.cells.influence(1, 8, 3, theta="x"), "`theta` must be a finite number; got x"),
    ],
)
def test_bad_settings_are_one_line(make, line):
    with pytest.raises(SettingError) as caught:
        make()
    assert fnmatch(str(caught.value), f"*{line}*") and "\n" not in str(caught.value)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bptt-study", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("task=influence_balancing cell=elman", "`cell` must be influence; got elman"),
        (
            "cell=influence",
            "`cell` must be a cell that fits the task; got bptt_study.cells.influence.",
        ),
        (
            "task=influence_balancing cell.states=11",
            "`cell.states` must be that of the task, 23; got 11. `task.states` sets both.",
        ),
        (
            "-m experiment=influence_balancing task.states=20 task.positive=10",
            "`task.positive` must be between",
        ),
    ],
)
def test_bad_command_lines_are_one_line(arguments, line, monkeypatch, capsys, tmp_path):
    where = f"results_dir={tmp_path}"
    assert command(monkeypatch, *arguments.split(), "size=smoke", where) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert not list(tmp_path.iterdir())


# Predicted


def test_the_published_response():
    one = study.system(23, 10)
    np.testing.assert_allclose(one.response, response(23, 10, len(one.response)), atol=1e-13)
    sums = np.cumsum(one.response)
    assert (sums.argmax() + 1, sums.max()) == (19, pytest.approx(16.476058959960938, abs=1e-12))
    assert sums[-1] == pytest.approx(-6, abs=1e-9) and one.limit == -6


def kept_by_definition(family, window, lags):
    """w_k from what a window means: which lags the losses of a long sequence see."""
    k = np.arange(lags)
    if family.strategy == "fixed":
        stride = family.stride or window
        seen = [window - stride + r for r in range(stride)]  # of the r-th loss of a block
        return np.mean([k <= reach for reach in seen], axis=0)
    a = family.alpha
    longer, alive = [1.0], 1.0  # P(N > j)
    while alive > 1e-9:
        delta = len(longer)
        alive *= 1 - (1 / window if a is None else (a - 1) / ((a - 2) * window + delta))
        longer.append(alive)
    left = np.cumsum(longer[::-1])[::-1]  # E[(N - k)₊]
    return np.append(left, np.zeros(lags))[:lags] / window


@pytest.mark.parametrize(("states", "positive"), [(23, 10), (9, 3)])
def test_slopes_are_those_of_the_windows_by_definition(states, positive):
    one = study.system(states, positive)
    plain = response(states, positive, len(one.response))
    for family in study.families():
        for window in (family.least, 25, 60):
            expected = kept_by_definition(family, window, len(plain)) @ plain / one.limit
            assert one.slope(family, window) == pytest.approx(expected, abs=1e-5)


def test_predicted_thresholds():
    """41 and 110 are published (estimators.md, section 4); a window off by one is another threshold."""
    one, found = study.system(23, 10), study.families()
    assert [one.threshold(f, 0) for f in found] == [41, 43, 46, 52, 110, 88, 82]
    shifted = [f._replace(make=lambda p, w, f=f: f.make(p, w + 1)) for f in found[:5]]
    assert [one.threshold(f, 0) for f in shifted[:4]] == [40, 42, 45, 51]


def test_no_threshold_where_truncation_never_misleads():
    """More +1 than -1: short lags point the right way too."""
    one = study.system(5, 4)
    for family in study.families():
        assert one.threshold(family, family.resolution) == family.least
        assert one.tried(family) == sorted({family.least, 40})


def test_what_cannot_be_told_from_zero_is_not_tried():
    """9 and 4: chunks of 49 have the slope 3e-8, chunks of 48 and 50 have not."""
    one = study.system(9, 4)
    chunks = study.families()[4]
    assert abs(one.slope(chunks, 49)) < 1e-6 < abs(one.slope(chunks, 48))
    assert one.tried(chunks) == [48, 50, 72]
    for family in study.families()[5:]:
        *near, turn, _ = one.tried(family)
        assert [*near, turn] == list(range(near[0], turn + 1))
        assert one.slope(family, near[0]) < -study.NOISE * one.peak
        assert one.slope(family, turn) > study.NOISE * one.peak > one.slope(family, turn - 1)


# Trained


def settings(line):
    return dict(part.split("=") for part in line)


def end(states, positive, line):
    """Last validation loss of one run of the study, as `bptt-study` would train it."""
    s = settings(line)
    task, problem = problem_of(states, positive, burn_in=int(s["task.burn_in"]))
    family = next(
        f
        for f in study.families()
        if (f.strategy, str(f.stride)) == (s["strategy"], s.get("strategy.stride", "None"))
    )
    budget = Budget(int(s["budget.steps"]), 1, 300, logs=1)
    rate = float(s["optimizer.learning_rate"])
    optimizer = bs.optimizers.clipped(optax.adam, rate)
    train = make_train(problem, family.make(problem, int(s["truncation"])), optimizer, budget, task)
    return train(jax.random.key(0)).records[-1]["validation_loss"][0]


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 5, None])
def test_training_turns_where_predicted(stride):
    """The run before the predicted window goes away from θ*, the one at it arrives."""
    one = study.system(5, 1)
    lines = [
        line
        for line in study._trained(one)
        if settings(line)["strategy"] == "fixed"
        and settings(line).get("strategy.stride") == (stride and str(stride))
    ]
    before, at, wide = (end(5, 1, line) for line in lines)
    assert before > 5 and at < 1e-3 and wide < 1e-3


def table(runs):
    """Last rows of runs (strategy, stride, alpha, length, losses of the seeds) on 5 states, 1 of them +1."""
    return pd.DataFrame(
        {
            "run": str(i), "seed": seed, "update": 10, "states": 5, "positive": 1, "strategy": strategy,
            "window": length if strategy == "fixed" else None, "stride": stride, "alpha": alpha,
            "mean_length": None if strategy == "fixed" else length, "truncation_length": length,
            "validation_loss": loss, "diverged": not np.isfinite(loss), "nothing_loss": 0.5,
            "schedule": "constant",
        }
        for i, (strategy, stride, alpha, length, losses) in enumerate(runs)
        for seed, loss in enumerate(losses)
    )  # fmt: skip


def test_observed_is_the_least_window_from_which_on_all_converge(tmp_path):
    law = "randomized_power_law_uncompensated"
    rows = table(
        [
            ("fixed", 1, None, 2, [1e-9]),  # by chance: a wider one fails
            ("fixed", 1, None, 3, [np.nan]),
            ("fixed", 1, None, 4, [1e-9]),
            ("fixed", 5, None, 5, [1e-9]),  # chunks of 5 as well
            ("fixed", 6, None, 6, [0.06]),
            ("fixed", 10, None, 10, [0.4]),
            (
                "randomized_uncompensated",
                None,
                None,
                4,
                [1e-9, 1e-9, np.inf],
            ),  # the median seed counts
            (law, None, 6, 3, [1e-9, np.inf, np.inf]),
            (law, None, 4, 2, [1e-9, 1e-9, 1e-9]),  # another law's
        ]
    )
    csv_tables.write_table(rows, tmp_path / "table.csv.gz")
    files = studies.make_tables("influence_balancing", tmp_path)
    assert [f.name for f in files] == ["thresholds.csv", "slopes.csv"]
    found = csv_tables.read_table(files[0])
    assert list(found)[:5] == ["strategy", "stride", "alpha", "predicted_window", "observed_window"]
    assert found["stride"].fillna(0).tolist() == [1, 5, 10, 20, 0, 0, 0]
    assert found["predicted_window"].tolist() == [4, 6, 10, 20, 6, 4, 3]
    assert found["observed_window"].fillna(0).tolist() == [4, 5, 0, 0, 0, 4, 0]
    assert found["failed_windows"].fillna("").tolist() == ["3", "", "10", "", "6 10", "", "3"]
    assert found["converged_windows"].fillna("").tolist() == ["2 4", "5", "", "", "5", "4", ""]


def test_a_run_counts_for_its_own_system():
    """The window 4 fails on a second system, whose lines stand below those of the first."""
    rows = table([("fixed", 1, None, n, [1e-9]) for n in (4, 40)])
    other = table([("fixed", 1, None, 4, [60.0])]).assign(run="other", states=9, positive=3)
    found = study.thresholds(pd.concat([rows, other]))
    assert found[["states", "positive"]].to_numpy().tolist() == [[5, 1]] * 7 + [[9, 3]] * 7
    assert found["converged_windows"].tolist() == ["4 40"] + [""] * 13
    assert found["failed_windows"].tolist() == [""] * 7 + ["4"] + [""] * 6


def test_a_diverged_run_has_not_converged(tmp_path):
    """The loss of its last parameters may be small."""
    rows = table([("fixed", 1, None, n, [1e-9]) for n in (3, 4, 5)])
    csv_tables.write_table(rows.assign(diverged=rows["window"] == 4), tmp_path / "table.csv.gz")
    found = csv_tables.read_table(studies.make_tables("influence_balancing", tmp_path)[0])
    assert found["failed_windows"].iloc[0] == 4 and found["observed_window"].iloc[0] == 5


@pytest.mark.slow
def test_the_published_system_has_others_and_descents_beside_it():
    """Every run beside the base has its own system; chunks of 10 … and random cuts descend on the published."""

    config = OmegaConf.create({"task": {"states": 23, "positive": 10}})
    lines = [settings(line) for line in study.more_runs(config)]
    sizes = {(s["task.states"], s["task.positive"]) for s in lines if "task.states" in s}
    assert sizes == {("23", "10"), ("16", "7"), ("9", "3")}
    descents = [(s["strategy"], s["truncation"]) for s in lines if "schedule" in " ".join(s)]
    assert descents == [("fixed", n) for n in ("10", "50", "80", "200")] + [
        ("randomized_power_law", "16")
    ]
    for s in lines:
        if s["strategy"] == "fixed" and "task.states" in s:
            window, silent = int(s["truncation"]), int(s["task.burn_in"])
            counted = int(s["budget.steps"]) - silent
            assert counted % int(s.get("strategy.stride", window)) == 0  # whole phases
            assert silent >= max(window - 1, 4 * int(s["task.states"]))  # full windows, at rest
