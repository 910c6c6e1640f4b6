"""Adaptive truncation: its means and its bound by hand, and what it chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import table_of

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.forward_pass import forward_pass
from bptt_study.strategies import adaptive, fixed
from bptt_study.strategies.adaptive import decay, relative_bias, state_gradients
from bptt_study.testing import examples
from bptt_study.training import devices
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
ALL = jnp.ones(99, bool)  # every lag has a token


def by_hand(name):
    """φ_k and S_K from the table of single losses, and err(K) / max (S - err), loop by loop."""
    ex, adjoints = examples.example(name), table_of(name).adjoints  # [S, T, B, n]
    mask = np.asarray(ex.batch.mask)
    alone = adjoints * (mask.sum() / np.where(mask > 0, mask, 1))[:, None, :, None]
    tokens = [(s, b) for s in range(T) for b in range(B) if mask[s, b] > 0]
    phi = [
        np.mean([np.linalg.norm(alone[s, s - k, b]) for s, b in tokens if s >= k]) for k in range(T)
    ]
    sums = [
        np.mean(
            [np.linalg.norm(alone[s, max(0, s - K + 1) : s + 1, b].sum(axis=0)) for s, b in tokens]
        )
        for K in range(1, T + 1)
    ]
    return np.array(phi), np.array(sums)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_means_and_bound(name):
    ex, tail = examples.example(name), 3
    run = forward_pass(ex.problem, ex.params, ex.state, ex.batch)
    phi, sums = by_hand(name)
    found = jax.jit(
        lambda: (state_gradients(run, ex.batch.mask), relative_bias(run, ex.batch.mask, tail))
    )()
    np.testing.assert_allclose(found[0][0], phi, rtol=1e-12)
    np.testing.assert_allclose(found[0][1], sums, rtol=1e-12)
    beta = np.exp(np.polyfit(np.arange(tail, T), np.log(phi[tail:]), 1)[0])
    assert float(decay(jnp.asarray(phi), tail, ALL[:T])) == pytest.approx(beta, rel=1e-10)
    assert beta < 1
    error = [
        phi[K:tail].sum() + phi[tail] * beta ** max(K - tail, 0) / (1 - beta) for K in range(T + 1)
    ]
    least = max(s - e for s, e in zip([0, *sums], error, strict=True))
    expected = np.array(error) / least if least > 0 else np.full(T + 1, np.inf)
    np.testing.assert_allclose(found[1], expected, rtol=1e-10)


def test_an_exploding_tail_has_no_bound():
    phi = jnp.asarray(1.1 ** np.arange(9))
    assert float(decay(phi, 4, ALL[:9])) == pytest.approx(1.1)
    assert float(decay(phi.at[4:].set(0), 4, ALL[:9])) == 0


@pytest.mark.parametrize(("last", "beta"), [(9, 0.8), (7, 0.8), (6, 0.8), (5, 1), (4, 1), (0, 1)])
def test_lags_that_no_token_has_are_left_out_of_the_decay(last, beta):
    """Of φ = 0.8^k the lags from `last` on have no token; two of those from 4 on make a line."""
    phi = jnp.where(jnp.arange(9) < last, 0.8 ** jnp.arange(9), 0)
    assert float(decay(phi, 4, jnp.arange(9) < last)) == pytest.approx(beta)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5, 2.0])
def test_padding_changes_no_window(key, delta):
    """Steps at the end that count in no sequence. The gradient is that without them, and so is the window."""
    problem, params, batch = smooth(0.9)
    pad = lambda a: jnp.pad(a, ((0, 4), *((0, 0) for _ in a.shape[1:])))  # noqa: E731
    strategy = adaptive(problem, delta, windows=(1, 2, 4, 8, 16, 24), tail=12)
    estimates = [
        jax.jit(strategy.estimate)(params, strategy.init(params, 3), one, key)[0]
        for one in (batch, jax.tree.map(pad, batch))
    ]
    assert estimates[0].metrics["window"] == estimates[1].metrics["window"]
    if estimates[0].metrics["window"] == 24:
        examples.close(*(found.grads for found in estimates))
    # beyond the last token by so much that too few lags of the tail are left: no bound
    short = batch._replace(mask=batch.mask.at[13:].set(0))
    found = strategy.estimate(params, strategy.init(params, 3), short, key)[0]
    assert int(found.metrics["window"]) == 24


def smooth(radius, steps=24):
    """A linear network whose gradients fall off by about `radius` in each step."""
    problem = bs.Problem(
        bs.cells.linear(2, 4, radius), bs.readouts.linear(4, 2), bs.losses.squared_error
    )
    key = jax.random.key(3)
    inputs, targets = jax.random.normal(key, (2, steps, 3, 2))
    return problem, problem.init(key), bs.Batch(inputs, targets, jnp.ones((steps, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0.3, 0.7])
def test_the_bias_is_within_the_bound(radius):
    """‖bias of K lags‖ ≤ M Σ_{k≥K} φ_k, M the largest ‖I_t‖ of a token; ‖·‖ of the sum of rows."""
    problem, params, batch = smooth(radius)
    steps, state = len(batch.mask), problem.cell.zeros(3)
    run = forward_pass(problem, params, state, batch)
    phi, _ = state_gradients(run, batch.mask)
    before = np.asarray(run.residuals.before)
    features = np.concatenate([batch.inputs, before, np.ones((steps, 3, 1))], axis=-1)
    M = np.linalg.norm(features, axis=-1).max()
    exact = jax.jit(lambda *call: backpropagate(problem, *call))(params, state, batch)[0].grads[
        "cell"
    ]
    for K in (1, 2, 4):
        kept = jax.jit(fixed(problem, 2 * K - 1, K).estimate)(params, state, batch, None)[0].grads[
            "cell"
        ]
        off = np.linalg.norm(examples.vector(kept) - examples.vector(exact))
        assert off <= M * float(phi[K:].sum())
        assert off > 1e-6 * M * float(phi[K:].sum())


@pytest.mark.slow
def test_the_window_follows_the_memory(key):
    """A shorter memory gets a smaller window, a larger tolerance too; the estimate is that of the window."""
    chosen = {}
    for radius, delta in ((0.3, 0.5), (0.3, 0.01), (0.7, 0.5)):
        problem, params, batch = smooth(radius)
        strategy = adaptive(problem, delta, every=2, windows=(1, 2, 4, 8), tail=6)
        state = strategy.init(params, 3)
        found, state = jax.jit(strategy.estimate)(params, state, batch, key)
        chosen[radius, delta] = K = int(found.metrics["window"])
        expected = jax.jit(fixed(problem, 2 * K - 1, K).estimate)(
            params, problem.cell.zeros(3), batch, key
        )[0]
        examples.close(found.grads, expected.grads)
        bound = relative_bias(
            forward_pass(problem, params, problem.cell.zeros(3), batch), batch.mask, 6
        )
        small = [w for w in (1, 2, 4, 8) if bound[w] < delta]
        assert (small[0] if small else 8) == K
        assert (int(state.updates), (1, 2, 4, 8)[int(state.choice)]) == (1, K)
        renewed = strategy.renew(params, state)
        assert (renewed.choice, renewed.updates) == (state.choice, 1)
        assert not renewed.state.any() and state.state.any()
    assert chosen[0.3, 0.5] < chosen[0.3, 0.01]
    assert chosen[0.3, 0.5] < chosen[0.7, 0.5]


def test_it_is_chosen_every_so_many_updates(key):
    """Between two choices the window stays, whatever the parameters."""
    problem, params, batch = smooth(0.3)
    _, longer, _ = smooth(0.7)
    strategy = adaptive(problem, 0.5, every=2, windows=(1, 2, 4, 8), tail=6)
    estimate, state = jax.jit(strategy.estimate), strategy.init(params, 3)
    windows = []
    for theta in (params, longer, longer, params):
        found, state = estimate(theta, state, batch, key)
        windows.append(int(found.metrics["window"]))
    assert windows[0] == windows[1] != windows[2] == windows[3]


def test_a_tail_beyond_the_steps(key):
    problem, params, batch = smooth(0.3, steps=5)
    strategy = adaptive(problem, 0.5, windows=(1, 2), tail=4)
    with pytest.raises(SettingError, match=r"`tail` must be at most 3.*got 4"):
        jax.jit(strategy.estimate)(params, strategy.init(params, 3), batch, key)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices: see test_two_devices.py")
def test_split_batch_is_one_device_s(key):
    ex = examples.example("gru", sequences=4)
    strategy = adaptive(ex.problem, 0.5, windows=(2, 4))
    estimate, state = jax.jit(strategy.estimate), strategy.init(ex.params, 4)
    with devices.split_batch(2):
        found = jax.device_get(estimate(ex.params, state, ex.batch, key))
    examples.close(found, jax.device_get(estimate(ex.params, state, ex.batch, key)))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        *[({"delta": d}, f"`delta` must be .* got {d}") for d in (0, -0.5, None)],
        *[({"delta": 0.5, "every": n}, f"`every` must be .* got {n}") for n in (0, 1.5)],
        *[({"delta": 0.5, "tail": n}, f"`tail` must be .* got {n}") for n in (0, 1.5)],
        *[
            ({"delta": 0.5, "windows": w}, "`windows` must be whole numbers that rise")
            for w in ([], [4, 2], [2, 2], 4, None)
        ],
        (
            {"delta": 0.5, "windows": [0, 2]},
            "`windows` must be a whole number of at least 1; got 0",
        ),
    ],
)
def test_bad_settings(settings, line):
    with pytest.raises(SettingError, match=line):
        adaptive(examples.problem_of("linear"), **settings)
