"""Published statements beside ours: looked up, judged by their bounds, and written down as of now."""

import pandas as pd
import published
import pytest
import quotes
import yaml
from test_results import RESULTS

from bptt_study.report import csv_tables

SAID = {
    "source": "A 2020", "item": "table 1", "seen": "text", "protocol": "Ten steps.", "theirs": "below 1",
    "bounds": [0, 1], "table": "s/t", "rows": {"a": 1}, "column": "x",
}  # fmt: skip


def compared(tmp_path, **changes):
    (tmp_path / "s").mkdir(exist_ok=True)
    rows = [(1, 0.5, 0.4, 0.6, 3), (2, 0.9, 0.8, 1.5, 3), (3, 2.0, 1.5, 2.5, 3)]
    table = pd.DataFrame(rows, columns=["a", "x", "x_low", "x_high", "n"])
    csv_tables.write_table(table.assign(y=table["x"]), tmp_path / "s" / "t.csv")
    (tmp_path / "published.yaml").write_text(yaml.safe_dump([SAID | changes]))
    return published.compare(tmp_path)


@pytest.mark.parametrize(("row", "agrees"), [(1, "yes"), (2, "partly"), (3, "no")])
def test_the_whole_interval_must_lie_within_the_bounds(row, agrees, tmp_path):
    table = compared(tmp_path, rows={"a": row}, why="Another rate.").iloc[0]
    assert table["agrees"] == agrees and table["n"] == 3
    assert table["ours_low"] < table["ours"] < table["ours_high"]


def test_a_number_without_an_interval_is_one_point(tmp_path):
    table = compared(tmp_path, column="y", bounds=[0.5, float("inf")]).iloc[0]
    assert table["ours_low"] == table["ours"] == table["ours_high"] == 0.5
    assert table["agrees"] == "yes"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rows": {"a": 3}}, "table 1 of A 2020 does not agree, and has no `why`"),
        ({"rows": {"a": 2}}, "table 1 of A 2020 does not agree, and has no `why`"),
        ({"rows": {"a": 4}}, "a=4 selects 0 rows"),
        ({"seen": "heard"}, "`seen` must be one of text, code, abstract, second hand; got heard"),
    ],
)
def test_what_is_not_found_or_not_explained_is_an_error(changes, line, tmp_path):
    with pytest.raises(ValueError, match=line):
        compared(tmp_path, **changes)


def test_the_committed_table_is_that_of_now():
    """`make published` writes it again after a change of the studies' tables; `make quotes` writes its page."""
    now = csv_tables.packed(published.compare(RESULTS), "published.csv")
    assert now == (RESULTS / "published.csv").read_bytes()
    assert RESULTS.parent / "docs" / "published.md.j2" in set(quotes.templates(RESULTS.parent))


def test_at_least_six_sources():
    table = csv_tables.read_table(RESULTS / "published.csv")
    assert table["source"].nunique() >= 6
    assert {"yes", "no"} <= set(table["agrees"])
