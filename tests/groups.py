"""The group of each test, which one process runs, and a sample of the cases of each test."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256


def group_of(test: str) -> str:
    """Tests of one file share what they compiled, so one process runs them; strategies share nothing."""
    file, _, name = test.partition("::")
    strategy = re.match(r"test_strategy\[([^-]+)-", name)
    return f"{file} {strategy[1]}" if strategy and file.endswith("test_check_strategy.py") else file


def sample(tests: Iterable[str]) -> set[str]:
    """Choose √n of the n cases of each test, spread by a hash over all parameters."""
    cases = defaultdict(list)
    for test in tests:
        cases[test.partition("[")[0]].append(test)
    return {
        case
        for of_test in cases.values()
        for case in sorted(of_test, key=lambda c: sha256(c.encode()).digest())[
            : round(math.sqrt(len(of_test)))
        ]
    }
