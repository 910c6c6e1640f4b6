"""Recall after a delay: a setting fixes exactly how far back the loss depends on the input."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from bptt_study.losses import cross_entropy
from bptt_study.types import Batch, Sampler, Task
from bptt_study.validation import SettingError, fits, whole

VALIDATION_SEQUENCES, VALIDATION_SEED = 512, 0


def copy(lag: int = 20, length: int = 5, symbols: int = 8) -> Task:
    """Recall the first `length` symbols, each `lag` steps after it came.

    A sequence has lag + length steps: the prefix, drawn uniformly from `symbols` symbols, then blanks up to
    step `lag`, then the cue to recall. The target at step t ≥ lag depends on the input at t - lag alone. A
    gradient that goes back `lag` steps can lower the loss from ln(symbols) to 0. A shorter gradient cannot
    teach the network to store the symbols: the readout can use only what the recurrence happens to store. With
    · for the blank and ? for the cue:

    >>> task = copy(lag=4, length=2, symbols=2)
    >>> sampler = task.sampler(6, 1)  # 6 time steps, 1 sequence
    >>> batch, fresh = sampler.sample(sampler.data, jax.random.key(0), 2)
    >>> "".join("01·?"[i] for i in batch.inputs[:, 0])
    '10··??'
    >>> "".join(str(y) if m else " " for y, m in zip(batch.targets[:, 0], batch.mask[:, 0]))
    '    10'

    Inputs and targets are int [T, B]; blank and cue are the numbers `symbols` and `symbols + 1`. The mask is 1
    from step `lag` on; targets are 0 before. Every update draws new sequences and starts from the zero state.
    The validation part has 512 sequences from a fixed key.

    Args:
      lag: Time steps between a symbol and its recall, at least `length`: the prefix ends before its recall.
      length: The number of symbols to recall.
      symbols: The number of different symbols, at least 2.

    Returns:
      The task.

    Raises:
      SettingError: For settings out of range, and in `sampler` for another number of steps.

    References:
      Hochreiter & Schmidhuber 1997 (the copying problem); as in Arjovsky, Shah & Bengio 2016.
    """
    whole("symbols", symbols, least=2)
    if whole("lag", lag) < whole("length", length):
        raise SettingError("lag", lag, f"at least the length ({length})")
    steps = lag + length
    fits("lag", lag, 3 * steps * VALIDATION_SEQUENCES)
    draw = partial(_draw, lag, length, symbols)

    def sampler(asked: int, batch_size: int) -> Sampler:
        if asked != steps:
            raise SettingError("budget.steps", asked, f"lag + length ({steps})")
        whole("budget.batch_size", batch_size)

        def sample(data: Any, key: Key[Array, ""], update: Int[Array, ""]) -> tuple[Batch, Array]:
            return draw(batch_size, jax.random.fold_in(key, update)), jnp.asarray(True)

        return Sampler((), sample, continues=False)

    return Task(
        inputs=symbols + 2,
        outputs=symbols,
        loss=cross_entropy,
        steps=steps,
        sampler=sampler,
        validation=draw(VALIDATION_SEQUENCES, jax.random.key(VALIDATION_SEED)),
        references={"uniform": math.log(symbols)},
        chance_accuracy=1 / symbols,
        facts={"lag": lag},
    )


def _draw(lag: int, length: int, symbols: int, batch_size: int, key: Key[Array, ""]) -> Batch:
    """Draw B independent sequences."""
    said = jax.random.randint(key, (length, batch_size), 0, symbols, jnp.int32)
    blank, cue = jnp.int32(symbols), jnp.int32(symbols + 1)
    silence = jnp.full((lag - length, batch_size), blank)
    inputs = jnp.concatenate([said, silence, jnp.full_like(said, cue)])
    targets = jnp.concatenate([jnp.zeros((lag, batch_size), jnp.int32), said])
    mask = jnp.zeros(inputs.shape).at[lag:].set(1)
    return Batch(inputs, targets, mask)
