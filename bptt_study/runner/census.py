"""The census of a study's tables: which runs they hold, and the checksums of their files; no jax, no pandas.

It lies beside the runs, in results_dir/runs/<study>/tables.json, so that `bptt-study-status` can say whether
the tables are still what was gathered, and of all that is finished.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bptt_study import files
from bptt_study.runner import run_folder
from bptt_study.runner.run_folder import Sweep
from bptt_study.validation import counted

FILE = "tables.json"
FORMAT = 1
GATHER = "bptt-study-status --gather makes them anew"


def write(sweep: Sweep, runs: Collection[str], only_latest: bool) -> None:
    """Note the tables in the study's folder as those of these runs."""
    found = {
        "format": FORMAT,
        "runs": sorted(runs),
        "only_latest": only_latest,
        "tables": {f.name: _checksum(f) for f in sorted(_folder(sweep).glob("*.csv*"))},
    }
    files.write(_note(sweep), json.dumps(found, indent=1))


def faults(sweep: Sweep) -> list[str]:
    """List the faults of a study's tables, one phrase each; none if they were never gathered."""
    if not _note(sweep).exists():
        return []
    found = _read(_note(sweep))
    if found is None:
        return [f"{_note(sweep)} is edited or of another version; {GATHER}"]
    seals = _note(sweep).parent.glob(f"*/{files.SEAL}")
    there = {seal.parent.name for seal in seals if ".aside" not in seal.parent.name}
    if found["only_latest"]:
        there &= {*sweep.runs}
    left_out = there - {*found["runs"]}
    return [
        *(
            f"{_folder(sweep) / name} is missing, truncated or edited; {GATHER}"
            for name, checksum in found["tables"].items()
            if _checksum(_folder(sweep) / name) != checksum
        ),
        *[f"they lack {counted(len(left_out), 'finished run')}; {GATHER}"] * bool(left_out),
    ]


def _note(sweep: Sweep) -> Path:
    return run_folder.runs_folder(sweep.results_dir, sweep.study) / FILE


def _folder(sweep: Sweep) -> Path:
    return sweep.results_dir / sweep.study


def _read(file: Path) -> dict[str, Any] | None:
    """The note; None if it is not what `write` writes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        named = [*found["runs"], *found["tables"], *found["tables"].values()]
        good = found["format"] == FORMAT and isinstance(found["only_latest"], bool)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # a name that leads to another folder is no table
    plain = all(isinstance(name, str) and Path(name).name == name for name in named)
    return found if good and plain else None


def _checksum(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
