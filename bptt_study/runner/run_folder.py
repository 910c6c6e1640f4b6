"""The state of a sweep on disk: which of its runs are finished, running, failed or missing; no jax, no pandas.

Everything lies in results_dir/runs/<study>:

    <identity>/                  a finished run: a sealed folder
    <identity>.checkpoint.npz    a run that was started and not finished
    <identity>.failed.txt        the traceback of a failed run
    sweeps/<checksum>.json       the composed configurations of one sweep
    sweeps/latest.json           the name of the sweep that was started last
    tables.json                  the census of the study's tables, see `census`
    .locks/<identity>.lock       the lock of a run, see `locks`
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bptt_study import files
from bptt_study.files import has_shape
from bptt_study.report.progress import shown
from bptt_study.runner import locks
from bptt_study.runner.locks import locked
from bptt_study.validation import SettingError

IDENTITY = re.compile(r"[0-9a-f]{12}")  # of a run
# what a run that was started leaves beside its folder
TRACES = ("*.checkpoint.npz", "*.failed.txt", f"{locks.FOLDER}/[0-9a-f]*.lock")
FORMAT = 1  # of sweeps' records and of run.json; those of version 0.1 do not say it
ABOUT = "run.json"  # facts about a finished run: rows, diverged seeds, the checksum of its corpus

RECORD_NAME = re.compile(r"\w{1,40}\.json")
# shapes, see `files.has_shape`; what some versions do not write may be missing
FACTS = {
    "rows": int,
    "diverged": int,
    "corpus_sha256?": (str, None),
    "code?": {str: str},
}  # of run.json
ENTRY = {  # of a run in a sweep's record
    "overrides": [str],
    "rows": int,
    "corpus_sha256": (str, None),
    "code?": {str: str},
    "config": dict,
    "choices": {str: (str, [str], None)},
}
RECORD = {
    "format?": int,
    "experiment": (re.compile(r"\w[\w-]*(/\w[\w-]*)*"), None),
    "story?": (re.compile(r"\w+(\.\w+)+"), None),
    "question?": str,
    "command?": str,
    "runs": {re.compile(r"\w[\w-]*"): ENTRY},  # a name stays in the folder
}


class RunPaths(NamedTuple):
    """The files and folders of one run."""

    runs: Path  # results_dir/runs/<study>
    run: str  # identity

    @property
    def folder(self) -> Path:
        """The sealed folder of the finished run."""
        return self.runs / self.run

    @property
    def checkpoint(self) -> Path:
        """The file from which an interrupted run continues."""
        return self.runs / f"{self.run}.checkpoint.npz"

    @property
    def failure(self) -> Path:
        """The traceback of the run, if it failed."""
        return self.runs / f"{self.run}.failed.txt"

    @property
    def lock(self) -> Path:
        """The lock file; it stays after the first start of the run."""
        return self.runs / locks.FOLDER / f"{self.run}.lock"


class RunState(NamedTuple):
    """The state of a run, the reason for it, and the number of seeds that diverged."""

    # finished, running, stopped (locked without a sign of life), failed, damaged (finished, but its files have
    # changed) or missing
    kind: str
    why: str = ""
    diverged: int = 0


class Ended(NamedTuple):
    """The runs of a study that came to an end, by identity: the intact ones, and the faults of the others."""

    finished: dict[str, RunPaths]
    damaged: dict[str, str]


class Sweep(NamedTuple):
    """The runs of one study that were started together, as they were composed at the start."""

    results_dir: Path
    study: str
    experiment: str | None
    # identity -> overrides, rows, corpus_sha256, config, choices
    runs: Mapping[str, Mapping[str, Any]]
    story: str | None = None  # the setting of this name, to be shown; see `stories`
    question: str = ""
    typed: str = ""  # the command as it was typed; empty in the records of earlier versions

    def paths(self, run: str) -> RunPaths:
        """Return the files and folders of a run."""
        return run_paths(self.results_dir, self.study, run)

    def state(self, run: str) -> RunState:
        """Read the state of a run from the disk."""
        entry = self.runs[run]
        return run_state(self.paths(run), entry["corpus_sha256"], entry.get("code", {}))

    def finished(self, run: str) -> bool:
        """Return True if the run is finished and undamaged."""
        return self.state(run).kind == "finished"

    def states(self) -> dict[str, RunState]:
        """Read the state of every run, and verify the checksums of finished runs."""
        return {run: self.state(run) for run in shown(self.runs, "checking runs")}

    def label(self, run: str) -> str:
        """Return the name of a run in messages: its identity and overrides."""
        return f"{run} ({' '.join(self.runs[run]['overrides'])})"

    @property
    def command(self) -> str:
        """The command that does these runs.

        A record of an earlier version has none. Then it is made of the overrides, and also does the runs with
        other combinations of the same values.
        """
        if self.typed:
            return self.typed
        values: dict[str, list[str]] = {}
        for entry in self.runs.values():
            for name, _, value in (override.partition("=") for override in entry["overrides"]):
                found = values.setdefault(name, [])
                found += [value] * (value not in found)
        settings = (shlex.quote(f"{name}={','.join(found)}") for name, found in values.items())
        return " ".join(["bptt-study -m", *settings])

    def save(self, latest: bool = True) -> Path:
        """Write the sweep's record, under a name that depends on its content.

        Args:
          latest: Whether it is the study's last sweep from now on.

        Returns:
          The file.
        """
        record = {
            "format": FORMAT,
            "experiment": self.experiment,
            "story": self.story,
            "question": self.question,
            "command": self.typed,
            "runs": self.runs,
        }
        content = json.dumps(record, indent=1)
        name = _record_name(content.encode())
        folder = runs_folder(self.results_dir, self.study) / "sweeps"
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / name, content)
        if latest:
            files.write(folder / "latest.json", json.dumps(name))
        return folder / name


def runs_folder(results_dir: Path, study: str) -> Path:
    """Return the folder of all runs of a study."""
    return results_dir / "runs" / study


def run_paths(results_dir: Path, study: str, run: str) -> RunPaths:
    """Return the files and folders of one run of a study."""
    return RunPaths(runs_folder(results_dir, study), run)


def studies(results_dir: Path) -> list[str]:
    """List the studies that have a sweep."""
    return sorted(f.parents[1].name for f in (results_dir / "runs").glob("*/sweeps/latest.json"))


def studies_with_runs(results_dir: Path) -> list[str]:
    """List the studies that have a sweep or a run, such as one that was started alone."""
    runs = results_dir / "runs"
    traces = [file for one in (f"*/{files.SEAL}", *TRACES) for file in runs.glob(f"*/{one}")]
    found = {file.relative_to(runs).parts[0] for file in traces}
    return sorted(found | set(studies(results_dir)))


def finished(results_dir: Path, study: str) -> dict[str, RunPaths]:
    """Find all finished and undamaged runs of a study, from any sweep, in the order of their identities."""
    return others(Sweep(results_dir, study, None, {})).finished


def others(sweep: Sweep) -> Ended:
    """Find and verify the runs of the study that came to an end and do not belong to this sweep."""
    folders = sorted(runs_folder(sweep.results_dir, sweep.study).glob("*"))
    runs = [f.name for f in folders if IDENTITY.fullmatch(f.name) and f.is_dir()]
    paths = {run: sweep.paths(run) for run in runs if run not in sweep.runs}
    wrong = {run: "; ".join(faults(of_run)) for run, of_run in paths.items()}
    return Ended(
        {run: of_run for run, of_run in paths.items() if not wrong[run]},
        {run: why for run, why in wrong.items() if why},
    )


def started(sweep: Sweep) -> dict[str, RunState]:
    """Read the states of the runs of the study that were started, did not end, and are not of this sweep."""
    folder = runs_folder(sweep.results_dir, sweep.study)
    runs = sorted({f.name.partition(".")[0] for one in TRACES for f in folder.glob(one)})
    paths = {run: sweep.paths(run) for run in runs if IDENTITY.fullmatch(run)}
    return {
        run: run_state(of_run, None)
        for run, of_run in paths.items()
        if run not in sweep.runs and not of_run.folder.exists()
    }


def labels(latest: Sweep, runs: Iterable[str]) -> dict[str, str]:
    """Return the names of runs in messages: the identity, with the overrides if a sweep has noted them."""
    found, rest = by_sweep(latest, runs)
    return {run: run for run in rest} | {run: s.label(run) for s, own in found for run in own}


def earlier_sweeps(latest: Sweep) -> list[Sweep]:
    """Find the study's other sweeps whose records are intact, in the order in which they were started."""
    folder = runs_folder(latest.results_dir, latest.study) / "sweeps"
    records = sorted(folder.glob("*.json"), key=lambda file: (file.stat().st_mtime, file.name))
    found = []
    for file in filter(_is_intact, records):
        with suppress(ValueError):  # it is not of this version
            found.append(_sweep(latest.results_dir, latest.study, file))
    return [sweep for sweep in found if sweep != latest]


def by_sweep(latest: Sweep, runs: Iterable[str]) -> tuple[list[tuple[Sweep, list[str]]], list[str]]:
    """Divide runs of a study among its sweeps.

    Args:
      latest: The study's last sweep.
      runs: The identities of the runs.

    Returns:
      Each sweep that has some of them, with those that no sweep before it in the list has: the last sweep, then
      the others in the order in which they were started. Beside that, the runs of no sweep.
    """
    rest, found = list(runs), []
    for sweep in (latest, *earlier_sweeps(latest)):
        if own := [run for run in rest if run in sweep.runs]:
            found.append((sweep, own))
        rest = [run for run in rest if run not in sweep.runs]
    return found, rest


def searches(latest: Sweep) -> list[str]:
    """List the commands of the study's sweeps by other sweepers, whose records do not name their runs."""
    return [s.typed for s in (*earlier_sweeps(latest), latest) if s.typed and not s.runs]


def latest_sweep(results_dir: Path, study: str) -> Sweep:
    """Read the study's sweep that was started last.

    Args:
      results_dir: The folder of results.
      study: The study.

    Returns:
      The sweep.

    Raises:
      SettingError: If there is no sweep of this study, or if its record is damaged.
    """
    file = runs_folder(results_dir, study) / "sweeps" / "latest.json"
    if not file.exists():
        known = ", ".join(s for s in studies(results_dir) if s != study) or "none"
        way_out = f"Studies with a sweep in {results_dir}: {known}."
        raise SettingError("study", study, "the name of a study that has a sweep", way_out)
    with suppress(OSError, ValueError):
        if has_shape(name := files.read_json(file), RECORD_NAME):
            file = file.with_name(name)
    allowed, why = "a study whose sweep record is intact", "is missing, truncated or edited"
    if _is_intact(file):
        with suppress(ValueError):
            return _sweep(results_dir, study, file)
        allowed = "a study whose sweep record is its own"
        why = "was not written by this version of bptt-study"
    way_out = f"{file} {why}. Start the same command again to rewrite it."
    raise SettingError("study", study, allowed, way_out)


def _is_intact(file: Path) -> bool:
    """Return True for a sweep's record that is as it was written: its name is its checksum."""
    try:
        return file.name == _record_name(file.read_bytes())
    except OSError:
        return False


def _sweep(results_dir: Path, study: str, file: Path) -> Sweep:
    """Read a sweep's record.

    Raises:
      ValueError: If it is none of this version.
    """
    found = files.read_json(file)
    if not has_shape(found, RECORD) or found.get("format", FORMAT) != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    said = {"story": found.get("story"), "question": found.get("question", "")}
    said["typed"] = found.get("command", "")
    return Sweep(results_dir, study, found["experiment"], found["runs"], **said)


def noted(folder: Path) -> Sweep:
    """Read the last sweep of a study by its folder of tables; an empty sweep if it has none.

    Args:
      folder: The folder, results_dir/study.

    Returns:
      The sweep.
    """
    if folder.name in studies(folder.parent):
        return latest_sweep(folder.parent, folder.name)
    return Sweep(folder.parent, folder.name, None, {})


def run_state(
    paths: RunPaths, corpus_sha256: str | None, code: Mapping[str, str] | None = None
) -> RunState:
    """Read the state of a run from the disk, and verify a finished run.

    Args:
      paths: The files of the run.
      corpus_sha256: As in `damage`.
      code: As in `damage`.

    Returns:
      The state.
    """
    wrong = damage(paths, corpus_sha256, code) if paths.folder.exists() else []
    if paths.folder.exists() and not wrong:
        return RunState("finished", diverged=about(paths)["diverged"])
    if locked(paths.lock):
        if found := locks.silent(paths.lock):
            return RunState("stopped", f"{found}; if it is dead, remove {paths.lock}")
        return RunState("running")
    if wrong:
        return RunState("damaged", "; ".join(wrong))
    if paths.failure.exists():
        return RunState("failed", failure_reason(paths))
    if paths.checkpoint.exists():
        return RunState("missing", "started; its next start continues from its checkpoint")
    stopped = "started; its process was stopped or killed, perhaps for lack of memory"
    return RunState("missing", stopped * paths.lock.exists())


def damage(
    paths: RunPaths, corpus_sha256: str | None, code: Mapping[str, str] | None = None
) -> list[str]:
    """List the faults of a finished run's folder.

    Args:
      paths: The files of the run.
      corpus_sha256: The present checksum of the corpus. None if the task has no corpus.
      code: The present checksums of the code from outside, see `own_code.code`.

    Returns:
      One phrase for each fault; an empty list for an intact run.
    """
    ran, wrong = _read(paths)
    return wrong or changes(ran, corpus_sha256, code or {})


def faults(paths: RunPaths) -> list[str]:
    """List the faults of a finished run's folder beside those that a present corpus or code would show."""
    return _read(paths)[1]


def changes(
    ran: Mapping[str, Any], corpus_sha256: str | None, code: Mapping[str, str]
) -> list[str]:
    """Name what has changed since a run, as far as its numbers depend on it.

    Args:
      ran: The facts that the run states about itself, see `about`.
      corpus_sha256: As in `damage`.
      code: As in `damage`.

    Returns:
      One phrase; an empty list if nothing has changed.
    """
    used = ran.get("corpus_sha256")
    if used != corpus_sha256:
        return [f"its corpus had SHA-256 {used}, and the corpus now has {corpus_sha256}"]
    changed = sorted({name for name, _ in ran.get("code", {}).items() ^ code.items()})
    modules = [name for name in changed if not name.startswith("file ")]
    files = [f"the {name}" for name in changed if name not in modules]
    what = [f"the code of {', '.join(modules)}"] * bool(modules) + files
    verb = "has" if len(what) == 1 else "have"
    return [f"{' and '.join(what)} {verb} changed since it ran"] if what else []


def _read(paths: RunPaths) -> tuple[dict[str, Any], list[str]]:
    """Read the facts of a finished run, and list the faults of its files; one of the two is empty."""
    try:
        wrong = files.damage(paths.folder)
        return ({} if wrong else about(paths)), wrong
    except (OSError, ValueError) as error:
        return {}, [f"it cannot be read ({error})"]


def about(paths: RunPaths) -> dict[str, Any]:
    """Read the facts that a finished run states about itself.

    Raises:
      ValueError: If they are none, or of another format.
    """
    found = files.read_json(paths.folder / ABOUT)
    if not has_shape(found, {"format?": int}) or found.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{ABOUT} is not of format {FORMAT}")
    if wrong := [n.rstrip("?") for n, shape in FACTS.items() if not has_shape(found, {n: shape})]:
        raise ValueError(f"{ABOUT} has no {', '.join(wrong)}")
    return found


def failure_reason(paths: RunPaths) -> str:
    """Read the first line that a failed run wrote; empty if it cannot be read."""
    with suppress(OSError):
        return paths.failure.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return ""


def _record_name(content: bytes) -> str:
    """Return the file name of a sweep's record, which is its checksum."""
    return f"{hashlib.sha256(content).hexdigest()[:12]}.json"
