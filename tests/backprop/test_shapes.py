"""What does not fit the mask's T and B is refused in one line: JAX would cut, clamp or broadcast it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.instruments import lags, measure
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


FULL, KEY = bs.strategies.full(PROBLEM), jax.random.key(0)
TAKES_A_BATCH = {
    "estimate": estimate,
    "lags.gradients": lambda batch: lags.gradients(PROBLEM, PARAMS, batch, 3),
    "quality": lambda batch: measure.quality(FULL, PROBLEM, PARAMS, batch, KEY, 3),
    "gradient_norms": lambda batch: measure.gradient_norms(FULL, PARAMS, batch, KEY, 1),
    "over_batches": lambda batch: measure.over_batches(FULL, PROBLEM, PARAMS, three(batch), KEY),
}


def three(batch):
    return jax.tree.map(lambda a: jnp.stack([a] * 3), batch)


@pytest.mark.parametrize("run", TAKES_A_BATCH)
@pytest.mark.parametrize("name", WRONG)
def test_a_batch_of_different_lengths(name, run):
    said = "batches" if (run, name) == ("over_batches", "batch.mask") else name.split(".")[1]
    with pytest.raises(SettingError, match=rf"{said}.* shape \["):
        TAKES_A_BATCH[run](BATCH._replace(**WRONG[name]))


def test_as_many_batches_as_masks():
    batches = three(BATCH)._replace(targets=three(BATCH).targets[:2])
    with pytest.raises(SettingError, match=r"`batches.targets` must be .* got shape \[2, 600, 3\]"):
        measure.over_batches(FULL, PROBLEM, PARAMS, batches, KEY)


@pytest.mark.parametrize("state", [CELL.zeros(B + 1), CELL.zeros(B)[:, :-1], (CELL.zeros(B),) * 2])
def test_a_state_of_another_size(state):
    with pytest.raises(SettingError, match="state"):
        estimate(state=state)


@pytest.mark.parametrize("shape", [(T - 1, B), (T, B + 1), (T,), (2, T - 1, B), (1, 1, T, B)])
def test_link_weights_of_another_size(shape):
    with pytest.raises(SettingError, match="link_weights"):
        estimate(link_weights=jnp.ones(shape))


@pytest.mark.parametrize(
    ("part", "name", "shape"),
    [
        (
            "cell",
            "W_xh",
            (6, H),
        ),  # of a network with one more symbol: its rows 0 to 4 would be read
        ("cell", "b_h", ()),
        ("readout", "W_hq", (H, 6)),
        ("readout", "b_q", (1,)),
    ],
)
def test_parameters_of_another_network(part, name, shape):
    """Such shapes fit each other, or broadcast, so a number would come out."""
    params = {**PARAMS, part: {**PARAMS[part], name: jnp.ones(shape)}}
    said = rf"`params\['{part}'\]\['{name}'\]` must be of shape .*, as problem.init makes it"
    for run in (
        lambda: backpropagate(PROBLEM, params, CELL.zeros(B), BATCH, Truncation()),
        lambda: lags.gradients(PROBLEM, params, BATCH, 3),
    ):
        with pytest.raises(SettingError, match=said):
            run()


def test_parameters_of_a_draw_by_hand():
    """Its shapes are unknown before it is called with a key."""
    init = lambda key: PARAMS["cell"] if int(key) else None  # noqa: E731
    problem = PROBLEM._replace(cell=CELL._replace(init=init))
    assert jnp.isfinite(estimate(problem=problem)[0].loss)


def test_a_mask_below_0_is_refused_and_one_below_1_is_a_weight():
    mask = BATCH.mask.at[3, 1].set(0.25).at[5].set(0)
    found = estimate(BATCH._replace(mask=mask))[0].loss
    each = [estimate(BATCH._replace(mask=1.0 * (mask == share)))[0].loss for share in (1, 0.25)]
    tokens = (mask == 1).sum()
    assert jnp.allclose(found, (tokens * each[0] + 0.25 * each[1]) / (tokens + 0.25))
    for wrong in (-1, jnp.nan, jnp.inf):
        said = rf"`batch.mask` must be finite and 0 or more everywhere; got a weight of {wrong}"
        with pytest.raises(SettingError, match=said):
            estimate(BATCH._replace(mask=mask.at[0, 0].set(wrong)))


@pytest.mark.parametrize("scale", [1e38, 1e-42])
def test_a_mask_whose_sum_is_no_float32_is_refused(scale):
    """Its loss would be 0. Control: smaller and larger weights give the loss of ordinary ones."""
    plain = estimate()[0].loss
    for fine in (1e30, 1e-30):
        found = estimate(BATCH._replace(mask=fine * BATCH.mask))[0].loss
        assert jnp.allclose(found, plain, rtol=1e-5)
    with pytest.raises(
        SettingError, match=r"`batch.mask` must be one with the sum 0, or a sum from"
    ):
        estimate(BATCH._replace(mask=scale * np.asarray(BATCH.mask)))


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


@pytest.mark.parametrize("size", [1, B])
def test_whole_numbers_in_rows_are_no_ids(size):
    """Rows of W_xh by [B, D] ids, and the states' part, would be broadcast."""
    cell = bs.cells.elman(size, H)
    problem = bs.Problem(cell, bs.readouts.linear(H, 5), bs.losses.cross_entropy)
    params, strategy = problem.init(jax.random.key(0)), bs.strategies.full(problem)
    batch = BATCH._replace(inputs=jnp.zeros((T, B, size), int))
    with pytest.raises(SettingError, match=r"batch.inputs.*Its step makes shape"):
        strategy.estimate(params, cell.zeros(B), batch, jax.random.key(0))


def test_a_search_for_nan_finds_none_in_the_checks():
    """The loss of an id that does not exist is nan, which is no number of the user's."""
    with jax.debug_nans(True):
        estimate()
