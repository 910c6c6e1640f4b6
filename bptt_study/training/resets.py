"""Resets: the task's batches, with the state resets that the budget asks for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from bptt_study.known import kept
from bptt_study.training.budget import Budget
from bptt_study.types import Batch, Sampler, Task
from bptt_study.validation import SettingError


def make_sampler(task: Task, budget: Budget) -> Sampler:
    """Make the sampler of the task's batches, with the resets that the budget asks for.

    A reset within an update makes its parts independent sequences, so they are folded into the batch: [T, B]
    becomes [R, B·T/R]. A reset every few updates marks the batch as fresh.

    Args:
      task: The task.
      budget: The budget.

    Returns:
      The sampler.

    Raises:
      SettingError: For steps that do not fit the task, and for resets longer than an update if every batch
        starts anew.
    """
    if task.steps is not None and budget.steps != task.steps:
        raise SettingError(
            "budget.steps", budget.steps, f"the length of this task's sequences ({task.steps})"
        )
    return _with_resets(task.sampler, budget.steps, budget.batch_size, budget.reset_every)


@kept(64)
def _with_resets(
    make: Callable[[int, int], Sampler], steps: int, batch_size: int, every: int | None
) -> Sampler:
    sampler = make(steps, batch_size)
    if every is None:
        return sampler
    if every > steps and not sampler.continues:
        raise SettingError(
            "budget.reset_every",
            every,
            f"at most budget.steps ({steps})",
            "With this task every batch starts from fresh sequences.",
        )

    def sample(data: Any, key: Key[Array, ""], update: Array, *level: Any) -> tuple[Batch, Array]:
        batch, fresh = sampler.sample(data, key, update, *level)
        if every < steps:
            return Batch(*(fold(a, every) for a in batch)), jnp.ones((), bool)
        return batch, fresh | (update % (every // steps) == 0)

    return sampler._replace(sample=sample)


def fold(a: Array, length: int) -> Array:
    """Cut each sequence into independent ones.

    Args:
      a: An array [T, B, …].
      length: The number of steps of each part, a divisor of T.

    Returns:
      The array [length, B·T/length, …].
    """
    parts = a.reshape(a.shape[0] // length, length, *a.shape[1:])
    return jnp.moveaxis(parts, 0, 1).reshape(length, -1, *a.shape[2:])


def opening(part: Batch, steps: int, batch_size: int, reset_every: int | None) -> Batch:
    """Take the first steps and sequences of a part of the data, cut at the resets as a batch of training is.

    Args:
      part: The part, such as a task's validation part.
      steps: Time steps per update. A part with fewer steps gives all, or as many as whole lengths fit in.
      batch_size: Sequences per update. A part with fewer gives all.
      reset_every: Time steps between two resets of the state; None: no resets.

    Returns:
      The batch.
    """
    most = min(steps, len(part.mask))
    every = min(reset_every or most, most)
    return Batch(*(fold(a[: most - most % every, :batch_size], every) for a in part))


def folded_size(budget: Budget) -> int:
    """Compute the number of sequences per update after folding.

    Args:
      budget: The budget.

    Returns:
      The number.
    """
    return budget.batch_size * max(1, budget.steps // (budget.reset_every or budget.steps))


def reseed(state: Any, key: Key[Array, ""]) -> Any:
    """Fold a draw of `key` into the random keys of a state; change nothing else.

    Fresh sequences of a random cell start from the same keys each time, and so does an optimizer. With this
    function the sequences draw anew at every update, and each seed of a run has its own draws.

    Args:
      state: The state of a strategy or an optimizer.
      key: The key.

    Returns:
      The state.
    """

    def folded(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        fold = jax.vmap(lambda own: jax.random.fold_in(own, jax.random.bits(key)))
        return fold(leaf.reshape(-1)).reshape(leaf.shape)

    return jax.tree.map(folded, state)
