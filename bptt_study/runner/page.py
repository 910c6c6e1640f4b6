"""The page of a study: one HTML file with everything that a reader needs, by `bptt-study-report`. No jax."""

import argparse
import base64
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from bptt_study import files
from bptt_study.paths import PACKAGE
from bptt_study.report import columns, csv_tables, provenance, tables, untold
from bptt_study.report import study as report_study
from bptt_study.report.progress import shown
from bptt_study.runner import census, environment, figures, run_folder, stories
from bptt_study.validation import SettingError, each, one_line_errors

PAGE = "report.html"
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
LARGEST = 300  # rows of a table that the page shows
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
MARKS = re.compile(
    r"\*\*(.+?)\*\*|\*(.+?)\*|`(.+?)`|!?\[(.+?)\]\(.+?\)"
)  # of Markdown, around a text


class Cell(NamedTuple):
    """A cell of a table: its text, and the number by which it is sorted, as JavaScript writes it."""

    text: str
    number: str | None


class Table(NamedTuple):
    """A table for the template."""

    columns: list[str]
    rows: list[list[Cell]]


def main(arguments: list[str] | None = None) -> None:
    """Run `bptt-study-report`; its status is 2 if a folder holds no study.

    Args:
      arguments: The arguments. None: those of this process.
    """
    parser = argparse.ArgumentParser(
        "bptt-study-report",
        description=f"Writes FOLDER/{PAGE} for each study: question, finding, figures, tables, runs, versions, "
        "failures, and the commands that make the study again. The file needs no other files.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="RESULTS_DIR/STUDY, or RESULTS_DIR for all its studies and an index",
    )
    given = parser.parse_args(arguments)
    with one_line_errors("bptt-study-report"):
        for _ in each(given.folders, _print_pages):
            pass


def _print_pages(folder: Path) -> None:
    for file in _pages(folder.resolve()):
        print(file)


def write(folder: Path | str) -> list[Path]:
    """Write the page of a study, or the pages of all studies in a folder with an index.

    Args:
      folder: The folder of a study, or of several.

    Returns:
      The files.

    Raises:
      SettingError: If there is no study, or, after the pages of all others, if one cannot be read.
    """
    return [*_pages(Path(folder).resolve())]


def _pages(folder: Path) -> Iterator[Path]:
    """Write the pages one by one, the index of several studies last."""
    alone = (folder / csv_tables.TABLE).is_file()
    studies = sorted(file.parent for file in folder.glob(f"*/{csv_tables.TABLE}"))
    if not (alone or studies):
        allowed = f"the folder of a study with a {csv_tables.TABLE}, or of several"
        raise SettingError("FOLDER", folder, allowed, "`bptt-study -m` makes the table.")
    written: list[Path] = []

    def one(place: Path) -> Path:
        of_all = place == folder and not alone
        file = _written(place, index(folder, written) if of_all else study(place))
        written.append(place)
        return file

    yield from each([folder] if alone else chain(shown(studies, "pages"), [folder]), one)


def study(folder: Path) -> dict[str, Any]:
    """Collect the content of a study's page, by the names of the template."""
    experiment = figures.experiment_of(folder)
    census.say_faults(folder)
    rows = csv_tables.read_rows(folder)
    small, others = _tables(folder)
    return {
        "title": folder.name,
        "question": question(folder),
        "faults": census.all_faults(folder),
        "unfinished": _text(folder / csv_tables.UNFINISHED),
        "readme": list(_blocks(_text(folder / "README.md"))),
        "figures": list(_pictures(folder)),
        "tables": small,
        "others": others,
        "runs": _shown(_runs(rows)),
        "apart": untold.also_differ(rows, tables.varying(rows)),
        "configurations": list(_configurations(folder, rows)),
        "states": _states(folder),
        "machines": _shown(_machines(folder)),
        "commands": _commands(folder, experiment, rows),
    }


def index(folder: Path, studies: Iterable[Path]) -> dict[str, Any]:
    """Collect the content of the page that lists studies."""
    found = []
    for one in studies:
        rows = csv_tables.read_rows(one)
        last = tables.final(rows)
        found.append(
            {
                "study": one.name,
                "question": question(one),
                "runs": rows["run"].nunique(),
                "seeds": int(last.groupby("run")["seed"].nunique().max()),
                "diverged": int(last["diverged"].sum()),
            }
        )
    links = [(row["study"], f"{row['study']}/{PAGE}") for row in found]
    return {"title": folder.name, "studies": _shown(pd.DataFrame(found)), "links": links}


def question(folder: Path) -> str:
    """Return the question of a study: the one that its sweep noted, or that of a shipped experiment."""
    noted = run_folder.noted(folder).question
    return noted or report_study.question(stories.shipped(figures.experiment_of(folder)))


def _written(folder: Path, content: dict[str, Any]) -> Path:
    template = (PACKAGE / "report" / "page.html").read_text(encoding="utf-8")
    made = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).from_string(template)
    files.remove_leftovers(folder)
    text = made.render(content).lstrip()
    files.write(folder / PAGE, text.encode(errors="backslashreplace"))  # a path may be no UTF-8
    return folder / PAGE


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""


def _blocks(readme: str) -> Iterator[tuple[str, str]]:
    """The blocks of a README as HTML elements and their text, without its title, comments and marks."""
    for block in re.split(r"\n\s*\n", COMMENT.sub("", readme)):
        text = block.strip()
        if text.startswith("# ") or not text:
            continue
        if text.startswith("#"):
            yield "h3", text.lstrip("# ")
        elif text.startswith(("|", "```", "- ", "* ")):
            yield "pre", text.strip("`")
        else:
            yield "p", MARKS.sub(lambda found: found[found.lastindex or 0], " ".join(text.split()))


def _tables(folder: Path) -> tuple[list[tuple[str, Table]], list[str]]:
    """Return the tables that the page shows, the summary first, and the names of tables that are too long."""
    names = sorted(csv_tables.tables_of([folder]), key=lambda name: (name != "summary.csv", name))
    found = {
        name: csv_tables.read_table(folder / name) for name in names if name != csv_tables.TABLE
    }
    small = [(name, _shown(table)) for name, table in found.items() if len(table) <= LARGEST]
    return small, [name for name in names if name not in dict(small)]


def _runs(rows: pd.DataFrame) -> pd.DataFrame:
    """List the runs with the settings that tell them apart, their seeds, and the number that diverged."""
    names = [name for name in tables.varying(rows) if name != "run"]
    rows = rows.assign(truncation_length=tables.lengths(rows))
    runs = rows.drop_duplicates("run")[["run", *names]].set_index("run")
    last = tables.final(rows).groupby("run", sort=False)
    runs["seeds"] = last["seed"].agg(lambda seeds: " ".join(map(str, sorted(seeds))))
    runs["diverged"] = last["diverged"].sum().astype(int)
    if "diverged_at" in rows:
        runs["first divergence, update"] = last["diverged_at"].min()
    return runs.reset_index().rename(columns={"truncation_length": "length"})


def _pictures(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the name, the type and the content of each figure, of its formats the one that was drawn last."""
    drawn = [file for file in sorted(folder.iterdir()) if file.suffix in PICTURES]
    newest = {file.stem: file for file in sorted(drawn, key=lambda file: file.stat().st_mtime_ns)}
    for name, file in sorted(newest.items()):
        yield name, PICTURES[file.suffix], base64.b64encode(file.read_bytes()).decode()


def _configurations(folder: Path, rows: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield the configuration of each run, or its settings in the table if its folder is missing."""
    for run, part in rows.groupby("run", sort=False):
        paths = run_folder.run_paths(folder.parent, folder.name, str(run))
        settings = part.iloc[0].dropna()
        lines = (f"{c}: {v}" for c, v in settings.items() if columns.kind(str(c)) == "setting")
        yield str(run), _text(paths.folder / "config.yaml") or "\n".join(lines)


def _states(folder: Path) -> Table | None:
    """List the unfinished runs of the study with the reason; None if all are finished."""
    sweep = run_folder.noted(folder)
    states = sweep.states() | run_folder.started(sweep)
    labels = run_folder.labels(sweep, states)
    found = [
        {"run": labels[run], "state": state.kind, "reason": state.why}
        for run, state in states.items()
        if state.kind != "finished"
    ]
    return _shown(pd.DataFrame(found)) if found else None


def _machines(folder: Path) -> pd.DataFrame:
    """List the versions and machines of the runs, with the number of runs of each."""
    if not (folder / provenance.FILE).is_file():
        return pd.DataFrame()
    costs = provenance.read(folder)
    told = ("version", "commit", "python", "jax", "device", "processor", "threads", "launcher")
    names = [c for c in told if c in costs]
    return costs.groupby(names, dropna=False)["run"].nunique().rename("runs").reset_index()


def _commands(folder: Path, experiment: str | None, rows: pd.DataFrame) -> list[str]:
    """Return the commands that make these runs again, those that did them if a sweep has recorded them."""
    latest = run_folder.noted(folder)
    found, rest = run_folder.by_sweep(latest, rows["run"].unique())
    commands = [sweep.command for sweep, _ in found]
    if rest and (searches := run_folder.searches(latest)):
        return [*commands, *searches]
    if found:
        return [*commands, *[f"# started one by one: {', '.join(rest)}"] * bool(rest)]
    if not experiment:
        return ["none is recorded"]
    return [f"{before}bptt-study -m experiment={experiment}" for before in _variables(rows)]


def _variables(rows: pd.DataFrame) -> list[str]:
    """Write the variables of the runs' environments in front of a command, such as 'JAX_ENABLE_X64=True '."""
    noted = rows["environment"].drop_duplicates() if "environment" in rows else [None]
    return ["".join(f"{one} " for one in environment.variables(_settings(v))) for v in noted]


def _settings(value: Any) -> dict[str, Any]:
    """Read a cell of the column `environment`; a gap, or what was edited to be no JSON, has no settings."""
    try:
        return {**json.loads(value)}
    except (ValueError, TypeError):
        return {}


def _shown(table: pd.DataFrame) -> Table:
    """Turn a table into text, with the numbers by which its columns are sorted."""
    return Table(
        [str(c) for c in table],
        [
            [_cell(v, str(c)) for c, v in zip(table, row, strict=True)]
            for row in table.to_numpy(object)
        ],
    )


def _cell(value: Any, column: str) -> Cell:
    if pd.isna(value):
        return Cell("", None)
    if isinstance(value, bool):
        return Cell(str(value), None)
    if isinstance(value, float):
        exact = columns.exact(column) or value % 1 == 0
        said = tables.text(value) if exact else f"{value:.4g}"
        return Cell(said, repr(value).replace("inf", "Infinity"))
    return Cell(str(value), str(value) if isinstance(value, int) else None)


if __name__ == "__main__":
    main()
