"""A damaged table or record of costs is one line that names the file and the way out, and never numbers."""

import gzip
import json

import pandas as pd
import pytest
import studies

import bptt_study as bs
from bptt_study.report import csv_tables, provenance, sweep_figures
from bptt_study.runner import figures, page
from bptt_study.validation import SettingError


@pytest.fixture
def folder(tmp_path):
    return studies.write(tmp_path / "own", table=studies.headline())


def truncated(table: bytes) -> bytes:
    return table[: len(table) // 2]


def with_rows(change) -> object:
    """The function from a table's bytes to those of the changed table."""

    def changed(table: bytes) -> bytes:
        lines = gzip.decompress(table).decode().splitlines(keepends=True)
        return gzip.compress("".join(change(lines)).encode())

    return changed


READERS = {
    "figures": lambda folder: figures.main([str(folder)]),
    "figures of any sweep": lambda folder: figures.main([str(folder), "--hue", "strategy"]),
    "report": lambda folder: page.main([str(folder)]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "EOFError"),
        (lambda _: b"no gzip at all", "BadGzipFile"),
        (lambda _: gzip.compress(b""), "EmptyDataError"),
        (lambda _: gzip.compress(b"\xff\xfe,\xff"), "UnicodeDecodeError"),
        (with_rows(lambda lines: ["a,b\n", "1,2\n"]), "it lacks run, seed, update, task"),
        (with_rows(lambda lines: [line.replace("diverged", "lost") for line in lines]), "it lacks diverged"),
        (with_rows(lambda lines: lines[:1]), "it has no row"),
        (with_rows(lambda lines: [*lines, *lines[1:]]), "it has a row twice"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_one_line(folder, damage, reason, reader, capsys):
    file = folder / csv_tables.TABLE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SystemExit, match="2"):
        READERS[reader](folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`file` must be as it was gathered; got {file}. Reason: {reason}" in line
    assert f"`bptt-study-status {folder} --gather` makes it anew" in line
    with pytest.raises(SettingError, match="must be as it was gathered"):
        bs.results.load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '[{"run": "z1", "update": [0, 1]}]'])
def test_damaged_costs_are_one_line(folder, text, capsys):
    file = folder / provenance.FILE
    file.write_text(text)
    drawn = sweep_figures.draw(folder, x="seconds")
    of_curves = [line for line in drawn.failed if f"got {file}. Reason: " in line]
    assert len(of_curves) == len(drawn.failed) == 2, "the curves of two scores; others need none"
    with pytest.raises(SystemExit, match="2"):
        page.main([str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`file` must be as it was gathered; got {file}. Reason: " in line


COSTS = {"run": "z1", "update": [0], "seconds": [1.0]}


@pytest.mark.parametrize(
    "change",
    [{"run": ["z1"]}, {"version": ["x"]}, {"update": [1e999]}, {"update": [10**30]}, {"seconds": ["x"]}],
    ids=json.dumps,
)  # fmt: skip
def test_foreign_costs_are_one_line(tmp_path, change):
    (tmp_path / provenance.FILE).write_text(json.dumps([COSTS]))
    assert provenance.read(tmp_path)["seconds"].tolist() == [1.0]
    for text in (json.dumps([COSTS | change]), "[" * 10**5):
        (tmp_path / provenance.FILE).write_text(text)
        with pytest.raises(
            SettingError, match=r"must be as it was gathered; got .*provenance\.json"
        ):
            provenance.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "other", "why"),
    [("validation_loss", "lost", "lacks validation_loss"), ("0.5", "half", "has texts in validation_loss")],
)  # fmt: skip
def test_foreign_rows_of_a_run_are_one_line(tmp_path, name, other, why):
    """Though the seal of the run is whole."""
    header = "run,seed,update,task,strategy,truncation_length,validation_loss,diverged"
    file = tmp_path / "rows.csv"
    file.write_text(f"{header}\na,0,0,copy,full,,0.5,False\n")
    assert len(csv_tables.gather([tmp_path], file.name)) == 1
    file.write_text(file.read_text().replace(name, other))
    said = rf"got {file}. Reason: it {why}. Once {tmp_path} is removed, the same command makes the run again"
    with pytest.raises(SettingError, match=said):
        csv_tables.gather([tmp_path], file.name)


def test_missing_costs_leave_curves_over_seconds_out(folder):
    (folder / provenance.FILE).unlink()
    drawn = sweep_figures.draw(folder, x="seconds")
    assert drawn.failed == []
    said = "figure learning_curves_accuracy: there are no seconds, for lack of provenance.json"
    assert said in drawn.left_out
    page.main([str(folder)])


def test_a_damaged_table_of_a_probe_fails_its_figure_alone(tmp_path, kept):
    rows = studies.networks()
    folder = studies.write(tmp_path / "own", table=rows, norms=studies.norms(rows))
    file = folder / "gradient_norms.csv.gz"
    file.write_bytes(truncated(file.read_bytes()))
    drawn = sweep_figures.draw(folder)
    assert len(drawn.failed) == 2 and all(f"got {file}. Reason: " in line for line in drawn.failed)
    assert "learning_curves_accuracy" in kept
    assert isinstance(csv_tables.read_rows(folder), pd.DataFrame)
