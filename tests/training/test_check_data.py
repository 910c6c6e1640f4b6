"""A task's data before a run: numbers that JAX would read as others, or sum to nothing, are named."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop.repeats import say
from bptt_study.training.budget import Budget
from bptt_study.training.check_data import check_axes, check_data, check_draws
from bptt_study.training.train import _largest_loss
from bptt_study.types import Batch, Sampler
from bptt_study.validation import SettingError

COPY = bs.tasks.copy(lag=3, length=2, symbols=4)  # symbols 0 … 5, classes 0 … 3, masked at first
BATCH = bs.Batch(*(np.array(a[:, :3]) for a in COPY.validation))


def changed(part: str, place: tuple[int, int], value: float) -> bs.Batch:
    array = np.array(getattr(BATCH, part), type(value))
    array[place] = value
    return BATCH._replace(**{part: array})


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (changed("inputs", (0, 0), 6), r"inputs` must be whole numbers 0 … 5, .* got 6"),
        (changed("inputs", (0, 0), -1), r"inputs` must be whole numbers 0 … 5, .* got -1"),
        (changed("inputs", (4, 2), np.nan), r"inputs` must be finite numbers; got nan"),
        (changed("targets", (4, 2), 4), r"targets` must be whole numbers 0 … 3, .* got 4"),
        (changed("targets", (4, 2), np.inf), r"targets` must be finite numbers; got inf"),
        (changed("mask", (4, 2), -1.0), r"mask` must be finite numbers of at least 0; got -1"),
        (changed("mask", (0, 0), np.nan), r"mask` must be finite numbers of at least 0; got nan"),
        (BATCH._replace(mask=0 * BATCH.mask), r"mask` must be greater than 0 .* got 0 everywhere"),
        (bs.Batch(*(a[:, :0] for a in BATCH)), r"mask` must be greater than 0 .* got 0 everywhere"),
        (BATCH._replace(targets=BATCH.targets[1:]), r"targets` must be of shape \[T, B, …\]"),
    ],
)
def test_what_a_run_would_misread(batch, said):
    with pytest.raises(SettingError, match=rf"`task\.validation\.{said}"):
        check_data("task.validation", batch, COPY)


def test_a_part_of_a_task_with_fixed_steps_has_so_many():
    """Else the validation part asks for lags that training never has, or lies batch-major."""
    turned = jax.tree.map(lambda a: np.swapaxes(a, 0, 1), BATCH)
    shorter = jax.tree.map(lambda a: a[1:], BATCH)
    check_data("task.validation", BATCH, COPY, steps=5)
    check_data("task.validation", shorter, COPY)
    for part, found in ((turned, r"\[3, 5\]"), (shorter, r"\[4, 3\]")):
        with pytest.raises(
            SettingError, match=rf"`task\.training` must be .* T = 5.*; got .*{found}"
        ):
            check_data("task.training", part, COPY, steps=5)


@pytest.mark.parametrize("turned", [{"inputs"}, {"targets"}, {"inputs", "targets", "mask"}])
@pytest.mark.parametrize("size", [2, 5])
def test_batches_are_time_major_also_if_there_are_as_many_sequences_as_steps(turned, size):
    def sampler(steps, size):
        made = COPY.sampler(steps, size)

        def sample(data, key, update):
            batch, fresh = made.sample(data, key, update)
            return batch._replace(**{n: getattr(batch, n).T for n in turned}), fresh

        return made._replace(sample=sample)

    check_axes(COPY, 5, size)
    with pytest.raises(SettingError, match=r"`task\.sampler` must be one of \[5, .*; got .*, 5\]"):
        check_axes(COPY._replace(sampler=sampler), 5, size)


def test_a_sampler_may_refuse_the_size_that_tells_its_axes_apart():
    def sampler(steps, size):
        if size % 5:
            raise ValueError(size)
        return COPY.sampler(steps, size)

    check_axes(COPY._replace(sampler=sampler), 5, 5)
    check_axes(COPY._replace(sampler=lambda steps, size: COPY.sampler(steps, 5)), 5, 5)


@pytest.mark.parametrize(
    "batch",
    [
        BATCH,
        changed("targets", (0, 0), -1),
        changed("targets", (0, 0), np.nan),
        BATCH._replace(mask=BATCH.mask.astype(bool)),
        BATCH._replace(mask=BATCH.mask / 2),
        BATCH._replace(inputs=BATCH.inputs[..., None] + 200),  # features that are whole numbers
        BATCH._replace(inputs=jnp.asarray(BATCH.inputs, jnp.bfloat16)),
    ],
)
def test_what_is_masked_or_no_id_may_be_anything(batch):
    check_data("task.validation", batch, COPY)


def test_the_first_part_of_a_stream_may_wait_for_its_first_token():
    check_data("task.sampler", BATCH._replace(mask=0 * BATCH.mask), COPY, may_be_empty=True)


def sampled(choose):
    """Check draws of a sampler that gets another key and update than it is given."""
    made = COPY.sampler(5, 2)
    sample = lambda data, key, update: made.sample(data, *choose(key, update))  # noqa: E731
    sampler = made._replace(sample=sample)
    draw = lambda seed: jax.vmap(lambda n: sample(made.data, jax.random.key(seed), n)[0])  # noqa: E731
    check_draws(COPY, sampler, *(draw(seed)(np.arange(2)) for seed in range(2)))


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda key, update: (key, update), ""),
        (lambda key, update: (key, 3), "all updates have the same batch"),
        (lambda key, update: (jax.random.key(3), update), "all seeds have the same batches"),
        (
            lambda key, update: (jax.random.key(3), 4),
            "all updates have the same batch; all seeds have the same batches",
        ),
    ],
)
def test_a_line_says_what_batches_do_not_depend_on(choose, said, caplog):
    say.cache_clear()
    for _ in range(2):
        sampled(choose)
    assert [r.getMessage() for r in caplog.records] == [f"task.sampler: {said}"][: bool(said)]


def test_a_line_says_that_the_batches_are_validated_on(caplog):
    say.cache_clear()
    many = bs.tasks.copy(lag=9, length=9)
    part = lambda update: Batch(*(a[:, :3] for a in many.validation))  # noqa: E731
    sampler = Sampler((), lambda data, key, update: (part(update), True), continues=False)
    batches = jax.tree.map(lambda a: a[None], part(0))
    check_draws(many, sampler, batches, batches)
    assert caplog.records[0].getMessage() == (
        "task.sampler: all seeds have the same batches; the sequences of the first batch are validated on, too"
    )


def test_a_sampler_that_draws_without_its_key():
    """Each call takes the next number; of two that are drawn, 1 in 256 pairs has equal batches."""
    draws = itertools.count()
    with pytest.raises(SettingError, match=r"`task\.sampler` must be a function of its arguments"):
        sampled(lambda key, update: (key, next(draws)))


@pytest.mark.parametrize(
    "make",
    [
        bs.tasks.copy,
        bs.tasks.copy_curriculum,
        bs.tasks.add,
        bs.tasks.char_lm,
        bs.tasks.digits,
        bs.tasks.series,
        bs.tasks.influence_balancing,
    ],
)
def test_the_batches_of_the_shipped_tasks(make):
    """Runs do not draw them beforehand, as each draw is a program to compile."""
    task = make()
    sampler = task.sampler(task.steps or 64, 4)
    level = sampler.level.start()
    for update in range(2):
        batch, fresh = sampler.sample(sampler.data, jax.random.key(0), update, *level)
        check_data("task.sampler", batch, task)
        assert fresh or sampler.continues
    check_axes(task, task.steps or 64, task.steps or 64)
    check_data("task.validation", task.validation, task, steps=task.steps)
    if task.training is not None:
        check_data("task.training", task.training, task, steps=task.steps)
    assert task.sampler.__module__.startswith("bptt_study.")


@pytest.mark.parametrize(
    ("references", "bound", "limit"),
    [
        ({"uniform": 2.0, "unigram": 1.0}, 10, 20),
        ({"uniform": 0}, 10, np.inf),
        ({"density": -8.6}, 10, np.inf),
        ({}, 10, np.inf),
        ({"uniform": 2.0}, None, np.inf),
    ],
)
def test_no_loss_exceeds_a_multiple_of_nothing(references, bound, limit):
    """Of a negative log-likelihood of a density, say, which is below 0."""
    budget = Budget(steps=5, batch_size=2, updates=1, divergence_bound=bound)
    assert _largest_loss(budget, COPY._replace(references=references)) == limit
