"""The study add_task: what the probe reads off a network, what is said of it, and that it all runs."""

import jax
import jax.numpy as jnp
import layout
import numpy as np
import pandas as pd
import pytest
import studies

import bptt_study as bs
from bptt_study import probes, tasks
from bptt_study.backprop.forward import evaluate
from bptt_study.report import csv_tables
from bptt_study.tasks.add import probability
from bptt_study.types import Cell, Readout
from bptt_study.validation import SettingError


def register(t1, t2, length=16):
    """A network that knows: the last `length` bits as its state, and the odds from two of them."""
    cell = Cell(
        init=lambda key: {},
        zeros=lambda batch_size: jnp.zeros((batch_size, length)),
        step=lambda params, h, x: jnp.concatenate([x[..., None] * 1.0, h[..., :-1]], axis=-1),
        read=lambda h: h,
    )

    def odds(params, h):
        p = jnp.clip(probability(h[..., t1], h[..., t2]), 1e-12, 1 - 1e-12)
        return jnp.log(jnp.stack([1 - p, p], axis=-1))

    return bs.Problem(cell, Readout(lambda key: {}, odds), bs.losses.cross_entropy)


def snapshot(problem, task, params, strategy=None):
    return probes.Snapshot(
        problem, strategy or bs.strategies.full(problem), task, params, None, None, None
    )


@pytest.mark.slow
@pytest.mark.parametrize(("t1", "t2"), [(3, 8), (4, 7)])
def test_who_knows_the_answer_responds_by_the_true_effects(t1, t2):
    task, problem = tasks.add(3, 8), register(t1, t2)
    table = probes.bit_responses(count=12).look(
        snapshot(problem, task, problem.init(jax.random.key(0)))
    )
    expected = np.zeros(12)
    expected[[t1, t2]] = 0.5, -0.25
    np.testing.assert_allclose(table["response"], expected, atol=1e-9)
    assert table["lag"].tolist() == list(range(12))
    if (t1, t2) == (3, 8):  # and its loss is the last rung
        loss = evaluate(problem, problem.init(jax.random.key(0)), task.validation)
        assert loss["validation_loss"] == pytest.approx(task.references["both"], abs=0.004)


@pytest.mark.slow
@pytest.mark.parametrize("make", [bs.cells.elman, bs.cells.lstm])
def test_responses_are_those_of_a_loop_over_steps(make, key):
    task = tasks.add(1, 2)
    problem = bs.Problem(make(2, 5), bs.readouts.linear(5, 2), bs.losses.cross_entropy)
    params = problem.init(key)
    strategy = bs.strategies.fixed(problem, window=4)
    table = probes.bit_responses(count=6).look(snapshot(problem, task, params, strategy))

    def odds(bit, k):
        x = np.array(task.validation.inputs)
        x[-6] = bit
        state = problem.cell.zeros(x.shape[1])
        for row in x[: len(x) - 5 + k]:
            state = problem.cell.step(params["cell"], state, row)
        outputs = problem.readout.apply(params["readout"], problem.cell.read(state))
        return 1 / (1 + np.exp(outputs[:, 0] - outputs[:, 1]))

    for k in (0, 3):
        by_hand = float((odds(1, k) - odds(0, k)).mean())
        assert table["response"][k] == pytest.approx(by_hand, rel=1e-9)
        assert abs(by_hand) > 1e-4  # live
    np.testing.assert_allclose(table["kept"], [1, 0.75, 0.5, 0.25, 0, 0])


def test_what_the_probe_cannot_look_at():
    probe = probes.bit_responses(count=24)
    probe.check(tasks.add())
    with pytest.raises(SettingError, match=r"^`probe` .*; got bit_responses. .* two symbols"):
        probe.check(tasks.copy())
    with pytest.raises(SettingError, match=r"^`count` must be between 1 and .* \(524\); got 600"):
        probes.bit_responses(count=600).check(tasks.add())
    with pytest.raises(SettingError, match=r"^`count` .* greater than .* t2 \(30\); got 24"):
        probe.check(tasks.add(t2=30))
    with pytest.raises(SettingError, match=r"^`count` .*; got 0"):
        probes.bit_responses(count=0)


def run(name, settings, losses, effects):
    """Rows and responses of a run of three seeds; effects[lag] of each seed, 0 elsewhere."""
    common = {
        "run": name, "task": "add", "cell": "elman", "hidden": 8, "spectral_radius": 0.5, "steps": 64,
        "batch_size": 4, "t1": 4, "t2": 12, "nothing_loss": 0.6616, "t1_loss": 0.5192, "t2_loss": 0.6277,
        "both_loss": 0.4545, **settings,
    }  # fmt: skip
    rows, responses = [], []
    for seed, loss in enumerate(losses):
        for update, value in ((0, 0.9), (10, loss)):
            diverged = not np.isfinite(value)
            rows.append(
                {"seed": seed, "update": update, "tokens": 100 * update, "validation_loss": value}
                | {"diverged": diverged}
            )
        for lag in range(16):
            effect = effects.get(lag, [0.0] * 3)[seed]
            responses.append({"seed": seed, "update": 10, "lag": lag, "response": effect})
            responses.append({"seed": seed, "update": 0, "lag": lag, "response": 0.9})
    kept = pd.DataFrame(responses).assign(run=name, kept=1.0)
    return pd.DataFrame(rows).assign(**common), kept


@pytest.fixture
def folder(tmp_path):
    fixed = {"strategy": "fixed", "window": 5.0, "stride": 5.0, "truncation_length": 5}
    random = {"strategy": "randomized", "mean_length": 5.0, "truncation_length": 5}
    both = {4: [0.5, 0.49, 0.51], 12: [-0.24, -0.25, -0.2]}
    one = {4: [0.5, 0.49, 0.51], 12: [-0.24, -0.01, 0.0], 7: [0.1, -0.2, -0.1]}
    full = {"strategy": "full", "truncation_length": 64}
    parts = [
        run("a", full, [0.46, 0.46, 0.457], both),
        run("b", fixed, [0.52, 0.51, 0.518], one),
        run("c", random, [0.6, np.inf, 0.62], {4: [0.2, np.nan, 0.3]}),
    ]
    rows, responses = (pd.concat(p, ignore_index=True) for p in zip(*parts, strict=True))
    csv_tables.write_table(rows, tmp_path / "table.csv.gz")
    csv_tables.write_table(responses, tmp_path / "bit_responses.csv.gz")
    return tmp_path


def test_a_lag_is_learned_where_the_whole_interval_is_beyond_half_of_its_effect(folder):
    (file,) = studies.make_tables("add_task", folder)
    table = csv_tables.read_table(file).set_index("run")
    assert table["learned"].to_dict() == {"a": "t1 and t2", "b": "t1", "c": "neither"}
    assert table.loc["a", "t2_response"] == -0.24
    assert table.loc["a", "t2_response_low"] == -0.25
    assert table.loc["b", "largest_other"] == 0.1  # the median of lag 7
    assert table.loc["a", "largest_other"] == 0
    assert table["diverged"].tolist() == [0, 0, 1]
    assert table["validation_loss"].tolist() == [0.46, 0.518, 0.62]
    assert table["t1_loss"].tolist() == [0.5192] * 3


@pytest.mark.parametrize("lost", [[0, 1, 2], [1]])
def test_diverged_networks_have_learned_no_lag(folder, lost):
    """Their parameters are of an earlier update, whose effects may be right."""
    rows, found = (
        csv_tables.read_table(folder / f"{n}.csv.gz") for n in ("table", "bit_responses")
    )
    rows.loc[rows["seed"].isin(lost) & (rows["update"] == 10), "diverged"] = True
    found = found.assign(stopped=found["seed"].isin(lost) & (found["update"] == 10))
    csv_tables.write_table(rows, folder / "table.csv.gz")
    csv_tables.write_table(found, folder / "bit_responses.csv.gz")
    (file,) = studies.make_tables("add_task", folder)
    table = csv_tables.read_table(file)
    assert set(table["learned"]) == {"neither"} and set(table["diverged"]) == {len(lost)}
    assert (table["t1_response_low"] == -np.inf).all() and (
        table["t1_response_high"] == np.inf
    ).all()


def test_one_seed_has_no_interval_so_nothing_is_learned(folder):
    for name in ("table", "bit_responses"):
        table = csv_tables.read_table(folder / f"{name}.csv.gz")
        csv_tables.write_table(table[table["seed"] == 0], folder / f"{name}.csv.gz")
    (file,) = studies.make_tables("add_task", folder)
    assert csv_tables.read_table(file)["learned"].isna().all()


def test_figures_can_be_read_and_mark_the_truth(folder, kept):
    studies.draw("add_task", folder)
    assert sorted(kept) == ["ladder", "lags"]
    for figure in kept.values():
        layout.check(figure)
        said = layout.words(figure)
        assert "n = 3 seeds; diverged: 1 of 3 Randomized (constant law) 5" in said
        assert "t1 = 4, t2 = 12, 8 units" in said
    for ax in kept["lags"].axes:
        truth = ax.lines[-1]
        assert list(truth.get_xdata()) == [4, 12] and list(truth.get_ydata()) == [0.5, -0.25]
    rungs = {t.get_text() for t in kept["ladder"].axes[-1].texts}
    assert rungs >= {"no input 0.66", "t2 only 0.63", "t1 only 0.52", "both lags 0.45"}


def test_responses_of_the_untrained_network_are_not_those_after_training(folder):
    """With snapshots=1 the probe has looked at the start alone."""
    table = csv_tables.read_table(folder / "bit_responses.csv.gz")
    csv_tables.write_table(table[table["update"] == 0], folder / "bit_responses.csv.gz")
    assert studies.make_tables("add_task", folder) == []
    assert {f.stem for f in studies.draw("add_task", folder)} == {"ladder"}


def test_nothing_is_said_without_snapshots(folder):
    (folder / "bit_responses.csv.gz").unlink()
    assert studies.make_tables("add_task", folder) == []
    assert {f.stem for f in studies.draw("add_task", folder)} == {"ladder"}


@pytest.mark.slow
def test_the_study_runs(command, tmp_path):
    line = ["-m", "experiment=add_task", "size=smoke", "strategy=full,fixed", "truncation=5"]
    status, said, errors = command(*line)
    assert status == 0, errors
    assert "census: 12 rows of 2 runs, as expected" in said
    table = csv_tables.read_table(tmp_path / "results" / "add_task" / "lags.csv")
    assert table["strategy"].tolist() == ["full", "fixed"]
    assert table["t1_kept"].tolist() == [1, 0.2]
    assert table["n"].tolist() == [2, 2]
