"""The benchmark's contenders compute the same gradient, or its times would compare nothing."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

from bptt_study import battery

SCRIPT = Path(__file__).parents[1] / "experiments" / "bench.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cell", ["elman", "lstm"])
@pytest.mark.parametrize("window", [None, 5])
def test_ours_is_the_textbooks(bench, cell, window):
    point = bench.Point(cell, hidden=4, batch_size=2, steps=12, window=window)
    (loss, grads, state), ((expected, last), by_jax) = (
        contender(point)[0]() for contender in (bench.ours, bench.textbook)
    )
    battery.close((loss, grads, state), (expected, by_jax, last))
    other = bench.textbook(point._replace(window=4))[0]()[1]
    with pytest.raises(AssertionError):
        battery.close(grads["cell"], other["cell"], 1e-4)


def test_the_sliding_window_is_one_pass_a_loss(bench):
    point = bench.Point("elman", hidden=4, batch_size=2, steps=12, window=3)
    (loss, grads, _), (expected, by_jax) = (
        contender(point)[0]() for contender in (bench.sliding, bench.one_pass_a_loss)
    )
    battery.close((loss, grads), (expected, by_jax))


def test_every_point_of_the_grid_is_named_once(bench):
    points = bench.grid(small=False)
    assert len({str(p) for p in points}) == len(points)
    assert {p.cell for p in points} == {"elman", "gru", "lstm"}
    assert all(p.window is None or p.window < p.steps for p in points)


def test_what_the_limit_counts(bench):
    """Three products of T·B·G·H² multiply-adds, and the textbook's operations are more."""
    point = bench.Point("gru", hidden=8, batch_size=4, steps=16, window=None)
    once, _ = bench.products(point)
    shapes = [a.shape for a in jax.tree.leaves(once())]
    assert shapes == [(64, 24), (64, 8), (8, 24)]
    counted = bench.textbook(point)[1]["operations"]
    assert counted > 2 * 3 * 64 * 3 * 8 * 8
