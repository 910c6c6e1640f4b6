"""What the probes say of a snapshot, against the measures that they are made of."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from support import without_metrics

import bptt_study as bs
from bptt_study import probes
from bptt_study.backprop import forward
from bptt_study.instruments import lags, measure
from bptt_study.report import columns
from bptt_study.testing import examples
from bptt_study.validation import SettingError

T, N = examples.T, 4
ESTIMATORS = {
    "fixed": bs.strategies.fixed,
    "randomized": bs.strategies.randomized_constant,
    "uncompensated": partial(bs.strategies.randomized_constant, compensate=False),
}


def snapshot(params=None, cell="elman_tanh"):
    ex = examples.example(cell)
    return probes.Snapshot(
        problem=ex.problem,
        strategy=bs.strategies.full(ex.problem),
        task=None,
        params=ex.params if params is None else params,
        batch=ex.batch,
        key=jax.random.key(0),
        batches=lambda count: jax.tree.map(
            lambda a: jnp.stack([jnp.roll(a, n, axis=0) for n in range(count)]), ex.batch
        ),
    )


@pytest.fixture(scope="module")
def table():
    look = probes.estimator_quality(ESTIMATORS, lengths=[1, 2, 3, 9], draws=400, batches=N).look
    return look(snapshot()).set_index(["over", "estimator", "length"]).sort_index()


@pytest.mark.slow
def test_rows_are_all_allowed_lengths_up_to_all_steps(table):
    for over in ("draws", "batches"):
        found = [(name, length) for name, length in table.loc[over].index if name != "full"]
        expected = [(name, n) for name in ESTIMATORS for n in (1, 2, 3)]
        expected.remove(("randomized", 1))  # no link would be kept
        assert found == expected
        assert len(table.loc[(over, "full")]) == 1
    ex = examples.example("elman_tanh")
    zeros = ex.problem.cell.zeros(ex.batch.mask.shape[1])
    once = measure.arithmetic(
        partial(forward.states, ex.problem.cell), ex.params["cell"], zeros, ex.batch.inputs
    )
    assert (table["forward_arithmetic"] == once).all()
    assert 0 < once < table["arithmetic"].min() / 2
    shown = {c.removesuffix("_low").removesuffix("_high") for c in table.reset_index()}
    assert shown <= set(columns.BIAS_VARIANCE)


def test_on_a_batch_it_is_the_exact_quality(table):
    ex = examples.example("elman_tanh")
    for name, make in ESTIMATORS.items():
        row, strategy = table.loc[("draws", name, 2)], make(ex.problem, 2)
        exact = measure.exact_quality(strategy, ex.problem, ex.params, ex.batch)
        assert row["bias2"] == pytest.approx(exact.bias2, rel=1e-9, abs=1e-25)
        assert row["exact"] == (name != "uncompensated")
        if row["exact"]:
            assert row["variance"] == pytest.approx(exact.variance, rel=1e-9)
        if name != "fixed":  # the sampled ones lie near, and elsewhere than each other's
            low, high = row["sampled_variance_low"], row["sampled_variance_high"]
            assert abs(row["sampled_variance"] - exact.variance) < 0.9 * (high - low)
            assert row["sampled_bias2_low"] - 1e-3 < exact.bias2 < row["sampled_bias2_high"] + 1e-3
        assert row["mse"] == row["bias2"] + row["variance"]
        full = examples.vector(
            lags.weighted_gradient(ex.problem, ex.params, ex.batch, jnp.ones((T, T)))
        )
        assert row["relative_mse"] == pytest.approx(row["mse"] / (full @ full))
    sampled = table.loc["draws"]["sampled_variance"]
    assert sampled[("randomized", 2)] > 2 * sampled[("uncompensated", 2)]
    assert table.loc["draws", "full"]["mse"].item() == 0


def test_over_batches_it_is_the_noise_of_the_data(table):
    """Of the expected estimate: that of full BPTT for unbiased ones, less for a short window."""
    ex, where = examples.example("elman_tanh"), snapshot()
    found = measure.over_batches(
        bs.strategies.full(ex.problem), ex.problem, ex.params, where.batches(N), where.key
    )
    noise = table.loc["batches"]["variance"]
    assert noise["full"].item() == pytest.approx(found.variance.value)
    assert noise[("randomized", 2)] == pytest.approx(found.variance.value)
    assert abs(noise[("fixed", 1)] / found.variance.value - 1) > 0.05
    assert table.loc["batches", "full"]["bias2"].item() == pytest.approx(0, abs=1e-25)


def test_a_diverged_seed_is_rows_without_numbers():
    params = jax.tree.map(lambda p: p * np.nan, snapshot().params)
    found = probes.estimator_quality({}, draws=3, batches=3).look(snapshot(params))
    assert isinstance(found, pd.DataFrame)
    assert found["mse"].isna().all()
    assert found["over"].tolist() == ["draws", "batches"], "as of every other seed"


@pytest.mark.slow
def test_an_empty_mask_has_no_relative_numbers():
    at = snapshot()
    empty = at.batch._replace(mask=jnp.zeros_like(at.batch.mask))
    at = at._replace(batches=lambda count: jax.tree.map(lambda a: jnp.stack([a] * count), empty))
    # truncated_es draws, but has no formula for its variance
    estimators = {name: OTHERS[name] for name in ("cuts", "telescope", "truncated_es")}
    estimators["randomized"] = partial(bs.strategies.randomized_constant, mean_length=2)
    found = probes.estimator_quality(estimators, {}, draws=5, batches=N).look(at)
    assert (found[["bias2", "variance", "mse", "norm2"]] == 0).all(axis=None)
    assert found[["relative_bias2", "relative_variance", "relative_mse"]].isna().all(axis=None)


@pytest.mark.slow
def test_arithmetic_is_the_mean_over_calls():
    """Over keys, and over whole periods in which one call measures; not that of the first call."""
    at, draws, every = snapshot(), 3, 2
    estimators = {
        "telescope": OTHERS["telescope"],
        "adaptive": partial(bs.strategies.adaptive, delta=0.5, windows=(1, 2), every=every),
    }
    found = probes.estimator_quality(estimators, {}, draws, batches=3).look(at)
    work = found[found["over"] == "draws"].set_index("estimator")["arithmetic"]
    for name, calls in (("telescope", draws), ("adaptive", 2 * every)):
        strategy, counts = estimators[name](at.problem), []
        start = state = strategy.init(at.params, at.batch.mask.shape[1])
        for key in jax.random.split(at.key, calls):
            arguments = at.params, state, at.batch, key
            counts.append(measure.arithmetic(without_metrics(strategy), *arguments))
            renew = strategy.renew or (lambda params, state, start=start: start)
            state = renew(at.params, strategy.estimate(*arguments)[1])
        assert work[name] == np.mean(counts) != counts[0]
    assert counts == 2 * [counts[0], *[counts[1]] * (every - 1)], "one call of each period measures"


def test_keys_and_counters_of_a_state_are_no_numbers():
    def beside(inputs, hidden):
        elman = bs.cells.elman(inputs, hidden)

        def zeros(size):
            h, keys = elman.zeros(size), jax.random.split(jax.random.key(0), size)
            return h, keys, jnp.zeros(size, int)

        def step(params, state, x):
            h = elman.step(params, state[0], x)
            return h, state[1], state[2] + 1

        return bs.Cell(elman.init, zeros, step, lambda state: state[0])

    found = probes.estimator_quality({}, draws=3, batches=N).look(snapshot(cell=beside))
    hidden = snapshot().problem.cell.zeros(1).size
    assert (found["numbers"] == T * hidden).all()


@pytest.mark.slow
def test_held_states_are_those_of_the_claim():
    """Whatever the setting is whose values are measured, and values beyond T are measured, too."""
    estimators = {
        "dni": partial(bs.strategies.dni, block=2),
        "fixed": partial(bs.strategies.fixed, window=3),
        "forward": bs.strategies.forward_gradient,
        "alone": partial(bs.strategies.fixed, window=2),
        "checkpointed": bs.strategies.checkpointed,  # 2√T, rounded as it rounds
    }
    settings = {
        "dni": {"rate": [0.01, 0.1]},
        "fixed": {"stride": [1, 2]},
        "forward": {"tangents": [T + 1]},
    }
    found = probes.estimator_quality(estimators, settings, draws=3, batches=N).look(snapshot())
    rows = found[found["over"] == "draws"].set_index("estimator")
    assert rows["states"].to_dict() == {
        "full": T,
        "dni": 2,
        "fixed": 3,
        "forward": 1,
        "alone": 2,
        "checkpointed": 4,
    }
    assert rows.loc["forward", "length"] == T + 1
    with pytest.raises(SettingError, match=r"`lengths\.dnu` must be of one of the estimators"):
        probes.estimator_quality(estimators, {"dnu": {"rate": [1]}}).look(snapshot())


def test_draws_that_seldom_differ_are_draws():
    """An estimator of unknown claim that returns twice the gradient in a few draws: all draws are looked at."""
    ex, at = examples.example("elman_tanh"), snapshot()._replace(key=jax.random.key(2))
    full = bs.strategies.full(ex.problem)

    def estimate(params, state, batch, key):
        found, state = full.estimate(params, state, batch, key)
        twice = 1.0 + jax.random.bernoulli(key, 0.2)
        return found._replace(grads=jax.tree.map(lambda g: g * twice, found.grads)), state

    seldom = full._replace(estimate=jax.jit(estimate), claim=UNDECLARED)
    found = probes.estimator_quality({"seldom": lambda problem: seldom}, {}, 64, N).look(at)
    row = found.set_index(["over", "estimator"]).loc[("draws", "seldom")]
    keys = jax.random.split(at.key, 64)
    factors = 1.0 + np.array([jax.random.bernoulli(key, 0.2) for key in keys])
    assert factors[0] == factors[1] and not row["exact"]
    assert row["relative_variance"] == pytest.approx(factors.var(ddof=1), rel=1e-6)


@pytest.mark.parametrize("name", ["gradient_norms", "gradient_error", "alignment"])
def test_strategies_without_a_hash_are_measured(name):
    """Such as a class with settings that may change: the program is not kept."""

    class Estimate:
        __hash__ = None

        def __call__(self, *arguments):
            return full.estimate(*arguments)

    ex, at = examples.example("elman_tanh"), snapshot()
    full = bs.strategies.full(ex.problem)
    own = full._replace(estimate=Estimate())
    make = {"alignment": lambda: probes.alignment({"own": lambda problem: own}, batches=2)}
    tables = [
        make.get(name, getattr(probes, name))().look(at._replace(strategy=strategy))
        for strategy in (own, full)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_bad_input():
    with pytest.raises(SettingError, match=r"`draws` .*; got 2"):
        probes.estimator_quality(ESTIMATORS, draws=2)
    never = {"randomized": partial(bs.strategies.randomized_power_law, alpha=1.5)}
    with pytest.raises(
        SettingError, match=r"`estimators\.randomized\.alpha` must be .*greater than 2; got 1\.5"
    ):
        probes.estimator_quality(never).look(snapshot())


UNDECLARED = bs.Claim()  # no formula at all
OTHERS = {
    "chunks": lambda problem, window: bs.strategies.fixed(problem, window)._replace(
        claim=UNDECLARED
    ),
    "cuts": lambda problem: bs.strategies.randomized_constant(problem, 3)._replace(
        claim=UNDECLARED
    ),
    "unbiased": lambda problem: bs.strategies.randomized_constant(problem, 3)._replace(
        claim=bs.Claim(unbiased=True)
    ),
    "claimed": lambda problem: bs.strategies.fixed(problem, 1)._replace(claim=bs.Claim(exact=True)),
    "telescope": partial(bs.strategies.telescope_constant, mean_length=2),
    "pes": partial(bs.strategies.pes, sigma=None, pairs=2),
    "truncated_es": partial(bs.strategies.truncated_es, sigma=None),
    "uoro": bs.strategies.uoro,
    "rtrl": bs.strategies.rtrl,
    "dni": partial(bs.strategies.dni, rate=0.5),
}
SETTINGS = {
    "chunks": {"window": [2, 3]},
    "pes": {"hold": [3]},
    "truncated_es": {"hold": [3]},
    "uoro": {"block": [1, 3]},
    "rtrl": {"block": [1, 3]},
    "dni": {"block": [2]},
}


@pytest.fixture(scope="module")
def others():
    look = probes.estimator_quality(OTHERS, SETTINGS, draws=400, batches=N, lessons=0).look
    return look(snapshot()).set_index(["over", "estimator", "length"]).sort_index()


@pytest.mark.slow
def test_without_lag_weights_it_is_what_draws_show(others, table):
    """Chunks are found to draw nothing, so that their bias is exact; cuts are not."""
    ex = examples.example("elman_tanh")
    for window in (2, 3):
        for over in ("draws", "batches"):
            row, declared = others.loc[(over, "chunks", window)], table.loc[(over, "fixed", window)]
            for name in ("bias2", "variance", "cosine"):
                assert row[name] == pytest.approx(declared[name], rel=1e-9, abs=1e-25)
        assert others.loc[("draws", "chunks", window), "exact"]
    exact = measure.exact_quality(
        bs.strategies.randomized_constant(ex.problem, 3), ex.problem, ex.params, ex.batch
    )
    for name in ("cuts", "unbiased"):
        row = others.loc["draws", name].iloc[0]
        assert not row["exact"]
        width = row["sampled_variance_high"] - row["sampled_variance_low"]
        assert abs(row["variance"] - exact.variance) < 0.9 * width
    assert others.loc["draws", "cuts"]["bias2"].item() != 0
    assert others.loc["draws", "unbiased"]["bias2"].item() == 0
    noise = others.loc["batches"]["variance"]
    assert noise["unbiased"].item() == noise["full"].item()
    assert noise["cuts"].item() != noise["full"].item()


def test_formulas_of_other_tables(others):
    """Of lags' products and of flows that sequences share: enumerated, and within the draws' interval."""
    ex, row = examples.example("elman_tanh"), others.loc["draws", "telescope"].iloc[0]
    telescope = OTHERS["telescope"](ex.problem)
    exact = measure.exact_quality(telescope, ex.problem, ex.params, ex.batch)
    assert row["exact"]
    assert (row["bias2"], row["variance"]) == (0, pytest.approx(exact.variance, rel=1e-9))
    pes = OTHERS["pes"](ex.problem, hold=3)
    found = measure.quality(pes, ex.problem, ex.params, ex.batch, jax.random.key(1), draws=400)
    assert found.variance.low < others.loc[("draws", "pes", 3), "variance"] < found.variance.high


def test_a_bias_by_lags_and_a_variance_by_draws(others):
    """Of truncated evolution: the bias of chunks, exactly."""
    row = others.loc[("draws", "truncated_es", 3)]
    assert row["bias2"] == pytest.approx(others.loc[("draws", "chunks", 3), "bias2"], rel=1e-9)
    assert row["variance"] == row["sampled_variance"] > 0
    assert not row["exact"]


def test_an_exact_one_has_no_error_and_an_unbiased_one_no_bias(others):
    for name in ("rtrl", "claimed"):  # the claim is trusted, and nothing is run
        assert (others.loc["draws", name]["mse"] == 0).all()
        assert others.loc["draws", name]["exact"].all()
    uoro = others.loc["draws", "uoro"]
    assert (uoro["bias2"] == 0).all()
    assert uoro.loc[1, "variance"] > 2 * uoro.loc[3, "variance"] > 0  # exact within a block


def test_synthetic_gradients_learn_before_they_are_measured(others):
    """Without lessons they are chunks, with some they are better."""
    untaught = others.loc[("draws", "dni", 2), "bias2"]
    assert untaught == pytest.approx(others.loc[("draws", "chunks", 2), "bias2"], rel=1e-9)
    dni = {"dni": OTHERS["dni"]}
    block = {"dni": SETTINGS["dni"]}
    look = probes.estimator_quality(dni, block, draws=3, batches=N, lessons=200).look
    taught = look(snapshot()).set_index(["over", "estimator"]).loc[("draws", "dni"), "bias2"]
    assert taught < 0.9 * untaught


def test_numbers_held_are_states_and_what_the_claim_names(table, others):
    ex = examples.example("elman_tanh")
    hidden, found = ex.problem.cell.zeros(1).size, table.loc["draws"]
    assert found.loc[("fixed", 3), "numbers"] == 3 * hidden
    assert found.loc["full", "numbers"].item() == T * hidden
    rtrl = bs.strategies.rtrl(ex.problem).claim.numbers
    assert others.loc[("draws", "rtrl", 3), "numbers"] == 3 * hidden + rtrl
    # two tangents of the cell's parameters and of its state, carried on or not, and the state itself
    tangents = 2 * (sum(p.size for p in jax.tree.leaves(ex.params["cell"])) + hidden)
    for name in ("pes", "truncated_es"):
        row = others.loc[("draws", name, 3)]
        assert (row["states"], row["numbers"]) == (1, hidden + tangents // (1 + (name != "pes")))
    law = bs.strategies.randomized_constant(ex.problem, 3).claim.lag_weights
    xi, longest = law.link_weights(jax.random.uniform(jax.random.key(0), (T, 1000))), []
    for column in np.asarray(xi).T:
        run = most = 1
        for weight in column[1:]:
            run = run + 1 if weight else 1
            most = max(most, run)
        longest.append(most)
    assert found.loc[("randomized", 3), "states"] == pytest.approx(np.mean(longest))
    assert found.loc[("randomized", 3), "numbers"] == np.mean(longest) * hidden + 5 * T


def test_norms_over_one_axis_are_those_of_both():
    at = snapshot()
    both = probes.gradient_norms(1).look(at)
    lag = probes.gradient_norms(1, ["lag"]).look(at)
    pd.testing.assert_frame_equal(lag, both[both["axis"] == "lag"].reset_index(drop=True))
    for axes in ([], ["lags"]):
        with pytest.raises(SettingError, match="`axes` must be"):
            probes.gradient_norms(1, axes)
