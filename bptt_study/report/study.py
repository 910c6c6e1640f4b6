"""A study: a question, and the functions that make its tables and figures. No jax.

A function names the tables that it reads by its parameters, as in `def lags(rows, bit_responses)`. `rows` is
table.csv.gz, and any other name is that of a file, NAME.csv.gz or NAME.csv. If a table is missing, because no
probe has measured it or it could not be made, then the table or figure that needs it is left out with a line.
A parameter with a default may do without its table.
"""

import inspect
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from bptt_study.report import csv_tables, figure_layout
from bptt_study.report.csv_tables import TAKEN, check_name
from bptt_study.report.progress import shown
from bptt_study.validation import SettingError, one_line


class NothingToDrawError(Exception):
    """The tables have no rows for a figure or table, so it is left out; the message gives the reason."""


def _no_runs(config: Any) -> list[list[str]]:
    return []


def _nothing(rows: pd.DataFrame) -> None:
    """Check nothing."""


class Study(NamedTuple):
    """A study, as the file beside its yaml defines it.

    Args:
      question: The question. The docstring of the file will do: its first paragraph counts.
      tables: The tables that the study adds to those of its runs and probes, by the names of their files. They
        are made in this order, and each may read the ones before it.
      figures: The figures, by the names of their files. A function returns a figure, or yields several as pairs
        of a suffix of the name and a figure.
      more_runs: The function from the configuration of a run of the grid to the overrides of further runs.
      check: The function that raises SettingError for rows that this study cannot show, such as
        `tables.told_by`. Such a study gets the figures of any sweep, with the line of the error.
    """

    question: str
    tables: Mapping[str, Callable[..., pd.DataFrame]] = {}
    figures: Mapping[str, Callable[..., Figure | Iterable[tuple[str, Figure]]]] = {}
    more_runs: Callable[[Any], list[list[str]]] = _no_runs
    check: Callable[[pd.DataFrame], object] = _nothing


def check_names(study: Study) -> Study:
    """Check that the names of tables and figures are names of files that are the study's own, and return it.

    Raises:
      SettingError: For another name.
    """
    for kind, names in (("tables", study.tables), ("figures", study.figures)):
        for name in names:
            check_name(f"Study.{kind}", name, TAKEN if kind == "tables" else ())
    return study


def question(study: Study | None) -> str:
    """Return the question of a study as one line; empty without a study."""
    return " ".join(study.question.partition("\n\n")[0].split()) if study else ""


class Made(NamedTuple):
    """The files that were made, and a line for each table or figure that was left out or has failed."""

    files: list[Path]
    left_out: list[str]
    failed: list[str]

    def __add__(self, other: "Made") -> "Made":  # type: ignore[override]
        left_out, failed = self.left_out + other.left_out, self.failed + other.failed
        return Made(self.files + other.files, left_out, failed)


def make(study: Study, folder: Path) -> Made:
    """Make all tables of a study, then all its figures.

    Args:
      study: The study.
      folder: The folder of its tables.

    Returns:
      The files, and what was left out or has failed.
    """
    read = _Tables(folder, study.tables)  # until they are made: older files may have their names
    if refused := read.refused(study):
        return refused
    tables = {
        f"table {name}": partial(_write, name, function, read)
        for name, function in study.tables.items()
    }
    made = attempt(tables)
    return made + draw(study, folder, read.without)


def draw(study: Study, folder: Path, without: Collection[str] = ()) -> Made:
    """Draw all figures of a study from the tables in its folder.

    Args:
      study: The study.
      folder: The folder of its tables.
      without: Tables that count as missing, even if an older file has their name.

    Returns:
      The files, and what was left out or has failed.
    """
    read = _Tables(folder, without)
    if refused := read.refused(study):
        return refused
    with figure_layout.of(folder), figure_layout.style():
        return attempt(
            {
                f"figure {name}": partial(_save, name, function, read)
                for name, function in study.figures.items()
            }
        )


def attempt(steps: Mapping[str, Callable[[], Iterable[Path]]]) -> Made:
    """Take each step, whatever becomes of the others.

    Args:
      steps: The functions that write files and return them, by the names of what they make.

    Returns:
      The files, and what was left out or has failed.
    """
    made = Made([], [], [])
    for name, step in shown(steps.items(), "tables and figures"):
        try:
            made.files.extend(step())
        except NothingToDrawError as reason:
            made.left_out.append(f"{name}: {reason}")
        except (Exception, SystemExit) as error:  # the code may be anyone's
            made.failed.append(f"{name}: {one_line(error)}{_place(error)}")
    return made


def some(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return the rows, of which a figure needs some.

    Args:
      rows: The rows.
      what: The words for them, such as `run of full BPTT`.

    Returns:
      The same rows.

    Raises:
      NothingToDrawError: If there are none.
    """
    if rows.empty:
        raise NothingToDrawError(f"there is no {what}")
    return rows


class _Tables:
    """The tables in a folder, each read once, and the figures that were drawn of them."""

    def __init__(self, folder: Path, without: Collection[str] = ()) -> None:
        self.folder, self.without = folder, set(without)
        self.read: dict[str, pd.DataFrame] = {}
        self.drawn: set[str] = set()  # the names of the figures so far

    def refused(self, study: Study) -> Made | None:
        """Say why the study cannot show these rows; None if it can."""
        try:
            study.check(self.arguments(_nothing)["rows"])
        except (SettingError, NothingToDrawError) as reason:
            return Made([], [str(reason)], [])
        except (Exception, SystemExit) as error:  # the code may be anyone's
            return Made([], [], [f"check: {one_line(error)}{_place(error)}"])
        return None

    def arguments(self, function: Callable[..., Any]) -> dict[str, pd.DataFrame]:
        """Return the tables that a function names by its parameters."""
        found = {}
        for name, parameter in inspect.signature(function).parameters.items():
            file = None if name in self.without else self._file(name)
            if file is not None:
                found[name] = self._table(file)
            elif parameter.default is parameter.empty:
                raise NothingToDrawError(f"there is no table {name}")
        return found

    def _file(self, name: str) -> Path | None:
        names = (csv_tables.TABLE,) if name == "rows" else (f"{name}.csv.gz", f"{name}.csv")
        return next((self.folder / n for n in names if (self.folder / n).is_file()), None)

    def _table(self, file: Path) -> pd.DataFrame:
        if file.name not in self.read:
            rows = file.name == csv_tables.TABLE
            read = csv_tables.read_rows(self.folder) if rows else csv_tables.read_table(file)
            self.read[file.name] = read
        return self.read[file.name].copy()


def _write(name: str, function: Callable[..., pd.DataFrame], tables: _Tables) -> list[Path]:
    """Make one table and write it."""
    if (tables.folder / f"{name}.csv.gz").exists():
        raise SettingError("Study.tables", repr(name), "another name than that of a probe's table")
    table = some(function(**tables.arguments(function)), "row for it")
    table = csv_tables.flat(f"Study.tables.{name}", table)
    file = tables.folder / f"{name}.csv"
    csv_tables.write_table(table, file)
    tables.without.discard(name)
    return [file]


def _save(name: str, function: Callable[..., Any], tables: _Tables) -> Iterator[Path]:
    """Draw the figure or figures of one function and write them."""
    found = function(**tables.arguments(function))
    for suffix, figure in [("", found)] if isinstance(found, Figure) else found:
        if suffix:
            check_name(f"the suffix of {name}", suffix, ())
        file = f"{name}_{suffix}".strip("_")
        if file in tables.drawn:
            raise SettingError("Study.figures", file, "the name of one figure")
        tables.drawn.add(file)
        yield from figure_layout.save(figure, tables.folder, file)


def _place(error: BaseException) -> str:
    """Say where the function of a study was when an error stopped it."""
    frames = traceback.extract_tb(error.__traceback__)
    found = next((f for f in frames if f.filename != __file__), None)
    return f" ({Path(found.filename).name}, line {found.lineno})" if found else ""
