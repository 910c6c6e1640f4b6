"""The moments of training at which probes looked: their names, and a figure for each. No files, no jax."""

from collections.abc import Callable, Iterator
from functools import wraps

import pandas as pd
from matplotlib.figure import Figure

WHEN = {"start": "before training", "middle": "half-way", "end": "after training"}


def moments(probed: pd.DataFrame) -> pd.Series:
    """Name the moment of each row in its run: start, end; between: the update, or middle if one is half-way."""
    return probed.groupby("run")["update"].transform(lambda updates: updates.map(_names(updates)))


def _names(updates: pd.Series) -> dict[int, str]:
    found = sorted(updates.unique())
    half_way = len(found) == 3 and 2 * found[1] == found[2]
    between = {update: "middle" if half_way else f"update {update}" for update in found[1:-1]}
    return {found[-1]: "end", found[0]: "start"} | between


def last_moment(table: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the last moment."""
    return table[table["moment"] == table["moment"].iloc[-1]]


def when(table: pd.DataFrame) -> str:
    """Put the moment of a table into words."""
    moment = table["moment"].iloc[0]
    return WHEN.get(moment, moment)


def each_moment(draw: Callable[..., Figure]) -> Callable[..., Iterator[tuple[str, Figure]]]:
    """Draw a figure for each moment of training, of which every table that has moments keeps one."""

    @wraps(draw)
    def drawn(**found: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
        timed = {name: table for name, table in found.items() if "moment" in table}
        for moment in next(iter(timed.values()))["moment"].unique():
            now = {name: table[table["moment"] == moment] for name, table in timed.items()}
            yield moment.replace(" ", "_"), draw(**found | now)

    return drawn
