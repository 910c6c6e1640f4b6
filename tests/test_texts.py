"""Texts in tables stay what they are, whatever characters they have and whatever they look like."""

import numpy as np
import pandas as pd
import pytest
from support import TINY

from bptt_study.report import csv_tables

LOOK_LIKE_OTHERS = ["NA", "null", "NaN", "None", "007", "1e3", "2024_01_15", "True", "inf", "#N/A"]


@pytest.mark.parametrize("name", ["cuts.csv", "cuts.csv.gz"])
def test_every_character_survives(tmp_path, name):
    """From U+0000 to U+2FFF; a carriage return alone and within a text; and numbers stay numbers."""
    texts = [*map(chr, range(0x3000)), *LOOK_LIKE_OTHERS, "a\r\nb", 'say "no", twice', " ", "=1+1"]
    numbers = np.where(np.arange(len(texts)) % 7, 1.5, np.nan)
    table = pd.DataFrame({"character": texts, "study": texts[::-1], "number": numbers})
    csv_tables.write_table(table, tmp_path / name)
    pd.testing.assert_frame_equal(csv_tables.read_table(tmp_path / name), table)


def test_a_table_without_one_is_written_as_ever():
    table = pd.DataFrame({"study": ["a", "b,c"], "loss": [1.0, np.nan]})
    assert csv_tables.packed(table, "table.csv") == b'study,loss\na,1\n"b,c",\n'


@pytest.mark.parametrize("study", ["007", "1e3", "2024_01_15", "true"])
def test_a_study_that_looks_like_a_number(command, tmp_path, study):
    """Hydra reads it as one, so its text is lost: refused, with the quotes that keep it."""
    code, _, err = command(*TINY, f"study={study}")
    assert code == 2
    assert "`study` must be a text; got" in err
    assert """such as 'study="007"'""" in err
    assert list(tmp_path.iterdir()) == []


def test_a_study_in_quotes_and_one_like_nothing(command, tmp_path):
    for written, study in (('study="007"', "007"), ("study=NA", "NA")):
        code, _, err = command("-m", *TINY, "seeds=1", written)
        assert code == 0, err
        table = csv_tables.read_table(tmp_path / "results" / study / "table.csv")
        assert set(table["study"]) == {study}
