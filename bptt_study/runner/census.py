"""The census of a study's tables: which runs they hold, and the checksums of their files; no jax, no pandas.

It lies beside the runs, in results_dir/runs/<study>/tables.json, so that `bptt-study-status` can say whether
the tables are still what was gathered, and of all that is finished.
"""

import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from bptt_study import files
from bptt_study.runner import locks, run_folder
from bptt_study.runner.locks import lock
from bptt_study.runner.run_folder import RunPaths, Sweep
from bptt_study.validation import SettingError, counted

FILE = "tables.json"
COSTS = "costs.csv"  # of a run
TUNING = "tuning.csv"  # of a study whose last sweep was tuned
FORMAT = 1
# shapes, see `files.has_shape`; no name leads to another folder, and only tables and figures are removed
RUN = re.compile(r"\w[\w-]*")
MADE = re.compile(r"\w[\w-]*(\.csv|\.csv\.gz|\.png|\.svg)")
FILE_NAME = re.compile(r"[^/\0]*[^/\0.][^/\0]*")
NOTE = {
    "format": int,
    "runs": [RUN],
    "versions?": {RUN: str},
    "only_latest": bool,
    "made?": [MADE],
    "tables": {FILE_NAME: str},
}
GATHER = "bptt-study-status --gather makes them anew"


def write(sweep: Sweep, runs: Collection[str], only_latest: bool, made: Collection[str]) -> None:
    """Note the tables in the study's folder as those of these runs, and the files that were made of them."""
    found = {
        "format": FORMAT,
        "runs": sorted(runs),
        "versions": {run: _version(sweep.paths(run)) for run in sorted(runs)},
        "only_latest": only_latest,
        "made": sorted(made),
        "tables": {f.name: _checksum(f) for f in sorted(_folder(sweep).glob("[!.]*.csv*"))},
    }
    files.write(_note(_folder(sweep)), json.dumps(found, indent=1))


def made(folder: Path) -> set[str]:
    """Return the names of the tables and figures that the last gathering made in a study's folder."""
    found = _read(_note(folder))
    return set(found.get("made", [])) if found else set()


def runs(folder: Path) -> set[str]:
    """Return the runs that the tables in a study's folder hold."""
    found = _read(_note(folder))
    return set(found["runs"]) if found else set()


def faults(folder: Path) -> list[str]:
    """List the faults of the tables in a study's folder, one phrase each; none if they were never gathered.

    A table is missing or edited, the tables mix runs of several versions of one's own code, or a run was made
    anew since they were gathered.
    """
    found = _read(_note(folder))
    if found is None:
        return [f"{_note(folder)} is edited or of another version; {GATHER}"]
    return [
        *(
            f"{folder / name} is missing, truncated or edited; {GATHER}"
            for name, checksum in found["tables"].items()
            if _checksum(folder / name) != checksum
        ),
        *_mixed(run_folder.run_paths(folder.parent, folder.name, run) for run in found["runs"]),
        *_older(folder, found.get("versions", {})),
    ]


def lacking(sweep: Sweep, finished: Collection[str]) -> list[str]:
    """Say how many finished runs the tables of a study lack, or that they were not made of finished ones.

    Args:
      sweep: The last sweep.
      finished: The study's intact runs, of whatever sweep.
    """
    found = _read(_note(_folder(sweep)))
    if found is None:
        return []
    if not found["runs"]:  # there is no note
        whole = bool(finished) and {*sweep.runs} <= {*finished}
        return ["they were not gathered; bptt-study-status --gather makes them"] * whole
    left_out = {run for run in finished if run in sweep.runs or not found["only_latest"]}
    left_out -= {*found["runs"]}
    return [f"they lack {counted(len(left_out), 'finished run')}; {GATHER}"] * bool(left_out)


def all_faults(folder: Path) -> list[str]:
    """List the faults of a study's tables and what they lack, one phrase each."""
    found, sweep = _read(_note(folder)), Sweep(folder.parent, folder.name, None, {})
    known: dict[str, Any] = {run: {} for run in found["runs"]} if found else {}
    new = run_folder.others(sweep._replace(runs=known)).finished
    with suppress(SettingError):  # the record of a sweep may be damaged
        sweep = run_folder.noted(folder)
    return [*faults(folder), *lacking(sweep, {*new, *known})]


def say_faults(folder: Path) -> None:
    """Print the same to stderr, before something is made of the tables."""
    for fault in all_faults(folder):
        print(f"{folder.name}: tables: {fault}", file=sys.stderr)


def say_ended(study: str, ended: run_folder.Ended) -> None:
    """Print to stderr what is wrong with runs that are read without a study's tables."""
    for run, why in ended.damaged.items():
        print(f"{study}: left out: {run} is damaged: {why}", file=sys.stderr)
    for fault in _mixed(ended.finished.values()):
        print(f"{study}: runs: {fault}", file=sys.stderr)


def only_writer(results_dir: Path, study: str) -> AbstractContextManager[bool]:
    """Lock a study's tables, so that two processes do not write them at once.

    While a process waits for the lock, more runs may finish. So it looks for finished runs only afterwards.

    Args:
      results_dir: The folder of results.
      study: The study.

    Returns:
      The lock, which waits.
    """
    folder = run_folder.runs_folder(results_dir, study)
    return lock(folder / locks.FOLDER / "tables.lock", wait=True)


def renew(folder: Path, made: Collection[Path]) -> None:
    """Note the study's own tables and figures that were made anew from the others."""
    found = _read(_note(folder))
    if found and found["tables"] and made:
        tables = (file for file in made if ".csv" in file.suffixes)
        found["tables"] |= {file.name: _checksum(file) for file in tables}
        found["made"] = sorted({*found.get("made", []), *(file.name for file in made)})
        files.write(_note(folder), json.dumps(found, indent=1))


def remove_former(folder: Path, made: Collection[Path]) -> None:
    """Remove, and name, the study's own tables and figures that are not among those that were made now."""
    found, kinds = _read(_note(folder)) or {}, {file.suffix for file in made}
    former = {name for name in found.get("made", []) if Path(name).suffix in kinds}
    former -= {"summary.csv", TUNING, *(file.name for file in made)}
    if not former:
        return
    for name in sorted(former):
        (folder / name).unlink(missing_ok=True)
        found["made"].remove(name)
        found["tables"].pop(name, None)
        print(f"removed: {name}, made before", file=sys.stderr)
    files.write(_note(folder), json.dumps(found, indent=1))


def _mixed(runs: Iterable[RunPaths]) -> Iterator[str]:
    """Yield a phrase for each module of one's own whose code differs between the runs."""
    versions: dict[str, dict[str, str]] = {}
    for paths in runs:
        with suppress(OSError, ValueError):  # the state of a run is told elsewhere
            for module, checksum in run_folder.about(paths).get("code", {}).items():
                versions.setdefault(module, {}).setdefault(checksum, paths.run)
    for module, found in versions.items():
        if len(found) > 1:
            yield (
                f"they mix runs of {len(found)} versions of {module}, such as {' and '.join(found.values())}; "
                "the command of the earlier sweep makes its runs anew, and --only-latest leaves them out"
            )


def _older(folder: Path, versions: Mapping[str, str]) -> Iterator[str]:
    """Yield a phrase if runs have other rows than when the tables were gathered."""
    paths = {run: run_folder.run_paths(folder.parent, folder.name, run) for run in versions}
    now = {run: _version(of_run) for run, of_run in paths.items()}
    if anew := [run for run, version in now.items() if version not in ("", versions[run])]:
        which = f"{counted(len(anew), 'run')} as before a run anew, such as {anew[0]}"
        yield f"they hold {which}; {GATHER}"


def _version(paths: RunPaths) -> str:
    """Compute a checksum of a run's tables, without what clock and machine decide; empty without a seal."""
    tables = {n: d for n, d in files.digests(paths.folder).items() if ".csv" in n and n != COSTS}
    if not tables:
        return ""
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:12]


def _note(folder: Path) -> Path:
    return run_folder.runs_folder(folder.parent, folder.name) / FILE


def _folder(sweep: Sweep) -> Path:
    return sweep.results_dir / sweep.study


def _read(file: Path) -> dict[str, Any] | None:
    """The note, empty if there is none; None if it is not what `write` writes."""
    if not file.exists():
        return {"runs": [], "tables": {}, "only_latest": False}
    try:
        found = files.read_json(file)
    except (OSError, ValueError):
        return None
    return found if files.has_shape(found, NOTE) and found["format"] == FORMAT else None


def _checksum(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
