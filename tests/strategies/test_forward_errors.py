"""Errors forward in time: the gradient where J can be inverted, its error where J contracts, else one line."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.strategies.forward_errors import forward_errors
from bptt_study.testing import examples
from bptt_study.validation import SettingError


def rotating(cell, radius, steps):
    """A network whose W_hh is a rotation times `radius`, in every gate."""
    inputs, hidden = 2, 3
    made = cell(inputs, hidden)
    problem = bs.Problem(made, bs.readouts.linear(hidden, 2), bs.losses.squared_error)
    params = problem.init(jax.random.key(1))
    gates = params["cell"]["W_hh"].shape[1] // hidden
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (hidden, hidden)))[0]
    params["cell"]["W_hh"] = radius * jnp.concatenate([turn] * gates, axis=1)
    x, y = 0.3 * jax.random.normal(jax.random.key(3), (2, steps, 4, 2))
    return problem, params, bs.Batch(x, y, jnp.ones((steps, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["affine", "step"])
@pytest.mark.parametrize("name", ["linear", "elman", "gru", "lstm"])
def test_it_is_the_gradient(name, form, key):
    steps = 3 if name == "lstm" else 9  # whose h forgets within a few steps
    problem, params, batch = rotating(getattr(bs.cells, name), 1.0, steps)
    if form == "step":
        problem = problem._replace(cell=problem.cell._replace(affine=None))
    state = jax.tree.map(lambda h: h + 0.2, problem.cell.zeros(4))
    found, last = jax.jit(forward_errors(problem).estimate)(params, state, batch, key)
    exact = jax.jit(backpropagate, static_argnums=0)
    expected, end = exact(problem, params, state, batch)
    tolerance = 1e3 * float(found.metrics["closing_error"]) + 1e-12
    assert tolerance < 1e-7
    examples.close((found.loss, found.grads, last), (expected.loss, expected.grads, end), tolerance)
    norms = expected.metrics["adjoint_norms"]
    np.testing.assert_allclose(found.metrics["adjoint_norms"], norms, atol=tolerance)


@pytest.mark.slow
def test_a_cell_that_is_nan_at_random_numbers(key):
    """A root of parameters that are above 0: the Jacobian is checked where training starts."""
    problem, params, batch = rotating(bs.cells.linear, 1.0, 4)
    step, init = problem.cell.step, problem.cell.init
    cell = problem.cell._replace(
        affine=None,
        init=lambda key: init(key) | {"g": jnp.ones(40)},
        step=lambda p, h, x: jnp.sqrt(p["g"].min()) * step(p, h, x),
    )
    params["cell"]["g"] = jnp.ones(40)
    problem = problem._replace(cell=cell)
    found, _ = forward_errors(problem).estimate(params, cell.zeros(4), batch, key)
    exact, _ = backpropagate(problem, params, cell.zeros(4), batch)
    examples.close(found.grads, exact.grads, 1e-9)


@pytest.mark.slow
def test_its_error_grows_where_states_contract(key):
    """About ε ρ^-T, and the metric says so. Beyond the tolerance there is no gradient, but a loss."""
    errors, closing = [], []
    for radius in (1.0, 0.8, 0.4):
        problem, params, batch = rotating(bs.cells.linear, radius, 40)
        state = problem.cell.zeros(4)
        found, _ = jax.jit(forward_errors(problem, 1e9).estimate)(params, state, batch, key)
        exact = jax.jit(backpropagate, static_argnums=0)(problem, params, state, batch)
        exact = examples.vector(exact[0].grads)
        off = examples.vector(found.grads) - exact
        errors.append(np.linalg.norm(off) / np.linalg.norm(exact))
        closing.append(float(found.metrics["closing_error"]))
        guarded, _ = jax.jit(forward_errors(problem).estimate)(params, state, batch, key)
        assert guarded.loss == found.loss
        assert np.isnan(examples.vector(guarded.grads)).all() == (closing[-1] > 1e-3)
    assert errors[0] < 1e-12 < 1e2 * errors[1] < errors[2]
    assert closing[1] < 1e-3 < closing[2]
    assert closing[0] < 1e-11 < 1e2 * closing[1] < closing[2]


@pytest.mark.parametrize("name", ["mlp", "elman_relu"])
def test_a_cell_that_forgets_is_refused(name, key):
    ex = examples.example(name)
    with pytest.raises(
        SettingError, match=r"`cell` must be one whose .* can be inverted; got .*full"
    ):
        jax.jit(forward_errors(ex.problem).estimate)(ex.params, ex.state, ex.batch, key)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_floats_that_no_linear_system_is_solved_in(kind, key):
    problem, *given = rotating(bs.cells.linear, 1.0, 3)
    params, batch, state = jax.tree.map(lambda a: a.astype(kind), (*given, problem.cell.zeros(4)))
    with pytest.raises(SettingError, match=f"`state` must be float32 or float64; got {kind}"):
        forward_errors(problem).estimate(params, state, batch, key)


@pytest.mark.parametrize("counts", ["none of the last step", "none"])
def test_a_last_step_that_is_masked(counts, key):
    """Then e_T is 0, and the recursion should end at 0."""
    problem, params, batch = rotating(bs.cells.linear, 1.0, 9)
    zeros = batch.mask.at[-1].set(0) if counts != "none" else 0 * batch.mask
    batch, state = batch._replace(mask=zeros), problem.cell.zeros(4)
    found, _ = forward_errors(problem).estimate(params, state, batch, key)
    expected, _ = backpropagate(problem, params, state, batch)
    assert float(found.metrics["closing_error"]) < 1e-9
    for a, e in zip(*map(jax.tree.leaves, (found.grads, expected.grads)), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-9)


@pytest.mark.parametrize("ends", [(29, 29), (19, 12), (30, 5)])
def test_a_gradient_that_is_returned_is_right_where_sequences_end_early(ends, key):
    """States grow, and with them the weight of late adjoints; λ_1 is far larger and bounds none of them."""
    problem = bs.Problem(
        bs.cells.linear(3, 4, spectral_radius=1.4),
        bs.readouts.linear(4, 1),
        bs.losses.squared_error,
    )
    mask = (jnp.arange(30)[:, None] < jnp.array(ends)).astype(jnp.float32)

    def off(key):
        init, inputs, targets = jax.random.split(key, 3)
        draw = partial(jax.random.normal, dtype=jnp.float32)
        batch = bs.Batch(draw(inputs, (30, 2, 3)), draw(targets, (30, 2, 1)), mask)
        given = jax.tree.map(jnp.float32, (problem.init(init), problem.cell.zeros(2)))
        found, exact = (
            jnp.concatenate(
                [
                    g.ravel()
                    for g in jax.tree.leaves(made(problem).estimate(*given, batch, key)[0].grads)
                ]
            )
            for made in (forward_errors, bs.strategies.full)
        )
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

    found = jax.jit(partial(jax.lax.map, off))(jax.random.split(key, 300))
    returned = found[jnp.isfinite(found)]
    assert 10 < len(returned) < 300
    assert returned.max() < 1e-3


@pytest.mark.parametrize(("size", "right"), [(1.5, True), (50.0, False)])
def test_an_error_that_has_shrunk_again(size, right, key):
    """Half the steps divide a direction that the loss does not read by `size`, and half multiply it.

    With 50, the gradient was several times too large.
    """
    hidden, steps = 2, 12
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (hidden, hidden)))[0]
    turn = turn.astype(jnp.float32)

    def step(p, h, x):
        return h @ turn * jnp.stack([jnp.ones_like(x[:, 0]), x[:, 0]], 1) @ turn.T + p * x[:, 1:]

    cell = bs.Cell(
        lambda key: jnp.ones(hidden), lambda n: jnp.zeros((n, hidden)), step, lambda h: h
    )
    readout = bs.Readout(lambda key: turn[:, :1], lambda p, h: h @ p)
    problem = bs.Problem(cell, readout, bs.losses.squared_error)
    drawn = jax.random.normal(key, (2, steps, 4), jnp.float32)
    factors = jnp.where(jnp.arange(steps) < steps // 2, 1 / size, size)[:, None] + 0 * drawn[0]
    inputs = jnp.stack([factors, drawn[0]], axis=2)
    batch = bs.Batch(inputs, drawn[1][..., None], jnp.ones((steps, 4), jnp.float32))
    given = jax.tree.map(jnp.float32, (problem.init(key), cell.zeros(4)))
    found, _ = forward_errors(problem).estimate(*given, batch, key)
    exact, _ = backpropagate(problem, *given, batch)
    assert found.metrics["closing_error"] < 1e-3
    assert (found.metrics["rounding_error"] < 1e-3) == right
    expected = exact.grads["cell"] if right else np.nan
    np.testing.assert_allclose(found.grads["cell"], expected + 0 * exact.grads["cell"], rtol=1e-4)
