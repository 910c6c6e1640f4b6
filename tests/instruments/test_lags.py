"""The lag table against the oracle, windows against strategies, memory against known systems."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.special import gammaln
from support import flat_state, table_of

import bptt_study as bs
from bptt_study.backprop.forward_pass import forward_pass
from bptt_study.instruments import jacobians, lag_windows, lags
from bptt_study.strategies.adaptive import state_gradients
from bptt_study.strategies.randomized import cuts
from bptt_study.testing import examples
from bptt_study.testing.gradient_checks import check_lag_weights
from bptt_study.testing.subject import Subject
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
PROBLEM = examples.problem_of("linear")
CELLS = list(examples.CELLS)
constant, power_law = bs.strategies.constant, bs.strategies.power_law
randomized, fixed = bs.strategies.randomized, bs.strategies.fixed


def table(measure, name, K=T, **changes):
    ex = examples.example(name)._replace(**changes)
    return measure(ex.problem, ex.params, ex.batch, K, ex.state)


def by_lag(single):
    """[S, T, …] at step t -> [S, K, …] at lag s - t, zeros where there is none."""
    out = np.zeros_like(single)
    for s in range(len(single)):
        for k in range(s + 1):
            out[s, k] = single[s, s - k]
    return out


def weighted(weights, grads):
    """Σ w[s,k] G[s,k] over losses, lags and sequences, flat."""
    return np.einsum("sk,skbp->p", weights, by_lag(grads))


@pytest.mark.parametrize("name", CELLS)
def test_gradients_are_the_oracles(name):
    """Each lag, with masks and h_0 ≠ 0; negative controls: h_0 ignored, lags shifted by one."""
    G, hand = table(lags.gradients, name), by_lag(table_of(name).grads).sum(axis=(0, 2))
    cell = np.stack([oracles.flat(jax.tree.map(lambda g, k=k: g[k], G["cell"])) for k in range(T)])
    np.testing.assert_allclose(cell, hand, rtol=0, atol=1e-13 * np.abs(hand).max())
    if name == "mlp":
        assert not cell[1:].any()
        return
    assert np.abs(hand[1:]).max() > 1e-3
    ignored = table(lags.gradients, name, state=None)
    off = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (G, ignored)), strict=True)]
    assert max(off) > 1e-4
    assert np.abs(cell[1:] - hand[:-1]).max() > 1e-3


@pytest.mark.parametrize("name", CELLS)
def test_all_lags_sum_to_the_gradient(name):
    """The readout's gradient belongs to lag 0; negative control: one lag too few."""
    G, exact = table(lags.gradients, name), examples.reference(name)[1]
    examples.close(jax.tree.map(lambda g: g.sum(axis=0), G), exact)
    assert all(not np.any(g[1:]) for g in jax.tree.leaves(G["readout"]))
    few = table(lags.gradients, name, K=3)
    examples.close(few, jax.tree.map(lambda g: g[:3], G))
    if name != "mlp":
        with pytest.raises(AssertionError):
            examples.close(jax.tree.map(lambda g: g[:-1].sum(axis=0), G), exact)


@pytest.mark.parametrize("name", CELLS)
def test_norms_are_the_oracles(name):
    """Of adjoints, per token (the oracle's are shares of the mean loss); of gradients, per sequence."""
    hand, tokens = table_of(name), float(examples.example(name).batch.mask.sum())
    adjoints = np.linalg.norm(by_lag(hand.adjoints), axis=-1) * tokens
    np.testing.assert_allclose(table(lags.adjoint_norms, name), adjoints, atol=1e-13)
    grads = np.linalg.norm(by_lag(hand.grads), axis=-1)
    np.testing.assert_allclose(table(lags.norms, name), grads, atol=1e-14)
    assert grads[-1, 0].min() > 1e-3
    mask = np.asarray(examples.example(name).batch.mask)
    assert not adjoints[mask[:, None] * np.ones((1, T, 1)) == 0].any()


def test_no_state_is_the_zero_state():
    ex = examples.example("lstm")
    zero = jax.tree.map(jnp.zeros_like, ex.state)
    examples.close(
        lags.gradients(ex.problem, ex.params, ex.batch, T),
        table(lags.gradients, "lstm", state=zero),
    )


SETTINGS = {
    "full": bs.strategies.full,
    "chunks_3": partial(fixed, window=3),
    "sliding_2": partial(fixed, window=2, stride=1),
    "tbptt_2_5": partial(fixed, window=5, stride=2),
    "longer": partial(fixed, window=20, stride=9),
    "constant": partial(randomized, law=constant(3)),
    "constant_raw": partial(randomized, law=constant(3), compensate=False),
    "power_law": partial(randomized, law=power_law(3, 4)),
    "power_law_raw": partial(randomized, law=power_law(3, 4), compensate=False),
}
RAW = {"constant_raw": constant(3), "power_law_raw": power_law(3, 4)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_weights_are_the_mean_over_all_cut_patterns(setting):
    """By definition, and by probability-weighted enumeration of all 2^(T-1) patterns."""
    weights = lags.weights(SETTINGS[setting](PROBLEM), T, T)
    if setting in RAW:
        law = RAW[setting]
        expected = np.zeros((T, T))
        for kept in np.ndindex(*[2] * (T - 1)):
            delta, probability = 1.0, 1.0
            for link in kept:
                pi = float(law.keep(jnp.asarray(delta)))
                probability *= pi if link else 1 - pi
                delta = delta + 1 if link else 1.0
            xi = np.array([1, *kept])[:, None]
            expected += probability * oracles.gated(xi)[..., 0]
    else:
        shape = {"chunks_3": (3, 3), "sliding_2": (1, 2), "tbptt_2_5": (2, 5)}
        expected = oracles.tbptt(T, *shape.get(setting, (T, T)))
    np.testing.assert_allclose(weights, by_lag(expected), atol=1e-14)


@pytest.mark.parametrize("setting", SETTINGS)
def test_window_is_the_mean_weight_far_from_the_start(setting):
    """Over 18 steps, a multiple of all strides here; negative control: a window off by one."""
    K, far = 9, 600
    strategy = SETTINGS[setting](PROBLEM)
    window = lags.window(strategy, K)
    weights = lags.weights(strategy, far, K)[-18:]
    # renewal forgets its start as a power: α = 4 leaves 1e-5 after 600 steps
    tolerance = 2e-4 if setting == "power_law_raw" else 1e-12
    np.testing.assert_allclose(weights.mean(axis=0), window, atol=tolerance)
    if window[-1] < 1:
        assert np.abs(lags.window(strategy, K + 1)[1:] - window).max() > 1e-2


def test_windows_in_numbers():
    np.testing.assert_allclose(lags.window(fixed(PROBLEM, 4), 6), [1, 0.75, 0.5, 0.25, 0, 0])
    np.testing.assert_allclose(lags.window(fixed(PROBLEM, 2, 1), 4), [1, 1, 0, 0])
    np.testing.assert_allclose(lags.window(fixed(PROBLEM, 5, 2), 7), [1, 1, 1, 1, 0.5, 0, 0])
    raw = randomized(PROBLEM, constant(4), compensate=False)
    np.testing.assert_allclose(lags.window(raw, 9), 0.75 ** np.arange(9), rtol=1e-13)
    # E[(N - k)₊]/E[N] of the power law from its survival Γ(a+2-α+k)Γ(a+1)/(Γ(a+2-α)Γ(a+1+k))
    a, alpha, n = (6 - 2) * 16, 6, np.arange(200_000)
    survival = np.exp(
        gammaln(a + 2 - alpha + n) - gammaln(a + 2 - alpha) + gammaln(a + 1) - gammaln(a + 1 + n)
    )
    tails = np.cumsum(survival[::-1])[::-1][:40] / survival.sum()
    raw = randomized(PROBLEM, power_law(16, 6), compensate=False)
    np.testing.assert_allclose(lags.window(raw, 40), tails, atol=1e-12)


def test_small_numbers_of_a_window_in_float32():
    """Few segments are so long: the numbers are right relative to themselves, not to 1."""
    n = np.arange(400_000)
    laws = {
        "constant": (constant(4), 0.75**n, 250),
        "power law": (power_law(16, 6), np.cumprod(1 - 5 / (64 + np.append(np.inf, n[1:]))), 2000),
        "long tail": (
            power_law(4, 2.5),
            np.cumprod(1 - 1.5 / (2 + np.append(np.inf, n[1:]))),
            2000,
        ),
    }
    for law, survival, K in laws.values():
        expected = 1 - np.cumsum(np.append(0, survival))[:K] / law.mean_length
        tails = np.cumsum(survival[::-1])[::-1][:K] / law.mean_length
        expected = np.where(expected > 1e-4, expected, tails)
        with jax.enable_x64(False):
            window = lags.window(randomized(PROBLEM, law, compensate=False), K)
        assert window.dtype == jnp.float32
        np.testing.assert_allclose(window, expected, rtol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_window_estimated_from_the_strategy(setting, key):
    """Negative control: the neighbour's window is told apart."""
    draws = 400
    steps = 60 if setting == "power_law_raw" else None
    mean, error = lags.estimated_window(SETTINGS[setting], 6, key, draws, phases=18, steps=steps)
    window = lags.window(SETTINGS[setting](PROBLEM), 6)
    slack = 2e-3 if setting == "power_law_raw" else 1e-12  # starts on a cut, 60 steps before
    assert (np.abs(mean - window) <= 4.5 * error + slack).all()
    assert error.max() < 0.1
    if window[-1] < 1:
        off = lags.window(SETTINGS[setting](PROBLEM), 7)[1:]
        assert (np.abs(mean - off) > 4.5 * error + slack).any()


@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
@pytest.mark.parametrize("setting", ["chunks_3", "sliding_2", "tbptt_2_5"])
def test_expected_gradient_of_a_grid_is_the_estimate(name, setting, key):
    """No draws: weights on the table are the estimate; sliding: the window alone says it too."""
    ex = examples.example(name)
    strategy = SETTINGS[setting](ex.problem)
    estimate = jax.jit(strategy.estimate)(ex.params, ex.state, ex.batch, key)[0].grads
    weights = lags.weights(strategy, T, T)
    table = lags.gradients(ex.problem, ex.params, ex.batch, T, ex.state)
    examples.close(
        lags.weighted_gradient(ex.problem, ex.params, ex.batch, weights, ex.state), estimate
    )
    by_window = lags.expected_gradient(lags.window(strategy, T), table)
    off = examples.vector(by_window) - examples.vector(estimate)
    assert (np.abs(off).max() < 1e-14) == (setting == "sliding_2")
    if setting == "sliding_2":
        exact = examples.vector(examples.reference(name)[1])
        bias = np.linalg.norm(exact - examples.vector(estimate))
        assert bias > 1e-3
        np.testing.assert_allclose(lags.bias(lags.window(strategy, T), table), bias, rtol=1e-12)


@pytest.mark.parametrize("law", RAW.values(), ids=RAW)
def test_expected_gradient_of_random_cuts(law):
    """Against the enumerated patterns, shared by the batch (which leaves the mean alone)."""
    ex, hand = examples.example("gru"), table_of("gru")
    weights = lags.weights(randomized(PROBLEM, law, compensate=False), T, T)
    grads = lags.weighted_gradient(ex.problem, ex.params, ex.batch, weights, ex.state)
    expected = weighted(np.asarray(weights), hand.grads)
    np.testing.assert_allclose(oracles.flat(grads["cell"]), expected, atol=1e-14)
    patterns = np.array(list(np.ndindex(*[2] * (T - 1))))  # 1: cut
    uniforms = jnp.asarray(np.concatenate([np.zeros((len(patterns), 1)), patterns], axis=1).T)
    kept, pi = cuts(law, uniforms)
    probability = np.prod(np.where(kept, pi, 1 - pi), axis=0)
    np.testing.assert_allclose(probability.sum(), 1)
    total = sum(
        p * oracles.weighted(hand, oracles.gated(np.asarray(kept[:, n : n + 1], float)))
        for n, p in enumerate(probability)
    )
    np.testing.assert_allclose(oracles.flat(grads["cell"]), total, atol=1e-14)
    np.testing.assert_allclose(oracles.flat(grads["readout"]), hand.readout, atol=1e-14)


@pytest.mark.parametrize("setting", ["sliding_2", "tbptt_2_5", "constant_raw", "power_law_raw"])
def test_weights_of_a_neighbour_are_found(setting):
    """Planted: a window longer by one, and cuts that are a little rarer."""
    neighbours = {
        "sliding_2": partial(fixed, window=3, stride=1),
        "tbptt_2_5": partial(fixed, window=6, stride=2),
        "constant_raw": partial(randomized, law=constant(4), compensate=False),
        "power_law_raw": partial(randomized, law=power_law(4, 4), compensate=False),
    }
    subject = Subject(SETTINGS[setting], "elman_tanh")
    check_lag_weights(subject)
    liar = Subject(SETTINGS[setting], "elman_tanh")
    liar.strategy = liar.strategy._replace(claim=neighbours[setting](PROBLEM).claim)
    with pytest.raises(AssertionError):
        check_lag_weights(liar)


def test_an_empty_mask_sends_nothing_back():
    ex = examples.example("gru")
    empty = ex.batch._replace(mask=jnp.zeros_like(ex.batch.mask))
    for measured in (lags.gradients, lags.adjoint_norms, lags.norms):
        found = jax.tree.leaves(table(measured, "gru", batch=empty))
        assert all(not leaf.any() for leaf in found)
    assert not lags.flows(ex.problem, ex.params, empty, ex.state).any()
    with pytest.raises(SettingError, match="mass"):
        lags.effective_length(lags.mass(table(lags.gradients, "gru", batch=empty)))


def test_tables_run_under_jit_and_vmap():
    ex = examples.example("elman_tanh")
    jitted = jax.jit(lambda p: lags.gradients(ex.problem, p, ex.batch, T, ex.state))
    examples.close(jitted(ex.params), table(lags.gradients, "elman_tanh"))
    many = jax.tree.map(lambda p: jnp.stack([p, p]), ex.params)
    norms = jax.vmap(lambda p: lags.norms(ex.problem, p, ex.batch, T, ex.state))(many)
    np.testing.assert_allclose(norms[1], table(lags.norms, "elman_tanh"), atol=1e-15)


# Influence balancing: estimators.md, section 4; Tallec & Ollivier 2017, section 5.1


def influence_balancing(states=23, positive=10):
    """s_{t+1} = A s_t + θ v, A = ½I + ½·superdiagonal, l = ½(s¹ - 1)²."""
    A = jnp.asarray(0.5 * np.eye(states) + 0.5 * np.eye(states, k=1))
    v = jnp.where(jnp.arange(states) < positive, 1.0, -1.0)
    cell = bs.Cell(
        init=lambda key: {"theta": jnp.zeros(())},
        zeros=lambda batch_size: jnp.zeros((batch_size, states)),
        step=lambda params, s, x: s @ A.T + params["theta"] * jnp.broadcast_to(v, s.shape),
        read=lambda s: s,
    )
    readout = bs.Readout(init=lambda key: {}, apply=lambda params, s: s[..., 0])
    return bs.Problem(cell, readout, lambda o, y: 0.5 * (o - y) ** 2)


def test_influence_balancing_from_lag_windows_alone(key):
    """At θ = 0 the last loss sends G_k = -(A^k v)¹: the known partial sums and thresholds."""
    steps, problem = 400, influence_balancing()
    ones = jnp.ones((steps, 1))
    last = jnp.zeros((steps, 1)).at[-1].set(1)
    G = lags.gradients(problem, problem.init(key), bs.Batch(0 * ones, ones, last), steps)
    sums = -np.cumsum(G["cell"]["theta"])
    assert (sums.argmax() + 1, sums.max()) == (19, pytest.approx(16.476058959960938, abs=1e-12))
    assert sums[-1] == pytest.approx(-6, abs=1e-9)

    def uphill(strategy):
        return lags.expected_gradient(lags.window(strategy, steps), G)["cell"]["theta"] <= 0

    windows = range(1, 200)
    wrong = {1: [uphill(fixed(problem, w, 1)) for w in windows]}
    wrong["chunks"] = [uphill(fixed(problem, w)) for w in windows]
    assert [sum(map(int, w)) + 1 for w in wrong.values()] == [41, 110]
    assert all(w == sorted(w, reverse=True) for w in wrong.values())  # right from there on


# Memory


@pytest.mark.parametrize(
    ("mass", "shares", "line"),
    [
        (np.ones((4, 2)), (0.5,), r"`mass` must be one finite .* for each lag; got shape \[4, 2\]"),
        ([], (0.5,), r"`mass` .*; got shape \[0\]"),
        ([1.0, -2.0, 5.0], (0.5,), "`mass` must be one finite number of at least 0 .*; got -2"),
        ([1.0, np.nan], (0.5,), "`mass` must be .*; got nan"),
        ([1.0, np.inf, 1.0], (0.5,), "`mass` must be .*; got inf"),
        ([1.0, 2.0], (50, 90), "`shares` must be numbers above 0 and up to 1; got .50"),
        ([1.0, 2.0], (0.5, 0), "`shares` must be numbers above 0"),
        ([1.0, 2.0], (-0.5,), "`shares` must be numbers above 0"),
    ],
)
def test_effective_length_of_what_has_none(mass, shares, line):
    with pytest.raises(SettingError, match=line):
        lags.effective_length(mass, shares)


def test_effective_length():
    mass = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
    np.testing.assert_array_equal(
        lags.effective_length(mass, (0.4, 0.41, 0.9, 0.91, 1)), [1, 2, 3, 4, 4]
    )
    np.testing.assert_array_equal(lags.effective_length(np.array([2.0])), [1, 1, 1])
    np.testing.assert_array_equal(lags.effective_length(0.9 ** np.arange(400)), [7, 22, 44])
    for size in (
        1e308,
        1e-310,
    ):  # the sum exceeds the largest float; each is below the least normal one
        np.testing.assert_array_equal(lags.effective_length([size] * 4, (0.25, 0.6, 1)), [1, 3, 4])
    G = table(lags.gradients, "gru")
    norms = [
        np.linalg.norm(examples.vector(jax.tree.map(lambda g, k=k: g[k], G["cell"])))
        for k in range(T)
    ]
    np.testing.assert_allclose(lags.mass(G), norms, rtol=1e-13)
    with pytest.raises(SettingError, match="mass"):
        lags.effective_length(np.zeros(3))


def scalar(weight, steps, sequences, key):
    """h_t = weight · h_{t-1} + x_t: all Jacobians are `weight`."""
    problem = bs.Problem(bs.cells.linear(1, 1), bs.readouts.linear(1, 1), bs.losses.squared_error)
    params = problem.init(key)
    params["cell"]["W_hh"] = jnp.full((1, 1), weight)
    inputs = jax.random.normal(key, (steps, sequences, 1))
    return problem, params, bs.Batch(inputs, inputs + 1, jnp.ones((steps, sequences)))


@pytest.mark.parametrize("weight", [0.8, -0.9, 1.1])
def test_decay_of_a_scalar_is_its_weight(weight, key):
    problem, params, batch = scalar(weight, 20, 3, key)
    fit = lags.decay_rate(lags.adjoint_norms(problem, params, batch, 20)[-1])
    np.testing.assert_allclose(fit, abs(weight), rtol=1e-9)
    J = jacobians.jacobians(problem, params, batch)
    np.testing.assert_allclose(J, weight)
    np.testing.assert_allclose(jacobians.spectrum(J), abs(weight))
    np.testing.assert_allclose(jacobians.lyapunov_exponents(J, 1), np.log(abs(weight)))


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_norms_whose_squares_are_no_floats(kind, sign, key):
    """They follow the powers of the weight to where these leave the range of floats, not to its root."""
    steps = 110
    weight = {"float32": 2, "float64": 500}[kind] ** sign
    problem, params, batch = scalar(weight, steps, 2, key)
    batch = bs.Batch(0 * batch.inputs, *batch[1:])  # no state grows
    params, batch = jax.tree.map(lambda a: a.astype(kind), (params, batch))
    powers = np.float64(weight) ** np.arange(steps)
    at_state, at_parameters = (
        measure(problem, params, batch, steps)[-1] for measure in (lags.adjoint_norms, lags.norms)
    )
    for norms in (at_state, at_parameters):
        np.testing.assert_allclose(norms, norms[0] * powers[:, None], rtol=1e-6)
    mass = lags.mass(lags.gradients(problem, params, batch, steps))
    assert ((mass > 0) & (mass < np.inf)).all()
    assert lags.decay_rate(at_state).rate == pytest.approx(weight, rel=1e-6)
    zeros = jnp.zeros((2, 1), kind)
    last = batch._replace(mask=batch.mask.at[:-1].set(0))
    for strategy in (bs.strategies.full(problem), bs.strategies.forward_errors(problem)):
        found, _ = strategy.estimate(params, zeros, last, key)
        norms = found.metrics["adjoint_norms"][::-1]
        np.testing.assert_allclose(norms, norms[0] * powers[:, None], rtol=1e-6)
    if kind == "float64":
        over_time = bs.measure.gradient_norms(bs.strategies.full(problem), params, last, key, 1)
        np.testing.assert_allclose(over_time["lag"], over_time["lag"][0] * powers, rtol=1e-6)
        np.testing.assert_allclose(
            over_time["time"][::-1], over_time["time"][-1] * powers, rtol=1e-6
        )


@pytest.mark.parametrize("sequences", [1, 6])
def test_decay_interval_covers(sequences, rng):
    """95 % intervals, 300 noisy lines with independent errors (one sequence), or slopes of their own."""
    hits, k = [], np.arange(15)[:, None]
    for _ in range(300):
        slopes = -0.2 + 0.02 * rng.standard_normal(sequences) * (sequences > 1)
        fit = lags.decay_rate(np.exp(slopes * k + 0.3 * rng.standard_normal((15, sequences))))
        hits.append(fit.low < np.exp(-0.2) < fit.high)
        assert fit.low < fit.rate < fit.high
    assert 0.91 < np.mean(hits) < 0.985


def test_decay_interval_by_its_formula(rng):
    """Student's t with one degree of freedom less than sequences; of the regression's for one alone."""
    slopes = -0.2 + 0.02 * rng.standard_normal(4)
    fit = lags.decay_rate(np.exp(slopes * np.arange(15)[:, None]))
    half = 3.182446305284263 * slopes.std(ddof=1) / 2  # 0.975 of t with 3 degrees of freedom
    expected = np.exp(slopes.mean() + half * np.array([0, -1, 1]))
    np.testing.assert_allclose(fit, expected, rtol=1e-9)
    noise = 0.3 * rng.standard_normal(5)
    fit = lags.decay_rate(np.exp(-0.2 * np.arange(5) + noise)[:, None])
    lag = np.arange(5) - 2.0
    slope = lag @ (-0.2 * np.arange(5) + noise) / 10
    left = -0.2 * np.arange(5) + noise - slope * lag
    error = np.sqrt(np.sum((left - left.mean()) ** 2) / 3 / 10)
    expected = np.exp(slope + 3.182446305284263 * error * np.array([0, -1, 1]))
    np.testing.assert_allclose(fit, expected, rtol=1e-9)


def test_decay_leaves_out_what_is_zero(rng):
    norms = np.exp(-0.3 * np.arange(8)[:, None]) * np.ones(3)
    norms[5, 1] = 0
    assert lags.decay_rate(norms).rate == pytest.approx(np.exp(-0.3))
    for bad in (norms[:2], norms[:, 1:2], norms[:, 0]):
        with pytest.raises(SettingError, match="norms"):
            lags.decay_rate(bad)
    shrinking = np.float32(0.3) ** np.arange(120, dtype=np.float32)[:, None]
    with pytest.raises(SettingError, match=r"underflow to 0, use fewer lags or float64"):
        lags.decay_rate(shrinking)
    for norms in (shrinking[:60], 0.3 ** np.arange(120.0)[:, None]):  # the ways out
        assert lags.decay_rate(norms).rate == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_decay_of_what_is_no_norm(bad):
    norms = np.exp(-0.3 * np.arange(8)[:, None]) * np.ones(3)
    norms[5, 1] = bad
    with pytest.raises(SettingError, match=rf"`norms` must be finite .* 0, \[K, B\]; got {bad}"):
        lags.decay_rate(norms)


@pytest.mark.parametrize("name", CELLS)
def test_jacobians_are_autodiffs(name):
    """Through `cell.step`, forward mode; the lag table is their product (explicit, in NumPy)."""
    ex = examples.example(name)
    J = jacobians.jacobians(ex.problem, ex.params, ex.batch, ex.state)
    leaves, tree = jax.tree.flatten(ex.state)
    states = np.concatenate([flat_state(ex.state)[None], table_of(name).states])

    def step(flat, x):
        parts = jnp.split(flat, len(leaves))
        state = ex.problem.cell.step(ex.params["cell"], jax.tree.unflatten(tree, parts), x)
        return jnp.concatenate(jax.tree.leaves(state))

    expected = jax.vmap(jax.vmap(jax.jacfwd(step)))(jnp.asarray(states[:-1]), ex.batch.inputs)
    np.testing.assert_allclose(J, expected, atol=1e-13)
    hand, tokens = table_of(name).adjoints, float(ex.batch.mask.sum())
    norms = table(lags.adjoint_norms, name)
    for b in range(B):
        adjoint = hand[-1, -1, b]
        for k in range(T):
            assert norms[-1, k, b] == pytest.approx(tokens * np.linalg.norm(adjoint), abs=1e-12)
            adjoint = adjoint @ np.asarray(J[T - 1 - k, b])


def test_spectrum(rng):
    J = rng.standard_normal((2, 3, 4, 4))
    singular, radius = jacobians.spectrum(J)
    for at in np.ndindex(2, 3):
        np.testing.assert_allclose(singular[at] ** 2, np.linalg.eigvalsh(J[at].T @ J[at]).max())
        np.testing.assert_allclose(
            radius[at], bs.cells.spectral_radius(jnp.asarray(J[at])), rtol=1e-5
        )


def test_lyapunov_exponents(rng):
    """Constant J: log-moduli of its eigenvalues; all exponents together: the mean log |det J_t|."""
    basis = rng.standard_normal((3, 3))
    J = basis @ np.diag([1.1, -0.7, 0.3]) @ np.linalg.inv(basis)
    constant_J = jnp.asarray(np.broadcast_to(J, (300, 2, 3, 3)))
    exponents = jacobians.lyapunov_exponents(constant_J, 3, skip=100)
    np.testing.assert_allclose(exponents, np.log([[1.1, 0.7, 0.3]] * 2), atol=1e-12)
    np.testing.assert_allclose(
        jacobians.lyapunov_exponents(constant_J, 1, skip=100), exponents[:, :1]
    )
    J = rng.standard_normal((9, 2, 3, 3))
    total = jacobians.lyapunov_exponents(jnp.asarray(J), 3).sum(axis=1)
    np.testing.assert_allclose(total, np.linalg.slogdet(J)[1].mean(axis=0), rtol=1e-12)
    # the order matters: products of the transposed matrices grow otherwise
    first = jacobians.lyapunov_exponents(jnp.asarray(J), 1)
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 1)))[0]
    for b in range(2):
        grown = np.linalg.norm(np.linalg.multi_dot([*J[::-1, b], start]))
        np.testing.assert_allclose(first[b, 0], np.log(grown) / 9, rtol=1e-12)
    swapped = jacobians.lyapunov_exponents(jnp.asarray(np.swapaxes(J, -1, -2)), 1)
    assert np.abs(swapped - first).min() > 1e-3


@pytest.mark.parametrize("skip", [0, 1])
def test_lyapunov_exponents_come_in_order(skip):
    """After few steps the columns of Q are out of order; a direction that dies is last."""
    J = np.broadcast_to(np.diag([0.9, 0.2, 0.5]), (4, 2, 3, 3)) * np.reshape([1, 0], (2, 1, 1))
    alive, dead = jacobians.lyapunov_exponents(jnp.asarray(J), 3, skip)
    assert (np.diff(alive) < 0).all()
    assert alive.sum() == pytest.approx(np.log(0.5 * 0.9 * 0.2), rel=1e-12)
    assert (dead == -np.inf).all()


# Bad input


@pytest.mark.parametrize("measure", [lags.gradients, lags.adjoint_norms, lags.norms])
@pytest.mark.parametrize(
    ("K", "allowed"), [(T + 1, "between 1 and T (7)"), (0, "a whole"), (2.0, "a whole")]
)
def test_lags_beyond_the_steps(measure, K, allowed):
    with pytest.raises(SettingError) as error:
        table(measure, "elman_tanh", K=K)
    assert str(error.value).startswith(f"`lags` must be {allowed}")
    assert f"; got {K}." in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parameters_that_are_not_finite(bad):
    ex = examples.example("elman_tanh")
    params = {**ex.params, "cell": {**ex.params["cell"]}}
    params["cell"]["W_hh"] = params["cell"]["W_hh"].at[0, 1].set(bad)
    for made in (lags.gradients, lags.norms):
        with pytest.raises(SettingError, match=r"`params\.cell\.W_hh` must be finite"):
            table(made, "elman_tanh", params=params)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda T, K: jnp.ones(K), r"float64\[3\]"),
        (lambda T, K: jnp.ones((K, T)), r"float64\[3, 5\]"),
        (lambda T, K: jnp.ones(()), r"float64\[\]"),
        (lambda T, K: jnp.full((T, K), jnp.nan), "nan"),
        (lambda T, K: jnp.ones((T, K)).at[2, 1].set(jnp.inf), "inf"),
    ],
)
def test_lag_weights_of_another_shape_or_not_finite(made, said):
    full = bs.strategies.full(PROBLEM)
    own = bs.types.LagWeights(window=lambda lags: made(lags, 1), weights=made)
    strategy = full._replace(claim=bs.Claim(lag_weights=own))
    must = r"finite numbers \[steps, lags\] = \[5, 3\]"
    with pytest.raises(SettingError, match=rf"`claim\.lag_weights\.weights` .*{must}; got {said}"):
        lags.weights(strategy, 5, 3)
    if said in ("nan", "inf"):  # within jit, only the shapes are known
        assert jax.jit(lambda: lags.weights(strategy, 5, 3))().shape == (5, 3)
    window = r"`claim\.lag_weights\.window` must be finite numbers \[lags\] = \[4\]"
    with pytest.raises(SettingError, match=window):
        lags.window(strategy, 4)


def test_weights_beyond_the_first_step_may_be_anything():
    anything = jnp.where(jnp.tri(5, 3), 0.5, jnp.nan)
    own = bs.types.LagWeights(window=jnp.ones, weights=lambda steps, lags: anything)
    found = lags.weights(
        bs.strategies.full(PROBLEM)._replace(claim=bs.Claim(lag_weights=own)), 5, 3
    )
    np.testing.assert_array_equal(found, 0.5 * np.tri(5, 3))


def test_other_bad_input(key):
    undeclared = bs.strategies.full(PROBLEM)._replace(claim=bs.Claim(exact=True, unbiased=True))
    with pytest.raises(SettingError, match="lag_weights"):
        lags.window(undeclared, 3)
    with pytest.raises(SettingError, match=r"`lags` .*; got 4"):
        lags.weights(bs.strategies.full(PROBLEM), 3, 4)
    with pytest.raises(SettingError, match="steps"):
        lags.estimated_window(bs.strategies.full, 5, key, phases=4, steps=7)
    ex = examples.example("elman_tanh")
    with pytest.raises(SettingError, match=r"`weights` .*; got shape \[6, 2\]"):
        lags.weighted_gradient(ex.problem, ex.params, ex.batch, jnp.ones((T - 1, 2)))
    J = jnp.ones((5, 1, 2, 2))
    for wrong in ({"count": 3}, {"count": 1, "skip": 5}):
        with pytest.raises(SettingError):
            jacobians.lyapunov_exponents(J, **wrong)


# Everything at once: many weights, and the variance of every law from one table


def test_many_weights_from_one_table():
    """Each as it is alone; negative control: in another order."""
    ex = examples.example("elman_tanh")
    weights = jnp.asarray(np.random.default_rng(0).random((3, T, T)))
    many = lags.weighted_gradients(ex.problem, ex.params, ex.batch, weights, ex.state)
    for n, w in enumerate(weights):
        alone = lags.weighted_gradient(ex.problem, ex.params, ex.batch, w, ex.state)
        examples.close(jax.tree.map(lambda g, n=n: g[n], many), alone)
    with pytest.raises(AssertionError):
        examples.close(jax.tree.map(lambda g: g[0], many), alone)
    with pytest.raises(SettingError, match=rf"`weights` must be of shape \[N, T, K\] with T = {T}"):
        lags.weighted_gradients(ex.problem, ex.params, ex.batch, weights[:, 1:], ex.state)


@cache
def flows_of(name):
    ex = examples.example(name)
    return lags.flows(ex.problem, ex.params, ex.batch, ex.state)


@pytest.mark.parametrize("name", ["linear", "elman_tanh", "lstm"])
def test_flows_are_the_oracles(name):
    """F[j,t] = Σ_{s≥j} G[s,t] of each sequence, and of all together; negative control: the loss at j alone."""
    hand = table_of(name).grads  # [S, T, B, P]
    F = np.cumsum(hand[::-1], axis=0)[::-1]
    products, ex = np.einsum("jtbp,jubp->jtu", F, F), examples.example(name)
    shared = lags.shared_flows(ex.problem, ex.params, ex.batch, ex.state)
    F = F.sum(axis=2)
    together = np.einsum("jtp,jup->jtu", F, F)
    np.testing.assert_allclose(shared, together, rtol=0, atol=1e-13 * together.max())
    assert np.abs(together - products).max() > 1e-4
    np.testing.assert_allclose(flows_of(name), products, rtol=0, atol=1e-13 * products.max())
    assert np.abs(flows_of(name) - np.einsum("jtbp,jubp->jtu", hand, hand)).max() > 1e-4


@pytest.mark.parametrize(
    "law", [constant(1.5), constant(3), constant(50), power_law(2, 4), power_law(3, 6)]
)
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_variance_from_flows_is_that_of_all_patterns(name, law):
    """In closed form as by enumeration; negative controls: another mean length, the cuts uncompensated."""
    single = np.moveaxis(by_lag(table_of(name).grads), 2, 0)  # [B, S, K, P]

    def enumerated(strategy):
        weights, probability = map(np.asarray, strategy.claim.lag_weights.patterns(T))
        draws = np.einsum("nsk,bskp->bnp", np.tril(weights), single)
        return sum(probability @ ((d - probability @ d) ** 2).sum(axis=1) for d in draws)

    found = lags.variance(randomized(PROBLEM, law), flows_of(name))
    assert found == pytest.approx(enumerated(randomized(PROBLEM, law)), rel=1e-11)
    assert found == pytest.approx(
        4 * lags.variance(randomized(PROBLEM, law, draws=4), flows_of(name))
    )
    for other in (constant(law.mean_length + 0.5), power_law(law.mean_length, 3)):
        assert found != pytest.approx(
            lags.variance(randomized(PROBLEM, other), flows_of(name)), rel=1e-3
        )
    assert found != pytest.approx(enumerated(randomized(PROBLEM, law, compensate=False)), rel=1e-3)


def test_link_weights_that_are_drawn_are_draws():
    """Though the claim lists no patterns."""
    ex = examples.example("elman_tanh")
    cuts = bs.strategies.randomized_constant(ex.problem, 3, compensate=False)
    claim = cuts.claim._replace(lag_weights=cuts.claim.lag_weights._replace(patterns=None))
    strategy = cuts._replace(claim=claim)
    table = lags.flows(ex.problem, ex.params, ex.batch)
    with pytest.raises(SettingError, match=r"lag_weights\.spread` must be declared"):
        lags.variance(strategy, table)
    with pytest.raises(SettingError, match=r"`strategy` must be one that draws lag weights"):
        bs.measure.exact_quality(strategy, ex.problem, ex.params, ex.batch)


@pytest.mark.slow
def test_variance_without_draws_and_without_a_closed_form():
    ex = examples.example("elman_tanh")
    flows = jnp.ones((T, T, T))
    assert lags.variance(fixed(ex.problem, 3), flows) == 0
    assert lags.variance(bs.strategies.full(ex.problem), flows) == 0
    # weights beyond a float, and products that have underflown to 0: their sum would be nan
    underflown, fewer = np.zeros((220, 220, 220)), r"a table of fewer steps; got one of 220"
    with pytest.raises(SettingError, match=fewer):
        lags.variance(randomized(ex.problem, constant(1.001)), underflown)
    cuts = randomized(ex.problem, constant(3))
    with pytest.raises(SettingError, match=rf"{fewer} steps\. .*range of a float32\."):
        lags.variance(cuts, underflown.astype("f4"))
    assert lags.variance(cuts, underflown) == 0  # in float64 nothing above 1e-260 is lost
    uncompensated = randomized(ex.problem, constant(3), compensate=False)
    with pytest.raises(SettingError, match=r"spread` must be declared .*measure\.quality"):
        lags.variance(uncompensated, flows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_variance_from_products_near_the_least_float_is_right_or_refused(kind, monkeypatch):
    """Against float64, whose range is enough; control: without the check, some are less than half of it."""
    as_type = lambda kind, tree: jax.tree.map(lambda a: a.astype(kind), tree)  # noqa: E731
    problem = bs.Problem(bs.cells.elman(2, 2), bs.readouts.linear(2, 2), bs.losses.cross_entropy)
    params, steps = problem.init(jax.random.key(0)), 80
    ids = jax.random.randint(jax.random.key(1), (steps, 1), 0, 2)
    batch, found = bs.Batch(ids, ids, jnp.ones((steps, 1))), []
    for radius in (0.4, 0.9):
        cell = params["cell"] | {"W_hh": radius * jnp.eye(2)}
        short = as_type(kind, params | {"cell": cell})
        exact = lags.flows(problem, as_type(float, short), batch)
        table = lags.flows(problem, short, batch)
        assert table.dtype == "float32"
        for mean_length in (1.05, 1.1, 3):
            strategy = randomized(problem, constant(mean_length))
            expected = lags.variance(strategy, exact)
            try:
                assert lags.variance(strategy, table) == pytest.approx(expected, rel=1e-5)
                found.append("right")
            except SettingError:
                with monkeypatch.context() as unchecked:
                    unchecked.setattr(lag_windows, "_unsure", lambda *_: 0)
                    wrong = lags.variance(strategy, table) < expected / 2
                found.append("wrong" if wrong else "refused")
    assert found == ["wrong", "right", "right", "wrong", "refused", "right"]


@pytest.mark.parametrize("law", [constant(3), power_law(3, 4)])
@pytest.mark.parametrize("compensate", [True, False])
def test_declared_link_weights_are_the_ones_drawn(law, compensate):
    """From the same uniform numbers as the strategy's own formula; several axes after time."""
    uniforms = jax.random.uniform(jax.random.key(0), (9, 4, 5))
    declared = randomized(PROBLEM, law, compensate).claim.lag_weights.link_weights(uniforms)
    kept, pi = cuts(law, uniforms)
    expected = np.where(kept, 1 / pi if compensate else 1, 0)
    np.testing.assert_allclose(declared, expected, rtol=1e-14)
    assert 0 < np.mean(expected == 0) < 1


def test_tables_of_another_shape():
    ex = examples.example("linear")
    given = ex.problem, ex.params, ex.batch
    for weights in (np.ones(T), np.ones((T, 2, B + 1)), [[1.0, 1.0]]):
        with pytest.raises(
            SettingError, match=r"`weights` must be of shape \[T, K\] or \[T, K, B\]"
        ):
            lags.weighted_gradient(*given, weights)
    lists = lags.weighted_gradient(*given, np.ones((T, 2)).tolist())
    jax.tree.map(
        np.testing.assert_array_equal, lists, lags.weighted_gradient(*given, jnp.ones((T, 2)))
    )
    for flows in (np.ones((T, T)), np.ones((T, T, 2)), 3.0):
        with pytest.raises(SettingError, match=r"`flows` must be a table \[T, T, T\]; got shape"):
            lags.variance(randomized(PROBLEM, constant(3)), flows)
    with pytest.raises(SettingError, match="`gradients` must be a dict"):
        lags.mass(lags.gradients(*given, 2)["cell"])
    with pytest.raises(SettingError, match="`strategy` must be a Strategy"):
        lags.window(PROBLEM, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_norms_do_not_depend_on_the_type_of_the_mask(kind):
    """So many tokens are more than the largest float16, and bfloat16 rounds their number."""
    problem = bs.Problem(bs.cells.linear(2, 1), bs.readouts.linear(1, 2), bs.losses.cross_entropy)
    params, ids = problem.init(jax.random.key(0)), jnp.zeros((8, 2**14), int)
    full, found = jnp.ones(ids.shape).at[:3, ::5].set(0), []
    for mask in (full, full.astype(kind)):
        batch = bs.Batch(ids, ids, mask)
        norms = lags.adjoint_norms(problem, params, batch, 2)
        run = forward_pass(problem, params, problem.cell.zeros(2**14), batch)
        found.append((norms, state_gradients(run, mask)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)  # noqa: E731
    jax.tree.map(close, *found)


def test_the_zero_state_has_the_precision_of_the_parameters():
    """It is not given, so nobody could cast it."""
    ex = examples.example("lstm")
    cast = jax.tree.map(lambda a: a.astype("f4"), (ex.params, ex.batch))
    for leaf in jax.tree.leaves(lags.gradients(ex.problem, *cast, 2)):
        assert leaf.dtype == np.float32


def test_tables_of_parameters_shorter_than_mask_and_weights():
    ex = examples.example("gru")
    cast = jax.tree.map(lambda a: a.astype("f4") if a.dtype == float else a, (ex.params, ex.batch))
    short = cast[0], cast[1]._replace(mask=ex.batch.mask)
    weights = jnp.ones((2, T, T)).at[1].set(0.5)
    for table in (lags.products, partial(lags.weighted_gradients, weights=weights)):
        expected = table(ex.problem, ex.params, ex.batch)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)  # noqa: E731
        jax.tree.map(close, table(ex.problem, *short), expected)
