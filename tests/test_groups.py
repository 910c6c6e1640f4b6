"""One process runs the tests of a file: the others would compile the same programs again."""

import os

import pytest
from groups import group_of


@pytest.mark.parametrize("number", range(6))
def test_one_process_runs_a_file(number, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "processes").open("a+") as file:
        print(os.getpid(), file=file)
        file.seek(0)
        assert len(set(file.read().split())) == 1


def test_groups():
    assert group_of("tests/a/test_b.py::test_c[d::e-f]") == "tests/a/test_b.py"
    check = "tests/testing/test_check_strategy.py"
    assert group_of(f"{check}::test_strategy[tbptt_2_5-lstm-sizes]") == f"{check} tbptt_2_5"
    assert group_of(f"{check}::test_planted_fault_is_found[a-b]") == check
