"""Recall of strings that grow as the network learns: the largest length that it reaches is the score."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bptt_study.losses import cross_entropy
from bptt_study.types import Batch, Level, Sampler, Task
from bptt_study.validation import SettingError, fits, number, whole

VALIDATION_SEQUENCES, VALIDATION_SEED = 16, 0  # sequences for each length


class Reached(NamedTuple):
    """The level: the largest length so far, and the last losses since it grew."""

    longest: Int[Array, ""]
    losses: Float[Array, "N"]  # bits per symbol; inf where there has been no update yet


def copy_curriculum(
    symbols: int = 2, most: int = 32, spread: int = 5, bound: float = 0.15, mean_over: int = 10
) -> Task:
    """Repeat a string after its end, and get a longer one as soon as the loss is low.

    A string of n symbols takes 2n steps: its symbols, then n cues, at which the symbols are recalled in their
    order. So the target at a cue depends on the input n steps before alone. The strings of a sequence follow
    each other without a gap. Each sequence draws its own length n from L - spread … L. The length L starts at
    1. If the mean loss of the last `mean_over` updates since L grew is below `bound`, L grows by 1. With ? for
    the cue:

    >>> task = copy_curriculum(spread=0)
    >>> sampler = task.sampler(64, 1)  # 64 time steps, 1 sequence
    >>> longest, losses = sampler.level.start()
    >>> batch, fresh = sampler.sample(sampler.data, jax.random.key(0), 0, longest + 2, losses)
    >>> "".join("01?"[i] for i in batch.inputs[:12, 0])
    '010???000???'
    >>> "".join(str(y) if m else " " for y, m in zip(batch.targets[:12, 0], batch.mask[:12, 0]))
    '   010   000'

    Inputs and targets are int [T, B]; the cue is the number `symbols`. The mask is 1 at the cues. Every update
    draws new strings and starts from the zero state. The validation part has 16 sequences for each length
    1 … most of a string, from a fixed key, so its loss falls as more lengths are learned. Of short strings a
    sequence has more. Log points show L as `longest`.

    Args:
      symbols: The number of different symbols, at least 2.
      most: The largest length, at most half of an update's steps.
      spread: The difference of the longest and the shortest string of an update, symbols.
      bound: The mean loss below which L grows, bits per symbol.
      mean_over: The number of updates of this mean.

    Returns:
      The task.

    Raises:
      SettingError: For settings out of range, and in `sampler` for updates in which the longest string does not
        fit.

    References:
      Mujika, Meier & Steger 2018, "Approximating real-time recurrent learning with random Kronecker factors".
    """
    whole("symbols", symbols, least=2)
    whole("spread", spread, least=0)
    number("bound", bound, above=0)
    fits("mean_over", mean_over, whole("mean_over", mean_over))
    fits("most", most, 6 * whole("most", most) ** 2 * VALIDATION_SEQUENCES)

    def start() -> Reached:
        return Reached(jnp.ones((), jnp.int32), jnp.full(mean_over, jnp.inf))

    def advance(level: Reached, metrics: dict[str, Array]) -> Reached:
        losses = jnp.append(level.losses[1:], metrics["train_loss"] / math.log(2))
        longer = (jnp.mean(losses) < bound) & (level.longest < most)
        return Reached(level.longest + longer, jnp.where(longer, jnp.inf, losses))

    def sampler(steps: int, batch_size: int) -> Sampler:
        if whole("budget.steps", steps) < 2 * most:
            raise SettingError("budget.steps", steps, f"at least 2 · task.most ({2 * most})")
        whole("budget.batch_size", batch_size)

        def sample(
            data: Any, key: Key[Array, ""], update: Array, longest: Array, losses: Array
        ) -> tuple[Batch, Array]:
            drawn, said = jax.random.split(jax.random.fold_in(key, update))
            shortest = jnp.maximum(1, longest - spread)
            lengths = jax.random.randint(drawn, (batch_size,), shortest, longest + 1)
            return _strings(lengths, steps, symbols, said), jnp.asarray(True)

        level = Level(start, advance, lambda level: {"longest": level.longest})
        return Sampler((), sample, continues=False, level=level)

    each = jnp.tile(jnp.arange(1, most + 1), VALIDATION_SEQUENCES)
    return Task(
        inputs=symbols + 1,
        outputs=symbols,
        loss=cross_entropy,
        steps=None,
        sampler=sampler,
        validation=_strings(each, 2 * most, symbols, jax.random.key(VALIDATION_SEED)),
        references={"uniform": math.log(symbols)},
        chance_accuracy=1 / symbols,
        facts={},
    )


def _strings(lengths: Int[Array, "B"], steps: int, symbols: int, key: Key[Array, ""]) -> Batch:
    """Draw sequences of T steps, in each of which strings of its length follow each other."""
    t = jnp.arange(steps)[:, None]
    said = jax.random.randint(key, (steps, len(lengths)), 0, symbols, jnp.int32)
    recalls = t % (2 * lengths) >= lengths
    targets = jnp.take_along_axis(said, jnp.maximum(t - lengths, 0), axis=0)
    inputs = jnp.where(recalls, jnp.int32(symbols), said)
    return Batch(inputs, jnp.where(recalls, targets, 0), 1.0 * recalls)
