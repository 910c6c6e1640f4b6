"""Gather the runs of a sweep into the tables of its study, then make the study's own tables and figures."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bptt_study import files
from bptt_study.report import columns, csv_tables, provenance, tables, untold
from bptt_study.report.csv_tables import ROWS
from bptt_study.runner import census as census_of_tables
from bptt_study.runner import run_folder
from bptt_study.runner.census import COSTS, TUNING
from bptt_study.runner.progress import say
from bptt_study.runner.run_folder import Sweep
from bptt_study.validation import SettingError, counted

if TYPE_CHECKING:
    from bptt_study.report.study import Made, Study


def rows_of(sweep: Sweep) -> pd.DataFrame:
    """Read the rows of all runs of a sweep.

    Args:
      sweep: The sweep.

    Returns:
      The rows, in the order of the runs.

    Raises:
      SettingError: If runs are missing; the message names them.
    """
    states = sweep.states()
    missing = [run for run, state in states.items() if state.kind != "finished"]
    finished = [run for run in states if run not in missing]
    rows = csv_tables.gather((sweep.paths(run).folder for run in finished), ROWS)
    missing += tables.missing(rows, {run: sweep.runs[run]["rows"] for run in finished})
    if missing:
        lines = "; ".join(
            sweep.label(run) + f": {states[run].why}" * bool(states[run].why) for run in missing
        )
        verb = "is" if len(missing) == 1 else "are"
        way_out = f"Missing {verb} {len(missing)} of {counted(len(states), 'run')}: {lines}. "
        way_out += "The same command does them and keeps the others."
        raise SettingError("study", sweep.study, "a study whose runs are all finished", way_out)
    return rows


def compare(
    tried: Sweep, setting: str, candidates: Sequence[tuple[str, str, float]]
) -> pd.DataFrame:
    """Compare the values of a setting, and choose the best one for each run.

    Args:
      tried: The sweep of the tuning runs.
      setting: The setting, such as optimizer.learning_rate.
      candidates: For each tuning run: its identity, the run that it is a candidate for, and its value.

    Returns:
      The comparison, as `tables.choose` makes it.
    """
    names = pd.DataFrame(candidates, columns=["run", "candidate_for", "value"])
    return tables.choose(rows_of(tried), names, columns.column(setting))


def write_choice(tried: Sweep, study: str, setting: str, table: pd.DataFrame) -> None:
    """Write a comparison to the study's tuning.csv, and say which choices are doubtful.

    Args:
      tried: The sweep of the tuning runs.
      study: The study whose runs get the chosen values.
      setting: The setting.
      table: The comparison; `candidate_for` is the run of the study that gets the chosen value.
    """
    folder = tried.results_dir / study
    folder.mkdir(parents=True, exist_ok=True)
    only_writer = partial(census_of_tables.only_writer, tried.results_dir)
    with only_writer(study), only_writer(tried.study):
        csv_tables.write_table(table.drop(columns="value"), folder / TUNING)
        census_of_tables.write(tried, [*tried.runs], True, ())  # tuning.csv is all that is made
    for _, row in table[table["chosen"]].iterrows():
        chosen = f"{setting}={row['value']}"
        if not np.isfinite(row["median"]):
            lost = "half of the seeds or more diverged at every candidate"
            say(f"{lost}: {chosen}, the first, for {row['candidate_for']}")
        if row["at_edge"]:
            say(f"at the edge of the grid: {chosen} for {row['candidate_for']}")


def gather(
    sweep: Sweep, story: "Study | None", only_latest: bool = False, tuned: bool = False
) -> str:
    """Make the tables and figures of a study whose last sweep is finished.

    Args:
      sweep: The sweep.
      story: The study's question, tables and figures; None: the figures of any sweep.
      only_latest: Whether to leave out the study's other finished runs, those of earlier sweeps.
      tuned: Whether `write_choice` has written the comparison that chose a setting of these runs.

    Returns:
      The text to print.

    Raises:
      SettingError: If runs are missing. Existing tables and figures then stay as they are.
    """
    with census_of_tables.only_writer(sweep.results_dir, sweep.study):
        return _make_tables(sweep, story, "", only_latest, tuned)


def gather_finished(sweep: Sweep, story: "Study | None", only_latest: bool = False) -> str:
    """Make the tables and figures of the finished runs, and mark them as unfinished if runs are missing.

    Args:
      sweep: The sweep.
      story: As in `gather`.
      only_latest: As in `gather`.

    Returns:
      The text to print.

    Raises:
      SettingError: If no run is finished.
    """
    with census_of_tables.only_writer(sweep.results_dir, sweep.study):
        finished = {run: entry for run, entry in sweep.runs.items() if sweep.finished(run)}
        others = run_folder.finished(sweep.results_dir, sweep.study)
        if only_latest and others and not sweep.runs:
            allowed = (
                "false for a study whose runs are all of another sweeper, or started one by one"
            )
            raise SettingError("only_latest", True, allowed)
        if not finished and (only_latest or not others):
            raise SettingError("study", sweep.study, "a study with at least one finished run")
        part = sweep._replace(runs=finished)
        of_all = f"{len(finished)} of {counted(len(sweep.runs), 'run')}"
        unfinished = f"unfinished: {of_all}" if len(finished) < len(sweep.runs) else ""
        return _make_tables(part, story, unfinished, only_latest)


def _make_tables(
    sweep: Sweep,
    story: "Study | None",
    unfinished: str,
    only_latest: bool,
    tuned: bool = False,
) -> str:
    folder = sweep.results_dir / sweep.study
    folder.mkdir(parents=True, exist_ok=True)
    runs = run_folder.runs_folder(sweep.results_dir, sweep.study)
    for place in (folder, runs, runs / "sweeps"):
        files.remove_leftovers(place)
    others, damaged = ({}, {}) if only_latest else run_folder.others(sweep)
    folders = [paths.folder for paths in (*map(sweep.paths, sweep.runs), *others.values())]
    seals = _seals(folders)
    latest = rows_of(sweep)
    rows = csv_tables.gather(folders, ROWS) if others else latest
    costs = csv_tables.gather(folders, COSTS)
    _check_all_stayed(sweep, seals)
    if unfinished:
        files.write(folder / csv_tables.UNFINISHED, unfinished + "\n")
    csv_tables.write_table(rows, folder / csv_tables.TABLE)
    made = {csv_tables.TABLE, "summary.csv"}
    still = census_of_tables.runs(folder) <= {*sweep.runs, *others}  # the tables still have them
    if tuned or (still and TUNING in census_of_tables.made(folder)):
        made.add(TUNING)
    made |= {*_write_others(folder, folders)}
    _check_all_stayed(sweep, seals)
    files.write(folder / provenance.FILE, provenance.packed(costs))
    from bptt_study.runner import figures

    summary = tables.summary(rows)
    csv_tables.write_table(summary, folder / "summary.csv")
    if not unfinished:
        (folder / csv_tables.UNFINISHED).unlink(missing_ok=True)
    old = census_of_tables.made(folder)
    _remove(folder, [name for name in old - made if ".csv" in name])  # no figure may read them
    own = figures.make(story, folder, sweep.story)
    made |= {file.name for file in own.files}
    removed = _remove(folder, sorted(old - made))
    census_of_tables.write(sweep, [*sweep.runs, *others], only_latest, made)
    left_out = [f"left out: {run} is damaged: {why}" for run, why in damaged.items()]
    left_out += [f"tables: {fault}" for fault in census_of_tables.faults(folder)]
    apart = untold.also_differ(rows, tables.varying(rows))
    census = _census(sweep, len(latest), len(rows), len(others), unfinished)
    lines = [tables.as_text(summary, costs), *[apart] * bool(apart), census]
    lines += [*removed, *left_out, f"table: {folder / csv_tables.TABLE}"]
    return "\n".join([*lines, *_said(own, folder, sweep.story)])


def _write_others(folder: Path, folders: list[Path]) -> Iterator[str]:
    """Write the tables of probes and of a study's own run, and yield their names."""
    for name in sorted(csv_tables.tables_of(folders) - {ROWS, COSTS}):
        file = folder / f"{name.removesuffix('.gz')}.gz"
        csv_tables.write_table(csv_tables.gather(folders, name), file)
        yield file.name


def _remove(folder: Path, old: list[str]) -> list[str]:
    """Remove files that would show other runs beside the new ones, and say so in a line."""
    for name in old:
        (folder / name).unlink(missing_ok=True)
    return [f"removed: {', '.join(old)}, made before"] * bool(old)


def _census(sweep: Sweep, latest: int, rows: int, others: int, unfinished: str) -> str:
    """Write how many rows of how many runs the tables have: of the last sweep, and beside it."""
    if not sweep.runs:  # single runs, or those of another sweeper
        return f"census: {counted(rows, 'row')} of {counted(others, 'finished run')}"
    said = f"census: {counted(latest, 'row')} of {counted(len(sweep.runs), 'run')}"
    said += f"; {unfinished}" if unfinished else ", as expected"
    beside = (
        f"; with {counted(others, 'run')} beside the last sweep's (--only-latest leaves them out)"
    )
    return said + beside * bool(others)


def _said(own: "Made", folder: Path, story: str | None) -> Iterator[str]:
    """Yield a line for each of the study's own tables and figures: made, left out, or failed."""
    for file in own.files:
        yield f"{'table' if '.csv' in file.suffixes else 'figure'}: {file}"
    yield from (f"left out: {line}" for line in own.left_out)
    yield from (f"FAILED: {line}" for line in own.failed)
    if own.failed:
        again = f"bptt-study-figures {folder}" + f" --story {story}" * bool(story)
        yield f"`{again}` makes them again once that is mended"


def _seals(folders: Sequence[Path]) -> dict[Path, tuple[int, int] | None]:
    """Return what tells a sealed run from the same run that went and came back; None if it has no seal."""

    def of(folder: Path) -> tuple[int, int] | None:
        try:
            found = folder.stat()
        except FileNotFoundError:
            return None
        return (found.st_ino, found.st_ctime_ns) if (folder / files.SEAL).exists() else None

    return {folder: of(folder) for folder in folders}


def _check_all_stayed(sweep: Sweep, before: dict[Path, tuple[int, int] | None]) -> None:
    """Raise SettingError if a run went, even if it came back: another process may set a damaged one aside."""
    now = _seals(list(before))
    if gone := [
        folder.name for folder in before if now[folder] is None or now[folder] != before[folder]
    ]:
        allowed = "a study whose runs stay while its tables are made"
        way_out = (
            f"Meanwhile {', '.join(gone)} went. `bptt-study-status --gather` makes the tables."
        )
        raise SettingError("study", sweep.study, allowed, way_out)
