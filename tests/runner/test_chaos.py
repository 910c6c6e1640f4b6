"""The chaos of `make chaos`, at a size that CI bears."""

import chaos
import pytest


@pytest.mark.slow
def test_a_sweep_in_chaos_ends_as_an_undisturbed_one(tmp_path):
    grid = ["strategy=fixed,randomized", "truncation=2,3"]
    chaos.chaos(tmp_path, grid, kills=2, seed=0)
    chaos.races(tmp_path, grid, arrivals=8, rounds=1, seed=0)


def test_a_small_sweep_in_chaos(tmp_path):
    """Killed and failed at changes of the disk, its files damaged, and beside another; in one process."""
    kinds = ("writes=1", "kill=60", "error=60", "errors=99", "flips=6", "race=1")
    said = chaos.strikes(tmp_path / "small", 0, *kinds).splitlines()
    assert [line.split()[0] for line in said[:4]] == ["kill", "kill", "error", "errors"]
    assert "with status -9" in said[1] and "with status 1" in said[3]
    assert said[4].startswith("6 damaged files") and said[5].endswith("1 ends of two small sweeps")
