"""The chaos of `make chaos`, at a size that CI bears."""

import chaos


def test_a_sweep_in_chaos_ends_as_an_undisturbed_one(tmp_path):
    grid = ["strategy=fixed,randomized", "truncation=2,3"]
    chaos.chaos(tmp_path, grid, kills=2, seed=0)
