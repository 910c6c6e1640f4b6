"""Lag windows: which part of each lag a strategy keeps, and what bias and variance follow from that."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from bptt_study.backprop.promises import vouch
from bptt_study.backprop.pytrees import norm
from bptt_study.types import (
    Affine,
    Batch,
    Cell,
    LagWeights,
    Params,
    Problem,
    Readout,
    Strategy,
)
from bptt_study.validation import SettingError, whole


def window(strategy: Strategy, lags: int) -> Float[Array, "K"]:
    """w_k, the share of lag k that the strategy keeps on average, in closed form.

    The average is over draws and over the phase of the strategy's grid in an endless sequence.
    """
    return declared(strategy).window(whole("lags", lags))


def weights(strategy: Strategy, steps: int, lags: int) -> Float[Array, "T K"]:
    """E[w[s,k]] over draws, for one call on T = `steps` steps; 0 where s - k < 0."""
    if whole("lags", lags) > whole("steps", steps):
        raise SettingError("lags", lags, f"between 1 and T ({steps})")
    return jnp.tril(declared(strategy).weights(steps, lags))


def estimated_window(
    make_strategy: Callable[[Problem], Strategy],
    lags: int,
    key: Key[Array, ""],
    draws: int = 32,
    phases: int | None = None,
    steps: int | None = None,
) -> tuple[Float[Array, "K"], Float[Array, "K"]]:
    """w_k read off a strategy's own gradients, and its standard error over draws (0 where nothing is drawn).

    The probe: h_t = h_{t-1} + W_xh[x_t] with one unit, every token of every sequence with a row of W_xh
    to itself, and sequence b with the loss o_s = h_s at the step s = T - phases + b alone. Then row
    (t, b) of the estimate is w[s, s-t] of that loss, with no division and no least squares. The mean
    goes over the last `phases` of T = `steps` steps (by default `lags` phases, and as many steps as all
    lags need).

    Exact in the mean over a grid if `phases` is a multiple of its stride. Random cuts that remember
    (the power law) are stationary only after some mean lengths: give more steps. A window that
    depends on parameters or data is that of the probe. Memory: T · phases rows.
    """
    phases = whole("phases", lags if phases is None else phases)
    steps = whole("steps", phases + lags - 1 if steps is None else steps, phases + lags - 1)
    problem = Problem(
        _adder(steps * phases),
        Readout(init=lambda key: {}, apply=lambda params, h: h),
        lambda outputs, targets: outputs[..., 0],
    )
    losses = steps - phases + jnp.arange(phases)
    tokens = jnp.arange(steps * phases).reshape(steps, phases)
    mask = 1.0 * (jnp.arange(steps)[:, None] == losses)
    batch = Batch(tokens, jnp.zeros_like(mask), mask)
    strategy, params = make_strategy(problem), problem.init(key)
    state = strategy.init(params, phases)

    @jax.jit
    def one(key: Key[Array, ""]) -> Float[Array, "K"]:
        grads = strategy.estimate(params, state, batch, key)[0].grads["cell"]["W_xh"]
        kept = phases * grads.reshape(steps, phases)  # the mean loss is over `phases` tokens
        return kept[losses - jnp.arange(lags)[:, None], jnp.arange(phases)].mean(axis=1)

    drawn = jax.lax.map(one, jax.random.split(key, whole("draws", draws, least=2)))
    return drawn.mean(axis=0), drawn.std(axis=0, ddof=1) / draws**0.5


def _adder(inputs: int) -> Cell:
    """h_t = h_{t-1} + W_xh[x_t] with one unit."""
    affine = Affine(
        project=lambda params, x: params["W_xh"][x],
        recur=lambda params, h: h,
        update=lambda x, recurred, h: x + recurred,
    )
    cell = Cell(
        init=lambda key: {"W_xh": jnp.zeros((inputs, 1))},
        zeros=lambda batch_size: jnp.zeros((batch_size, 1)),
        step=affine.step,
        read=lambda h: h,
        affine=affine,
    )
    return vouch(cell)


def expected_gradient(window: Float[Array, "K"], gradients: Params) -> Params:
    """Σ_k w_k G_k from one table, for any window: a tree like params.

    The expected gradient of the strategy exactly, where its weights w[s,k] depend on k alone (full, the
    sliding window, the constant law, all compensated ones); for a grid on average over its phase, that
    is, where the sequence is cut out of a long text anywhere. Exact on one batch: `weighted_gradient`.
    """
    return jax.tree.map(lambda g: jnp.tensordot(window, g, axes=1), gradients)


def bias(window: Float[Array, "K"], gradients: Params) -> Float[Array, ""]:
    """‖Σ_k (1 - w_k) G_k‖ over all parameters, for a table of all T lags; exact as `expected_gradient` is."""
    return norm(expected_gradient(1 - window, gradients))


def variance(strategy: Strategy, flows: Float[Array, "T T *T"], table: str = "flows") -> float:
    """E‖ĝ - E[ĝ]‖² over draws on the batch of this table, exactly, for every setting from one table.

    `flows` is `flows(problem, params, batch)`; for a strategy whose claim names another table, it is that one,
    and `table` says so: "shared_flows" for perturbations, "products" for random horizons. 0 for a strategy that
    draws nothing. SettingError for one whose claim gives its variance in no closed form (random cuts without
    compensation), and for the wrong table.
    """
    claim = declared(strategy)
    if claim.patterns is None and strategy.claim.noise is None and claim.spread is None:
        return 0.0
    if claim.spread is None:
        way_out = "`measure.quality` estimates the variance from draws."
        raise SettingError("claim.lag_weights.spread", None, "declared by the strategy", way_out)
    if table != claim.table:
        raise SettingError("table", table, f"{claim.table}, of which this variance is a sum")
    return float(np.vdot(claim.spread(len(flows)), np.asarray(flows, float))) / claim.draws


def declared(strategy: Strategy) -> LagWeights:
    """The lag weights of the strategy's claim, or SettingError."""
    claim = strategy.claim
    if claim.lag_weights is None:
        way_out = "`measure.quality` estimates the bias from draws."
        raise SettingError("claim.lag_weights", None, "declared by the strategy", way_out)
    return claim.lag_weights
