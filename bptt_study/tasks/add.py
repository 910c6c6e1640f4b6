"""Two bits of the past add up to the probability of a coin: the loss shows which of them was learned."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from bptt_study.losses import cross_entropy
from bptt_study.types import Batch, Sampler, Task
from bptt_study.validation import SettingError, fits, whole

VALIDATION_STEPS, VALIDATION_SEQUENCES, VALIDATION_SEED = 512, 256, 0


def add(t1: int = 4, t2: int = 12) -> Task:
    """Predict y_t ~ Bernoulli(½ + ½ x_{t-t1} - ¼ x_{t-t2}) from fair bits x_1 … x_t, at every step.

    A model that ignores the input has a loss of .6616 nats per step, a model that uses x_{t-t1} alone .5192,
    x_{t-t2} alone .6277, and both .4545. So the loss shows which of the two lags was learned. If x_{t-t1} = 1
    and x_{t-t2} = 0, y_t is certainly 1:

    >>> task = add(t1=1, t2=3)
    >>> sampler = task.sampler(12, 1)  # 12 time steps, 1 sequence
    >>> batch, fresh = sampler.sample(sampler.data, jax.random.key(0), 0)
    >>> for row in batch:  # inputs, targets, mask
    ...     print("".join(str(int(bit)) for bit in row[:, 0]))
    011110001010
    111111001100
    000111111111

    Inputs and targets are int [T, B], 0 or 1. Every sequence is an endless stream: an update continues where
    the last one stopped, and carries its state. The first t2 steps of a stream depend on bits before it,
    which no model has seen. There, and only there, the mask is 0. The validation part has 256 streams of
    t2 + 512 steps from a fixed key. `references` are the entropies, see `entropies`; `chance_accuracy` is the
    accuracy of the constant answer 1.

    Args:
      t1: The shorter lag, time steps.
      t2: The longer lag, time steps.

    Returns:
      The task.

    Raises:
      SettingError: For settings out of range (1 ≤ t1 < t2), and in `sampler` for updates of t2 steps or fewer,
        whose first would have no loss.

    References:
      Pitis 2016, "Recurrent neural networks in TensorFlow I" (r2rt.com); Marschall, Cho & Savin 2020.
    """
    if whole("t1", t1) >= whole("t2", t2, least=2):
        raise SettingError("t1", t1, f"between 1 and t2 - 1 ({t2 - 1})")
    fits("t2", t2, 3 * (t2 + VALIDATION_STEPS) * VALIDATION_SEQUENCES)

    def sampler(steps: int, batch_size: int) -> Sampler:
        if whole("budget.steps", steps) <= t2:
            raise SettingError("budget.steps", steps, f"greater than task.t2 ({t2})")
        whole("budget.batch_size", batch_size)

        def sample(data: Any, key: Key[Array, ""], update: Int[Array, ""]) -> tuple[Batch, Array]:
            fresh = jnp.asarray(update == 0)
            return _draw(t1, t2, steps, batch_size, key, update), fresh

        return Sampler((), sample, continues=True)

    validation = _draw(
        t1, t2, t2 + VALIDATION_STEPS, VALIDATION_SEQUENCES, jax.random.key(VALIDATION_SEED), 0
    )
    return Task(
        inputs=2,
        outputs=2,
        loss=cross_entropy,
        steps=None,
        sampler=sampler,
        validation=validation,
        references=entropies(),
        chance_accuracy=float(
            jnp.sum(validation.targets * validation.mask) / validation.mask.sum()
        ),
        facts={"t1": t1, "t2": t2},
    )


def probability(first: Any, second: Any) -> Any:
    """Compute P(y_t = 1).

    Args:
      first: x_{t-t1}, 0 or 1; a number or an array.
      second: x_{t-t2}, 0 or 1, of the same shape.

    Returns:
      The probability, of the same shape.
    """
    return 0.5 + 0.5 * first - 0.25 * second


def entropies() -> dict[str, float]:
    """Compute the lowest loss of a model that uses nothing of the input, x_{t-t1}, x_{t-t2}, or both.

    Returns:
      The losses by name, nats per step.
    """
    p = probability(*np.indices((2, 2)))  # the four equally likely cases [x_{t-t1}, x_{t-t2}]

    def left(p: Float[np.ndarray, "..."]) -> float:
        return float(np.mean([_entropy(q) for q in p.ravel()]))

    unknown = {"nothing": (0, 1), "t1": (1,), "t2": (0,), "both": ()}  # axes to average out
    return {name: left(np.mean(p, axis=axes)) for name, axes in unknown.items()}


def _entropy(p: float) -> float:
    """Compute the entropy of a coin, in nats."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _draw(t1: int, t2: int, steps: int, batch_size: int, key: Key[Array, ""], update: Any) -> Batch:
    """Draw block `update` of B streams; its targets depend on the block before, as t2 < steps."""

    def toss(block: Any, which: int, odds: Any = 0.5) -> Int[Array, "T B"]:
        own = jax.random.fold_in(jax.random.fold_in(key, block), which)
        odds = jnp.asarray(odds, jnp.float32)  # the same tosses with and without x64
        return jax.random.bernoulli(own, odds, (steps, batch_size)).astype(jnp.int32)

    stream = jnp.concatenate([toss(update, 0), toss(update + 1, 0)])  # block 0 is before the start
    odds = probability(stream[steps - t1 : -t1], stream[steps - t2 : -t2])
    inputs, targets = stream[steps:], toss(update + 1, 1, odds)
    seen = (jnp.arange(steps) >= t2) | (update > 0)
    return Batch(inputs, targets, jnp.broadcast_to(1.0 * seen[:, None], inputs.shape))
