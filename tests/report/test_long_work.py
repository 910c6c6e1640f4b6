"""Long work says how far it is, on stderr and only after a while; short work says nothing."""

import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import studies

from bptt_study.report import csv_tables, progress
from bptt_study.report.study import Study, make
from bptt_study.runner import page


def gather(folder: Path) -> None:
    csv_tables.gather([folder, folder], csv_tables.TABLE)


def draw(folder: Path) -> None:
    make(Study("?", {"a": lambda rows: rows, "b": lambda rows: pd.DataFrame(rows)}), folder)


def report(folder: Path) -> None:
    page.write(folder.parent)


@pytest.mark.parametrize("work", [gather, draw, report])
def test_long_work_shows_progress(work, tmp_path, monkeypatch, capsys):
    rows = studies.run("a", studies.TEXT | studies.FULL, [[3.0, 2.0]] * 2)
    for name in ("own", "second"):
        studies.write(tmp_path / name, table=rows.assign(study=name))
    work(tmp_path / "own")
    assert capsys.readouterr().err == "", "it takes no time"
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    work(tmp_path / "own")
    assert ": 1 of 2\n" in capsys.readouterr().err


def test_a_terminal_has_a_bar_after_a_while(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for seconds, bar in ((0.1, True), (60, False)):
        monkeypatch.setattr(progress, "SECONDS", seconds)
        for _ in progress.shown(range(3), "waiting"):
            time.sleep(0.2)
        assert ("| 1/3 [" in capsys.readouterr().err) == bar
