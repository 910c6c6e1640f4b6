"""Runs that differ in their first seed are runs of other seeds."""

import pytest
from support import TINY

from bptt_study.report import csv_tables


@pytest.mark.slow
def test_the_first_seed_is_the_one_that_is_run(command, tmp_path):
    """By its number in the table, and by its numbers: another start, other draws."""
    arguments = (
        *TINY,
        "study=mine",
        "first_seed=0,3",
        "seeds=1",
        f"results_dir={tmp_path / 'results'}",
    )
    status, _, errors = command("-m", *arguments)
    assert status == 0, errors
    table = csv_tables.read_table(tmp_path / "results" / "mine" / "table.csv.gz")
    start = table[table["update"] == 0].set_index("seed")["validation_loss"]
    assert sorted(start.index) == [0, 3]
    assert start[0] != start[3]
