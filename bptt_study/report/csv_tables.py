"""CSV files of tables: they are written completely or not at all, and read with the right types."""

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype, is_numeric_dtype

from bptt_study import files
from bptt_study.report.columns import exact, kind
from bptt_study.report.progress import shown
from bptt_study.validation import SettingError, one_line

TEXTS = ("study", "run", "corpus", "corpus_sha256", "commit", "character", "prefix", "path")
# A text that a spreadsheet would run gets an apostrophe before it in the file, and so does one that looks so.
FORMULA = re.compile(r"'*[=+\-@\t\r].")
# If all cells of a column look like numbers or flags, each text among them gets one. TEXTS are read as texts.
NUMBER = re.compile(
    r"'*\s*(?:[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?inf(?:inity)?|nan|true|false)\s*",
    re.IGNORECASE,
)
TABLE = "table.csv.gz"  # of a study: one row per run, seed and log point
ROWS = "rows.csv"  # of a run, with the same columns
KEYS = ["run", "seed", "update"]  # of a row
NEEDED = (*KEYS, "task", "strategy", "truncation_length", "validation_loss", "diverged")
UNFINISHED = "unfinished.txt"  # lies beside tables that lack runs, and says how many there are
PLAIN = re.compile(r"\w[\w-]*")  # the name of a file without its suffix
# names of files in the folders of a study and a run that are nobody's own
TAKEN = frozenset({"table", "summary", "tables", "tuning", "provenance", "rows", "costs", "cuts"})


def check_name(where: str, name: str, taken: Collection[str] = TAKEN) -> None:
    """Check the name of a table or figure.

    Args:
      where: What has the name, for messages.
      name: The name.
      taken: Names of others.

    Raises:
      SettingError: Unless the name is that of a file of its own.
    """
    if not PLAIN.fullmatch(name) or name in taken:
        others = f", and none of {', '.join(sorted(taken))}" if taken else ""
        raise SettingError(where, repr(name), f"letters, digits, _ and -{others}")


def packed(table: pd.DataFrame, name: str) -> bytes:
    """Write a table as CSV, gzipped if the name ends with .gz.

    Settings and counts keep all their digits; measured numbers have the seven of float32.
    """
    table = _respelled(table, _marked)
    # a carriage return ends a line unless it is in quotes, which Python before 3.11.9 does not set
    quoting: Any = csv.QUOTE_NONNUMERIC if _holds(table, "\r") else csv.QUOTE_MINIMAL
    digits = {
        name: table[name].map(_digits, na_action="ignore")
        for name in map(str, table.select_dtypes("float"))
        if exact(name) or (kind(name) and _whole(table[name]))
    }
    table = table.assign(**digits).rename(columns=_escaped)
    text = table.to_csv(index=False, float_format="%.7g", quoting=quoting).encode()
    return gzip.compress(text, mtime=0) if name.endswith(".gz") else text


def flat(where: str, table: pd.DataFrame) -> pd.DataFrame:
    """Make columns of a table's index, and one name of a column's several, as a CSV file has neither.

    Raises:
      SettingError: For an index of texts without a name; `where` has the table, for the message.
    """
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    elif not pd.api.types.is_integer_dtype(table.index):
        raise SettingError(where, "one without", "a table whose index has a name")
    names = ["_".join(filter(None, map(str, c))) if isinstance(c, tuple) else str(c) for c in table]
    return table.set_axis(names, axis=1)


def write_table(table: pd.DataFrame, file: Path | str) -> None:
    """Write a table completely or not at all."""
    files.write(Path(file), packed(table, Path(file).name))


def read_table(file: Path | str | BytesIO) -> pd.DataFrame:
    """Read a table. Columns of text stay text even if they look like numbers or gaps: 007, 1e3, NA.

    Raises:
      SettingError: If the file is damaged.
    """
    dtypes = dict.fromkeys(TEXTS, str)
    try:
        # in parts, pandas would guess the type of a column for each part of its rows
        table = pd.read_csv(
            file, dtype=dtypes, keep_default_na=False, na_values=[""], low_memory=False
        )
    except (EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged(Path(str(file)), one_line(error)) from error
    return _respelled(table.rename(columns=_unescaped), _unmarked)


def read_rows(folder: Path) -> pd.DataFrame:
    """Read the table of a study: one row per run, seed and log point.

    Raises:
      SettingError: If the file is damaged, lacks columns or rows, or has a row twice.
    """
    rows = _checked(read_table(folder / TABLE), folder / TABLE)
    if rows.empty or rows.duplicated(KEYS).any():
        raise damaged(folder / TABLE, "it has no row" if rows.empty else "it has a row twice")
    return rows


def _counts(table: pd.DataFrame, file: Path) -> dict[str, pd.Series]:
    """Read large whole numbers beside gaps again: pandas makes floats of them, which would lose digits."""
    floats = table.select_dtypes("float")
    gaps = (name for name in map(str, floats) if floats[name].isna().any())
    names = [name for name in gaps if floats[name].abs().max() >= 1e7]
    texts = pd.read_csv(file, dtype=str).rename(columns=_unescaped) if names else table
    digits = {name: texts[name].dropna() for name in names}
    return {
        name: found.map(int).astype(object).reindex(table.index)
        for name, found in digits.items()
        if found.str.fullmatch(r"-?\d+").all()
    }


def _checked(rows: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Check the columns of a study's or a run's rows, as far as all that reads them relies on them."""
    if missing := [name for name in NEEDED if name not in rows]:
        raise damaged(file, f"it lacks {', '.join(missing)}")
    numbers = ("seed", "update", "validation_loss", "diverged")
    if texts := [name for name in numbers if len(rows) and not is_numeric_dtype(rows[name])]:
        raise damaged(file, f"it has texts in {', '.join(texts)}")
    return rows


def damaged(file: Path, why: str) -> SettingError:
    """Make the error for a file of a study's folder, or of a run's, that cannot be used."""
    anew = f"`bptt-study-status {file.parent} --gather` makes it anew."
    if file.name == ROWS:
        anew = f"Once {file.parent} is removed, the same command makes the run again."
    way_out = f"Reason: {why.rstrip('.')}. {anew}"
    return SettingError("file", file, "as it was gathered", way_out)


def _marked(texts: list[str], guessed: bool) -> list[str]:
    """Put an apostrophe before texts that would not be read, or run by a spreadsheet, as they are.

    Args:
      texts: The different texts of a column.
      guessed: Whether the column is read as numbers or flags if all of it looks so.

    Returns:
      The texts, as they stand in the file.
    """
    texts = [*map(_escaped, texts)]
    return (
        [f"'{text}" for text in texts] if guessed and all(map(NUMBER.fullmatch, texts)) else texts
    )


def _unmarked(texts: list[str], guessed: bool) -> list[str]:
    """The inverse of `_marked`; numbers and flags beside texts have become texts."""
    if guessed and all(map(NUMBER.fullmatch, texts)):
        texts = [text.removeprefix("'") for text in texts]
    return [*map(_unescaped, texts)]


def _escaped(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) else text


def _unescaped(text: str) -> str:
    return text[1:] if text[:1] == "'" and FORMULA.match(text) else text


def _whole(column: pd.Series) -> bool:
    """Return True if all finite numbers of a column are whole."""
    return bool((column[np.isfinite(column)] % 1 == 0).all())


def _digits(value: float) -> str:
    """Write all digits that a float is sure of."""
    whole = value % 1 == 0 and abs(value) < 2**53
    return f"{value:.0f}" if whole else f"{value:.15g}"


def _respelled(table: pd.DataFrame, spell: Callable[[list[str], bool], list[str]]) -> pd.DataFrame:
    """The table with the texts of each column spelled in another way."""
    for name in map(str, table.select_dtypes(["object", "string", "category"])):
        is_text = table[name].map(lambda cell: isinstance(cell, str)).astype(bool)
        texts = list(dict.fromkeys(table.loc[is_text, name]))
        others = table[name][~is_text].dropna().map(str)
        guessed = name not in TEXTS and all(map(NUMBER.fullmatch, others))
        spelled = dict(zip(texts, spell(texts, guessed), strict=True))
        if any(text != other for text, other in spelled.items()):
            cells = [spelled[c] if isinstance(c, str) else c for c in table[name]]
            table = table.assign(**{name: cells})
    return table


def _holds(table: pd.DataFrame, character: str) -> bool:
    """Return True if a name or a text of the table has this character."""
    texts = (table[c] for c in table if not pd.api.types.is_numeric_dtype(table[c]))
    cells = (cell for column in (table.columns, *texts) for cell in column)
    return any(character in cell for cell in cells if isinstance(cell, str))


def tables_of(folders: Iterable[Path]) -> set[str]:
    """Return the file names of the tables in these folders, without those that are being written."""
    return {file.name for folder in folders for file in folder.glob("[!.]*.csv*")}


def gather(folders: Iterable[Path], table: str) -> pd.DataFrame:
    """Concatenate the tables of this name in these folders, in the order of the folders; some may have none.

    Whole numbers and flags stay such beside tables that lack them.
    """
    tables = []
    for folder in shown(folders, f"reading {table}"):
        with suppress(FileNotFoundError, NotADirectoryError):
            found = read_table(folder / table)
            found = _checked(found, folder / table) if table == ROWS else found
            found = found.assign(**_counts(found, folder / table))
            # beside a gap pandas would make floats of them
            tables.append(found.astype(dict.fromkeys(found.select_dtypes(["int", "bool"]), object)))
    if not tables:
        return pd.DataFrame()
    joined = pd.concat(tables, ignore_index=True)
    gaps = {name: joined[name].dropna() for name in joined.columns[joined.isna().any()]}
    whole = [
        name for name, found in gaps.items()
        if infer_dtype(found) == "integer" and (found.abs() < 2**63).all()
    ]  # fmt: skip
    return joined.astype(dict.fromkeys(whole, "Int64")).infer_objects()
