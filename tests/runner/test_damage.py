"""Damage of any kind: what is on disk is as it was, or it is named and set aside."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import chaos
import numpy as np
import pytest
from support import TINY, run_folders

import bptt_study as bs
from bptt_study import files
from bptt_study.report import csv_tables
from bptt_study.runner import census, figures, locks, page, run_folder, status, stories
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
        ({"code": {"x": ["y"]}}, "run.json has no code"),
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


ENTRY = {"overrides": [], "rows": 1, "corpus_sha256": None, "config": {}, "choices": {}}
RECORD = {"format": 1, "experiment": None, "command": "believed", "runs": {"abc": ENTRY}}
BARE = {name: value for name, value in ENTRY.items() if name != "corpus_sha256"}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    "foreign",
    [
        [], {}, None, RECORD | {"format": 99}, RECORD | {"format": True}, RECORD | {"command": 3},
        RECORD | {"experiment": "../x"}, RECORD | {"runs": [ENTRY]}, RECORD | {"runs": {"..": ENTRY}},
        *(
            RECORD | {"runs": {"abc": entry}}
            for entry in (BARE, ENTRY | {"corpus_sha256": 3}, ENTRY | {"code": {"x": ["y"]}},
                          ENTRY | {"choices": []}, ENTRY | {"overrides": [3]}, ENTRY | {"rows": True})
        ),
    ],
    ids=lambda foreign: json.dumps(foreign)[:60],
)  # fmt: skip
def test_a_sweep_record_that_is_foreign(tmp_path, capsys, foreign, last):
    """Though its name is its checksum. The last is named in a line, and an earlier one names no runs."""
    run_folder.Sweep(tmp_path, "mine", None, {"abd": ENTRY}).save()
    content = json.dumps(foreign)
    name = f"{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"
    folder = tmp_path / "runs" / "mine" / "sweeps"
    (folder / name).write_text(content)
    if last:
        (folder / "latest.json").write_text(json.dumps(name))
    with pytest.raises(SystemExit) as stop:
        status.main([str(tmp_path / "mine")])
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == ((2, 1) if last else (1, 0))
    if last:
        assert f"{name} was not written by this version of bptt-study" in err
    else:
        latest = run_folder.latest_sweep(tmp_path, "mine")
        assert run_folder.by_sweep(latest, ["abc"]) == ([], ["abc"])


NOTE = {
    "format": 1,
    "runs": ["abc"],
    "versions": {},
    "only_latest": False,
    "made": [],
    "tables": {},
}


@pytest.mark.parametrize(
    "change",
    [{"format": True}, {"runs": "abc"}, {"runs": [".."]}, {"made": {"a": 1}}, {"made": [".."]},
     {"made": ["README.md"]}, {"tables": {"a\0": "x"}}, {"tables": {"..": "x"}}, {"versions": {"../x": "y"}}],
    ids=json.dumps,
)  # fmt: skip
def test_a_note_of_tables_that_is_foreign(tmp_path, change):
    """It would name files to be removed."""
    note = tmp_path / "runs" / "mine" / "tables.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(NOTE))
    assert census.runs(tmp_path / "mine") == {"abc"}
    note.write_text(json.dumps(NOTE | change))
    assert census.runs(tmp_path / "mine") == census.made(tmp_path / "mine") == set()
    (fault,) = census.faults(tmp_path / "mine")
    assert "tables.json is edited or of another version" in fault


@pytest.mark.parametrize("content", ["²\nhost", "1" * 5000])
def test_a_lock_file_that_is_garbled(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    found = locks.holder(tmp_path / "lock")
    assert found is not None and found.process is None


def test_a_reason_that_is_garbled(tmp_path, capsys):
    run_folder.Sweep(tmp_path, "mine", None, {"abc": ENTRY}).save()
    run_folder.run_paths(tmp_path, "mine", "abc").failure.write_bytes(b"no \xff memory\n")
    with pytest.raises(SystemExit):
        status.main([str(tmp_path / "mine")])
    assert "abc (): no \ufffd memory" in capsys.readouterr().out


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
    note.unlink()
    code, out = says()
    assert code == 1, "the process was killed before it noted the tables"
    assert "tables: they were not gathered; bptt-study-status --gather makes them" in out


@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_status_lists_what_was_started_whatever_started_it(tmp_path, capsys, swept, search):
    """It ended with status 0 and without a word, unless the last sweep had noted the run."""
    sweep = run_folder.Sweep(tmp_path, "mine", None, {"abc": ENTRY})
    if swept:  # an earlier sweep's run is known by its overrides
        known = sweep._replace(runs={"f" * 12: ENTRY | {"overrides": ["strategy=full"]}})
        known.save(latest=False)
        sweep.save()
    if search:
        sweep._replace(runs={}, typed="bptt-study -m hydra/sweeper=optuna").save(latest=not swept)
    begun, failed, killed, runs, done = (sweep.paths(c * 12) for c in "bcdef")
    begun.lock.parent.mkdir(parents=True)
    begun.checkpoint.touch()
    failed.failure.write_text("OvertimeError: it trained longer\n\n")
    killed.lock.touch()
    done.failure.write_text("ValueError: not finite\n")
    with locks.lock(runs.lock, wait=False) as held:
        assert held
        for place in (tmp_path, tmp_path / "mine"):
            code, out = said_by_status(capsys, str(place))
            assert code == 1
            assert "mine: 5 unfinished runs beside the last sweep's:\n" in out
            assert (
                "missing  bbbbbbbbbbbb: started; its next start continues from its checkpoint\n"
                in out
            )
            said = f"failed   cccccccccccc: OvertimeError: it trained longer\n{' ' * 11}traceback: "
            assert f"{said}{failed.failure}\n" in out
            assert "missing  dddddddddddd: started; its process was stopped or killed" in out
            assert "running  eeeeeeeeeeee\n" in out
            assert f"failed   ffffffffffff{' (strategy=full)' * swept}: ValueError: not f" in out
            assert f"to give one up, remove {tmp_path}/runs/mine/RUN.checkpoint.npz, " in out
            said = "mine: searched by another sweeper: bptt-study -m hydra/sweeper=optuna\n"
            assert (said in out) == search
            assert ("mine: no finished run\n" in out) != swept
    assert "unfinished runs beside" not in said_by_status(capsys, str(place), "--only-latest")[1]


def edit(folder: Path, **facts) -> None:
    """Change the record of a run, whose seal stays whole."""
    whole = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != files.SEAL}
    about = json.loads(whole["run.json"]) | facts
    files.write_folder(folder, whole | {"run.json": json.dumps(about).encode()})


@pytest.fixture
def three(command, tmp_path) -> tuple[Path, list[Path]]:
    """The tables of a study, and its runs: two of an earlier sweep, then that of the last."""
    own = ["-m", *TINY, "study=mine", "seeds=1"]
    runs = tmp_path / "results" / "runs" / "mine"
    assert command(*own, "first_seed=0,1")[0] == 0
    before = run_folders(runs)
    assert command(*own, "first_seed=2")[0] == 0
    return tmp_path / "results" / "mine", [*before, *({*run_folders(runs)} - {*before})]


def said_by_status(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        status.main([*arguments])
    return int(stop.value.code or 0), capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bytes", "seal", "record"])
def test_a_damaged_run_of_an_earlier_sweep_is_named(three, damage, capsys):
    """The tables lack it, and nothing says that they will have it once they are made anew."""
    mine, (first, second, _) = three
    if damage == "bytes":
        (first / "rows.csv").write_bytes(b"edited")
    elif damage == "seal":
        (first / files.SEAL).unlink()
    else:
        edit(first, format=2)
    why = {"bytes": "rows.csv is truncated or edited", "seal": "SHA256SUMS is missing",
           "record": "it cannot be read (run.json is not of format 1)"}[damage]  # fmt: skip
    for arguments in ([str(mine)], [str(mine), "--gather"], [str(mine)]):
        code, out = said_by_status(capsys, *arguments)
        assert code == 1
        assert f"damaged, and not in the tables: {first.name}, beside the last sweep: {why}" in out
        assert "with 1 finished run beside the last sweep's" in out and "they lack" not in out
        gathered = f"left out: {first.name} is damaged: {why}" in out
        assert gathered == (len(arguments) == 2)
    assert second.name in set(csv_tables.read_rows(mine)["run"])
    assert first.name not in set(csv_tables.read_rows(mine)["run"])
    assert said_by_status(capsys, str(mine), "--gather", "--only-latest")[0] == 0
    assert said_by_status(capsys, str(mine), "--only-latest")[0] == 0


@pytest.mark.slow
def test_tables_that_mix_versions_of_ones_own_code_say_so(three, capsys):
    mine, (first, second, _) = three
    edit(first, code={"mytasks": "1" * 12, "same": "3" * 12})
    edit(second, code={"mytasks": "2" * 12, "same": "3" * 12})
    said = f"they mix runs of 2 versions of mytasks, such as {first.name} and {second.name}; "
    assert said in said_by_status(capsys, str(mine), "--gather")[1]
    code, out = said_by_status(capsys, str(mine))
    assert code == 1 and said in out and "same" not in out
    assert said_by_status(capsys, str(mine), "--gather", "--only-latest")[0] == 0
    assert said_by_status(capsys, str(mine)) == (0, out[: out.index("mine: tables")])


@pytest.mark.slow
def test_what_reads_tables_says_that_they_were_edited(three, capsys):
    mine, _ = three
    readers = {
        "figures": lambda: figures.main([str(mine), "--hue", "run"]),
        "report": lambda: page.main([str(mine)]),
        "python": lambda: bs.results.load(mine),
    }
    for read in readers.values():
        read()
        assert "edited" not in capsys.readouterr().err
    table = csv_tables.read_rows(mine)
    csv_tables.write_table(table.assign(learning_rate=0.7), mine / csv_tables.TABLE)
    for read in readers.values():
        read()
        said = f"tables: {mine / csv_tables.TABLE} is missing, truncated or edited; "
        assert f"mine: {said}" in capsys.readouterr().err
    assert f'<p class="warning">The {said}' in (mine / page.PAGE).read_text().partition("<h2>")[0]


@pytest.mark.slow
def test_a_run_that_was_made_anew_since_the_tables_is_told(three, capsys):
    """Such as one that was started alone after an edit of its code."""
    mine, (first, *_) = three
    whole = {f.name: f.read_bytes() for f in first.iterdir() if f.name != files.SEAL}
    files.write_folder(first, whole | {"costs.csv": b"", "machine.json": b""})
    assert said_by_status(capsys, str(mine))[0] == 0, "the same numbers, on another machine"
    rows = csv_tables.read_table(first / "rows.csv")
    rows["validation_loss"] += 1
    files.write_folder(first, whole | {"rows.csv": csv_tables.packed(rows, "rows.csv")})
    said = f"mine: tables: they hold 1 run as before a run anew, such as {first.name}; "
    code, out = said_by_status(capsys, str(mine))
    assert code == 1 and said in out
    bs.results.load(mine)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_what_reads_tables_says_which_runs_they_lack(three, capsys):
    mine, _ = three
    said_by_status(capsys, str(mine), "--gather", "--only-latest")
    bs.results.load(mine)
    assert capsys.readouterr().err == "", "the others were left out on purpose"
    said_by_status(capsys, str(mine), "--gather")
    note = run_folder.runs_folder(mine.parent, "mine") / "tables.json"
    found = json.loads(note.read_text())
    note.write_text(json.dumps(found | {"runs": found["runs"][:2], "versions": {}}))
    for read in (lambda: page.main([str(mine)]), lambda: bs.results.load(mine)):
        read()
        assert "mine: tables: they lack 1 finished run; " in capsys.readouterr().err


@pytest.mark.slow
def test_runs_that_are_read_without_tables_say_what_is_wrong(three, capsys):
    mine, (first, second, third) = three
    (mine / csv_tables.TABLE).unlink()
    (third / ".DS_Store").touch()  # of a file manager
    assert len(bs.results.load(mine).runs) == 3
    assert capsys.readouterr().err == ""
    for run, version in ((first, "1"), (second, "2")):
        edit(run, code={"mytasks": version * 12})
    (third / "rows.csv").write_bytes(b"edited")
    assert len(bs.results.load(mine).runs) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"mine: left out: {third.name} is damaged: rows.csv is truncated or edited"
    assert lines[1].startswith("mine: runs: they mix runs of 2 versions of mytasks, such as ")


@pytest.mark.slow
def test_tables_of_ones_own_that_are_made_anew_are_not_edited(three, capsys, monkeypatch):
    """The function that makes them may have changed since the sweep."""
    mine, _ = three
    monkeypatch.setattr(stories, "find", lambda *_: story)
    for name in ("first", "second"):
        table = partial(lambda rows, name: rows.assign(name=name), name=name)
        story = bs.Study("Why?", {"own": lambda rows, make=table: make(rows)})
        if name == "first":
            said_by_status(capsys, str(mine), "--gather")
        else:
            figures.main([str(mine)])
        assert set(csv_tables.read_table(mine / "own.csv")["name"]) == {name}
        assert said_by_status(capsys, str(mine))[0] == 0
    (mine / "own.csv").write_text("x\n")
    assert said_by_status(capsys, str(mine))[0] == 1


@pytest.mark.slow
def test_what_a_story_no_longer_makes_does_not_stay(three, capsys, monkeypatch):
    """After an edit of the story. If something fails, all stays."""
    mine, _ = three
    monkeypatch.setattr(stories, "find", lambda *_: story)
    story = bs.Study("Why?", {"old": lambda rows: rows, "kept": lambda rows: rows})
    said_by_status(capsys, str(mine), "--gather")
    before = {file.name for file in mine.iterdir()}
    story = bs.Study("Why?", {"new": lambda rows: rows, "kept": lambda rows: rows.loc["none"]})
    with pytest.raises(SystemExit):
        figures.main([str(mine)])
    assert {file.name for file in mine.iterdir()} == before | {"new.csv"}
    story = bs.Study("Why?", {"new": lambda rows: rows, "kept": lambda rows: rows})
    figures.main([str(mine)])
    assert capsys.readouterr().err.endswith("removed: old.csv, made before\n")
    assert {file.name for file in mine.iterdir()} == before - {"old.csv"} | {"new.csv"}
    assert said_by_status(capsys, str(mine))[0] == 0


def test_gathering_removes_what_killed_processes_left(command, tmp_path, capsys):
    """In each of its folders, and so does a page; what a living process writes stays."""
    assert command("-m", *TINY, "study=mine", "seeds=1")[0] == 0
    mine, runs = tmp_path / "results" / "mine", tmp_path / "results" / "runs" / "mine"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = {}
    for process in (dead.pid, os.getpid()):
        named = f"{files.HOST}-{process}.0123456789ab"
        left[process] = {
            mine / f".summary.csv.{named}",
            runs / f".0123456789ab.{named}",
            runs / "sweeps" / f".latest.json.{named}",
            mine.parent / f".report.html.{named}",
        }
        for file in left[process]:
            file.touch()
            os.utime(file, (1e9, 1e9))
    assert said_by_status(capsys, str(mine), "--gather")[0] == 0
    page.main([str(mine.parent)])
    assert not any(file.exists() for file in left[dead.pid])
    for file in left[os.getpid()]:
        file.unlink()
    assert said_by_status(capsys, str(mine))[0] == 0, "they were not taken for tables"


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
