"""CSV files of tables: write them whole or not at all, read them with the right types, gather those of runs."""

import gzip
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bptt_study import files

UNFINISHED = "unfinished.txt"  # beside tables that lack runs; its content says how many there are


def packed(table: pd.DataFrame, name: str) -> bytes:
    """CSV, by the name gzipped, with seven digits: as many as float32 has."""
    text = table.to_csv(index=False, float_format="%.7g").encode()
    return gzip.compress(text, mtime=0) if name.endswith(".gz") else text


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write the table, whole or not at all."""
    files.write(file, packed(table, file.name))


def read_table(file: Path) -> pd.DataFrame:
    """A table as it was written; its text columns stay text, whatever they hold."""
    return pd.read_csv(file, dtype={"run": str, "commit": str, "corpus_sha256": str})


def tables_of(folders: Iterable[Path]) -> set[str]:
    """The names of the tables in these folders."""
    return {file.name for folder in folders for file in folder.glob("*.csv*")}


def gather(folders: Iterable[Path], table: str) -> pd.DataFrame:
    """One table of all tables of that name in these folders, in the order of the folders."""
    found = [folder / table for folder in folders]
    tables = [read_table(file) for file in found if file.is_file()]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
