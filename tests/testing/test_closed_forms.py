"""The book's formulas against automatic differentiation and against plain loops; float64, tiny."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop import forward
from bptt_study.testing import closed_forms, examples, loops

T, B = examples.T, examples.B


@pytest.fixture(scope="module")
def linear():
    """The linear cell of the examples without biases, h_0 ≠ 0; ∂L/∂o_t and the gradient by autodiff."""
    ex = examples.example("linear")
    params = jax.tree.map(lambda p: p, ex.params)
    params["cell"]["b_h"] = 0 * params["cell"]["b_h"]
    params["readout"]["b_q"] = 0 * params["readout"]["b_q"]
    states = forward.states(ex.problem.cell, params["cell"], ex.state, ex.batch.inputs)

    def loss(outputs):
        return (
            ex.problem.loss(outputs, ex.batch.targets) * ex.batch.mask
        ).sum() / ex.batch.mask.sum()

    outputs = jax.grad(loss)(states @ params["readout"]["W_hq"])
    grads = jax.grad(lambda p: loops.looped_loss(ex.problem, p, ex.state, ex.batch)[0])(params)
    return ex, params, states, outputs, grads


def test_states_in_powers(linear):
    ex, params, states, *_ = linear
    np.testing.assert_allclose(
        closed_forms.linear_states(params, ex.batch.inputs, ex.state), states, atol=1e-13
    )


def test_gradients_in_powers(linear):
    """Negative controls: h_0 ignored, the power one too high, W_hh not transposed."""
    ex, params, _, outputs, grads = linear
    actual = closed_forms.linear_gradients(params, ex.batch.inputs, ex.state, outputs)
    expected = {name: {**grads["cell"], **grads["readout"]}[name] for name in actual}
    examples.close(actual, expected)
    assert all(np.abs(g).max() > 1e-3 for g in expected.values())

    no_start = closed_forms.linear_gradients(params, ex.batch.inputs, 0 * ex.state, outputs)
    assert np.abs(no_start["W_hh"] - expected["W_hh"]).max() > 1e-3

    W, immediate = np.asarray(params["cell"]["W_hh"]), outputs @ params["readout"]["W_hq"].T

    def by_loops(W, shift=0):
        adjoints = [
            sum(immediate[i] @ np.linalg.matrix_power(W, i - t + shift) for i in range(t, T))
            for t in range(T)
        ]
        return np.einsum("tbd,tbh->dh", ex.batch.inputs, np.stack(adjoints))

    np.testing.assert_allclose(by_loops(W.T), actual["W_xh"], atol=1e-13)
    for wrong in (by_loops(W.T, shift=1), by_loops(W)):
        assert np.abs(wrong - expected["W_xh"]).max() > 1e-3


def test_gradients_of_lags_are_single_powers(linear):
    """G_k for W_xh is Σ_s x_{s-k}ᵀ e_s (W_hhᵀ)^k."""
    ex, params, _, outputs, _ = linear
    G = bs.lags.gradients(ex.problem, params, ex.batch, T, ex.state)["cell"]["W_xh"]
    e, powers = (
        outputs @ params["readout"]["W_hq"].T,
        closed_forms.powers(params["cell"]["W_hh"], T),
    )
    for k in range(T):
        expected = sum(ex.batch.inputs[s - k].T @ e[s] @ powers[k].T for s in range(k, T))
        np.testing.assert_allclose(G[k], expected, atol=1e-13)


def test_powers(rng):
    W = rng.standard_normal((3, 3))
    expected = [np.linalg.matrix_power(W, n) for n in range(6)]
    np.testing.assert_allclose(closed_forms.powers(jnp.asarray(W), 6), expected, rtol=1e-12)
    np.testing.assert_array_equal(closed_forms.powers(jnp.asarray(W), 1), np.eye(3)[None])


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_scalar_recursion(rng, steps):
    b, c = rng.standard_normal((2, steps))
    a, loop = 0.0, []
    for b_t, c_t in zip(b, c, strict=True):
        a = b_t + c_t * a
        loop.append(a)
    for form in (closed_forms.recursion, closed_forms.solved_recursion):
        np.testing.assert_allclose(
            form(jnp.asarray(b), jnp.asarray(c)), loop, rtol=1e-12, atol=1e-14
        )


def test_scalar_recursion_is_the_derivative(rng):
    """h_t = tanh(w h_{t-1} + x_t): ∂h_t/∂w by forward mode, b_t and c_t by hand; h_0 ≠ 0."""
    w, x = 0.9, rng.standard_normal(8)

    def states(w):
        h = [jnp.asarray(0.5)]
        for x_t in x:
            h.append(jnp.tanh(w * h[-1] + x_t))
        return jnp.stack(h)

    h, expected = jax.jvp(states, (w,), (1.0,))
    slope = 1 - h[1:] ** 2
    b, c = slope * h[:-1], slope * w
    for form in (closed_forms.recursion, closed_forms.solved_recursion):
        np.testing.assert_allclose(form(b, c), expected[1:], atol=1e-14)
        assert np.abs(form(b, c) - form(b, slope)).max() > 1e-3  # w forgotten
    assert np.abs(closed_forms.solved_recursion(b.at[0].set(0), c) - expected[1:]).max() > 1e-3
