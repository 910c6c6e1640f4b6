"""The probe alignment: cosines of estimates on the same batches."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bptt_study as bs
from bptt_study import probes, tasks
from bptt_study.validation import SettingError

S = bs.strategies


@pytest.fixture(scope="module")
def snapshot():
    task = tasks.add(1, 3)
    problem = bs.Problem(bs.cells.elman(2, 4), bs.readouts.linear(4, 2), task.loss)
    sampler = task.sampler(6, 3)

    def batches(count):
        each = [sampler.sample((), jax.random.key(1), n)[0] for n in range(count)]
        return jax.tree.map(lambda *a: np.stack(a), *each)

    params = problem.init(jax.random.key(0))
    return probes.Snapshot(problem, S.full(problem), task, params, None, jax.random.key(2), batches)


@pytest.mark.slow
def test_cosines_are_means_over_the_same_batches(snapshot):
    estimators = {"full": S.full, "rtrl": S.rtrl, "frozen": S.frozen, "uoro": S.uoro}
    table = probes.alignment(estimators, batches=3).look(snapshot)
    grid = table.pivot_table(index="first", columns="second", values="cosine")
    names = list(estimators)
    np.testing.assert_allclose(grid.loc[names, names], grid.loc[names, names].T, atol=1e-6)
    np.testing.assert_allclose(np.diag(grid.loc[names, names]), 1, atol=1e-6)
    assert grid.loc["full", "rtrl"] == pytest.approx(1, abs=1e-6)

    def cell(strategy, batch):
        state = strategy.init(snapshot.params, 3)
        found, _ = strategy.estimate(snapshot.params, state, batch, jax.random.key(0))
        return np.asarray(ravel_pytree(found.grads["cell"])[0], float)

    by_hand = []
    for n in range(3):
        batch = jax.tree.map(lambda a, n=n: a[n], snapshot.batches(3))
        a, b = (cell(make(snapshot.problem), batch) for make in (S.full, S.frozen))
        by_hand.append(a @ b / np.sqrt(a @ a * (b @ b)))
    assert grid.loc["full", "frozen"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert np.mean(by_hand) < 0.99  # the control
    assert abs(grid.loc["full", "uoro"]) < 0.99


def test_every_draw_has_a_key_of_its_own(snapshot):
    """The same estimator under two names draws twice."""
    estimators = {"one": S.uoro, "other": S.uoro}
    table = probes.alignment(estimators, batches=2).look(snapshot)
    grid = table.set_index(["first", "second"])["cosine"]
    assert abs(grid["one", "other"]) < 0.999
    assert grid["one", "one"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_synthetic_gradients_learn_from_the_lessons(snapshot):
    """From as many estimates, on the batches in turn; without any they are chunks."""
    estimators = {"chunks": partial(S.fixed, window=2), "dni": partial(S.dni, block=2, rate=0.5)}
    names = [*estimators]
    untaught = probes.alignment(estimators, batches=3).look(snapshot)
    assert untaught["cosine"].to_numpy() == pytest.approx(1, abs=1e-6)

    table = probes.alignment(estimators, batches=3, lessons=7).look(snapshot)
    found = table.set_index(["first", "second"])["cosine"][tuple(names)]
    params, data = snapshot.params, snapshot.batches(3)
    chunks, dni = (make(snapshot.problem) for make in estimators.values())
    state = dni.init(params, 3)
    each = [jax.tree.map(lambda a, n=n: a[n], data) for n in range(3)]
    for n in range(7):
        state = dni.renew(params, dni.estimate(params, state, each[n % 3], snapshot.key)[1])
    cosines = []
    for batch in each:
        a, b = (
            np.asarray(ravel_pytree(s.estimate(params, h, batch, snapshot.key)[0].grads["cell"])[0])
            for s, h in ((chunks, chunks.init(params, 3)), (dni, state))
        )
        cosines.append(a @ b / np.sqrt(a @ a * (b @ b)))
    assert found == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found < 0.999


def test_a_diverged_seed_has_no_cosines(snapshot):
    lost = snapshot._replace(params=jax.tree.map(lambda a: a * np.nan, snapshot.params))
    table = probes.alignment({"full": S.full}, batches=1).look(lost)
    assert table["cosine"].isna().all()


def test_batches_out_of_range():
    with pytest.raises(SettingError, match=r"^`batches` .*; got 0"):
        probes.alignment({"fixed": partial(S.fixed, window=2)}, batches=0)
    with pytest.raises(SettingError, match=r"^`lessons` .*; got -1"):
        probes.alignment({"fixed": partial(S.fixed, window=2)}, lessons=-1)
