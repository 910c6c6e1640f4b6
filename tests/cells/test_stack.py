"""Cells one above the other: two layers against NumPy loops by hand, and what does not fit."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from support import how
from test_any_cell import step_only

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.types import Layers
from bptt_study.validation import SettingError

T, B, D, H1, H2, Q = 6, 2, 3, 4, 2, 2


@cache
def example(kind: str):
    """Two layers of a kind, with parameters, h_0 and data at random."""
    make, rng = getattr(bs.cells, kind), np.random.default_rng(0)
    cell = bs.cells.stack([make(D, H1), make(H1, H2)])
    problem = bs.Problem(cell, bs.readouts.linear(H2, Q), bs.losses.squared_error)
    draw = lambda a: jnp.asarray(a + 0.3 * rng.standard_normal(a.shape))  # noqa: E731
    params = jax.tree.map(draw, problem.init(jax.random.key(0)))
    state = jax.tree.map(draw, cell.zeros(B))
    arrays = rng.standard_normal((T, B, D)), rng.standard_normal((T, B, Q)), rng.random((T, B))
    return problem, params, state, bs.Batch(*map(jnp.asarray, arrays))


def by_hand(kind, params, state, batch, xi):
    """Loss, the gradient of both layers and of the readout: one loop up, one down, derivatives by hand."""
    layers, readout = jax.tree.map(np.asarray, (params["cell"], params["readout"]))
    h = [np.concatenate(jax.tree.leaves(own), axis=-1) for own in state]
    inputs, targets, mask = map(np.asarray, batch)
    mask = mask / mask.sum()
    tapes, tops = [], []
    for t in range(T):
        h[0], below = oracles.step(kind, layers[0], h[0], inputs[t])
        h[1], above = oracles.step(kind, layers[1], h[1], h[0][:, :H1])
        tapes.append((below, above))
        tops.append(h[1][:, :H2])

    errors = [top @ readout["W_hq"] + readout["b_q"] - targets[t] for t, top in enumerate(tops)]
    loss = sum(0.5 * (mask[t] * (e**2).sum(-1)).sum() for t, e in enumerate(errors))
    sent = [mask[t][:, None] * e for t, e in enumerate(errors)]
    grads, arriving = [0.0, 0.0], [np.zeros((1, *own.shape)) for own in h]
    for t in reversed(range(T)):
        total = arriving[1] + _padded(sent[t] @ readout["W_hq"].T, h[1])
        part, arriving[1] = oracles.pull(kind, layers[1], tapes[t][1], total)
        grads[1] = grads[1] + part.sum((0, 1))
        # the gradient of the bias is that of the pre-activation, which W_xh sends on to the layer below
        start = layers[1]["W_hh"].size + layers[1]["W_xh"].size
        to_inputs = part[0, :, start : start + layers[1]["b_h"].size] @ layers[1]["W_xh"].T
        total = arriving[0] + _padded(to_inputs, h[0])
        part, arriving[0] = oracles.pull(kind, layers[0], tapes[t][0], total)
        grads[0] = grads[0] + part.sum((0, 1))
        arriving = [a * xi[t][:, None] for a in arriving]
    W_hq = sum(top.T @ s for top, s in zip(tops, sent, strict=True))
    return loss, grads, {"W_hq": W_hq, "b_q": sum(s.sum(0) for s in sent)}


def _padded(a, like):
    return np.concatenate([a, np.zeros((len(a), like.shape[-1] - a.shape[-1]))], axis=-1)[None]


@pytest.mark.parametrize("links", ["full", "weighted"])
@pytest.mark.parametrize("kind", ["gru", "lstm", "elman"])
def test_two_layers_equal_a_loop_by_hand(kind, links, rng):
    problem, params, state, batch = example(kind)
    xi = np.ones((T, B)) if links == "full" else rng.uniform(-1, 2, (T, B))
    oracle = {"elman": "elman_tanh"}.get(kind, kind)
    loss, layers, readout = by_hand(oracle, params, state, batch, xi)
    weights = {} if links == "full" else {"link_weights": jnp.asarray(xi)}
    estimate, _ = backpropagate(problem, params, state, batch, *how(**weights))
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-13)
    for found, expected in zip(estimate.grads["cell"], layers, strict=True):
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(oracles.flat(found), expected, atol=1e-13)
    np.testing.assert_allclose(oracles.flat(estimate.grads["readout"]), oracles.flat(readout))


def test_the_layer_below_hears_of_the_loss():
    """Negative control: without what the upper layer sends down, the lower one has no gradient."""
    problem, params, state, batch = example("gru")
    deaf = params | {
        "cell": [params["cell"][0], params["cell"][1] | {"W_xh": jnp.zeros((H1, 3 * H2))}]
    }
    grads = backpropagate(problem, deaf, state, batch)[0].grads["cell"]
    assert not oracles.flat(grads[0]).any()
    assert oracles.flat(grads[1]).any()


def test_each_layer_has_a_key_of_its_own():
    cell = bs.cells.stack([bs.cells.gru(3, 3), bs.cells.gru(3, 3)])
    below, above = cell.init(jax.random.key(0))
    assert not np.isclose(below["W_hh"], above["W_hh"]).any()
    np.testing.assert_array_equal(
        below["W_hh"], bs.cells.gru(3, 3).init(jax.random.split(jax.random.key(0))[0])["W_hh"]
    )


def test_parts_of_a_stack(rng):
    layers = [bs.cells.lstm(D, H1), step_only(bs.cells.gru(H1, H2))]
    cell = bs.cells.stack(layers)
    params, state = cell.init(jax.random.key(0)), cell.zeros(B)
    x = jnp.asarray(rng.standard_normal((B, D)))
    assert (type(params), type(state)) == (list, tuple)
    below = layers[0].step(params[0], state[0], x)
    above = layers[1].step(params[1], state[1], layers[0].read(below))
    after = cell.step(params, state, x)
    for a, e in zip(jax.tree.leaves(after), jax.tree.leaves((below, above)), strict=True):
        np.testing.assert_array_equal(a, e)
    np.testing.assert_array_equal(cell.read(after), above)
    assert cell.affine == Layers(tuple(layers))
    assert bs.cells.stack([step_only(own) for own in layers]).affine is None


def test_a_stack_in_a_stack_is_the_same_network():
    make = lambda: (bs.cells.gru(D, H1), bs.cells.lstm(H1, 3), bs.cells.elman(3, H2))  # noqa: E731
    one, two, three = make()
    flat, nested = (
        bs.cells.stack([one, two, three]),
        bs.cells.stack([bs.cells.stack([one, two]), three]),
    )
    a, b, c = flat.init(jax.random.key(0))
    batch = example("gru")[-1]
    found = []
    for cell, params in ((flat, [a, b, c]), (nested, [[a, b], c])):
        problem = bs.Problem(cell, bs.readouts.linear(H2, Q), bs.losses.squared_error)
        whole = {"cell": params, "readout": problem.readout.init(jax.random.key(1))}
        found.append(backpropagate(problem, whole, cell.zeros(B), batch)[0].grads)
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bs.cells.stack([]), "`cells` must be a list of at least one cell"),
        (lambda: bs.cells.stack([bs.cells.gru]), "`cells` must be a list of at least one cell"),
        (
            lambda: bs.cells.stack([bs.cells.gru(3, 5), bs.cells.lstm(4, 2)]),
            r"`cells\[1\]` must be a cell whose inputs are the 5 numbers that cells\[0\] reads out",
        ),
        (lambda: bs.cells.stacked(3, 4, layers=0), "`layers` must be a whole number of at least 1"),
        (lambda: bs.cells.stacked(3, 0), "`hidden` must be a whole number of at least 1"),
        (lambda: bs.cells.stacked(3, 4, of="stacked"), "`of` must be .*mlp, linear.* got stacked"),
        (lambda: bs.cells.stacked(3, 4, of="lru", spectral_radius=0.9), "null for of=lru"),
        (
            lambda: bs.cells.stacked(3, 4, activation="relu"),
            "`activation` must be null for of=lstm",
        ),
    ],
)
def test_what_does_not_fit(make, said):
    with pytest.raises(SettingError, match=said):
        make()


def test_stacked_passes_its_settings_on(key):
    cell = bs.cells.stacked(3, 5, layers=3, of="elman", activation="relu", spectral_radius=0.7)
    params = cell.init(key)
    assert [own["W_xh"].shape for own in params] == [(3, 5), (5, 5), (5, 5)]
    for own in params:
        radius = np.abs(np.linalg.eigvals(own["W_hh"])).max()
        np.testing.assert_allclose(radius, 0.7, rtol=1e-6)
    state = cell.step(params, cell.zeros(2), -10 * jnp.ones((2, 3)))
    assert min(leaf.min() for leaf in state) == 0
