"""The settings that differ between runs although nothing that is shown says so. No files, no axes, no jax."""

from collections.abc import Sequence

import pandas as pd

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
    """Name the settings that differ between runs and that the shown ones do not tell.

    A text or flag that is the same in all runs of a shown option follows from it. So does a number that only
    one option has, such as the window of fixed beside full. A copy of another setting follows from that.

    Args:
      rows: The rows of the runs.
      shown: The settings that are shown, such as `tables.varying(rows)`.

    Returns:
      A sentence, such as 'Also different: learning_rate.'; empty if there is none.
    """
    runs = rows.assign(truncation_length=tables.lengths(rows)).drop_duplicates("run")
    found: list[str] = []
    for name in (c for c in map(str, runs) if kind(c) == "setting" and c not in IGNORED):
        told, values = [*shown, *found], runs[name]
        option = group(name)
        if option in told and option in runs:
            of_option = runs.groupby(option, dropna=False)[name]
            if of_option.nunique(dropna=False).max() == 1:  # it may follow from the option
                number = pd.api.types.is_any_real_numeric_dtype(values)
                values = values.dropna() if number else values[:0]
        copied = any(values.equals(runs.loc[values.index, c]) for c in told if c in runs)
        if len(values.unique()) > 1 and not copied and group(name) not in IGNORED_GROUPS:
            found.append(name)
    if {"corpus", "path"} & {*shown, *found}:  # they tell texts apart
        found = [c for c in found if c != "corpus_sha256"]
    more = f" and {counted(len(found) - MOST, 'other setting')}" * (len(found) > MOST)
    return f"Also different: {', '.join(found[:MOST])}{more}." if found else ""
