"""Render the pages that quote numbers: `PAGE.md.j2` becomes `PAGE.md`, with each number looked up in results/.

In a template (Jinja), `table` reads a table of a study, conditions keep rows, and a column of the row that is
left is a number:

    {% set text = table("compare_strategies/summary", task="char_lm") %}
    {{ text(strategy="fixed", truncation_length=4).validation_loss | digits(3) }}      1.745
    {{ text(strategy="full").interval("validation_loss", 3) }}                         1.752 [1.747, 1.757]
    {{ text | length }}                                                                11

The condition `None` asks for an empty cell. `over_seeds` turns the rows of several seeds into one with the
median and its interval. A loop over rows gives them one by one. `{{ files_of_every_study }}` is the part of a
README's list of files that is always the same.

`python tools/quotes.py` (`make quotes`) renders all pages and names those that changed. The sentences around
the numbers must then be read again.
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bptt_study import files
from bptt_study.report import csv_tables, tables

FILES = """\
| `summary.csv` | one row per run: last scores with intervals over seeds |
| `table.csv.gz` | one row per run, seed and log point |
| `provenance.json` | one line per run: seconds, versions, commit and machine |"""
WIDTH = 112
NOTE = "<!-- `make quotes` wrote this page. Edit {}. -->\n\n"


class Rows:
    """Rows of a table, of which conditions keep some."""

    def __init__(self, name: str, table: pd.DataFrame) -> None:
        self.name, self.table = name, table

    def __call__(self, /, **conditions: Any) -> "Rows":
        """The rows that meet the conditions, column=value."""
        table = self.table
        for column, value in conditions.items():
            table = table[table[column].isna() if value is None else table[column] == value]
        said = ", ".join(f"{column}={value}" for column, value in conditions.items())
        return Rows(f"{self.name} {said}".strip(), table)

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator["Rows"]:
        for i in range(len(self)):
            yield Rows(self.name, self.table.iloc[[i]])

    def __getitem__(self, column: str) -> Any:
        """The number in the only row that is left.

        Raises:
          ValueError: If there is not exactly one row.
        """
        if len(self) != 1:
            raise ValueError(f"{self.name} selects {len(self)} rows; it must select one")
        return self.table[column].iloc[0]

    def interval(self, column: str, n: int) -> str:
        """The number with its interval, both with n digits; its ends are in COLUMN_low or low, and so on."""
        prefix = f"{column}_" if f"{column}_low" in self.table else ""
        low, high = (digits(self[f"{prefix}{end}"], n) for end in ("low", "high"))
        return f"{digits(self[column], n)} [{low}, {high}]"

    def over_seeds(self, column: str) -> "Rows":
        """One row with the median of a column and its interval, the rows being those of the seeds."""
        found = dict(zip(("", "_low", "_high"), tables.interval(self.table[column]), strict=True))
        row = {f"{column}{end}": [number] for end, number in found.items()}
        return Rows(self.name, pd.DataFrame(row))


def digits(value: float, n: int) -> str:
    """The number with n digits after the point, commas between thousands, and no sign before a zero."""
    return f"{value:z,.{n}f}"


def power(value: float) -> str:
    """The number with one digit and a power of ten, as 3·10⁻¹²."""
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}·10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def templates(root: Path) -> Iterator[Path]:
    """The templates of a checkout."""
    for pattern in ("*.md.j2", "docs/*.md.j2", "results/*.md.j2", "results/*/*.md.j2"):
        yield from sorted(root.glob(pattern))


def table(results: Path, name: str, /, **conditions: Any) -> Rows:
    """The rows of a table of `results`, STUDY/TABLE, that meet the conditions."""
    study, _, file = name.partition("/")
    (found,) = (results / study).glob(f"{file}.csv*")
    return Rows(name, csv_tables.read_table(found))(**conditions)


def render(template: Path, results: Path) -> str:
    """The page of a template, with the numbers that the tables in `results` have now."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"digits": digits, "power": power}
    made = environment.from_string(template.read_text(encoding="utf-8"))
    text = made.render(table=partial(table, results), files_of_every_study=FILES).strip("\n")
    return NOTE.format(template.name) + _filled(text) + "\n"


def _filled(text: str) -> str:
    """The page with paragraphs and items in lines of WIDTH letters; code, tables and headings stay."""
    parts = re.split(r"(^```.*?^```$)|\n\n", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [part.strip("\n") for part in parts if part and part.strip("\n")]
    return "\n\n".join("\n".join(map(_lines, re.split(r"\n(?=- )", block))) for block in blocks)


def _lines(block: str) -> str:
    """A paragraph or an item of a list in lines; another block as it is."""
    if block.startswith(("#", "|", "```", "    ")):
        return block
    indent = "  " * block.startswith("- ")
    return textwrap.fill(
        " ".join(block.split()), WIDTH, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def main(root: Path) -> list[Path]:
    """Render all pages of a checkout, and return those that changed."""
    changed = []
    for template in templates(root):
        page, text = template.with_suffix(""), render(template, root / "results")
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            files.write(page, text)
            changed.append(page)
    return changed


if __name__ == "__main__":
    sys.stdout.writelines(f"{page}\n" for page in main(Path(__file__).parents[1]))
