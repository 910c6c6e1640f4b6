"""Losses per token, and the mean over unmasked tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.testing import examples
from bptt_study.validation import SettingError


def test_cross_entropy_is_minus_log_softmax(rng):
    outputs, targets = rng.standard_normal((4, 2, 3)), rng.integers(3, size=(4, 2))
    softmax = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    expected = [[-np.log(softmax[t, b, targets[t, b]]) for b in range(2)] for t in range(4)]
    actual = bs.losses.cross_entropy(jnp.asarray(outputs), jnp.asarray(targets))
    np.testing.assert_allclose(actual, expected, rtol=1e-13)


def test_cross_entropy_of_equal_outputs_is_log_of_their_number():
    actual = bs.losses.cross_entropy(jnp.full((1, 1, 27), 5.0), jnp.zeros((1, 1), int))
    np.testing.assert_allclose(actual, np.log(27), rtol=1e-15)


def test_cross_entropy_of_large_outputs_is_finite():
    outputs = jnp.array([[[1e4, 0.0, -1e4]]])
    losses = [bs.losses.cross_entropy(outputs, jnp.full((1, 1), q))[0, 0] for q in range(3)]
    np.testing.assert_allclose(losses, [0, 1e4, 2e4])


def test_squared_error_sums_over_outputs(rng):
    outputs, targets = rng.standard_normal((4, 2, 3)), rng.standard_normal((4, 2, 3))
    expected = 0.5 * ((outputs - targets) ** 2).sum(-1)
    np.testing.assert_allclose(bs.losses.squared_error(outputs, targets), expected, rtol=1e-14)
    actual = bs.losses.squared_error(outputs[..., :1], targets[..., 0])  # targets [T, B]
    np.testing.assert_allclose(actual, 0.5 * (outputs[..., 0] - targets[..., 0]) ** 2, rtol=1e-14)


@pytest.mark.parametrize("dtype", [bool, int, np.float64])
def test_mean_over_unmasked_tokens(dtype):
    """Not over all tokens, and not the mean of the sequences' means; a masked target counts nothing."""
    ex = examples.example("elman_tanh")
    mask = jnp.ones_like(ex.batch.mask).at[:, 0].set(0).at[2:4, 0].set(1)
    per_token = token_losses(ex)
    counts = np.asarray(mask) == 1
    expected = per_token[counts].mean()
    by_sequence = np.mean([per_token[counts[:, b], b].mean() for b in range(2)])
    batch = ex.batch._replace(
        mask=mask.astype(dtype), targets=jnp.where(counts, ex.batch.targets, 0)
    )
    estimate, _ = jax.jit(backpropagate, static_argnums=0)(ex.problem, ex.params, ex.state, batch)
    np.testing.assert_allclose(estimate.loss, expected, rtol=1e-13)
    assert estimate.loss.dtype == np.float64
    assert abs(expected - by_sequence) > 1e-3
    assert abs(expected - per_token.mean()) > 1e-3


def token_losses(ex):
    state, losses = ex.state, []
    for x, y in zip(ex.batch.inputs, ex.batch.targets, strict=True):
        state = ex.problem.cell.step(ex.params["cell"], state, x)
        outputs = np.asarray(ex.problem.readout.apply(ex.params["readout"], state))
        log_softmax = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
        losses.append(-log_softmax[np.arange(2), y])
    return np.stack(losses)


@pytest.mark.parametrize(
    "targets",
    [np.zeros((4, 2)), np.zeros((4, 2), bool), np.eye(3)[np.zeros((4, 2), int)], [[[0]] * 2] * 4],
    ids=["floats", "flags", "one_hot", "one_axis_more"],
)
def test_targets_that_are_no_classes(targets):
    outputs = jnp.zeros((4, 2, 3))
    with pytest.raises(SettingError, match=r"`batch.targets` must be classes, .*; got \w+\[T, B"):
        bs.losses.cross_entropy(outputs, targets)


def test_another_number_of_targets_than_outputs():
    with pytest.raises(SettingError, match=r"`batch.targets` must be like .*, \[T, B, 3\]; got"):
        bs.losses.squared_error(jnp.zeros((4, 2, 3)), jnp.zeros((4, 2)))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (bs.losses.cross_entropy, (12, 2)),
        (bs.losses.cross_entropy, (4, 3)),
        (bs.losses.cross_entropy, (4,)),
        (bs.losses.squared_error, (12, 2, 3)),
        (bs.losses.squared_error, (2, 4, 3)),
    ],
)
def test_targets_of_other_lengths(loss, shape):
    """The message named T and B alone; targets [B, T, Q] of the squared error were those of other tokens."""
    said = rf"`batch.targets` must be of shape \[4, 2, …\], .*; got int64{re.escape(str([*shape]))}"
    with pytest.raises(SettingError, match=said):
        loss(jnp.zeros((4, 2, 3)), jnp.zeros(shape, int))


@pytest.mark.parametrize(("kind", "classes"), [("uint8", 256), ("uint8", 300), ("int8", 128)])
def test_classes_of_one_byte(kind, classes):
    """The number of classes is none of their type."""
    targets = jnp.array([[0, 50, 127]], kind)
    losses = bs.losses.cross_entropy(jnp.zeros((1, 3, classes)), targets)
    np.testing.assert_allclose(losses, np.log(classes), rtol=1e-14)
