"""Random horizons: every horizon of every lag table by hand, the variance in closed form, and the executor."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from support import agrees, how, table_of

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.lag_weighted import lag_weighted
from bptt_study.strategies import constant, power_law, telescope
from bptt_study.testing import examples
from bptt_study.training import devices
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
PROBLEM = examples.problem_of("linear")
CELLS = [name for name in examples.CELLS if name != "elman_relu"]
DECAY = 0.6 ** np.arange(T)
SETTINGS = {
    "constant": {"law": constant(3)},
    "power_law": {"law": power_law(3, 4)},
    "tuned": {"tuned": DECAY},
}
KINDS = ["single", "roulette"]


def weights_by_hand(kind, q, n):
    """w_k of the horizon n."""
    w = np.zeros(len(q))
    for k in range(len(q)):
        if kind == "single" and k == n:
            w[k] = 1 / q[k]
        if kind == "roulette" and k <= n:
            w[k] = 1 / q[k:].sum()
    return w


@cache
def by_lag(name):
    """G_k of each sequence, [K, B, P], from the table by hand."""
    table = table_of(name).grads  # [S, T, B, P]
    return np.stack([sum(table[s, s - k] for s in range(k, T)) for k in range(T)])


@pytest.mark.parametrize("name", CELLS)
def test_lag_weights_of_each_sequence(name, rng):
    """Any weights [K, B], fewer lags than steps among them, against the table of single losses."""
    ex, w = examples.example(name), rng.standard_normal((5, B)) * [1, 0.5]
    w[3:, 1] = 0
    estimate, last = jax.jit(partial(lag_weighted, ex.problem))(
        ex.params, ex.state, ex.batch, jnp.asarray(w)
    )
    full = np.zeros((T, T, B))
    for s in range(T):
        for k in range(min(s + 1, 5)):
            full[s, s - k] = w[k]
    agrees(estimate, table_of(name), full)
    examples.close(last, backpropagate(ex.problem, ex.params, ex.state, ex.batch)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elman_tanh", "gru"])
def test_without_the_affine_form(name, rng):
    ex, w = examples.example(name), jnp.asarray(rng.standard_normal((T, B)))
    plain = ex.problem._replace(cell=ex.problem.cell._replace(affine=None))
    found = lag_weighted(plain, ex.params, ex.state, ex.batch, w)
    examples.close(found, lag_weighted(ex.problem, ex.params, ex.state, ex.batch, w))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_horizons(kind, settings):
    """Likely in sum 1, each as by hand, 1 on average; without the division by P the control is off."""
    weights, q = map(np.asarray, telescope(PROBLEM, kind, **settings).claim.lag_weights.patterns(T))
    assert q.sum() == pytest.approx(1, rel=1e-14)
    by_hand = [weights_by_hand(kind, q, n) for n in range(T)]
    np.testing.assert_allclose(weights, np.repeat(np.array(by_hand)[:, None], T, 1), rtol=1e-13)
    np.testing.assert_allclose(q @ weights[:, 0], 1, atol=1e-14)
    assert abs(q @ (weights[:, 0] > 0) - 1).max() > 0.1


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_variance(name, kind, settings):
    """From the products of lags, by enumeration, and by the formulas of the two kinds."""
    ex, G = examples.example(name), by_lag(name)
    strategy = telescope(ex.problem, kind, **settings)
    q = np.asarray(strategy.claim.lag_weights.patterns(T)[1])
    table = bs.lags.products(ex.problem, ex.params, ex.batch, ex.state)
    hand = np.einsum("kbp,lbp->kl", G, G)
    np.testing.assert_allclose(table, hand, atol=1e-13 * hand.max())
    found = bs.lags.variance(strategy, table, table="products")
    if kind == "single":
        second = sum((G[k] ** 2).sum() / q[k] for k in range(T))
    else:
        sums = np.cumsum(G / np.cumsum(q[::-1])[::-1, None, None], axis=0)
        second = sum(q[n] * (sums[n] ** 2).sum() for n in range(T))
    assert found == pytest.approx(second - (G.sum(axis=0) ** 2).sum(), rel=1e-9)
    exact = bs.measure.exact_quality(strategy, ex.problem, ex.params, ex.batch, ex.state)
    assert found == pytest.approx(exact.variance, rel=1e-9)
    assert exact.bias2 < 1e-24
    with pytest.raises(SettingError, match=r"`table` must be products.*got flows"):
        bs.lags.variance(strategy, table)
    norms = np.sqrt(np.diag(table))
    tuned = bs.lags.variance(telescope(PROBLEM, kind, tuned=norms), table, table="products")
    assert tuned < found or kind == "roulette"


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_horizons_of_least_variance(sequences):
    """Those near them have more. With several sequences, the norms of their sums (`lags.mass`) do, too."""
    ex = examples.example("gru", sequences=sequences)
    given = ex.problem, ex.params, ex.batch
    products = bs.lags.products(*given, ex.state)
    mass = bs.lags.mass(bs.lags.gradients(*given, T, ex.state))

    def variance(tuned):
        strategy = telescope(ex.problem, "single", tuned=tuned)
        return bs.lags.variance(strategy, products, table="products")

    least = np.sqrt(np.diag(products))
    near = np.exp(0.05 * np.random.default_rng(0).standard_normal((20, T)))
    assert all(variance(least * factors) > variance(least) for factors in near)
    more = variance(mass) / variance(least) - 1
    assert more == pytest.approx(0, abs=1e-12) if sequences == 1 else more > 1e-3


@pytest.mark.parametrize("n", [0, 2, T - 1])
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_roulette_under_a_geometric_law_is_a_sliding_window_with_open_links(name, n):
    """The horizon n keeps n + 1 lags, each link of which passes 1/π."""
    ex, pi = examples.example(name), 1 - 1 / 3
    weights = telescope(PROBLEM, "roulette", constant(3)).claim.lag_weights.patterns(T)[0][n, 0]
    found, _ = jax.jit(partial(lag_weighted, ex.problem))(
        ex.params, ex.state, ex.batch, jnp.repeat(weights[:, None], B, 1)
    )
    links = jnp.full((T, B), 1 / pi)

    def sliding(window):
        asked = how(window=window, stride=1, link_weights=links)
        return jax.jit(
            lambda: backpropagate(ex.problem, ex.params, ex.state, ex.batch, *asked)[0]
        )()

    expected = sliding(n + 1)
    examples.close(found.grads, expected.grads)
    off = sliding(n + 2)
    if n < T - 1:
        with pytest.raises(AssertionError):
            examples.close(found.grads, off.grads, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_horizons_are_drawn_as_often_as_likely(kind, key):
    """Read off the gradient of one lag table; each sequence draws its own."""
    ex = examples.example("linear")
    strategy = telescope(ex.problem, kind, constant(3))
    draws = 2000

    @jax.jit
    def run(keys):
        one = lambda key: strategy.estimate(ex.params, ex.state, ex.batch, key)[0].metrics  # noqa: E731
        return jax.lax.map(one, keys)["adjoint_norms"]

    norms = np.asarray(run(jax.random.split(key, draws)))  # [N, T, B]
    weights, q = map(np.asarray, strategy.claim.lag_weights.patterns(T))
    seen = []
    for n in range(T):
        table = np.zeros((T, T))
        for s in range(T):
            for k in range(s + 1):
                table[s, s - k] = weights[n, s, k]
        expected = np.linalg.norm(oracles.weighted_adjoints(table_of("linear"), table), axis=-1)
        seen.append(np.abs(norms - expected).max(axis=1) < 1e-10 * norms.max())
    seen = np.stack(seen)  # [horizon, draw, sequence]
    assert (seen.sum(axis=0) == 1).all()
    error = np.sqrt(q * (1 - q) / draws)
    assert (np.abs(seen.mean(axis=1) - q[:, None]) <= 4.5 * error[:, None]).all()
    together = np.mean(seen[..., 0] & seen[..., 1], axis=1).sum()
    assert together == pytest.approx((q**2).sum(), abs=4 * 0.5 / np.sqrt(draws))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            partial(telescope, kind="both", law=constant(3)),
            "`kind` must be .*single, roulette; got both",
        ),
        (telescope, "`law` must be a law, unless numbers are `tuned`; got None"),
        (partial(telescope, law=constant(1)), "got 1. No link"),
        (partial(telescope, tuned=[1, 0.0, 2]), "`tuned` must be finite numbers above 0"),
        (partial(telescope, tuned=[1, np.nan]), "`tuned` must be finite numbers above 0"),
        (partial(telescope, tuned=[[1.0]]), "`tuned` must be finite numbers above 0"),
        (partial(telescope, tuned="abc"), "`tuned` must be finite numbers above 0.*got abc"),
        (partial(telescope, law=3.0), "`law` must be a Law of bptt_study; got a float"),
        (
            partial(telescope, law=constant(3), tuned=[1.0]),
            "`tuned` must be None, or given without",
        ),
    ],
)
def test_bad_settings(make, line):
    with pytest.raises(SettingError, match=line):
        make(PROBLEM)


def test_tuned_numbers_whose_sum_is_no_float(key):
    ex = examples.example("linear")
    runs = [telescope(ex.problem, tuned=[size] * T).estimate for size in (1.0, 1.7e308, 5e-324)]
    found = [run(ex.params, ex.state, ex.batch, key)[0] for run in runs]
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


def test_a_horizon_that_never_comes_is_refused_unless_shorter_lags_ride_along(key):
    """No segment of this law is shorter than three steps: as a single lag, 0 to 2 would never count."""
    law = bs.strategies.Law(lambda distance: jnp.where(distance < 3, 1.0, 0.6), 4.5)
    ex = examples.example("elman_tanh")
    state = ex.problem.cell.zeros(ex.batch.mask.shape[1])
    single, roulette = (
        bs.strategies.telescope(ex.problem, kind, law) for kind in ("single", "roulette")
    )
    with pytest.raises(
        SettingError, match=r"`law` must be one with every horizon.*; got .* no horizon is 0"
    ):
        single.estimate(ex.params, state, ex.batch, key)
    patterns, probabilities = roulette.claim.lag_weights.patterns(7)
    np.testing.assert_allclose(jnp.einsum("n,ntk->tk", probabilities, patterns), 1, rtol=1e-12)


def test_weights_that_float32_does_not_hold(key):
    """Beyond lag 218 they exceed 3.4e38, and NumPy's warning named no setting; no such lag is drawn."""
    ex = examples.example("linear", steps=300)
    strategy = telescope(ex.problem, law=constant(3))
    given = ex.params, ex.state, ex.batch
    exact = strategy.estimate(*given, key)[0].grads
    found = strategy.estimate(*jax.tree.map(jnp.float32, given), key)[0].grads
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, found, exact)


def test_fewer_tuned_numbers_than_steps(key):
    ex = examples.example("linear")
    strategy = telescope(ex.problem, tuned=[1.0, 0.5])
    with pytest.raises(
        SettingError, match=f"`tuned` must be one for each of {T} steps; got 2 numbers"
    ):
        jax.jit(strategy.estimate)(ex.params, ex.state, ex.batch, key)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices: see test_two_devices.py")
def test_split_batch_is_one_device_s(key):
    ex = examples.example("gru", sequences=4)
    strategy = telescope(ex.problem, law=constant(3))
    estimate, state = jax.jit(strategy.estimate), strategy.init(ex.params, 4)
    with devices.split_batch(2):
        found = jax.device_get(estimate(ex.params, state, ex.batch, key))
    examples.close(found, jax.device_get(estimate(ex.params, state, ex.batch, key)))
