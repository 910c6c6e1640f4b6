"""The settings that differ between runs although nothing that is shown says so. No files, no axes, no jax."""

from collections.abc import Sequence

import pandas as pd
from pandas.api.types import is_any_real_numeric_dtype as numeric

from bptt_study.report import tables
from bptt_study.report.columns import group, kind
from bptt_study.validation import counted

# they follow from others, change no score, or are told by the number of seeds
IGNORED = (
    "budget", "parameters", "exact", "unbiased", "logs", "snapshots", "sample_length", "seeds",
)  # fmt: skip
IGNORED_GROUPS = ("probes", "loggers")
MOST = 6  # the largest number of settings that a sentence names


def also_differ(rows: pd.DataFrame, shown: Sequence[str]) -> str:
    """Name the settings that differ between runs and that the shown ones do not tell; see `untold`.

    Args:
      rows: The rows of the runs.
      shown: The settings that are shown, such as `tables.varying(rows)`.

    Returns:
      A sentence, such as 'Also different: learning_rate.'; empty if there is none.
    """
    return sentence(untold(rows, shown))


def sentence(names: Sequence[str]) -> str:
    """Write the sentence that names these settings; empty if there is none."""
    more = f" and {counted(len(names) - MOST, 'other setting')}" * (len(names) > MOST)
    return f"Also different: {', '.join(names[:MOST])}{more}." if names else ""


def untold(rows: pd.DataFrame, shown: Sequence[str]) -> list[str]:
    """List the settings that differ between runs and that the shown ones do not tell.

    A text or flag that is the same in all runs of an option follows from the option, and so does a number that
    only one option has, such as the window of fixed beside full. A stride that equals the window follows from
    it, and so does a copy of a setting within a group or in a nested name, such as the steps of a schedule.

    Args:
      rows: The rows of the runs.
      shown: The settings that are shown.

    Returns:
      The names of their columns.
    """
    runs = rows.assign(truncation_length=tables.lengths(rows)).drop_duplicates("run")
    if {"stride", "window"} <= {*runs}:  # chunks
        runs["stride"] = runs["stride"].where(runs["stride"] != runs["window"])
    found: list[str] = []
    for name in (c for c in map(str, runs) if kind(c) == "setting" and c not in IGNORED):
        told, values = [*shown, *found], runs[name]
        if group(name) in told and group(name) in runs:
            nested = name.split(".")[-2:-1]  # schedule in optimizer.schedule._target_
            options = [[c] for c in (group(name), *nested) if c in told and c in runs]
            if not numeric(values) and any(_follows(values, runs[names]) for names in options):
                values = values[:0]
            elif any(_follows(values.isna(), runs[names]) for names in _lacking(runs, name)):
                values = values.dropna()
        near = [c for c in told if c in runs and (group(c) == group(name) or "." in c + name)]
        copied = any(values.equals(runs.loc[values.index, c]) for c in near)
        if len(values.unique()) > 1 and not copied and group(name) not in IGNORED_GROUPS:
            found.append(name)
    if {"corpus", "path"} & {*shown, *found}:  # they tell texts apart
        found = [c for c in found if c != "corpus_sha256"]
    return found


def _lacking(runs: pd.DataFrame, name: str) -> list[list[str]]:
    """List what a run may lack a setting for: its group, or a part of it, is another function.

    Options that call the same function, such as adam and sgd, have the same settings: one that is missing there
    is null. A stride is missing where it equals the window, whatever the function.
    """
    parts = (f"{part}._target_" for part in (group(name), name.rpartition(".")[0]))
    called = [[part] for part in dict.fromkeys(parts) if part in runs]
    return called if called and name != "stride" else [[str(group(name))]]


def _follows(values: pd.Series, others: pd.DataFrame) -> bool:
    """Return True if runs that agree in the other columns have the same value."""
    keys = [others[name] for name in others]
    return bool(values.groupby(keys, dropna=False).nunique(dropna=False).max() <= 1)
