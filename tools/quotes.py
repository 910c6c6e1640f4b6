"""Update the numbers that texts quote from the tables: `1.637<!--study/table: condition, …: column-->`.

A new quote is written as `?.???`. `python tools/quotes.py` (`make quotes`) replaces each quoted number by the
table's, with as many digits, and prints the changes. The sentences around them must then be read again.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bptt_study.report import csv_tables

QUOTE = re.compile(r"([-−]?[\d.?]+)<!--(.*?)-->")


def readmes(results: Path) -> Iterator[Path]:
    """The files that may quote."""
    pages = sorted((results.parent / "docs").glob("*.md"))
    return iter((results.parent / "README.md", *pages, *sorted(results.rglob("README.md"))))


def now(results: Path, number: str, where: str) -> str:
    """The number in the table, with as many digits as `number`. Without a table, it is the study's summary.

    Raises:
      ValueError: If the conditions do not select exactly one row.
    """
    name, conditions, column = (part.strip() for part in where.split(":"))
    folder, _, table = name.partition("/")
    (file,) = (results / folder).glob(f"{table or 'summary'}.csv*")
    rows = csv_tables.read_table(file)
    for condition in conditions.split(","):
        key, value = condition.strip().split("=")
        rows = rows[rows[key].astype(object).fillna("").map(str).str.removesuffix(".0") == value]
    if len(rows) != 1:
        raise ValueError(f"{conditions} selects {len(rows)} rows")
    return f"{rows[column].iloc[0]:.{len(number.partition('.')[2])}f}"


def requote(results: Path) -> list[str]:
    """Replace all quoted numbers, and return a line for each change and each quote that cannot be looked up."""
    changed = []
    for file in readmes(results):

        def quote(found: re.Match[str], file: Path = file) -> str:
            number, where = found.groups()
            try:
                new = now(results, number, where)
            except (ValueError, KeyError) as error:
                new = number
                changed.append(f"{file}: {number} of {where} cannot be looked up: {error}")
            if new != number.replace("−", "-"):
                changed.append(f"{file}: {number} -> {new} ({where})")
            return f"{new}<!--{where}-->"

        text = file.read_text(encoding="utf-8")
        file.write_text(QUOTE.sub(quote, text), encoding="utf-8")
    return changed


if __name__ == "__main__":
    changed = requote(Path(__file__).parents[1] / "results")
    sys.stdout.writelines(f"{line}\n" for line in changed)
