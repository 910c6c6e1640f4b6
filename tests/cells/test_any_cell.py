"""Every strategy on cells of every kind: with the affine form, without it, and by `bs.scan`, all the same."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import how

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.pytrees import floats, like, numbers, with_floats
from bptt_study.strategies.randomized import cuts

T, B, D, H, Q = 7, 2, 3, 3, 2
LONG = 36  # steps, so that random cuts go from cut to cut
KEY = jax.random.key(3)


def step_only(cell: bs.Cell) -> bs.Cell:
    return cell._replace(affine=None)


def dropout(cell: bs.Cell, rate: float = 0.4) -> bs.Cell:
    """A cell whose hidden state loses each unit at random; each sequence carries a key."""

    def step(params: Any, state: Any, x: Any) -> Any:
        keys, h = state
        both = jax.vmap(jax.random.split)(keys)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, h.shape[1:]))(both[:, 1])
        return both[:, 0], cell.step(params, h * kept / (1 - rate), x)

    return bs.Cell(
        init=cell.init,
        zeros=lambda size: (jax.random.split(jax.random.key(5), size), cell.zeros(size)),
        step=step,
        read=lambda state: cell.read(state[1]),
    )


def counting() -> bs.Cell:
    """State leaves [B] int, [B] float and [B, 2, H], and the number of steps acts on the states."""

    def step(params: Any, state: Any, x: Any) -> Any:
        count, total, h = state
        new = jnp.tanh(h @ params["W"] + (x @ params["V"])[:, None] + 0.1 * total[:, None, None])
        return count + 1, 0.9 * total + new.sum((1, 2)) / (1 + count), new

    return bs.Cell(
        init=lambda key: dict(
            zip("WV", jax.random.normal(key, (2, H, H)) / jnp.sqrt(H), strict=True)
        ),
        zeros=lambda size: (jnp.zeros(size, int), jnp.zeros(size), jnp.zeros((size, 2, H))),
        step=step,
        read=lambda state: state[2][..., 0, :],
    )


def rotating() -> bs.Cell:
    """A complex state and parameter; the step has no complex derivative."""

    def step(params: Any, h: Any, x: Any) -> Any:
        a = jnp.exp(1j * params["theta"] - params["nu"] ** 2) * h + x @ params["W"]
        return jnp.tanh(a.real) + 1j * jnp.tanh(a.imag)

    return bs.Cell(
        init=lambda key: {
            "theta": jax.random.normal(key, (H,)),
            "nu": 0.5 * jnp.ones(H),
            "W": jax.random.normal(key, (D, H), complex),
        },
        zeros=lambda size: jnp.zeros((size, H), complex),
        step=step,
        read=jnp.real,
    )


FORMED = {
    "elman": bs.cells.elman(D, H),
    "gru": bs.cells.gru(D, H),
    "lstm": bs.cells.lstm(D, H),
    "lru": bs.cells.lru(D, H),
    "min_gru": bs.cells.min_gru(D, H),
    "two_lstms": bs.cells.stack([bs.cells.lstm(D, 2), bs.cells.lstm(2, H)]),
    "gru_and_step_only": bs.cells.stack([bs.cells.gru(D, 2), step_only(bs.cells.elman(2, H))]),
}
CELLS = FORMED | {
    "dropout": dropout(bs.cells.elman(D, H)),
    "dropout_below": bs.cells.stack([dropout(bs.cells.elman(D, H)), bs.cells.min_gru(H, H)]),
    "counting": counting(),
    "rotating": rotating(),
}
LAWS = {"constant": bs.strategies.constant(2.5), "power_law": bs.strategies.power_law(2.5)}


def link_weights(law: Any, draws: int = 1) -> jax.Array:
    """ξ [N, T, B] of `randomized` with the key KEY."""
    uniforms = jax.random.uniform(KEY, (T, B, draws))
    kept, pi = cuts(law, uniforms)
    return jnp.moveaxis(jnp.where(kept, 1 / pi, 0), -1, 0)


# name -> the strategy, and the settings of `bs.scan` whose mean it is
STRATEGIES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "full": (bs.strategies.full, [{}]),
    "chunks": (lambda p: bs.strategies.fixed(p, 3), [{"window": 3}]),
    "sliding": (lambda p: bs.strategies.fixed(p, 3, 1), [{"window": 3, "stride": 1}]),
    "tbptt": (lambda p: bs.strategies.fixed(p, 5, 2), [{"window": 5, "stride": 2}]),
    "checkpointed": (lambda p: bs.strategies.checkpointed(p, 3), [{}]),
    "discounted": (
        lambda p: bs.strategies.discounted(p, 2.5),
        [{"link_weights": jnp.full((T, B), 0.6)}],
    ),
} | {
    f"{name}_{draws}": (
        lambda p, law=law, draws=draws: bs.strategies.randomized(p, law, draws=draws),
        [{"link_weights": xi} for xi in link_weights(law, draws)],
    )
    for name, draws in (("constant", 1), ("constant", 2), ("power_law", 1))
    for law in [LAWS[name]]
}


def problem_of(cell: bs.Cell) -> bs.Problem:
    return bs.Problem(cell, bs.readouts.linear(H, Q), bs.losses.squared_error)


@cache
def example(name: str, steps: int = T) -> Any:
    """Parameters, h_0 and a batch with a mask, all at random."""
    rng = np.random.default_rng(1)
    problem = problem_of(CELLS[name])

    def nudged(a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        return a + 0.3 * jnp.asarray(rng.standard_normal(a.shape), a.dtype)

    params = jax.tree.map(nudged, problem.init(jax.random.key(0)))
    state = jax.tree.map(nudged, problem.cell.zeros(B))
    mask = np.ones((steps, B))
    mask[0, 0] = mask[steps // 2, -1] = 0
    arrays = rng.standard_normal((steps, B, D)), rng.standard_normal((steps, B, Q)), mask
    return params, state, bs.Batch(*map(jnp.asarray, arrays))


def by_scan(cell: bs.Cell, params: Any, state: Any, batch: bs.Batch, **settings: Any) -> Any:
    """(loss, last state), gradient by `bs.scan`."""
    problem = problem_of(cell)

    def loss(params: Any) -> Any:
        def f(h: Any, x: Any) -> Any:
            h = cell.step(params["cell"], h, x)
            return h, problem.readout.apply(params["readout"], cell.read(h))

        last, outputs = bs.scan(f, state, batch.inputs, **settings)
        tokens = problem.loss(outputs, batch.targets)
        return jnp.sum(tokens * batch.mask) / jnp.sum(batch.mask), last

    return jax.value_and_grad(loss, has_aux=True)(params)


def same(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Trees that are equal: floats to rounding, integers and keys exactly."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        scale = max(1e-3, np.abs(e).max(initial=0)) if jnp.issubdtype(e.dtype, jnp.inexact) else 0
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)


@cache
def estimates(name: str) -> Any:
    """Of every strategy: the estimate with the form and without it, and by `bs.scan`; one program."""

    @jax.jit
    def run(*arguments: Any) -> Any:
        found = {}
        for strategy, (make, settings) in STRATEGIES.items():
            cells = dict.fromkeys([CELLS[name], step_only(CELLS[name])])
            ours = [make(problem_of(cell)).estimate(*arguments, KEY) for cell in cells]
            scans = [by_scan(CELLS[name], *arguments, **s) for s in settings]
            found[strategy] = ours, scans
        return found

    return run(*example(name))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CELLS)
def test_a_strategy_is_the_same_with_the_form_without_it_and_by_scan(name, strategy):
    ours, scans = estimates(name)[strategy]
    same(ours[0], ours[-1])
    (loss, last), _ = scans[0]
    grads = jax.tree.map(lambda *g: sum(g) / len(g), *[grads for _, grads in scans])
    (estimate, state) = ours[-1]
    same((estimate.loss, estimate.grads, state), (loss, grads, last))
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(estimate.grads))


@pytest.mark.parametrize("name", ["two_lstms", "gru_and_step_only", "lru", "dropout", "counting"])
def test_long_sequences_go_from_cut_to_cut(name):
    """`per_segment` runs each sequence in its own time, and equals `store_all` and `bs.scan`."""
    params, state, batch = example(name, LONG)
    rng = np.random.default_rng(2)
    xi = rng.uniform(0.5, 2, (LONG, B))
    for b in range(B):  # cuts at most 4 steps apart, at other steps in each sequence
        at = np.cumsum(rng.integers(1, 5, LONG))
        xi[at[at < LONG], b] = 0

    @jax.jit
    def run(*arguments: Any) -> Any:
        link_weights = jnp.asarray(xi)
        cells = dict.fromkeys([CELLS[name], step_only(CELLS[name])])
        found = [
            backpropagate(
                problem_of(cell),
                *arguments,
                *how(segment=4, link_weights=link_weights, reach=reach),
            )
            for cell in cells
            for reach in (4, None)
        ]
        return found, by_scan(CELLS[name], *arguments, link_weights=link_weights)

    found, ((loss, last), grads) = run(params, state, batch)
    for estimate, after in found:
        same((estimate.loss, estimate.grads, after), (loss, grads, last))
        same(estimate.metrics, found[0][0].metrics)


LAGS = 4


@cache
def tables(name: str, formed: bool) -> Any:
    """What the instruments say of a cell, in one program."""
    problem = problem_of(CELLS[name] if formed else step_only(CELLS[name]))
    params, state, batch = example(name)
    weights = jnp.asarray(np.random.default_rng(4).uniform(size=(2, T, T)))

    @jax.jit
    def run(params: Any, state: Any, batch: bs.Batch) -> dict[str, Any]:
        arguments = problem, params, batch
        return {
            "gradients": bs.lags.gradients(*arguments, LAGS, state),
            "norms": bs.lags.norms(*arguments, LAGS, state),
            "adjoint_norms": bs.lags.adjoint_norms(*arguments, LAGS, state),
            "flows": bs.lags.flows(*arguments, state),
            "weighted": bs.lags.weighted_gradient(*arguments, weights[0], state),
            "of_many": bs.lags.weighted_gradients(*arguments, weights, state),
            "jacobians": bs.jacobians.jacobians(*arguments, state),
        }

    return run(params, state, batch)


INSTRUMENTS = ["gradients", "norms", "adjoint_norms", "flows", "weighted", "of_many", "jacobians"]


@pytest.mark.slow
@pytest.mark.parametrize("instrument", INSTRUMENTS)
@pytest.mark.parametrize("name", ["lstm", "lru", "min_gru", "two_lstms", "gru_and_step_only"])
def test_instruments_are_the_same_with_the_form_and_without_it(name, instrument):
    expected = tables(name, formed=True)[instrument]
    assert all(np.abs(e).max() > 1e-6 for e in jax.tree.leaves(expected))
    same(tables(name, formed=False)[instrument], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_lstms", "counting", "dropout"])
def test_lag_gradients_are_differences_of_sliding_windows(name):
    """G_0 + … + G_k is what the sliding window of k + 1 steps keeps."""
    found, arguments = tables(name, formed=False)["gradients"]["cell"], example(name)
    sums = jax.tree.map(lambda g: np.cumsum(g, axis=0), found)
    run = jax.jit(by_scan, static_argnames=("cell", "window", "stride"))
    for k in range(LAGS):
        expected = run(CELLS[name], *arguments, window=k + 1, stride=1)[1]["cell"]
        same(jax.tree.map(lambda g, k=k: g[k], sums), expected)


def test_norms_are_those_of_single_tokens():
    """‖G[s,k]‖, ‖∂l_s/∂h_{s-k}‖ and the table of flows, from the loss of one token at a time."""
    params, state, batch = example("counting")
    found = tables("counting", formed=False)
    cell, table = CELLS["counting"], np.zeros((T, LAGS, B))

    @jax.jit
    def up_to(mask: Any) -> Any:
        """Σ_{j ≤ k} G[s,j] for k = 0 … K - 1, of the tokens where the mask is set."""
        one = batch._replace(mask=mask)
        return [
            ravel_pytree(by_scan(cell, params, state, one, window=k + 1, stride=1)[1]["cell"])[0]
            for k in range(LAGS)
        ]

    for s in range(T):
        for b in range(B):
            if batch.mask[s, b]:
                sums = np.stack(up_to(jnp.zeros((T, B)).at[s, b].set(1.0))) / batch.mask.sum()
                table[s, :, b] = np.linalg.norm(np.diff(sums, axis=0, prepend=0), axis=1)
    assert (table > 1e-6).sum() > 20
    np.testing.assert_allclose(found["norms"], table, atol=1e-12)


@pytest.mark.parametrize("name", ["two_lstms", "counting", "rotating"])
def test_jacobians_are_those_of_one_sequence_alone(name):
    params, state, batch = example(name)
    found, cell = tables(name, formed=False)["jacobians"], CELLS[name]

    @jax.jit
    def jacobian(state: Any, x: Any) -> Any:
        def step(vector: Any) -> Any:
            before = with_floats(state, like(vector[None], floats(state)))
            return numbers(floats(cell.step(params["cell"], before, x)))

        return jax.jacobian(step)(numbers(floats(state)))

    for t, x in enumerate(batch.inputs):
        for b in range(B):
            one = jax.tree.map(lambda a, b=b: a[b : b + 1], state)
            np.testing.assert_allclose(found[t, b], jacobian(one, x[b : b + 1]), atol=1e-13)
        state = cell.step(params["cell"], state, x)


@pytest.mark.slow
def test_variances_of_complex_gradients_count_both_parts():
    """By formula and by enumeration they are those of all draws."""
    (params, state, batch), steps = example("rotating"), 4
    problem = problem_of(CELLS["rotating"])
    strategy = bs.strategies.randomized(problem, LAWS["constant"])
    arguments = problem, params, bs.Batch(*(a[:steps] for a in batch))
    weights, chances = bs.lags.declared(strategy).patterns(steps)

    @jax.jit
    def of_sequence(w: Any, b: Any) -> Any:
        own = w[..., None] * jnp.eye(B)[b]
        leaves = jax.tree.leaves(bs.lags.weighted_gradient(*arguments, own, state)["cell"])
        return jnp.concatenate([part.ravel() for g in leaves for part in (g.real, g.imag)])

    each = [jnp.stack([of_sequence(w, b) for w in weights]) for b in range(B)]
    expected = sum(chances @ jnp.sum((own - chances @ own) ** 2, axis=1) for own in each)
    found = bs.measure.exact_quality(strategy, *arguments, state)
    np.testing.assert_allclose(found.variance, expected, rtol=1e-10)
    flows = bs.lags.flows(*arguments, state)
    np.testing.assert_allclose(bs.lags.variance(strategy, flows), expected, rtol=1e-10)
    whole = [of_sequence(jnp.ones((steps, steps)), b) for b in range(B)]
    products = bs.lags.products(*arguments, state)
    np.testing.assert_allclose(products.sum(), sum(g @ g for g in whole), rtol=1e-10)
