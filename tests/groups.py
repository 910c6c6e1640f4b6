"""The group of each test: one process runs the tests of a group."""

import re


def group_of(test: str) -> str:
    """Tests of one file share what they compiled, so one process runs them; strategies share nothing."""
    file, _, name = test.partition("::")
    strategy = re.match(r"test_strategy\[([^-]+)-", name)
    return f"{file} {strategy[1]}" if strategy and file.endswith("test_check_strategy.py") else file
