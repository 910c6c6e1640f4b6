"""The norms of a strategy's gradient over time and lag."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from bptt_study.backprop.arguments import as_batch
from bptt_study.backprop.pytrees import norm
from bptt_study.types import Batch, Params, Strategy
from bptt_study.validation import SettingError, instance, whole


def gradient_norms(
    strategy: Strategy, params: Params, batch: Batch, key: Key[Array, ""], draws: int = 16
) -> dict[str, Float[Array, "T"]]:
    """Compute the norms of the adjoints over time and over the lag, as the strategy computes them.

    Every pass starts from the zero state.

    For the LSTM, h is the pair (h, c).

    Args:
      strategy: Its estimate reports `adjoint_norms`.
      params: The parameters.
      batch: One batch of T steps.
      key: The key, which is split into one key per draw.
      draws: The number of draws over which the norms are averaged.

    Returns:
      A dict of two arrays [T]. "time" is ‖∂L/∂h_t‖ for t = 1 … T, where L is the mean loss of the batch, and
      the norm is Frobenius over B and H. "lag" is ‖∂l_s/∂h_{s-k}‖ for k = 0 … T - 1, where s is the last step
      of a sequence whose loss counts, with weight 1, averaged over the sequences that have a step s - k. It is
      0 if none has one.

    Raises:
      SettingError: For a strategy that reports no `adjoint_norms`, and fewer than one draw.
    """
    whole("draws", draws)
    batch = as_batch(batch)
    size = batch.mask.shape[1]
    state = instance("strategy", strategy, Strategy).init(params, size)
    steps = jnp.arange(len(batch.mask))[:, None]
    # of each sequence, the last step whose loss counts; -1: none does
    end = jnp.where(batch.mask > 0, steps, -1).max(axis=0)
    last = batch._replace(mask=steps == end)

    def adjoint_norms(batch: Batch, key: Key[Array, ""]) -> Float[Array, "T B"]:
        metrics = strategy.estimate(params, state, batch, key)[0].metrics
        if "adjoint_norms" not in metrics:
            found = f"one with the metrics {sorted(metrics)}"
            way_out = "Estimators without a backward pass have none."
            raise SettingError("strategy", found, "one that reports `adjoint_norms`", way_out)
        return metrics["adjoint_norms"]

    def norms(key: Key[Array, ""]) -> dict[str, Array]:
        over_time, over_lag = adjoint_norms(batch, key), adjoint_norms(last, key)
        back = end - steps  # [lag, sequence] -> step
        there = jnp.take_along_axis(over_lag, jnp.maximum(back, 0), axis=0)
        mean = jnp.where(back < 0, 0, there).sum(axis=1) / jnp.maximum((back >= 0).sum(axis=1), 1)
        # the mean loss, times the number of its tokens, is the sum of the losses
        return {"time": norm(over_time, keep=1), "lag": mean * (end >= 0).sum()}

    return jax.tree.map(lambda n: n.mean(axis=0), lax.map(norms, jax.random.split(key, draws)))
