"""The headline: what does each way of truncating cost in bias, variance, time and learning?"""

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study, some

CHARACTERS = 60


def draw_cuts(rows: pd.DataFrame, cuts: pd.DataFrame) -> Figure:
    """Draw where each strategy cuts the gradient in a text."""
    found = set(cuts["strategy"])
    names = [name for name in ("randomized", "fixed", "full") if name in found] or sorted(found)
    table = tables.opening(cuts, rows, names)
    table = table[table["position"] < CHARACTERS]
    figure, [[ax]] = figure_layout.figure(
        1, 1, (13, 4.4),
        f"Comparing strategies: where the gradient is cut, on the first {CHARACTERS} characters",
        "The gradient travels back within a box and never from a box to the one before it; the hidden "
        "state passes on everywhere. Truncation length in time steps: the window of fixed, the mean "
        f"of randomized truncation (the draw of the first seed's first update). {plots.runs(rows, table)}",
    )  # fmt: skip
    plots.cut_text(table, ax, plots.looks(rows["strategy"]))
    return figure


def draw_curves(rows: pd.DataFrame) -> Figure:
    """Draw learning curves: a row of panels for each score, a column for each length."""
    wanted = list(_scores(rows))
    figure, axes = _curves(
        rows,
        wanted,
        "Learning curves against tokens: each strategy, by truncation length",
        "Dotted: models without a network.",
    )
    for (part, score, _), panels in zip(wanted, axes, strict=True):
        known = tables.references(part, score)
        for ax in panels:
            plots.references(known, ax, named=ax is panels[-1])
    return figure


def draw_differences(rows: pd.DataFrame) -> Figure:
    """Draw the same relative to full BPTT of the same seed, which has the same initial weights and data."""
    pairs = [
        (part, tables.less_full(part, ["seed", "update", "tokens"], [score]), score, f"Δ {label}")
        for part, score, label in _scores(rows)
    ]
    some(pd.concat([less for _, less, _, _ in pairs]), "run beside full BPTT of the same network")
    pairs = [pair for pair in pairs if len(pair[1])]
    both = pd.concat([part for part, *_ in pairs])
    figure, axes = _curves(
        rows,
        [pair[1:] for pair in pairs],
        "What truncation changes: the score less that of full BPTT with the same seed",
        "Δ: the difference; black: none.",
        beside=both.loc[both["strategy"] == "full", "run"],
    )
    for ax in axes.ravel():
        ax.axhline(0, **plots.FULL)
    return figure


def _curves(
    rows: pd.DataFrame,
    wanted: list[tuple[pd.DataFrame, str, str]],
    title: str,
    said: str,
    beside: Iterable[str] = (),
) -> tuple[Figure, Any]:
    """Draw scores over tokens: a row of panels for each, a column for each length; return the panels, too.

    The caption has the settings of the runs that are drawn, and of those that stand behind them, `beside`.
    """
    shown = pd.concat([tables.curves(part, score) for part, score, _ in wanted])
    known = pd.DataFrame({"run": [*shown["run"], *beside]})
    named, also = plots.looks(shown["strategy"]), tables.apart(rows)
    lengths = tables.distinct_lengths(rows)
    figure, axes = figure_layout.figure(
        len(wanted), len(lengths), (2.5 + 5.2 * len(lengths), 1.4 + 3.1 * len(wanted)),
        title,
        f"{plots.spread(shown)} {plots.runs(rows, known)} {said} "
        "The y axes fit what follows the first tenth of training.",
        plots.handles(named),
        sharey="row",
        sharex="row",
    )  # fmt: skip
    for (part, score, label), panels in zip(wanted, axes, strict=True):
        table = tables.curves(part, score)
        for length, ax in zip(lengths, panels, strict=True):
            ax.set_ylim(plots.limits(plots.after_the_start(table)))
            ax.set_xlabel(plots.LABELS["tokens"])
            if len(own := tables.of_length(table, length)):
                plots.learning_curves(own, ax, named, "tokens", label)
            name = plots.panel_name(part.iloc[0], also)
            plots.titled(
                ax, name + f": truncation length {tables.text(length)}" * (not pd.isna(length))
            )
        for ax in panels[1:]:
            ax.set_ylabel("")
    return figure, axes


def draw_final(rows: pd.DataFrame) -> Figure:
    """Draw the last scores over the truncation length."""
    named, also = plots.looks(rows["strategy"]), tables.apart(rows)
    wanted = [
        (part, tables.final_scores(part, score), score, label)
        for part, score, label in _scores(rows)
    ]
    shown = pd.concat([table for _, table, _, _ in wanted])
    figure, axes = figure_layout.figure(
        1, len(wanted), (2 + 4.4 * len(wanted), 6),
        "Final score by strategy and truncation length",
        f"{plots.spread(shown, 'Marker', 'bar')} {plots.runs(rows, shown)} "
        "Without a truncation length, as Full: line and band across.",
        plots.handles(named, markers=True),
    )  # fmt: skip
    for (part, table, score, label), ax in zip(wanted, axes[0], strict=True):
        ax.set_ylim(plots.limits(table))
        plots.scores(table, ax, named, label)
        plots.references(tables.references(part, score), ax)
        plots.titled(ax, plots.panel_name(part.iloc[0], also))
    return figure


def _scores(rows: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, str, str]]:
    """Yield each row of panels: rows of one task, a score, its label; for images the accuracy too."""
    for part in tables.panels(rows, tables.apart(rows)):
        yield part, "validation_loss", plots.loss_label(part)
        if not tables.measured(part, "bits_per_character") and tables.measured(part, "accuracy"):
            yield part, "accuracy", plots.LABELS["accuracy"]


STUDY = Study(
    question=__doc__,
    figures={
        "learning_curves_tokens": draw_curves,
        "differences": draw_differences,
        "final_scores": draw_final,
        "cuts": draw_cuts,
    },
    check=tables.told_apart,
)
