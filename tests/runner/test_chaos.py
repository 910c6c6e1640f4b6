"""The chaos of `make chaos`, at a size that CI bears."""

import chaos
import pytest


@pytest.mark.slow
def test_a_sweep_in_chaos_ends_as_an_undisturbed_one(tmp_path):
    grid = ["strategy=fixed,randomized", "truncation=2,3"]
    chaos.chaos(tmp_path, grid, kills=2, seed=0)
    chaos.races(tmp_path, grid, arrivals=8, rounds=0, seed=0)


@pytest.mark.parametrize("how", ["kill", "error"])
def test_before_each_change_of_the_disk(tmp_path, how):
    assert chaos.at_each_change(tmp_path, how) > 10
