"""Damage of any kind: what is on disk is as it was, or it is named and set aside."""

import json

import chaos
import numpy as np
import pytest
from support import TINY, run_folders

from bptt_study import files
from bptt_study.report import csv_tables
from bptt_study.runner import run_folder, status
from bptt_study.validation import SettingError


def test_a_checkpoint_with_any_flipped_bit(tmp_path):
    """It is set aside, or what is read is the same; `make chaos` flips every bit."""
    rng = np.random.default_rng(0)
    aside = chaos.flip_bits(tmp_path, rng.integers(0, 10**9, 400))
    assert 100 < aside < 400, "some bits are read by nobody, such as those of dates"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "run.json is not of format 1"),
        ({"rows": "many"}, "run.json has no rows"),
        ([], "run.json is not of format 1"),
    ],
)
def test_a_run_record_that_is_foreign(command, tmp_path, change, reason):
    """Though its seal is whole, as another program or version may have made it."""
    assert command(*TINY, "study=mine", "seeds=1")[0] == 0
    (folder,) = run_folders(tmp_path / "results" / "runs" / "mine")
    whole = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != files.SEAL}
    about = json.loads(whole["run.json"])
    assert about["format"] == 1
    whole["run.json"] = json.dumps(about | change if change else change).encode()
    rows = csv_tables.read_table(folder / "rows.csv")
    files.write_folder(folder, whole)
    code, out, err = command(*TINY, "study=mine", "seeds=1")
    assert code == 0, err
    assert reason in out
    assert csv_tables.read_table(folder / "rows.csv").equals(rows)
    assert len(list(folder.parent.glob("*.aside-1"))) == 1


def test_a_sweep_record_of_another_format(tmp_path, monkeypatch):
    sweep = run_folder.Sweep(tmp_path, "mine", None, {})
    sweep.save()
    assert run_folder.latest_sweep(tmp_path, "mine") == sweep
    monkeypatch.setattr(run_folder, "FORMAT", 2)
    with pytest.raises(SettingError, match="was not written by this version of bptt-study"):
        run_folder.latest_sweep(tmp_path, "mine")


def test_status_holds_the_tables_to_what_was_gathered(command, tmp_path, capsys):
    def says() -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            status.main([str(tmp_path / "results" / "mine")])
        return int(stop.value.code or 0), capsys.readouterr().out

    own = [*TINY, "study=mine", "seeds=1"]
    assert command("-m", *own)[0] == 0
    assert says()[0] == 0
    table = tmp_path / "results" / "mine" / "summary.csv"
    whole = table.read_bytes()
    for damaged in (whole[:-10], whole.replace(b"1", b"2", 1), None):
        table.unlink() if damaged is None else table.write_bytes(damaged)
        code, out = says()
        assert code == 1
        assert f"tables: {table} is missing, truncated or edited; bptt-study-status --gather" in out
    table.write_bytes(whole)
    assert command(*own, "first_seed=5")[0] == 0, "a run alone gathers nothing"
    code, out = says()
    assert code == 1
    assert "tables: they lack 1 finished run; bptt-study-status --gather makes them anew" in out
    note = tmp_path / "results" / "runs" / "mine" / "tables.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"tables": {"../evil": ""}}))
    assert "is edited or of another version" in says()[1]
    with pytest.raises(SystemExit) as stop:
        status.main([str(tmp_path / "results" / "mine"), "--gather"])
    assert stop.value.code == 0
    assert says()[0] == 0


def test_a_run_that_goes_and_comes_back_while_tables_are_made(
    command, tmp_path, capsys, monkeypatch
):
    """A table that was read in between lacks it."""
    assert command("-m", *TINY, "study=mine", "seeds=1", "first_seed=0,1")[0] == 0
    mine, runs = tmp_path / "results" / "mine", tmp_path / "results" / "runs" / "mine"
    before = {file: file.read_bytes() for file in mine.iterdir()}
    run, aside, gather = run_folders(runs)[0], tmp_path / "aside", csv_tables.gather

    def reads(folders, name):
        folders = list(folders)
        if name == "costs.csv":
            run.rename(aside)
        table = gather(folders, name)
        if aside.exists():
            aside.rename(run)
        return table

    monkeypatch.setattr(csv_tables, "gather", reads)
    with pytest.raises(SystemExit) as stop:
        status.main([str(mine), "--gather"])
    assert stop.value.code == 2
    assert f"Meanwhile {run.name} went." in capsys.readouterr().err
    assert {file: file.read_bytes() for file in mine.iterdir()} == before


def test_a_run_that_is_set_aside_while_tables_are_made(command, tmp_path, capsys, monkeypatch):
    """Another process may do so. No table mixes what was there with what is gone."""
    assert command("-m", *TINY, "study=mine", "seeds=1", "first_seed=0,1")[0] == 0
    mine, runs = tmp_path / "results" / "mine", tmp_path / "results" / "runs" / "mine"
    before = {file: file.read_bytes() for file in mine.iterdir()}
    run, other = run_folders(runs)
    gather = csv_tables.gather

    def reads(folders, name):
        table = gather(folders, name)
        if run.exists():
            run.rename(tmp_path / "aside")
        return table

    monkeypatch.setattr(csv_tables, "gather", reads)
    with pytest.raises(SystemExit) as stop:
        status.main([str(mine), "--gather"])
    assert stop.value.code == 2
    assert f"Meanwhile {run.name} went." in capsys.readouterr().err
    assert {file: file.read_bytes() for file in mine.iterdir()} == before
    assert other.exists()
