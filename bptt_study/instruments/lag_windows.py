"""Lag profiles: the share of each lag that a strategy keeps, and the bias and variance that follow from it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from bptt_study.backprop.promises import vouch
from bptt_study.backprop.pytrees import norm
from bptt_study.instruments.draws import names_draws, unnamed
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
from bptt_study.validation import SettingError, instance, whole


def window(strategy: Strategy, lags: int) -> Float[Array, "K"]:
    """Return the lag profile w_k in closed form: the share of lag k that the strategy keeps on average.

    The average is over draws, and over the phase of the strategy's grid in an endless sequence.

    Args:
      strategy: A strategy whose claim declares lag weights.
      lags: K.

    Returns:
      w_k for k = 0 … K - 1, shape [K].

    Raises:
      SettingError: For a claim without lag weights, and one whose window is not K finite numbers.
    """
    found = declared(strategy).window(whole("lags", lags))
    return _shares("window", found, "[lags]", (lags,))


def weights(strategy: Strategy, steps: int, lags: int) -> Float[Array, "T K"]:
    """Return E[w[s,k]] over draws, for one call on T steps.

    Args:
      strategy: A strategy whose claim declares lag weights.
      steps: T.
      lags: K, at most T.

    Returns:
      The weights [T, K]; 0 where s - k < 0.

    Raises:
      SettingError: For lags > T, a claim without lag weights, and one whose weights are not [T, K] finite
        numbers.
    """
    if whole("lags", lags) > whole("steps", steps):
        raise SettingError("lags", lags, f"between 1 and T ({steps})")
    found = declared(strategy).weights(steps, lags)
    return jnp.tril(_shares("weights", found, "[steps, lags]", (steps, lags)))


def _shares(name: str, found: Array, axes: str, shape: tuple[int, ...]) -> Array:
    """Check the shape of a claim's lag weights, and that they are finite where k ≤ s."""
    name, must = f"claim.lag_weights.{name}", f"finite numbers {axes} = {list(shape)}"
    if jnp.shape(found) != shape or not jnp.issubdtype(jnp.result_type(found), jnp.number):
        raise SettingError(name, f"{jnp.result_type(found)}{list(jnp.shape(found))}", must)
    if not isinstance(found, jax.core.Tracer):
        numbers = np.asarray(found)
        numbers = np.tril(numbers) if numbers.ndim == 2 else numbers
        if not np.isfinite(numbers).all():
            raise SettingError(name, numbers[~np.isfinite(numbers)][0], must)
    return found


def estimated_window(
    make_strategy: Callable[[Problem], Strategy],
    lags: int,
    key: Key[Array, ""],
    draws: int = 32,
    phases: int | None = None,
    steps: int | None = None,
) -> tuple[Float[Array, "K"], Float[Array, "K"]]:
    """Read the lag profile w_k off a strategy's own gradients.

    The network is h_t = h_{t-1} + W_xh[x_t] with one unit. Every token of every sequence has its own row of
    W_xh, and sequence b has one loss, o_s = h_s at the step s = T - phases + b. So row (t, b) of the estimate
    is w[s, s-t] of that loss, without a division or a least-squares fit. The network has T · phases rows.

    Args:
      make_strategy: Problem -> strategy. A profile that depends on parameters or data is that of this network.
      lags: K.
      key: The key of the draws.
      draws: The number of estimates.
      phases: The number of last steps over which the mean is taken. None: `lags`. For a grid, the mean is
        exact if `phases` is a multiple of its stride.
      steps: T. None: as many as all lags need. Random cuts with memory (the power law) need more: they are
        stationary only after some mean lengths.

    Returns:
      w_k [K], and its standard error over draws [K], 0 if the strategy draws nothing.

    Raises:
      SettingError: For fewer steps than lags and phases need, and fewer than two draws.
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
    """Make the cell h_t = h_{t-1} + W_xh[x_t] with one unit."""
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
    """Compute Σ_k w_k G_k from one table, for any lag profile.

    If the weights w[s,k] depend on k alone (full, the sliding window, the constant law, all compensated ones),
    this is exactly the strategy's expected gradient. For a grid it is the mean over the phase, as if the
    sequence were cut out of a long text at an arbitrary place. `weighted_gradient` is exact on one batch.

    Args:
      window: w_k [K].
      gradients: G_k, a tree like params with a leading axis [K].

    Returns:
      A tree like params.
    """
    return jax.tree.map(lambda g: jnp.tensordot(window, g, axes=1), gradients)


def bias(window: Float[Array, "K"], gradients: Params) -> Float[Array, ""]:
    """Compute the bias ‖Σ_k (1 - w_k) G_k‖ over all parameters, as exactly as `expected_gradient`.

    Args:
      window: w_k [T], for all T lags.
      gradients: G_k, a tree like params with a leading axis [T].

    Returns:
      The norm, a scalar.
    """
    return norm(expected_gradient(1 - window, gradients))


def variance(strategy: Strategy, flows: Float[Array, "T T *T"], table: str = "flows") -> float:
    """Compute E‖ĝ - E[ĝ]‖² over draws, exactly. One table of a batch serves all settings of a strategy.

    Args:
      strategy: A strategy whose claim declares its variance. If it names no draws, the variance is 0: this
        function sees no gradient, and believes the claim. A run and `measure.exact_quality` do not.
      flows: `flows(problem, params, batch)`, or the table that the strategy's claim names.
      table: The name of that table: "shared_flows" for perturbations, "products" for random horizons.

    Returns:
      The variance, summed over all parameters.

    Raises:
      SettingError: For a claim without its variance in closed form (random cuts without compensation), for an
        unbiased one that does not name its draws, for another table than the claim's or another shape, and
        for a table so long that its products leave the range of floats: the number would be wrong.
    """
    claim = declared(strategy)
    if not names_draws(strategy.claim):
        if strategy.claim.unbiased and not strategy.claim.exact:
            raise unnamed()
        return 0.0
    if claim.spread is None:
        way_out = "`measure.quality` estimates the variance from draws."
        raise SettingError("claim.lag_weights.spread", None, "declared by the strategy", way_out)
    if table != claim.table:
        raise SettingError("table", table, f"{claim.table}, which gives this strategy's variance")
    kind = jnp.finfo(jnp.result_type(given := np.asarray(flows), 0.0))
    products = given.astype(float)
    spread = claim.spread(len(products)) if products.ndim else np.zeros(0)
    if products.shape != spread.shape:
        name = "T, T" if table == "products" else "T, T, T"
        raise SettingError("flows", f"shape {list(products.shape)}", f"a table [{name}]")
    with np.errstate(invalid="ignore", over="ignore"):
        found = float(np.vdot(spread, products)) / claim.draws
        unsure = _unsure(spread, products, kind) / claim.draws
    # nan is no number either; a table of zeros has no scale but that of its type
    if not (np.isfinite(found) and unsure <= (abs(found) / 1000 or float(kind.tiny) ** 0.5)):
        way_out = f"Its numbers, or the weights of its lags, leave the range of a {kind.dtype}."
        raise SettingError("flows", f"one of {len(flows)} steps", "a table of fewer steps", way_out)
    return found


def _unsure(spread: np.ndarray, products: np.ndarray, kind: jnp.finfo) -> float:
    """Sum up what products near the least float give, as those below are lost; if none is, all that may be."""
    size, tiny = np.abs(products), float(kind.tiny)
    low = size < tiny / float(kind.eps)
    if size[low].max(initial=0) < tiny:
        size = np.full_like(size, tiny)
    return float(np.vdot(np.abs(spread[low]), size[low]))


def declared(strategy: Strategy) -> LagWeights:
    """Return the lag weights of a strategy's claim.

    Args:
      strategy: The strategy.

    Returns:
      The lag weights.

    Raises:
      SettingError: For a claim without lag weights.
    """
    claim = instance("strategy", strategy, Strategy).claim
    if claim.lag_weights is None:
        way_out = "`measure.quality` estimates the bias from draws."
        raise SettingError("claim.lag_weights", None, "declared by the strategy", way_out)
    return claim.lag_weights
