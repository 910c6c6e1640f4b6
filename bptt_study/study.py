"""A study: many runs gathered into tables, and its experiment's own file, which analyses and draws them.

`experiments/<experiment>.py` may have three functions: `more_runs(config)`, overrides of runs that a sweep
does beside its grid; `analyse(folder)`, which writes further tables; `draw(folder)`, which draws the figures.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from bptt_study import records, tables
from bptt_study.checks import SettingError
from bptt_study.paths import shipped

ROWS = "rows.csv"  # of a run; of the study: table.csv
COSTS = "costs.csv"


def begin(results_dir: Path, study: str, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down which runs the study will hold, before the first one starts."""
    records.write_manifest(results_dir, study, expected)


def rows_of(results_dir: Path, study: str) -> tuple[dict[str, dict[str, Any]], pd.DataFrame]:
    """The study's manifest and the rows of all its runs; SettingError that names the missing ones."""
    expected = records.read_manifest(results_dir, study)
    rows = records.gather(results_dir, study, expected, ROWS)
    missing = tables.missing(rows, {run: entry["rows"] for run, entry in expected.items()})
    if missing:
        lines = "; ".join(" ".join(expected[run]["overrides"]) for run in missing)
        raise SettingError(
            "study",
            study,
            f"all of its {len(expected)} runs, but {len(missing)} are missing: {lines}",
        )
    return expected, rows


def choose(
    results_dir: Path,
    tuning: str,
    study: str,
    setting: str,
    rivals: Sequence[tuple[str, str, float]],
) -> dict[str, tuple[float, bool]]:
    """The best value of `setting` for each run, by the runs of the study `tuning`.

    rivals: tuning run, what it is a candidate for, and with which value. Beside the value: whether it
    lies at an end of the grid. The grid and the choice are left as `tuning.csv` beside the study's table.
    """
    candidates = pd.DataFrame(rivals, columns=["run", "candidate_for", "value"])
    rows = rows_of(results_dir, tuning)[1]
    table = tables.choose(rows, candidates, records.column(setting))
    folder = results_dir / study
    folder.mkdir(parents=True, exist_ok=True)
    records.write_table(table.drop(columns="value"), folder / "tuning.csv")
    best = table[table["chosen"]].set_index("candidate_for")
    return {str(run): (row["value"], bool(row["at_edge"])) for run, row in best.iterrows()}


def finish(results_dir: Path, study: str, experiment: str | None = None) -> str:
    """Gather the study's tables, check their census, draw the figures; returns what to print.

    Raises SettingError that names the missing runs.
    """
    expected, rows = rows_of(results_dir, study)
    folder = results_dir / study
    folder.mkdir(parents=True, exist_ok=True)
    records.write_table(rows, folder / "table.csv")
    for name in sorted(records.tables_of(results_dir, study, expected) - {ROWS}):
        records.write_table(records.gather(results_dir, study, expected, name), folder / name)
    costs = records.read_table(folder / COSTS)
    summary = tables.summary(rows)
    records.write_table(summary, folder / "summary.csv")
    own = [*analyse(experiment, folder), *draw(experiment, folder)]
    return "\n".join(
        [
            tables.as_text(summary, costs),
            f"census: {len(rows)} rows of {len(expected)} runs, as expected",
            f"table: {folder / 'table.csv'}",
            *(f"{'table' if '.csv' in file.suffixes else 'figure'}: {file}" for file in own),
        ]
    )


def analyse(experiment: str | None, folder: Path) -> list[Path]:
    """The experiment's further tables, made from those in the folder."""
    return getattr(story(experiment), "analyse", lambda folder: [])(folder)


def draw(experiment: str | None, folder: Path) -> list[Path]:
    """The experiment's figures, drawn from the tables in the folder."""
    return getattr(story(experiment), "draw", lambda folder: [])(folder)


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
