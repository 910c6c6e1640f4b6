"""What of a sweep lies on disk: which of its runs are finished, running, failed or missing; no jax, no pandas.

All of it is in results_dir/runs/<study>: a sealed folder per finished run, named by its identity; beside it
`<identity>.checkpoint.npz` of one that was begun and `<identity>.failed.txt` with the traceback of one that
failed; `sweeps/` with what each sweep has composed, of which `latest.json` names the one started last; and
`.claims/`, a lock per run that is being done.

A claim is a lock of the operating system (flock), which ends with its process: a dead one leaves none. That
holds on local disks and on NFS with locking (version 4, or 3 with its lock daemon), over all machines. Where
the file system knows no flock, filelock falls back to lock files that name host and process; those of dead
processes are then taken over on the same host only.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from bptt_study import files
from bptt_study.validation import SettingError

ABOUT = "run.json"  # of a finished run: how many rows, seeds that diverged, the corpus's checksum
PROBE_SECONDS = 0.5  # longer than it takes to look whether a run is claimed


class Place(NamedTuple):
    """Where one run leaves what."""

    runs: Path  # results_dir/runs/<study>
    run: str  # its identity

    @property
    def folder(self) -> Path:
        return self.runs / self.run

    @property
    def checkpoint(self) -> Path:
        return self.runs / f"{self.run}.checkpoint.npz"

    @property
    def failure(self) -> Path:
        return self.runs / f"{self.run}.failed.txt"

    @property
    def claim(self) -> Path:
        return self.runs / ".claims" / f"{self.run}.lock"


class State(NamedTuple):
    """How far a run is, why, and how many of its seeds diverged."""

    kind: str  # finished, running, failed, damaged (finished, but not whole any more) or missing
    why: str = ""
    diverged: int = 0


class Sweep(NamedTuple):
    """Runs of one study that were asked for together, as composed when it started; nothing changes it later.

    runs: identity -> overrides, rows, corpus_sha256, config and choices (of the groups).
    """

    results_dir: Path
    study: str
    experiment: str | None
    runs: Mapping[str, Mapping[str, Any]]

    def place(self, run: str) -> Place:
        return place(self.results_dir, self.study, run)

    def state(self, run: str) -> State:
        return state(self.place(run), self.runs[run]["corpus_sha256"])

    def finished(self, run: str) -> bool:
        """Whether it is there, whole."""
        return self.state(run).kind == "finished"

    def states(self) -> dict[str, State]:
        """Of all runs, with the checksums of what is finished."""
        return {run: self.state(run) for run in self.runs}

    def said(self, run: str) -> str:
        """A run as it is called in messages: identity and overrides."""
        return f"{run} ({' '.join(self.runs[run]['overrides'])})"

    def note(self) -> Path:
        """Write it down, under a name that no other sweep has; returns the file."""
        content = json.dumps({"experiment": self.experiment, "runs": self.runs}, indent=1)
        name = _name_of(content)
        folder = folder_of(self.results_dir, self.study) / "sweeps"
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / name, content)
        files.write(folder / "latest.json", json.dumps(name))
        return folder / name


def folder_of(results_dir: Path, study: str) -> Path:
    """Of the study's runs."""
    return results_dir / "runs" / study


def place(results_dir: Path, study: str, run: str) -> Place:
    return Place(folder_of(results_dir, study), run)


def studies(results_dir: Path) -> list[str]:
    """Those of which a sweep was started."""
    return sorted(f.parents[1].name for f in (results_dir / "runs").glob("*/sweeps/latest.json"))


def latest(results_dir: Path, study: str) -> Sweep:
    """The study's sweep that was started last; SettingError if there is none, or none that is whole."""
    file = folder_of(results_dir, study) / "sweeps" / "latest.json"
    if not file.exists():
        known = ", ".join(s for s in studies(results_dir) if s != study) or "none"
        way_out = f"Studies with a sweep in {results_dir}: {known}."
        raise SettingError("study", study, "the name of a study that has a sweep", way_out)
    try:
        name = json.loads(file.read_text(encoding="utf-8"))
        file = file.with_name(name)
        content = file.read_text(encoding="utf-8")
        whole = name == _name_of(content)
    except (FileNotFoundError, ValueError, TypeError):  # not there, no JSON, no name
        whole = False
    if not whole:
        way_out = f"{file} is missing, truncated or edited. The same command writes it again."
        raise SettingError("study", study, "a study whose sweep's record is intact", way_out)
    found = json.loads(content)
    return Sweep(results_dir, study, found["experiment"], found["runs"])


def _name_of(content: str) -> str:
    """Of what a sweep has written down: its checksum."""
    return f"{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"


@contextmanager
def claim(place: Place, wait: bool) -> Iterator[bool]:
    """Whether this process alone does the run until the end of the block; with `wait`, when it may."""
    place.claim.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.claim)
    try:
        lock.acquire(timeout=-1 if wait else PROBE_SECONDS)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def claimed(place: Place) -> bool:
    """Whether some living process is doing the run."""
    if not place.claim.exists():
        return False
    try:
        with FileLock(place.claim, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # read-only, or gone meanwhile
        return False


def wait_for(places: Iterable[Place], seconds: float = 0.5) -> None:
    """Until one of these runs is claimed by nobody."""
    places = list(places)
    while all(claimed(place) for place in places):
        time.sleep(seconds)


def state(place: Place, corpus_sha256: str | None) -> State:
    """How far the run is; a finished one is held to its checksums and to the corpus that has this checksum."""
    wrong = damage(place, corpus_sha256) if place.folder.exists() else []
    if place.folder.exists() and not wrong:
        return State("finished", diverged=about(place)["diverged"])
    if claimed(place):
        return State("running")
    if wrong:
        return State("damaged", "; ".join(wrong))
    if place.failure.exists():
        return State("failed", reason(place))
    if place.checkpoint.exists():
        return State("missing", "begun; goes on from its checkpoint")
    stopped = "begun; its process was stopped or killed (for lack of memory?)"
    return State("missing", stopped * place.claim.exists())


def damage(place: Place, corpus_sha256: str | None) -> list[str]:
    """What is wrong with the run's folder, a phrase per file; empty: it is finished and whole."""
    try:
        wrong = files.damage(place.folder)
        made_from = None if wrong else about(place)["corpus_sha256"]
    except OSError as error:
        return [f"it cannot be read ({error})"]
    if not wrong and made_from != corpus_sha256:
        return [
            f"it was made from another corpus, of SHA-256 {made_from} instead of {corpus_sha256}"
        ]
    return wrong


def about(place: Place) -> dict[str, Any]:
    """What a finished run says about itself."""
    found: dict[str, Any] = json.loads((place.folder / ABOUT).read_text(encoding="utf-8"))
    return found


def in_a_line(error: BaseException) -> str:
    """What went wrong, as it is called in messages."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def reason(place: Place) -> str:
    """Of a failed run: the first line of what it left."""
    with suppress(OSError):
        return place.failure.read_text(encoding="utf-8").partition("\n")[0]
    return ""
