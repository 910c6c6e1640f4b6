"""A study: many runs gathered into tables, and its experiment's own file, which analyses and draws them.

`experiments/<experiment>.py` may have three functions: `more_runs(config)`, overrides of runs that a sweep
does beside its grid; `analyse(folder)`, which writes further tables; `draw(folder)`, which draws the figures.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from bptt_study import files
from bptt_study.paths import shipped
from bptt_study.report import columns, csv_tables, tables
from bptt_study.runner.run_folder import Sweep
from bptt_study.validation import SettingError, counted

ROWS = "rows.csv"  # of a run; of the study: table.csv
COSTS = "costs.csv"


def rows_of(sweep: Sweep) -> pd.DataFrame:
    """The rows of all runs of a sweep; SettingError that names those that are missing."""
    states = sweep.states()
    missing = [run for run, state in states.items() if state.kind != "finished"]
    rows = csv_tables.gather(
        (sweep.place(run).folder for run in states if run not in missing), ROWS
    )
    missing += tables.missing(
        rows, {run: entry["rows"] for run, entry in sweep.runs.items() if run not in missing}
    )
    if missing:
        lines = "; ".join(
            sweep.said(run) + f": {states[run].why}" * bool(states[run].why) for run in missing
        )
        way_out = f"Missing are {len(missing)} of {counted(len(states), 'run')}: {lines}. "
        way_out += "The same command does them and keeps the others."
        raise SettingError("study", sweep.study, "a study whose runs are all finished", way_out)
    return rows


def choose(
    tried: Sweep,
    study: str,
    setting: str,
    rivals: Sequence[tuple[str, str, float]],
) -> dict[str, tuple[float, bool]]:
    """The best value of `setting` for each run, by the runs of the sweep `tried`.

    rivals: tuning run, what it is a candidate for, and with which value. Beside the value: whether it
    lies at an end of the grid. The grid and the choice are left as `tuning.csv` beside the study's table.
    """
    candidates = pd.DataFrame(rivals, columns=["run", "candidate_for", "value"])
    table = tables.choose(rows_of(tried), candidates, columns.column(setting))
    folder = tried.results_dir / study
    folder.mkdir(parents=True, exist_ok=True)
    csv_tables.write_table(table.drop(columns="value"), folder / "tuning.csv")
    best = table[table["chosen"]].set_index("candidate_for")
    return {str(run): (row["value"], bool(row["at_edge"])) for run, row in best.iterrows()}


def finish(sweep: Sweep) -> str:
    """Gather the sweep's tables, check their census, draw the figures; returns what to print.

    Raises SettingError that names the missing runs; the tables and figures that are there stay as they are.
    """
    return _compile(sweep, rows_of(sweep), "")


def gather(sweep: Sweep) -> str:
    """`finish` for the runs that are there; tables and figures say that they are unfinished."""
    there = {r: e for r, e in sweep.runs.items() if sweep.state(r).kind == "finished"}
    if not there:
        raise SettingError("study", sweep.study, "a study with at least one finished run")
    left = len(sweep.runs) - len(there)
    part = sweep._replace(runs=there)
    unfinished = f"unfinished: {len(there)} of {counted(len(sweep.runs), 'run')}" if left else ""
    return _compile(part, rows_of(part), unfinished)


def _compile(sweep: Sweep, rows: pd.DataFrame, unfinished: str) -> str:
    folder = sweep.results_dir / sweep.study
    folder.mkdir(parents=True, exist_ok=True)
    folders = [sweep.place(run).folder for run in sweep.runs]
    if unfinished:
        files.write(folder / csv_tables.UNFINISHED, unfinished + "\n")
    csv_tables.write_table(rows, folder / "table.csv")
    for name in sorted(csv_tables.tables_of(folders) - {ROWS}):
        csv_tables.write_table(csv_tables.gather(folders, name), folder / name)
    costs = csv_tables.read_table(folder / COSTS)
    summary = tables.summary(rows)
    csv_tables.write_table(summary, folder / "summary.csv")
    if not unfinished:
        (folder / csv_tables.UNFINISHED).unlink(missing_ok=True)
    own = [*analyse(sweep.experiment, folder), *draw(sweep.experiment, folder)]
    census = f"census: {counted(len(rows), 'row')} of {counted(len(folders), 'run')}"
    return "\n".join(
        [
            tables.as_text(summary, costs),
            f"{census}; {unfinished}" if unfinished else f"{census}, as expected",
            f"table: {folder / 'table.csv'}",
            *(f"{'table' if '.csv' in file.suffixes else 'figure'}: {file}" for file in own),
        ]
    )


def analyse(experiment: str | None, folder: Path) -> list[Path]:
    """The experiment's further tables, made from those in the folder."""
    return getattr(story(experiment), "analyse", lambda folder: [])(folder)


def draw(experiment: str | None, folder: Path) -> list[Path]:
    """The experiment's figures, drawn from the tables in the folder."""
    own = getattr(story(experiment), "draw", None)
    if own is None:
        return []
    from bptt_study.report import (
        figure_layout,  # half a second of matplotlib, for those who draw only
    )

    with figure_layout.of(folder):
        return own(folder)


def more_runs(experiment: str | None, config: Any) -> list[list[str]]:
    """Overrides of the runs that the experiment wants beside one of its grid, whose config this is."""
    return getattr(story(experiment), "more_runs", lambda config: [])(config)


def story(experiment: str | None) -> ModuleType | None:
    """The experiment's own file, `experiments/<experiment>.py`, if there is one."""
    try:
        file = shipped("experiments", f"{experiment}.py") / f"{experiment}.py"
    except FileNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location(f"experiments.{experiment}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
