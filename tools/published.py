"""Look our numbers up beside published ones: from results/published.yaml to results/published.csv.

Each statement has bounds, within which ours must lie to agree with it, and names its table, rows and column.
`make published` writes the table, and `make quotes` then the page docs/published.md.
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import quotes
import yaml

from bptt_study.report import csv_tables

SEEN = ("text", "code", "abstract", "second hand")  # what of a source was read
COLUMNS = (
    "source", "item", "seen", "protocol", "theirs", "least", "most", "ours", "ours_low", "ours_high", "n",
    "agrees", "why", "table",
)  # fmt: skip


def compare(results: Path) -> pd.DataFrame:
    """Make one row per statement, with ours and whether it agrees.

    Ours agrees if its whole 95 % interval lies within the bounds, and partly if a part of it does.

    Raises:
      ValueError: If ours is not one row of its table, and for a statement that does not agree and has no `why`.
    """
    statements = yaml.safe_load((results / "published.yaml").read_text(encoding="utf-8"))
    return pd.DataFrame([_compared(results, said) for said in statements], columns=COLUMNS)


def _compared(results: Path, said: dict[str, Any]) -> dict[str, Any]:
    if said["seen"] not in SEEN:
        raise ValueError(f"`seen` must be one of {', '.join(SEEN)}; got {said['seen']}")
    found, column = quotes.table(results, said["table"], **said["rows"]), said["column"]
    ours = found[column]
    prefix = f"{column}_" if f"{column}_low" in found.table else ""
    ends = [f"{prefix}{end}" for end in ("low", "high")]
    low, high = (found[end] if end in found.table else ours for end in ends)
    least, most = said["bounds"]
    inside, apart = least <= low and high <= most, high < least or most < low
    agrees = "yes" if inside else "no" if apart else "partly"
    if not inside and "why" not in said:
        raise ValueError(f"{said['item']} of {said['source']} does not agree, and has no `why`")
    bounds = {"least": least, "most": most, "agrees": agrees}
    numbers = {"ours": ours, "ours_low": low, "ours_high": high}
    seeds = {"n": found["n"] if "n" in found.table else None}
    return said | bounds | numbers | seeds


if __name__ == "__main__":
    results = Path(__file__).parents[1] / "results"
    csv_tables.write_table(compare(results), results / "published.csv")
    sys.stdout.write(f"{results / 'published.csv'}\n")
