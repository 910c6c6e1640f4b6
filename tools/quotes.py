"""Render the pages that quote numbers: `PAGE.md.j2` becomes `PAGE.md`, with each number looked up in results/.

In a template (Jinja), `table` reads a table of a study, conditions keep rows, and a column of the row that is
left is a number:

    {% set text = table("compare_strategies/summary", task="char_lm") %}
    {{ text(strategy="fixed", truncation_length=4).validation_loss | digits(3) }}      1.745
    {{ text(strategy="full").interval("validation_loss", 3) }}                         1.752 [1.747, 1.757]
    {{ text | length }}                                                                10

The condition `None` asks for an empty cell. `python tools/quotes.py` (`make quotes`) renders all pages and
names those that changed. The sentences around the numbers must then be read again.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bptt_study import files
from bptt_study.report import csv_tables

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


def digits(value: float, n: int) -> str:
    """The number with n digits after the point, and commas between thousands."""
    return f"{value:,.{n}f}"


def templates(root: Path) -> Iterator[Path]:
    """The templates of a checkout."""
    for pattern in ("*.md.j2", "docs/*.md.j2", "results/*.md.j2", "results/*/*.md.j2"):
        yield from sorted(root.glob(pattern))


def render(template: Path, results: Path) -> str:
    """The page of a template, with the numbers that the tables in `results` have now."""

    def table(name: str, /, **conditions: Any) -> Rows:
        study, _, file = name.partition("/")
        (found,) = (results / study).glob(f"{file}.csv*")
        return Rows(name, csv_tables.read_table(found))(**conditions)

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["digits"] = digits
    made = environment.from_string(template.read_text(encoding="utf-8"))
    return NOTE.format(template.name) + made.render(table=table).lstrip("\n")


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
