"""A study: many runs gathered into tables, and its experiment's figures drawn from them."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bptt_study import records, tables
from bptt_study.checks import SettingError
from bptt_study.paths import shipped

TABLES = {
    "rows.csv": "table.csv",
    "gradient_norms.csv.gz": "gradient_norms.csv.gz",
    "cuts.csv": "cuts.csv",
}


def begin(results_dir: Path, study: str, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down which runs the study will hold, before the first one starts."""
    records.write_manifest(results_dir, study, expected)


def finish(results_dir: Path, study: str, experiment: str | None = None) -> str:
    """Gather the study's tables, check their census, draw the figures; returns what to print.

    Raises SettingError that names the missing runs.
    """
    expected = records.read_manifest(results_dir, study)
    rows = records.gather(results_dir, study, expected, "rows.csv")
    missing = tables.missing(rows, {run: entry["rows"] for run, entry in expected.items()})
    if missing:
        lines = "; ".join(" ".join(expected[run]["overrides"]) for run in missing)
        raise SettingError(
            "study",
            study,
            f"all of its {len(expected)} runs, but {len(missing)} are missing: {lines}",
        )
    folder = results_dir / study
    folder.mkdir(parents=True, exist_ok=True)
    for run_table, study_table in TABLES.items():
        table = records.gather(results_dir, study, expected, run_table)
        if len(table):
            records.write_table(table, folder / study_table)
    summary = tables.summary(rows)
    records.write_table(summary, folder / "summary.csv")
    figures = draw(experiment, folder)
    return "\n".join(
        [
            tables.as_text(summary),
            f"census: {len(rows)} rows of {len(expected)} runs, as expected",
            f"table: {folder / 'table.csv'}",
            *(f"figure: {figure}" for figure in figures),
        ]
    )


def draw(experiment: str | None, folder: Path) -> list[Path]:
    """The figures of the experiment's own file, `experiments/<experiment>.py`, if there is one."""
    try:
        file = shipped("experiments", f"{experiment}.py") / f"{experiment}.py"
    except FileNotFoundError:
        return []
    spec = importlib.util.spec_from_file_location(f"experiments.{experiment}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures: list[Path] = module.draw(folder)
    return figures
