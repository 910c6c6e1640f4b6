"""The task copy_curriculum: its strings, and the level's rule against a Python loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_study import tasks
from bptt_study.tasks.copy_curriculum import Reached
from bptt_study.validation import SettingError

KEY = jax.random.key(0)


def drawn(longest: int, size: int = 64, update: int = 3, **settings):
    """A batch at this level, read off as a Python list of (inputs, targets, mask) for each sequence."""
    sampler = tasks.copy_curriculum(**{"most": 10, "symbols": 4} | settings).sampler(30, size)
    _, losses = sampler.level.start()
    batch, fresh = jax.jit(sampler.sample)((), KEY, update, jnp.int32(longest), losses)
    assert fresh
    assert not sampler.continues
    return [np.asarray(rows).T.tolist() for rows in batch]


def test_strings_follow_each_other_and_are_recalled():
    """Each sequence is read as its strings: symbols up to the first cue, as many cues, and so on."""
    lengths = set()
    for inputs, targets, mask in zip(*drawn(longest=7, spread=4), strict=True):
        n = inputs.index(4)
        lengths.add(n)
        for start in range(0, 30, 2 * n):
            said = inputs[start : start + n]
            recall = slice(start + n, min(start + 2 * n, 30))
            count = len(range(30)[recall])
            assert all(0 <= symbol < 4 for symbol in said)
            assert inputs[recall] == [4] * count
            assert targets[recall] == said[:count]
            assert mask[start : start + n] == [0.0] * len(said)
            assert mask[recall] == [1.0] * count
    assert lengths == {3, 4, 5, 6, 7}


def test_short_strings_at_the_start_and_new_ones_at_each_update():
    assert {row.index(4) for row in drawn(longest=2)[0]} == {1, 2}
    assert {row.index(4) for row in drawn(longest=1)[0]} == {1}
    assert drawn(longest=5)[0] != drawn(longest=5, update=4)[0]


def test_the_level_follows_its_rule():
    """Against a plain loop over the losses, up to the largest length; losses before growth are forgotten."""
    settings = {"most": 4, "bound": 0.5, "mean_over": 3}
    level = tasks.copy_curriculum(**settings).sampler(8, 1).level
    bits = np.random.default_rng(0).uniform(0, 1, 60)
    longest, since, expected = 1, [], []
    for loss in bits:
        since.append(loss)
        if len(since) >= 3 and np.mean(since[-3:]) < 0.5 and longest < 4:
            longest, since = longest + 1, []
        expected.append(longest)
    assert expected[2] < 4 == expected[-1]  # it grows slowly, and stops

    reached, found = level.start(), []
    for loss in bits:
        reached = level.advance(reached, {"train_loss": jnp.asarray(loss * math.log(2))})
        found.append(int(level.scores(reached)["longest"]))
    assert found == expected
    forgotten = level.advance(
        Reached(jnp.int32(1), jnp.array([9.0, 0.1, 0.1])), {"train_loss": 0.1}
    )
    assert int(forgotten.longest) == 2
    assert np.isinf(forgotten.losses).all()


def test_validation_has_every_length():
    inputs = np.asarray(tasks.copy_curriculum(most=5).validation.inputs)
    first = (inputs == 2).argmax(axis=0)
    assert inputs.shape == (10, 80)
    assert np.bincount(first).tolist() == [0, 16, 16, 16, 16, 16]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"symbols": 1}, "symbols"),
        ({"most": 0}, "most"),
        ({"most": 10**6}, "most"),
        ({"spread": -1}, "spread"),
        ({"bound": 0}, "bound"),
        ({"mean_over": 0}, "mean_over"),
        ({"mean_over": 10**12}, "mean_over"),
    ],
)
def test_settings_out_of_range(settings, name):
    with pytest.raises(SettingError, match=f"`{name}` must be"):
        tasks.copy_curriculum(**settings)


def test_the_longest_string_must_fit():
    with pytest.raises(SettingError, match=r"`budget\.steps` must be .*\(20\); got 19"):
        tasks.copy_curriculum(most=10).sampler(19, 1)
