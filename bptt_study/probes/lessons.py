"""Estimates that a strategy makes before it is measured, if it learns as synthetic gradients do."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from bptt_study.instruments.compiled import compiled
from bptt_study.types import Batch, Params, Strategy


@compiled("lessons")
def taught(
    strategy: Strategy, params: Params, batches: Batch, key: Key[Array, ""], lessons: int
) -> Any:
    """Make the state of a strategy for fresh sequences, after some estimates on such if it learns from them.

    Args:
      strategy: The strategy; without `renew` it learns nothing.
      params: The parameters, which stay as they are.
      batches: N batches, leaves [N, T, B, …], which the lessons take in turn.
      key: The key of every lesson.
      lessons: The number of estimates.

    Returns:
      The state.
    """
    count, _, size = batches.mask.shape
    state = strategy.init(params, size)
    if (renew := strategy.renew) is None:
        return state

    def lesson(state: Any, n: Int[Array, ""]) -> tuple[Any, None]:
        batch = jax.tree.map(lambda a: a[n % count], batches)
        return renew(params, strategy.estimate(params, state, batch, key)[1]), None

    return lax.scan(lesson, renew(params, state), jnp.arange(lessons))[0]
