"""How far does the gradient reach? Its norm over time steps and over the lag, before and after training."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.figure import Figure

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study

AXES = ("time", "lag")


def draw(rows: pd.DataFrame, gradient_norms: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Draw a figure for each length, before and after training."""
    lengths, start = tables.distinct_lengths(rows), gradient_norms["update"] == 0
    after = tables.final(gradient_norms[~start])
    for moment, found in (("start", gradient_norms[start]), ("end", after)):
        norms = tables.norms(found, rows)
        for length in lengths if len(norms) else ():
            name = f"{moment}_{tables.text(length)}" if len(lengths) > 1 else moment
            yield name, draw_norms(tables.of_length(norms, length), rows, length)


def draw_norms(norms: pd.DataFrame, rows: pd.DataFrame, length: float) -> Figure:
    """Draw a column of panels for each network: norms over time steps above, over the lag below."""
    named, also = plots.looks(rows["strategy"]), tables.apart(rows)
    networks = tables.panels(norms, also)
    when = (
        f"after {plots.span(norms['update'], 'update')}"
        if norms["update"].any()
        else "before training"
    )
    figure, axes = figure_layout.figure(
        len(AXES), len(networks), (2 + 2.8 * len(networks), 8.4),
        f"How far back the gradient reaches, {when}",
        "Norm of each strategy's own gradient. Top: of the mean loss L by the hidden state of time step t. "
        "Bottom: of the last step's loss by the state k steps before, mean over the sequences. Randomized: "
        "mean over draws. A line that drops to the axis is exactly zero from there on. "
        f"{plots.spread(norms)} "
        + f"Truncation length {tables.text(length)} time steps. " * pd.notna(length)
        + plots.runs(rows, norms),
        [*plots.handles(named), plots.end_handle()],
        sharey="row",
        sharex="row",
    )  # fmt: skip
    for axis, panels in zip(AXES, axes, strict=True):
        along = norms[norms["axis"] == axis]
        for network, ax in zip(networks, panels, strict=True):
            ax.set_yscale("log")
            ax.set_ylim(plots.limits(along, log=True))
            unit = tables.unit(rows[rows["run"].isin(network["run"])])
            plots.gradient_norms(network[network["axis"] == axis], ax, named, axis, unit)
            plots.titled(ax, plots.network_name(network.iloc[0], also))
        for ax in panels[1:]:
            ax.set_ylabel("")
    return figure


STUDY = Study(question=__doc__, figures={"gradient_norms": draw}, check=tables.told_apart)
