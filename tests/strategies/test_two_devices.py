"""A batch split over two devices, for every strategy that says how: in a process that has them."""

from pathlib import Path

import pytest
from support import in_a_process_with


@pytest.mark.slow
def test_in_a_process_with_two_devices():
    """All in one process, whose start takes longer than the tests."""
    here = Path(__file__).parent
    said = in_a_process_with(2, str(here), "split_batch")
    assert "skipped" not in said, said
    for file in here.glob("test_*.py"):
        named = file != Path(__file__) and "def test_split_batch" in file.read_text(
            encoding="utf-8"
        )
        assert named == (file.name in said), said
