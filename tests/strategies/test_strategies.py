"""Full, fixed and randomized truncation against their definitions."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from support import agrees, by_hand, flat_grads, flat_state, full_estimate, table_of

import bptt_study as bs
from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.strategies.laws import reach
from bptt_study.strategies.randomized import cuts, link_weights
from bptt_study.testing import examples, loops
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
CELLS = list(examples.CELLS)
RECURRENT = [name for name in CELLS if name != "mlp"]
CONSTANT = bs.strategies.constant(mean_length=4.0)
POWER = bs.strategies.power_law(mean_length=4.0, alpha=6)
LAWS = {"constant": CONSTANT, "power_law": POWER}


@cache
def fixed(name, window, stride=None):
    ex = examples.example(name)
    strategy = bs.strategies.fixed(ex.problem, window=window, stride=stride)
    return jax.jit(strategy.estimate)(ex.params, ex.state, ex.batch, jax.random.key(0))


# ---- full and fixed


@pytest.mark.parametrize("name", CELLS)
def test_full_is_the_gradient_of_the_plain_loop(name):
    estimate, _ = full_estimate(name)
    loss, grads = examples.reference(name)
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-13)
    examples.close(estimate.grads, grads)
    assert not estimate.metrics["cuts"].any()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("window", [T, T + 5])
def test_a_window_of_all_steps_is_full(name, window):
    estimate, last = fixed(name, window)
    expected, expected_last = full_estimate(name)
    examples.close(estimate.grads, expected.grads, 1e-14)
    examples.close(last, expected_last, 1e-15)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("window", [1, 3])
def test_chunks_are_the_plain_loop_with_detached_states(name, window):
    """T = 7 ends in a shorter chunk. The state before the first step is detached as well."""
    problem, params, _, batch, state = examples.example(name)
    cut = range(0, T, window)
    expected = jax.grad(lambda p: loops.looped_loss(problem, p, state, batch, cut)[0])(params)
    estimate, _ = fixed(name, window)
    examples.close(estimate.grads, expected)
    marked = np.zeros((T, B), bool)
    marked[window::window] = True
    np.testing.assert_array_equal(estimate.metrics["cuts"], marked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_sliding_window_is_every_loss_truncated_alone(name):
    """By JAX, one loss at a time: only its newest `window` steps are differentiated."""
    problem, params, _, batch, state = examples.example(name)
    window, total = 3, 0.0
    for s in range(T):
        single = batch._replace(mask=batch.mask * (jnp.arange(T) == s)[:, None])
        weight = single.mask.sum() / batch.mask.sum()

        def loss(p, single=single, s=s, weight=weight):
            cut = (max(0, s - window + 1),)
            return weight * loops.looped_loss(problem, p, state, single, cut)[0]

        total = (
            jax.tree.map(jnp.add, jax.grad(loss)(params), total) if s else jax.grad(loss)(params)
        )
    examples.close(fixed(name, window, stride=1)[0].grads, total)


def test_sliding_weights_are_tbptt_of_stride_one():
    """The two naive definitions in the oracle agree with each other."""
    for window in range(1, T + 2):
        np.testing.assert_array_equal(oracles.sliding(T, window), oracles.tbptt(T, 1, window))
    assert (oracles.tbptt(T, 3, 4) != oracles.sliding(T, 4)).any()


@pytest.mark.parametrize(("window", "stride"), [(4, None), (3, 2), (4, 1)])
def test_a_leaf_of_the_state_without_numbers_changes_nothing(window, stride):
    """The blocks side by side ended in a division by zero."""
    ex = examples.example("lstm")
    cell = ex.problem.cell

    def step(params, state, x):
        return {**state, "lstm": cell.step(params, state["lstm"], x)}

    def with_none(state):
        return {"lstm": state, "none": jnp.zeros((B, 0, 2))}

    other = bs.Cell(
        cell.init, lambda n: with_none(cell.zeros(n)), step, lambda state: cell.read(state["lstm"])
    )
    strategy = bs.strategies.fixed(ex.problem._replace(cell=other), window=window, stride=stride)
    key = jax.random.key(0)
    found, last = strategy.estimate(ex.params, with_none(ex.state), ex.batch, key)
    expected, expected_last = fixed("lstm", window, stride)
    examples.close(found.grads, expected.grads)
    examples.close(last["lstm"], expected_last)


@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
@pytest.mark.parametrize("strategy", ["full", "sliding", "power_law"])
def test_the_state_is_carried_and_detached(name, strategy, key):
    ex = examples.example(name)
    make = {
        "full": lambda p: bs.strategies.full(p),
        "sliding": lambda p: bs.strategies.fixed(p, window=3, stride=1),
        "power_law": lambda p: bs.strategies.randomized(p, law=POWER),
    }
    init, estimate = make[strategy](ex.problem)[:2]

    @jax.jit
    def run(params, state, batch):
        def state_first(p):
            result, last = estimate(p, state, batch, key)
            return last, result

        last, pull, result = jax.vjp(state_first, params, has_aux=True)
        return result, last, pull(jax.tree.map(jnp.ones_like, last))[0]

    zeros = init(ex.params, B)
    assert all(not leaf.any() for leaf in jax.tree.leaves(zeros))
    _, state, _ = run(ex.params, zeros, ex.earlier)
    np.testing.assert_allclose(flat_state(state), flat_state(ex.state), atol=1e-14)
    carried, last, through = run(ex.params, state, ex.batch)
    np.testing.assert_allclose(flat_state(last), table_of(name).states[-1], atol=1e-14)
    assert all(not leaf.any() for leaf in jax.tree.leaves(through)), "a gradient through the state"
    fresh, _, _ = run(ex.params, zeros, ex.batch)
    assert abs(carried.loss - fresh.loss) > 1e-4
    difference = examples.vector(carried.grads) - examples.vector(fresh.grads)
    assert np.abs(difference).max() > 1e-3


def test_float32_numbers_are_the_float64_numbers(key):
    ex = examples.example("lstm")
    wide = examples.vector(full_estimate("lstm")[0].grads)
    with jax.enable_x64(False):
        narrow = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float32)), (ex.params, ex.state, ex.batch)
        )
        estimate, last = jax.jit(bs.strategies.full(ex.problem).estimate)(*narrow, key)
        assert {a.dtype for a in jax.tree.leaves((estimate.grads, last))} == {np.dtype("float32")}
        error = np.abs(examples.vector(estimate.grads) - wide).max()
    assert 0 < error < 1e-5 * np.abs(wide).max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": w}, f"`window` must be a whole number of at least 1; got {w}")
        for w in (0, -1, 2.5, True, None)
    ]
    + [
        ({"window": 3, "stride": s}, f"`stride` must be a whole number of at least 1; got {s}")
        for s in (0, -1, 1.5, True)
    ]
    + [({"window": 3, "stride": 4}, r"`stride` must be between 1 and window \(3\).*; got 4")],
)
def test_bad_windows(settings, message):
    with pytest.raises(SettingError, match=message):
        bs.strategies.fixed(examples.problem_of("linear"), **settings)


# ---- randomized: every pattern of cuts

PATTERNS = np.array([(0, *p) for p in itertools.product((0, 1), repeat=T - 1)]).T  # [T, 64], 1 cuts


def enumerated(law):
    """All patterns: kept and π [T, 64], and each one's probability."""
    kept, pi = (np.asarray(a) for a in cuts(law, jnp.asarray(PATTERNS, float)))
    np.testing.assert_array_equal(kept, PATTERNS == 0)
    return kept, pi, np.where(kept, pi, 1 - pi)[1:].prod(axis=0)


@cache
def gated_grads(name):
    """Gates [N, T, B] -> flat gradients [N, P], compiled once for all laws."""
    ex = examples.example(name)

    def one(xi):
        estimate, _ = backpropagate(
            ex.problem, ex.params, ex.state, ex.batch, Truncation(link_weights=xi)
        )
        return jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(estimate.grads)])

    return jax.jit(jax.vmap(one))


def expectation(name, xi, probability):
    """Σ p · estimate over patterns, the same one for both sequences."""
    both = np.repeat(xi.T[..., None], B, axis=-1)
    return probability @ np.asarray(gated_grads(name)(jnp.asarray(both)))


@pytest.mark.parametrize("law", LAWS)
def test_probabilities_of_all_patterns_sum_to_one(law):
    assert abs(enumerated(LAWS[law])[2].sum() - 1) < 1e-14


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("law", LAWS)
def test_compensated_expectation_is_the_gradient(name, law):
    kept, pi, probability = enumerated(LAWS[law])
    exact = examples.vector(examples.reference(name)[1])
    mean = expectation(name, np.asarray(link_weights(kept, pi, True)), probability)
    np.testing.assert_allclose(mean, exact, atol=1e-12 * np.abs(exact).max())


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("law", LAWS)
def test_wrong_compensation_is_biased(name, law):
    """Negative controls: none, and by 1/π²."""
    kept, pi, probability = enumerated(LAWS[law])
    exact = examples.vector(examples.reference(name)[1])
    for xi in (np.asarray(link_weights(kept, pi, False)), kept / pi**2):
        bias = expectation(name, xi, probability) - exact
        assert np.linalg.norm(bias) > 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("law", LAWS)
def test_expectation_over_independent_draws_of_each_sequence(law):
    """All 64 × 64 pairs of patterns; the second sequence's pattern does not move the mean of the first."""
    kept, pi, probability = enumerated(LAWS[law])
    xi = np.asarray(link_weights(kept, pi, True)).T  # [64, T]
    pairs = np.stack([np.repeat(xi, 64, axis=0), np.tile(xi, (64, 1))], axis=-1)  # [4096, T, 2]
    all_grads = np.asarray(gated_grads("elman_tanh")(jnp.asarray(pairs))).reshape(64, 64, -1)
    exact = examples.vector(examples.reference("elman_tanh")[1])
    mean = np.einsum("i,j,ijp->p", probability, probability, all_grads)
    np.testing.assert_allclose(mean, exact, atol=1e-12)
    first = np.einsum("i,ijp->jp", probability, all_grads)  # mean over the first sequence's draw
    expected = first.mean(axis=0) - first
    second_only = all_grads[:1].mean(axis=1) - all_grads[0]
    np.testing.assert_allclose(expected, second_only, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENT)
def test_forward_form_equals_backward_form(name, rng):
    """z_t = I_t + ξ_t J_t z_{t-1} with explicit Jacobians, for the same draws."""
    kept, pi = cuts(POWER, jnp.asarray(rng.random((T, B))))
    table, p = table_of(name), examples.example(name).params["cell"]
    cell = {k: np.asarray(v) for k, v in p.items()}
    for xi in (np.asarray(link_weights(kept, pi, True)), rng.uniform(0, 2, (T, B))):
        backward = np.asarray(gated_grads(name)(jnp.asarray(xi)[None]))[0]
        forward = oracles.forward_form(name, cell, table, xi)
        np.testing.assert_allclose(
            backward[: forward.size], forward, atol=1e-12 * np.abs(forward).max()
        )
        shifted = oracles.forward_form(name, cell, table, np.roll(xi, 1, axis=0))
        assert np.abs(forward - shifted).max() > 1e-4 * np.abs(forward).max()  # negative control


# ---- randomized: what a call draws


def gates_of(law, cut, compensate):
    """ξ [T, B] by a plain loop, from the links a call reports as cut."""
    xi = np.ones(cut.shape)
    for b in range(cut.shape[1]):
        delta = 1
        for t in range(1, len(cut)):
            c = 1 / 4 if law == "constant" else 5 / (4 * 4 + delta)
            xi[t, b] = 0 if cut[t, b] else 1 / (1 - c) if compensate else 1
            delta = 1 if cut[t, b] else delta + 1
    return xi


@cache
def draws(law, compensate):
    ex = examples.example("elman_tanh")
    strategy = bs.strategies.randomized(ex.problem, law=LAWS[law], compensate=compensate)
    return jax.jit(jax.vmap(strategy.estimate, in_axes=(None, None, None, 0)))(
        ex.params, ex.state, ex.batch, jax.random.split(jax.random.key(5), 200)
    )[0]


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_an_estimate_follows_from_its_cuts(law, compensate):
    estimates = draws(law, compensate)
    for n in range(20):
        one = jax.tree.map(lambda a, n=n: a[n], estimates)
        xi = gates_of(law, np.asarray(one.metrics["cuts"]), compensate)
        agrees(one, table_of("elman_tanh"), oracles.gated(xi))


def test_every_sequence_has_its_own_draw_and_every_key_another():
    cut = np.asarray(draws("constant", True).metrics["cuts"])  # [200, T, B]
    assert (cut[..., 0] != cut[..., 1]).any(axis=1).mean() > 0.5
    both = np.corrcoef(cut[:, 1:, 0].ravel(), cut[:, 1:, 1].ravel())[0, 1]
    assert abs(both) < 4 / np.sqrt(200 * (T - 1))
    assert len({c.tobytes() for c in cut}) > 150


@pytest.mark.parametrize("law", LAWS)
def test_delta_starts_at_one_after_a_cut(law):
    keep = LAWS[law].keep
    uniforms = jnp.array([0, 0, 0, 1, 0, 1, 1, 0, 0], float)[:, None]
    kept, pi = cuts(LAWS[law], uniforms)
    np.testing.assert_array_equal(kept[:, 0], uniforms[:, 0] == 0)
    delta = jnp.array([1, 2, 3, 1, 2, 1, 1, 2], float)
    np.testing.assert_allclose(pi[1:, 0], keep(delta), rtol=1e-15)
    if law == "power_law":  # negative control: δ from 0 differs
        assert (np.abs(pi[1:, 0] - keep(delta - 1)) > 1e-3).all()
        np.testing.assert_allclose(keep(delta), 1 - 5 / (16 + delta), rtol=1e-15)
    else:
        np.testing.assert_allclose(keep(delta), 3 / 4, rtol=1e-15)


@pytest.mark.parametrize("law", LAWS)
def test_drawn_cuts_follow_the_law(law):
    """The number of cuts in 300 links, against its mean by a recursion over δ, within 4 standard errors."""
    n, columns = 300, 2000
    kept, _ = cuts(LAWS[law], jax.random.uniform(jax.random.key(2), (n + 1, columns)))
    count = (~np.asarray(kept)).sum(axis=0)
    cut = np.full(n, 1 / 4) if law == "constant" else 5 / (16 + np.arange(1, n + 1))
    at, expected = np.zeros(n), 0.0  # probability of every δ
    at[0] = 1
    for _ in range(n):
        expected += at @ cut
        at = np.concatenate([[at @ cut], (at * (1 - cut))[:-1]])
    error = count.std(ddof=1) / np.sqrt(columns)
    assert abs(count.mean() - expected) < 4 * error
    assert error < 0.005 * expected


# ---- laws


def moments(law):
    """Mean and standard deviation of the segment length from P(N > n), a long sum and its tail."""
    far = 10**6
    survival = np.concatenate([[1], np.cumprod(np.asarray(law.keep(jnp.arange(1.0, far))))])
    n = np.arange(far)
    mean, square, last = survival.sum(), ((2 * n + 1) * survival).sum(), survival[-1]
    if last > 1e-300:  # a power law goes on as n^-decay
        decay = np.log(survival[far // 2] / last) / np.log(2)
        mean, square = mean + last * far / (decay - 1), square + 2 * last * far**2 / (decay - 2)
    return mean, np.sqrt(square - mean**2)


@pytest.mark.parametrize("law", LAWS)
def test_hardly_a_segment_goes_beyond_the_reach(law):
    """The first n with P(N > n) ≤ the chance; the constant law's is closed, L0 = 4."""
    chance = 1e-3
    n = reach(LAWS[law], 10, 10 * chance)
    passed = np.cumprod([float(LAWS[law].keep(jnp.asarray(float(d)))) for d in range(1, n + 1)])
    assert passed[n - 1] <= chance < passed[n - 2]
    if law == "constant":
        assert n == int(np.ceil(np.log(chance) / np.log(3 / 4)))
        assert (
            jax.jit(lambda x: x + reach(LAWS[law], 10, 10 * chance))(0) == n
        )  # also while tracing


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("compensate", [True, False])
def test_a_long_sequence_goes_from_cut_to_cut(law, compensate, key):
    """What the gates say, in a fraction of the states, and hardly more arithmetic: nothing is done twice."""
    problem, params, _, short, state = examples.example("elman_tanh")
    batch = jax.tree.map(lambda a: jnp.tile(a, (900, 1)), short)
    strategy = bs.strategies.randomized(problem, LAWS[law], compensate)
    arguments = params, state, batch, key
    actual, last = jax.jit(strategy.estimate)(*arguments)

    def stored(params, state, batch, key):
        uniforms = jax.random.uniform(key, (*batch.mask.shape, 1))[..., 0]
        xi = link_weights(*cuts(LAWS[law], uniforms), compensate)
        return backpropagate(problem, params, state, batch, Truncation(link_weights=xi))

    expected = jax.jit(stored)(*arguments)
    examples.close((actual, last), expected, 1e-11)
    work = (bs.measure.arithmetic(f, *arguments) for f in (strategy.estimate, stored))
    assert 1 < next(work) / next(work) < 1.3


@pytest.mark.parametrize(
    ("mean_length", "alpha", "sd"), [(16, 6, 20.0), (50, 4, 85.7), (3, 3.5, None), (1, 6, 0.0)]
)
def test_power_law_has_its_mean_length(mean_length, alpha, sd):
    mean, deviation = moments(bs.strategies.power_law(mean_length, alpha))
    np.testing.assert_allclose(mean, mean_length, rtol=1e-6)
    if sd is not None:
        assert abs(deviation - sd) < 0.05


NO_LAWS = {
    "no probability": (lambda d: jnp.full_like(d, 1.5), 3.0, "keep` must be a probability"),
    "no number": (lambda d: jnp.full_like(d, jnp.nan), 3.0, "keep` must be a probability"),
    "one for all": (lambda d: 0.8, 5.0, "keep` must be a probability"),
    "never beyond": (lambda d: jnp.where(d < 3, 0.7, 0.0), 2.19, "keep` must be above 0 .* δ = 3"),
    "no mean": (lambda d: jnp.full_like(d, 0.5), "2", "mean_length` must be a finite number"),
    "an endless mean": (lambda d: jnp.full_like(d, 0.5), np.inf, "mean_length` must be a finite"),
    "another mean": (
        lambda d: jnp.full_like(d, 7 / 8),
        3.0,
        r"mean_length` must be .* \(8\); got 3",
    ),
    "a longer mean": (
        lambda d: jnp.full_like(d, 0.5),
        3.0,
        r"mean_length` must be .* \(2\); got 3",
    ),
    "a longer mean of a long tail": (
        bs.strategies.power_law(16, 3).keep,
        17.0,
        r"mean_length` must be .* \(16\); got 17",
    ),
}


@pytest.mark.parametrize("name", NO_LAWS)
def test_a_law_that_is_none(name):
    """Each would claim to be unbiased, and would not be."""
    keep, mean_length, said = NO_LAWS[name]
    problem, law = examples.example("elman_tanh").problem, bs.strategies.Law(keep, mean_length)
    for make in (bs.strategies.randomized, lambda p, law: bs.strategies.telescope(p, law=law)):
        with pytest.raises(SettingError, match=said):
            make(problem, law)
    if name == "never beyond":  # a window of random length is fine where nothing is scaled up
        bs.strategies.randomized(problem, law, compensate=False)


@pytest.mark.parametrize("mean_length", [1, 1.05, 1.5, 2, 16, 1e4])
@pytest.mark.parametrize("alpha", [2.05, 2.6, 2.7, 4])
def test_any_power_law_is_a_law(mean_length, alpha):
    """However long its tail is, and however much of its mean lies there."""
    law = bs.strategies.power_law(mean_length, alpha)
    bs.strategies.randomized(examples.example("elman_tanh").problem, law, compensate=False)


@pytest.mark.parametrize("mean_length", [1, 1.5, 16])
def test_constant_law_has_its_mean_length(mean_length):
    mean, deviation = moments(bs.strategies.constant(mean_length))
    np.testing.assert_allclose(mean, mean_length, rtol=1e-12)
    np.testing.assert_allclose(deviation, np.sqrt(mean_length * (mean_length - 1)), atol=1e-9)


@pytest.mark.parametrize("law", [bs.strategies.constant, bs.strategies.power_law])
def test_without_cuts_it_is_full(law, key):
    ex = examples.example("gru")
    strategy = bs.strategies.randomized(ex.problem, law=law(mean_length=1e13))
    estimate, _ = strategy.estimate(ex.params, ex.state, ex.batch, key)
    examples.close(estimate.grads, full_estimate("gru")[0].grads, 1e-10)
    assert not estimate.metrics["cuts"].any()


@pytest.mark.parametrize("law", [bs.strategies.constant, bs.strategies.power_law])
def test_segments_of_length_one_are_a_window_of_one(law, key):
    ex = examples.example("gru")
    strategy = bs.strategies.randomized(ex.problem, law=law(mean_length=1), compensate=False)
    estimate, _ = strategy.estimate(ex.params, ex.state, ex.batch, key)
    examples.close(estimate.grads, fixed("gru", 1)[0].grads, 1e-14)


@pytest.mark.parametrize(
    "make", [bs.strategies.randomized_constant, bs.strategies.randomized_power_law]
)
def test_names_of_the_command_line(make, key):
    """They are `randomized` with the law."""
    ex = examples.example("elman_tanh")
    law = {"randomized_constant": "constant", "randomized_power_law": "power_law"}[make.__name__]
    strategy = make(ex.problem, mean_length=4.0)
    expected = bs.strategies.randomized(ex.problem, law=LAWS[law])
    examples.close(
        strategy.estimate(ex.params, ex.state, ex.batch, key)[0].grads,
        expected.estimate(ex.params, ex.state, ex.batch, key)[0].grads,
        1e-15,
    )


@pytest.mark.parametrize("law", [bs.strategies.constant, bs.strategies.power_law])
@pytest.mark.parametrize("value", [0.5, 0, -3, float("nan"), float("inf"), True, "16"])
def test_bad_mean_length(law, value):
    with pytest.raises(
        SettingError, match=f"`mean_length` must be a finite number of at least 1; got .?{value}"
    ):
        law(mean_length=value)


@pytest.mark.parametrize("value", [2, 1.5, -1, float("nan"), float("inf"), True])
def test_bad_alpha(value):
    with pytest.raises(
        SettingError, match=f"`alpha` must be a finite number greater than 2; got {value}"
    ):
        bs.strategies.power_law(mean_length=16, alpha=value)


@pytest.mark.parametrize("law", [bs.strategies.constant, bs.strategies.power_law])
def test_segments_of_length_one_have_no_compensation(law):
    with pytest.raises(
        SettingError, match=r"`mean_length` must be greater than 1; got 1. .*compensate=false"
    ):
        bs.strategies.randomized(examples.problem_of("linear"), law=law(mean_length=1))


# ---- metrics

CUTTING = {
    "full": lambda p: bs.strategies.full(p),
    "chunks": lambda p: bs.strategies.fixed(p, window=3),
    "sliding": lambda p: bs.strategies.fixed(p, window=2, stride=1),
    "tbptt": lambda p: bs.strategies.fixed(p, window=4, stride=3),
    "constant": lambda p: bs.strategies.randomized(p, law=CONSTANT),
    "uncompensated": lambda p: bs.strategies.randomized(p, law=POWER, compensate=False),
}


@pytest.mark.parametrize("strategy", CUTTING)
def test_cuts_mark_the_links_that_pass_nothing(strategy):
    """Losses counted one step at a time show which of them reach h_{t-1}, under the same draw."""
    ex = examples.example("elman_tanh")
    estimate, key = CUTTING[strategy](ex.problem).estimate, jax.random.key(3)
    single = jnp.eye(T)[:, :, None] * jnp.ones(B)  # mask of loss s alone
    metrics = jax.jit(
        jax.vmap(lambda m: estimate(ex.params, ex.state, ex.batch._replace(mask=m), key)[0].metrics)
    )(single)
    reaches = np.asarray(metrics["adjoint_norms"]) > 0  # [S, T, B]
    marked = np.asarray(metrics["cuts"])[0]
    assert reaches[np.arange(T), np.arange(T)].all()
    for t in range(1, T):
        np.testing.assert_array_equal(marked[t], ~reaches[t:, t - 1].any(axis=0))
    assert not marked[0].any()
    assert marked.any() == (strategy in ("chunks", "constant", "uncompensated"))


def test_h_0_is_not_ignored():
    """Negative control: the truncated oracle from h_0 = 0 differs."""
    ex = examples.example("elman_tanh")
    from_zero = by_hand("elman_tanh", ex._replace(state=jnp.zeros_like(ex.state)))
    cell, _ = flat_grads(fixed("elman_tanh", 3, 1)[0])
    assert np.abs(cell - oracles.weighted(from_zero, oracles.sliding(T, 3))).max() > 1e-3


def test_a_law_is_checked_as_far_as_a_call_goes():
    """A link that no draw keeps is never counted, and nothing can compensate that."""
    keep = lambda delta: jnp.where(delta < 4500, 0.999, 0.0)  # noqa: E731
    law = bs.strategies.Law(keep, (1 - 0.999**4500) / 0.001)
    problem = examples.problem_of("linear", 1, 1, 1)
    params, ids = problem.init(jax.random.key(0)), jnp.zeros((4600, 1, 1))
    batch = bs.Batch(ids, ids, jnp.ones((4600, 1)))
    for make in (bs.strategies.randomized, bs.strategies.telescope):
        strategy = make(problem, law=law)
        with pytest.raises(SettingError, match=r"law\.keep` must be above 0"):
            strategy.estimate(params, strategy.init(params, 1), batch, jax.random.key(0))


def test_steps_beyond_the_end_do_not_overflow(key):
    """A schedule from cut to cut makes up steps there; without a reset, this state would overflow in them."""
    steps, size = 6000, 2

    def step(params, h, x):
        return jnp.where(x[:, 1:] > 0, 0, params["a"] * h) + x[:, :1] * params["b"]

    cell = bs.Cell(
        lambda key: {"a": jnp.array(1e4), "b": jnp.array(1.0)},
        lambda size: jnp.zeros((size, 1)),
        step,
        lambda h: h,
    )
    loss = lambda o, y: jnp.tanh(o[..., 0] - y) ** 2  # noqa: E731
    problem = bs.Problem(cell, bs.readouts.linear(1, 1), loss)
    resets = jnp.where(jnp.arange(steps) % 8 == 0, 1.0, -1.0)[:, None]
    inputs = jax.random.normal(key, (steps, size, 2)).at[..., 1].set(resets)
    batch = bs.Batch(inputs, jnp.zeros((steps, size)), jnp.ones((steps, size)))
    strategy = bs.strategies.randomized_constant(problem, mean_length=4)
    params = problem.init(key)
    estimate, _ = jax.jit(strategy.estimate)(params, cell.zeros(size), batch, key)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(estimate.grads))
