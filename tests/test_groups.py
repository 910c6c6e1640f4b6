"""One process runs the tests of a file: the others would compile the same programs again."""

import os

import pytest
from groups import group_of, sample


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


def test_a_sample_has_cases_of_every_test():
    tests = [f"a.py::test_b[{x}-{y}]" for x in range(6) for y in range(6)]
    tests += ["a.py::test_c", "a.py::test_d[0]", "a.py::test_d[1]"]
    kept = sample(tests)
    assert kept == sample(reversed(tests))  # each process chooses the same
    assert kept <= set(tests)
    counts = [sum(case.startswith(f"a.py::test_{name}") for case in kept) for name in "bcd"]
    assert counts == [6, 1, 1]
    values = {case[case.index("[") + 1 :] for case in kept if "test_b" in case}
    assert min(len({value[i] for value in values}) for i in (0, 2)) > 2
