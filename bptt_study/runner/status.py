"""The command `bptt-study-status`: the state of a study's runs and tables, from another shell. No jax."""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bptt_study.runner import census, run_folder
from bptt_study.runner.run_folder import Ended, RunState, Sweep
from bptt_study.validation import SettingError, counted, each, one_line_errors

KINDS = ("finished", "running", "stopped", "failed", "damaged", "missing")


def main(arguments: list[str] | None = None) -> None:
    """Run `bptt-study-status`. Its status is 0 if all runs are finished, 1 if not, 2 if there is no sweep.

    Args:
      arguments: The arguments. None: those of this process.
    """
    parser = argparse.ArgumentParser(
        "bptt-study-status",
        description="Shows the last sweep of a study: the number of runs that are finished, running, stopped, "
        "failed (with the reason), damaged or missing. Beside these it shows the study's other runs, whatever "
        "started them, and whether the tables are those that were gathered, of "
        "runs of one version of your code. The exit status is 0 only if all runs are "
        "finished and the tables hold them, single runs among them.",
        epilog="The same `bptt-study -m …` command does the missing runs. It also notices if the corpus has "
        "changed since then. Of Hydra's other sweepers, such as optuna, only runs that were started are known.",
    )
    parser.add_argument(
        "folder", type=Path, help="RESULTS_DIR/STUDY, or RESULTS_DIR for all studies in it"
    )
    parser.add_argument(
        "--gather",
        action="store_true",
        help="make tables and figures of all finished runs. If runs of the last sweep are missing, the titles "
        "of the figures and the file unfinished.txt beside the tables say so",
    )
    parser.add_argument(
        "--only-latest",
        action="store_true",
        help="leave out the runs beside the last sweep's, in the list and in the tables: those of "
        "earlier sweeps, of Hydra's other sweepers, and single ones",
    )
    parser.add_argument(
        "--story",
        metavar="MODULE.NAME",
        help="with --gather and the folder of one study: the bptt_study.Study of a study of your own",
    )
    given = parser.parse_args(arguments)
    if given.story and not given.gather:
        parser.error("--story goes with --gather")
    with one_line_errors("bptt-study-status"):
        studies = _studies(given.folder)
        if given.story and len(studies) > 1:
            raise SettingError("--story", given.story, "given with the folder of one study")
        complete = all([*each(studies, partial(_show_study, given))])
    sys.exit(0 if complete else 1)


def _show_study(given: argparse.Namespace, place: tuple[Path, str]) -> bool:
    """Print the state of a study, gather it if that is asked for, and return whether it is complete."""
    sweep = _latest(*place)
    complete = _show(sweep, given.only_latest, given.gather)
    if given.gather:
        from bptt_study.runner import gather, stories

        story = stories.find(given.story, sweep.experiment)
        print(gather.gather_finished(sweep, story, given.only_latest))
    return complete


def _studies(folder: Path) -> list[tuple[Path, str]]:
    """Find the results folder and the name of each study that the argument means."""
    if found := run_folder.studies_with_runs(folder):
        return [(folder, study) for study in found]
    folder = folder.resolve()
    return [(folder.parent, folder.name)]


def _latest(results_dir: Path, study: str) -> Sweep:
    """Read the last sweep of a study; a study that has single runs alone gives an empty sweep."""
    swept = study in run_folder.studies(results_dir)
    if not swept and study in run_folder.studies_with_runs(results_dir):
        return Sweep(results_dir, study, None, {})
    return run_folder.latest_sweep(results_dir, study)


def _show(sweep: Sweep, only_latest: bool, gathers: bool) -> bool:
    """Print the state of a study, and return whether runs and tables are complete.

    Args:
      sweep: Its last sweep.
      only_latest: Whether the runs of earlier sweeps do not count.
      gathers: Whether the tables are made anew, whatever they are now.
    """
    states = sweep.states()
    complete = _show_runs(sweep, states)
    started = {} if only_latest else run_folder.started(sweep)
    others = Ended({}, {}) if only_latest else run_folder.others(sweep)
    show_started(sweep, started)
    _show_others(sweep, others)
    for command in [] if only_latest else run_folder.searches(sweep):
        print(f"{sweep.study}: searched by another sweeper: {command}")
    complete = complete and not started and not others.damaged
    if not (states or only_latest or others.finished):
        print(f"{sweep.study}: no finished run")
        complete = False
    if gathers:
        return complete
    finished = {run for run, state in states.items() if state.kind == "finished"}
    faults = census.faults(sweep.results_dir / sweep.study)
    faults += census.lacking(sweep, finished | set(others.finished))
    for fault in faults:
        print(f"{sweep.study}: tables: {fault}")
    return complete and not faults


def show_started(latest: Sweep, started: Mapping[str, RunState]) -> None:
    """Print the runs beside the last sweep's that were started and did not end."""
    if not started:
        return
    print(f"{latest.study}: {counted(len(started), 'unfinished run')} beside the last sweep's:")
    _show_unfinished(latest, started)
    left = latest.paths("RUN")
    print(
        f"  to give one up, remove {', '.join(map(str, (left.checkpoint, left.failure, left.lock)))}"
    )


def _show_unfinished(latest: Sweep, states: Mapping[str, RunState]) -> None:
    """Print the states of the runs that are not finished, a line each."""
    unfinished = {run: state for run, state in states.items() if state.kind != "finished"}
    labels = run_folder.labels(latest, unfinished)
    for run, state in unfinished.items():
        print(f"  {state.kind:8} {labels[run]}" + f": {state.why}" * bool(state.why))
        if state.kind == "failed":
            print(f"           traceback: {latest.paths(run).failure}")


def _show_others(latest: Sweep, others: Ended) -> None:
    """Print the runs beside the last sweep's, sweep by sweep; the tables include the intact ones."""
    for run, why in others.damaged.items():
        print(
            f"{latest.study}: damaged, and not in the tables: {run}, beside the last sweep: {why}"
        )
    if not others.finished:
        return
    print(
        f"{latest.study}: with {counted(len(others.finished), 'finished run')} beside the last sweep's:"
    )
    found, rest = run_folder.by_sweep(latest, others.finished)
    for sweep, runs in found:
        of_all = f"{len(runs)} of {counted(len(sweep.runs), 'run')} of an earlier sweep"
        print(f"  {of_all}: {sweep.command}")
    if rest:
        how = "of another sweeper, or " * bool(run_folder.searches(latest)) + "started one by one"
        print(f"  {counted(len(rest), 'run')} {how}: {', '.join(rest)}")


def _show_runs(sweep: Sweep, states: Mapping[str, RunState]) -> bool:
    """Print the states of a sweep's runs, and return whether all are finished."""
    if not states:
        searched = " but those of other sweepers, which do not note their runs beforehand"
        print(f"{sweep.study}: no sweep" + searched * bool(run_folder.searches(sweep)))
        return True
    count = Counter(state.kind for state in states.values())
    diverged = sum(state.diverged > 0 for state in states.values())
    complete = count["finished"] == len(states)
    kinds = ", ".join(f"{count[kind]} {kind}" for kind in KINDS if count[kind])
    print(
        f"{sweep.study}: {counted(len(states), 'run')}: {kinds}"
        + f" ({diverged} with diverged seeds)" * bool(diverged)
        + ("; complete" if complete else "; unfinished")
    )
    _show_unfinished(sweep, states)
    return complete
