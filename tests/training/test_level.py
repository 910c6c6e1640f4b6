"""A level that follows the loss: training against a plain loop, and a run that stops and continues."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bptt_study as bs
from bptt_study import tasks
from bptt_study.optimizers import clipped
from bptt_study.runner.run_checkpoint import RunCheckpoint
from bptt_study.testing.examples import close
from bptt_study.training import train as training
from bptt_study.training.budget import Budget
from bptt_study.training.train import make_train

TASK = tasks.copy_curriculum(most=4, mean_over=2, bound=0.9)
PROBLEM = bs.Problem(bs.cells.elman(3, 6), bs.readouts.linear(6, 2), TASK.loss)
STRATEGY = bs.strategies.full(PROBLEM)
BUDGET = Budget(steps=8, batch_size=4, updates=60, logs=6)
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))


@pytest.fixture(scope="module")
def train():
    optimizer = clipped(optax.sgd, learning_rate=0.5, clip_norm=1.0)
    return make_train(PROBLEM, STRATEGY, optimizer, BUDGET, TASK)


@pytest.fixture(scope="module")
def whole(train):
    return train(KEYS)


@pytest.mark.slow
def test_equals_a_plain_loop(whole):
    """The level of each update decides its batch, and its loss the level of the next."""
    init_key, data_key, draw_key = jax.random.split(KEYS[0], 3)
    params, sampler = PROBLEM.init(init_key), TASK.sampler(8, 4)
    level, reached = sampler.level.start(), [1]
    estimate_of = jax.jit(STRATEGY.estimate)
    for update in range(BUDGET.updates):
        batch, _ = sampler.sample((), data_key, update, *level)
        estimate, _ = estimate_of(params, PROBLEM.cell.zeros(4), batch, draw_key)
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(estimate.grads)))
        rate = 0.5 * min(1, 1 / norm)
        params = jax.tree.map(lambda p, g, r=rate: p - r * g, params, estimate.grads)
        level = sampler.level.advance(level, {"train_loss": estimate.loss})
        reached.append(int(level.longest))
    close(jax.tree.map(lambda p: p[0], whole.progress.params), params)
    assert [int(r["longest"][0]) for r in whole.records] == [reached[n] for n in BUDGET.log_points]
    assert reached[-1] > 1
    assert len(set(reached)) > 2


def stopped(train, monkeypatch):
    """The state at the last pause before update 30: a pause after each update."""
    states = []
    monkeypatch.setattr(training, "PAUSE_SECONDS", 0.0)
    train(KEYS, pause=states.append)
    return next(s for s in reversed(states) if int(s.progress.update.max()) < 30)


def same(one, other) -> bool:
    return all(
        np.array_equal(a[name], b[name], equal_nan=True)
        for a, b in zip(one.records, other.records, strict=True)
        for name in a
        if name != "seconds"
    )


def test_a_run_that_continues_has_the_same_rows(train, whole, monkeypatch, tmp_path):
    """Through the file of a checkpoint. With a level that was lost, the rows differ."""
    half = stopped(train, monkeypatch)
    assert set(np.asarray(half.progress.level.longest)) - {1}
    checkpoint = RunCheckpoint(tmp_path / "checkpoint.npz", {}, seconds=0.0, probed={})
    checkpoint.pause(half)
    again = train(KEYS, restore=checkpoint.restore)
    assert len(half.records) > 1
    assert same(again, whole)

    def lost(progress):
        found = checkpoint.restore(progress)
        return found._replace(progress=found.progress._replace(level=progress.level))

    assert not same(train(KEYS, restore=lost), whole)


def test_a_run_that_stops_at_a_log_point_continues(train, whole, tmp_path):
    """While the third log point is shown: the last pause came before it."""
    checkpoint = RunCheckpoint(tmp_path / "checkpoint.npz", {}, seconds=1e9, probed={})

    def stop(record, progress):
        if record["update"][0] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(KEYS, stop, checkpoint.pause)
    checkpoint.save()
    assert same(train(KEYS, restore=checkpoint.restore), whole)


def test_a_task_without_a_level_has_none():
    task = tasks.copy(lag=2, length=1, symbols=2)
    problem = bs.Problem(bs.cells.elman(4, 3), bs.readouts.linear(3, 2), task.loss)
    train = make_train(
        problem, bs.strategies.full(problem), clipped(optax.sgd, learning_rate=0.5), Budget(3, 2, 1), task
    )  # fmt: skip
    trained = train(KEYS[0])
    assert trained.progress.level == ()
    assert "longest" not in trained.records[0]
