"""Adaptive truncation: credit goes back as many steps as keep the relative bias below a tolerance."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.backprop.forward import count_tokens
from bptt_study.backprop.forward_pass import ForwardPass, forward_pass
from bptt_study.backprop.lag_adjoints import fold_lags
from bptt_study.backprop.pytrees import add, as_arrays, norm, wide, zeros_like
from bptt_study.backprop.shapes import check_call
from bptt_study.strategies.validated import validated
from bptt_study.types import Batch, Claim, Estimate, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, number, whole


class Adaptive(NamedTuple):
    """The state of the strategy: the hidden state, the window in use, and the number of updates so far."""

    state: State
    choice: Int[Array, ""]  # the index of the window in use
    updates: Int[Array, ""]


@validated
def adaptive(
    problem: Problem,
    delta: float,
    every: int = 50,
    windows: Sequence[int] = (2, 4, 8, 16, 32, 64, 100),
    tail: int | None = None,
) -> Strategy:
    """Make TBPTT(K, 2K - 1) with the least K whose relative bias is below δ.

    Let φ_k be the mean of ‖∂l_s/∂h_{s-k}‖ over tokens, β its rate of decay by a line through log φ_k from lag τ
    on, and S_K the mean of ‖Σ_{k<K} ∂l_s/∂h_{s-k}‖. The relative bias of K lags is at most

        err(K) / max_K' (S_K' - err(K')),   err(K) = Σ_{K≤k<τ} φ_k + φ_τ β^max(K-τ, 0) / (1 - β).

    A lag that no token has, as in steps that are masked in all sequences, is left out of the line. Every loss
    keeps K lags or more. If no window is good enough, for example because β ≥ 1 or because fewer than two lags
    from τ on have tokens, the strategy takes the largest. The paper also scales the learning rate by √K. That
    belongs to the optimizer and is not done here.

    Args:
      problem: Cell, readout and loss.
      delta: δ, the tolerance.
      every: Updates from one choice of K to the next; the first choice is at the first update.
      windows: The values of K to choose from, in rising order. Each is compiled separately.
      tail: τ, the lag from which the decay is extrapolated. None: half the steps of a call.

    Returns:
      The strategy. Its estimate also reports the metric `window`, the K in use. Calls of one or two steps
      keep the K of the call before.

    Raises:
      SettingError: For a delta of 0 or less, an every or a tail below 1, and windows that do not rise from 1;
        in `estimate`, for a tail that leaves fewer than two lags.

    References:
      Aicher, Foti & Fox 2019.
    """
    number("delta", delta, above=0)
    whole("every", every)
    windows = _rising(windows)
    if tail is not None:
        whole("tail", tail)

    def init(params: Params, batch_size: int) -> Adaptive:
        largest, none = jnp.asarray(len(windows) - 1, jnp.int32), jnp.zeros((), jnp.int32)
        return Adaptive(problem.cell.zeros(batch_size), largest, none)

    def estimate(
        params: Params, carried: Adaptive, batch: Batch, key: Any
    ) -> tuple[Estimate, Adaptive]:
        params, carried, batch = as_arrays((params, carried, batch))
        check_call(problem, params, carried.state, batch)
        steps = len(batch.mask)
        if tail is not None and tail > steps - 2:
            raise SettingError("tail", tail, f"at most {steps - 2}, two less than the steps")

        def choose() -> Int[Array, ""]:
            run = forward_pass(problem, params, carried.state, batch)
            bound = relative_bias(run, batch.mask, tail or steps // 2)
            small = bound[jnp.minimum(jnp.asarray(windows), steps)] < delta
            return jnp.where(small.any(), jnp.argmax(small), len(windows) - 1).astype(jnp.int32)

        due, choice = carried.updates % every == 0, carried.choice
        if steps > 2:  # fewer steps show no decay
            choice = lax.cond(due, choose, lambda: carried.choice)
        branches = [partial(_truncated, problem, K) for K in windows]
        found, state = lax.switch(choice, branches, params, carried.state, batch)
        metrics = found.metrics | {"window": jnp.asarray(windows)[choice]}
        return found._replace(metrics=metrics), Adaptive(state, choice, carried.updates + 1)

    def renew(params: Params, carried: Adaptive) -> Adaptive:
        size = jax.tree.leaves(carried.state)[0].shape[0]
        return carried._replace(state=problem.cell.zeros(size))

    claim = Claim(memory="T", steps="window", source="Aicher et al. 2019", period=every)
    return Strategy(init, estimate, claim, renew=renew)


def _rising(windows: Any) -> tuple[int, ...]:
    numbers = [whole("windows", n) for n in windows] if np.ndim(windows) == 1 else []
    if not numbers or sorted(set(numbers)) != numbers:
        raise SettingError("windows", windows, "whole numbers that rise from 1 or more")
    return tuple(numbers)


def _truncated(
    problem: Problem, K: int, params: Params, state: State, batch: Batch
) -> tuple[Estimate, State]:
    return backpropagate(problem, params, state, batch, Truncation(2 * K - 1, K))


def relative_bias(run: ForwardPass, mask: Float[Array, "T B"], tail: int) -> Float[Array, "K"]:
    """Compute the bound on the relative bias of K lags.

    Args:
      run: The forward pass of T steps.
      mask: The mask [T, B], 0 where a token does not count.
      tail: τ ≤ T - 2.

    Returns:
      The bounds for K = 0 … T, shape [T + 1]; inf where there is no bound.
    """
    phi, sums = state_gradients(run, mask)
    k, K = jnp.arange(len(phi)), jnp.arange(len(phi) + 1)
    seen = lax.cumsum((mask > 0).any(axis=1).astype(jnp.int32), reverse=True) > 0
    rate = decay(phi, tail, seen)
    # there is no bound for a tail that grows or is 0
    rest = jnp.where(rate < 1, phi[tail] / jnp.where(rate < 1, 1 - rate, 1), jnp.inf)
    before = jnp.append(jnp.cumsum(jnp.where(k < tail, phi, 0)[::-1])[::-1], 0.0)
    error = before + rest * jnp.minimum(rate, 1) ** jnp.maximum(K - tail, 0)
    least = jnp.max(jnp.append(0.0, sums) - error)
    return jnp.where(least > 0, error / jnp.where(least > 0, least, 1), jnp.inf)


def state_gradients(
    run: ForwardPass, mask: Float[Array, "T B"]
) -> tuple[Float[Array, "K"], Float[Array, "K"]]:
    """Compute the mean norms of the gradients that losses send back to the states.

    Args:
      run: The forward pass of T steps.
      mask: The mask [T, B], 0 where a token does not count.

    Returns:
      φ_k = E‖∂l_s/∂h_{s-k}‖ for k = 0 … T - 1, the mean over the tokens that have lag k, and
      S_K = E‖Σ_{k<K} ∂l_s/∂h_{s-k}‖ for K = 1 … T, the mean over all tokens.
    """
    total, t = count_tokens(mask), jnp.arange(len(mask))
    mask = mask.astype(total.dtype)
    counts = (mask > 0).astype(run.loss.dtype)
    each = jnp.where(
        mask > 0, total / jnp.where(mask > 0, mask, 1), 0
    )  # a token's loss ÷ its share

    def means(so_far: State, adjoints: State, k: Int[Array, ""]) -> tuple[State, Any]:
        by_loss = jax.tree.map(lambda a: jnp.roll(a, k, axis=0), adjoints)
        so_far = add(so_far, by_loss)
        own = counts * (t >= k)[:, None]
        tokens = jnp.maximum(own.sum(), 1)
        phi = jnp.sum(own * each * _norms(by_loss)) / tokens
        return so_far, (phi, jnp.sum(counts * each * _norms(so_far)) / jnp.maximum(counts.sum(), 1))

    return fold_lags(run, len(mask), means, wide(zeros_like(run.immediate)))


def _norms(tree: State) -> Float[Array, "T B"]:
    return jax.vmap(jax.vmap(norm))(tree)


def decay(phi: Float[Array, "K"], tail: int, seen: Bool[Array, "K"]) -> Float[Array, ""]:
    """Fit β of φ_k ∝ β^k by least squares of log φ_k.

    Args:
      phi: φ_k [K].
      tail: τ, the first lag of the fit.
      seen: Whether a token has the lag, [K]. After the last token of all sequences, none has.

    Returns:
      β, a scalar; 0 if φ_τ is 0, and 1 if fewer than two lags of the tail have a token.
    """
    logs = jnp.log(jnp.maximum(phi[tail:], jnp.finfo(phi.dtype).tiny))
    weights = seen[tail:].astype(logs.dtype)
    k = jnp.arange(len(logs))
    k = k - jnp.sum(weights * k) / jnp.maximum(jnp.sum(weights), 1)
    spread = jnp.sum(weights * k * k)
    rate = jnp.exp(jnp.sum(weights * k * logs) / jnp.where(spread > 0, spread, 1))
    return jnp.where((phi[tail] > 0) | (spread == 0), rate, 0)
