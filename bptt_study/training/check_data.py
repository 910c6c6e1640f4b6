"""Checks of a task's data: JAX reads a symbol that does not exist as another, and sums nothing to 0."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.backprop.compare import as_floats, said
from bptt_study.backprop.repeats import alike, repeated, say
from bptt_study.training.programs import METRICS
from bptt_study.types import Batch, Level, Sampler, Task
from bptt_study.validation import SettingError


def check_axes(task: Task, steps: int, batch_size: int) -> None:
    """Check that the arrays of a training batch are [T, B, …].

    If T = B, those of a batch with a sequence less tell the axes apart, unless the sampler refuses it.

    Args:
      task: The task.
      steps: T, time steps per update.
      batch_size: B, sequences per update.

    Raises:
      SettingError: For the first array with other axes.
    """
    for size in (batch_size, batch_size - 1) if steps == batch_size > 1 else (batch_size,):
        try:
            batch = _shapes(task, steps, size)
        except (
            Exception
        ):  # the sampler may raise anything, and may refuse a size that nobody asked for
            if size == batch_size:
                raise
            return
        for name, array in batch._asdict().items():
            found = list(array.shape[:2])
            # a sampler may have batches of one size alone, whatever it is asked for
            if found != [steps, size] and (size == batch_size or found == [size, steps]):
                allowed = (
                    f"one of {[steps, size]}, for budget.steps={steps} and budget.batch_size={size}"
                )
                raise SettingError("task.sampler", f"one of {name} [T, B] = {found}", allowed)


def _shapes(task: Task, steps: int, size: int) -> Any:
    """Trace the sampler for the shapes of its first batch."""
    sampler = task.sampler(steps, size)
    key, update = jax.random.key(0), np.int32(0)
    return jax.eval_shape(sampler.sample, sampler.data, key, update, *sampler.level.start())[0]


def check_data(
    name: str, batch: Batch, task: Task, may_be_empty: bool = False, steps: int | None = None
) -> None:
    """Check that the symbols, classes and weights of a batch exist. Masked targets may be anything.

    Args:
      name: The batch in messages, such as `task.validation`.
      batch: The batch.
      task: The task, which says how many symbols and classes there are.
      may_be_empty: Whether the batch may have no token that counts.
      steps: The only length that its sequences may have. None: any.

    Raises:
      SettingError: For the first array that does not fit, with one of its numbers.
    """
    inputs, targets, mask = map(np.asarray, batch)
    for part, array in (("inputs", inputs), ("targets", targets)):
        if array.shape[:2] != mask.shape:
            allowed = f"of shape [T, B, …] with the mask's [T, B] = {list(mask.shape)}"
            raise SettingError(f"{name}.{part}", f"shape {list(array.shape)}", allowed)
    if steps is not None and len(mask) != steps:
        allowed = f"[T, B] with T = {steps}, the length of this task's sequences (task.steps)"
        raise SettingError(name, f"[T, B] = {list(mask.shape)}", allowed)
    _all(f"{name}.mask", mask, np.isfinite(mask) & (mask >= 0), "finite numbers of at least 0")
    if not (may_be_empty or mask.any()):
        raise SettingError(f"{name}.mask", "0 everywhere", "greater than 0 for at least one token")
    _exist(f"{name}.inputs", inputs, inputs.ndim, task.inputs)
    _exist(f"{name}.targets", targets[mask != 0], targets.ndim, task.outputs)


def check_level(level: Level) -> list[str]:
    """Check that the functions of a level fit together: training carries it, and its scores fill cells.

    Args:
      level: The level of a sampler.

    Returns:
      The names of its scores.

    Raises:
      SettingError: For the first part that is no function, or returns something else.
    """
    where = "task.sampler.level"
    for name, part in level._asdict().items():
        if not callable(part):
            raise SettingError(f"{where}.{name}", part, "a function")
    start = level.start()
    if not isinstance(start, tuple):
        allowed = "a function that returns a tuple of arrays"
        raise SettingError(f"{where}.start", f"one that returns {type(start).__name__}", allowed)
    metrics = dict.fromkeys(METRICS, jnp.zeros(()))
    after, scores = jax.eval_shape(lambda: (level.advance(start, metrics), level.scores(start)))
    if said(after) != said(start):
        allowed = f"a function that returns a level such as the first: {said(start)}"
        raise SettingError(f"{where}.advance", f"one that returns {said(after)}", allowed)
    for name, score in scores.items():
        if score.shape:
            allowed = "a function that returns single numbers by name"
            raise SettingError(f"{where}.scores", f"{name}: {said(score)}", allowed)
    return [*scores]


def check_draws(task: Task, sampler: Sampler, batches: Batch, others: Batch) -> None:
    """Check that batches depend on key and update alone; say where they depend on neither, or are validated on.

    Args:
      task: The task.
      sampler: Its sampler.
      batches: The batches of the first updates, leaves [N, T, B, …].
      others: The same with another key.

    Raises:
      SettingError: For a sampler that gives another batch for the same key and update.
    """
    arguments = sampler.data, jax.random.key(0), np.int32(0), *sampler.level.start()
    repeated("task.sampler", sampler.sample, *arguments)
    first, second = (Batch(*(a[n] for a in batches)) for n in (0, -1))
    both = (first, task.validation)
    trained, validated = (_sequences(part, min(len(b.mask) for b in both)) for part in both)
    found = {
        "all updates have the same batch": len(batches.mask) > 1 and alike(first, second),
        "all seeds have the same batches": alike(batches, others),
        "the sequences of the first batch are validated on, too": (
            # if there are few different sequences at all, those of the validation part are repeated
            trained <= validated and len(validated) == task.validation.mask.shape[1]
        ),
    }
    if any(found.values()):
        say(f"task.sampler: {'; '.join(fact for fact, holds in found.items() if holds)}")


def _sequences(batch: Batch, steps: int) -> set[bytes]:
    """Return inputs and targets of each sequence up to a step."""
    inputs, targets = (np.swapaxes(a[:steps], 0, 1) for a in as_floats(batch[:2]))
    return {x.tobytes() + y.tobytes() for x, y in zip(inputs, targets, strict=True)}


def _exist(name: str, values: np.ndarray, axes: int, size: int) -> None:
    """Check that ids [T, B] are below `size`, and that anything else is finite."""
    if axes == 2 and np.issubdtype(values.dtype, np.integer):
        allowed = f"whole numbers 0 … {size - 1}, the task's ids; what is no id must be a float"
        _all(name, values, (values >= 0) & (values < size), allowed)
    else:
        _all(name, values, np.isfinite(values), "finite numbers")


def _all(name: str, values: np.ndarray, good: Any, allowed: str) -> None:
    if not good.all():
        raise SettingError(name, values[~good][0], allowed)
