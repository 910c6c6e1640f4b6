"""`bptt-study-status`: how far a sweep is, from another shell. No jax."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from bptt_study.runner import run_folder
from bptt_study.runner.run_folder import Sweep
from bptt_study.validation import counted, one_line_errors

KINDS = ("finished", "running", "failed", "damaged", "missing")


def main(arguments: list[str] | None = None) -> None:
    """`bptt-study-status`: status 0 if all is complete, 1 if not, 2 if there is nothing to show."""
    parser = argparse.ArgumentParser(
        "bptt-study-status",
        description="Shows the sweep of a study that was started last: which of its runs are finished, "
        "running, failed (with the reason), damaged or missing. Status 0 only if all are finished.",
        epilog="What is missing is done by the same `bptt-study -m …` again, which also sees whether a corpus "
        "has changed since.",
    )
    parser.add_argument(
        "folder", type=Path, help="RESULTS_DIR/STUDY, or RESULTS_DIR for all studies in it"
    )
    parser.add_argument(
        "--gather",
        action="store_true",
        help="make the tables and figures of what is finished; if runs are missing the figures say so, and "
        "unfinished.txt beside the tables",
    )
    given = parser.parse_args(arguments)
    with one_line_errors("bptt-study-status"):
        sweeps = [run_folder.latest(*found) for found in _studies(given.folder)]
        complete = [_show(sweep) for sweep in sweeps]
        if given.gather:
            from bptt_study.runner import gather as study

            for sweep in sweeps:
                print(study.gather(sweep))
    sys.exit(0 if all(complete) else 1)


def _studies(folder: Path) -> list[tuple[Path, str]]:
    """results_dir and study of each."""
    if found := run_folder.studies(folder):
        return [(folder, study) for study in found]
    folder = folder.resolve()
    return [(folder.parent, folder.name)]


def _show(sweep: Sweep) -> bool:
    """Print what there is to say; whether the sweep is complete."""
    states = sweep.states()
    count = Counter(state.kind for state in states.values())
    diverged = sum(state.diverged > 0 for state in states.values())
    complete = count["finished"] == len(states)
    said = ", ".join(f"{count[kind]} {kind}" for kind in KINDS if count[kind])
    print(
        f"{sweep.study}: {counted(len(states), 'run')}: {said}"
        + f" ({diverged} with diverged seeds)" * bool(diverged)
        + ("; complete" if complete else "; unfinished")
    )
    for run, state in states.items():
        if state.kind != "finished":
            print(f"  {state.kind:8} {sweep.said(run)}" + f": {state.why}" * bool(state.why))
        if state.kind == "failed":
            print(f"           traceback: {sweep.place(run).failure}")
    return complete
