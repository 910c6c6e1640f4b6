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
FOLLOWS = {
    "stride": ["strategy", "truncation_length"]
}  # settings that follow from these, unless one is set
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
    only one option has, such as the window of fixed beside full. A copy of another setting follows from it.

    Args:
      rows: The rows of the runs.
      shown: The settings that are shown.

    Returns:
      The names of their columns.
    """
    runs = rows.assign(truncation_length=tables.lengths(rows)).drop_duplicates("run")
    found: list[str] = []
    for name in (c for c in map(str, runs) if kind(c) == "setting" and c not in IGNORED):
        told, values = [*shown, *found], runs[name]
        if group(name) in told and group(name) in runs:
            nested = name.split(".")[-2:-1]  # schedule in optimizer.schedule._target_
            options = [[c] for c in (group(name), *nested) if c in told and c in runs]
            others = [FOLLOWS[name]] if name in FOLLOWS else [] if numeric(values) else options
            if any(_follows(values, runs[names]) for names in others):
                values = values[:0]
            elif any(_follows(values.isna(), runs[names]) for names in options):
                values = values.dropna()
        copied = any(values.equals(runs.loc[values.index, c]) for c in told if c in runs)
        if len(values.unique()) > 1 and not copied and group(name) not in IGNORED_GROUPS:
            found.append(name)
    if {"corpus", "path"} & {*shown, *found}:  # they tell texts apart
        found = [c for c in found if c != "corpus_sha256"]
    return found


def _follows(values: pd.Series, others: pd.DataFrame) -> bool:
    """Return True if runs that agree in the other columns have the same value."""
    keys = [others[name] for name in others]
    return bool(values.groupby(keys, dropna=False).nunique(dropna=False).max() <= 1)
