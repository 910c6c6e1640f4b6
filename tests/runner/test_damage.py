"""Damage of any kind: what is on disk is as it was, or it is named and set aside."""

import json

import chaos
import numpy as np
import pytest
from support import TINY, run_folders

from bptt_study import files
from bptt_study.report import csv_tables
from bptt_study.runner import run_folder
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
