"""What does not fit the mask's T and B is refused in one line: JAX would cut, clamp or broadcast it."""

import jax
import jax.numpy as jnp
import pytest

import bptt_study as bs
from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.instruments import lags
from bptt_study.validation import SettingError

T, B, H = 600, 3, 4  # longer than a segment, where slices are clamped
CELL = bs.cells.elman(5, H)
PROBLEM = bs.Problem(CELL, bs.readouts.linear(H, 5), bs.losses.cross_entropy)
PARAMS = PROBLEM.init(jax.random.key(0))
IDS = jnp.zeros((T, B), int)
BATCH = bs.Batch(IDS, IDS, jnp.ones((T, B)))
WRONG = {
    "batch.inputs": {"inputs": IDS[:-1]},
    "batch.targets": {"targets": IDS[:, :-1]},
    "batch.mask": {"mask": jnp.ones(T)},
}


def estimate(batch=BATCH, state=None, problem=PROBLEM, **truncation):
    state = CELL.zeros(B) if state is None else state
    return backpropagate(problem, PARAMS, state, batch, Truncation(**truncation))


@pytest.mark.parametrize("name", WRONG)
def test_a_batch_of_different_lengths(name):
    batch = BATCH._replace(**WRONG[name])
    with pytest.raises(SettingError, match=rf"{name}.* shape \["):
        estimate(batch)
    with pytest.raises(SettingError, match=rf"{name}.* shape \["):
        lags.gradients(PROBLEM, PARAMS, batch, 3)


@pytest.mark.parametrize("state", [CELL.zeros(B + 1), CELL.zeros(B)[:, :-1], (CELL.zeros(B),) * 2])
def test_a_state_of_another_size(state):
    with pytest.raises(SettingError, match="state"):
        estimate(state=state)


@pytest.mark.parametrize("shape", [(T - 1, B), (T, B + 1), (T,), (2, T - 1, B), (1, 1, T, B)])
def test_link_weights_of_another_size(shape):
    with pytest.raises(SettingError, match="link_weights"):
        estimate(link_weights=jnp.ones(shape))


@pytest.mark.parametrize("shape", [(T, B, 1), (B,), ()])
def test_a_loss_that_is_not_one_per_token(shape):
    problem = PROBLEM._replace(loss=lambda outputs, targets: jnp.zeros(shape))
    for run in (
        lambda: estimate(problem=problem),
        lambda: lags.gradients(problem, PARAMS, BATCH, 3),
    ):
        with pytest.raises(SettingError, match=r"problem\.loss.*one loss per token"):
            run()


@pytest.mark.parametrize("truncation", [{}, {"window": 5}, {"link_weights": jnp.ones((T, B))}])
def test_an_empty_mask_has_loss_0_and_gradient_0(truncation):
    found, _ = estimate(BATCH._replace(mask=jnp.zeros((T, B))), **truncation)
    assert found.loss == 0
    assert all((g == 0).all() for g in jax.tree.leaves(found.grads))
