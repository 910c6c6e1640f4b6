"""Influence balancing: a system on which truncated gradients point the wrong way."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from bptt_study.losses import squared_error
from bptt_study.types import Batch, Readout, Sampler, Task
from bptt_study.validation import SettingError, whole


def influence_balancing(states: int = 23, positive: int = 10, burn_in: int = 0) -> Task:
    """Steer the first variable of a linear system to 1 by the one parameter θ: l_t = ½ (s¹_t - 1)².

    The cell is `cells.influence` with the same number of states. θ acts on `positive` of them as +1 and on the
    others as -1. Nothing is random, and the input has no effect. In the long run s¹ = 2 (2·positive - states)
    θ, so θ* = -1/6 for 23 and 10. A gradient that goes back k steps takes the partial sum Σ_{j<k} (Aʲ v)_1
    for the slope of s¹ in θ. For small k this sum is positive, so the gradient leads away from θ*.

    >>> task = influence_balancing(states=5, positive=2)
    >>> sampler = task.sampler(3, 1)  # 3 time steps, 1 sequence
    >>> batch, fresh = sampler.sample(sampler.data, None, 0)
    >>> batch.inputs.shape, batch.targets.shape
    ((3, 1, 1), (3, 1, 1))

    Inputs and targets are ones [T, B, 1], and the state is carried from update to update. The validation part
    is so long that the system comes to rest.

    Args:
      states: The number of variables of the system.
      positive: The number of variables on which θ acts as +1.
      burn_in: The number of first time steps of every update whose losses do not count, since no gradient goes
        back beyond the start of the update.

    Returns:
      The task.

    Raises:
      SettingError: For settings out of range, for 2·positive = states (θ has no effect in the long run), and in
        `sampler` for a burn_in that leaves no loss.

    References:
      Tallec & Ollivier 2017, section 5.1.
    """
    if 2 * whole("positive", positive) == whole("states", states) or positive > states:
        raise SettingError(
            "positive", positive, f"between 1 and states ({states}), and not half of them"
        )
    whole("burn_in", burn_in, least=0)

    def batch(steps: int, batch_size: int, silent: int) -> Batch:
        ones = jnp.ones((steps, batch_size, 1))
        return Batch(ones, ones, ones[..., 0].at[:silent].set(0))

    def sampler(steps: int, batch_size: int) -> Sampler:
        if whole("budget.steps", steps) <= burn_in:
            raise SettingError("budget.steps", steps, f"greater than task.burn_in ({burn_in})")
        whole("budget.batch_size", batch_size)

        def sample(data: Any, key: Key[Array, ""], update: Int[Array, ""]) -> tuple[Batch, Array]:
            return batch(steps, batch_size, burn_in), jnp.asarray(update == 0)

        return Sampler((), sample, continues=True)

    return Task(
        inputs=1,
        outputs=1,
        loss=squared_error,
        steps=None,
        sampler=sampler,
        validation=batch(16 * states, 1, 8 * states),
        references={"nothing": 0.5},  # θ = 0
        chance_accuracy=None,
        facts={},
        cell="influence",
        readout=Readout(init=lambda key: {}, apply=lambda params, s: s[..., :1]),
    )
