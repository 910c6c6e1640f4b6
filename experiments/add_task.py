"""Which lags does each strategy learn if its gradient reaches one of the two deciding bits and not the other?

The task adds two bits of known lags, so that the truth is known for each lag.
"""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study, some

EFFECT = {"t1": 0.5, "t2": -0.25}  # the effect of the bit at this lag on P(y = 1)
LOSS = tables.interval_of("validation_loss")
THEORY = {"color": "black", "marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": ""}


def lags(rows: pd.DataFrame, bit_responses: pd.DataFrame) -> pd.DataFrame:
    """Say what the networks of each run have learned of each lag in the end.

    The columns are: strategy, length (time steps), n and diverged seeds, and validation_loss (_low, _high)
    beside t1_loss and both_loss, the steps of the ladder. For t1 and for t2: t1_kept, the share of that lag's
    gradient that the strategy keeps, and t1_response (_low, _high), the effect of that lag's bit on P(y = 1),
    as the median over the seeds with its 95 % interval. largest_other is the largest median at another lag,
    without its sign. learned lists the lags whose whole interval exceeds half of the true effect, ½ for t1
    and -¼ for t2; one seed has no interval, and learned is then empty.
    """
    truth = rows.drop_duplicates("run")[["run", *EFFECT, "t1_loss", "both_loss"]]
    table = tables.named(tables.final_scores(rows, "validation_loss"), "validation_loss")
    table = table[["run", "strategy", "length", "n", "diverged", *LOSS]].merge(truth, on="run")
    effects = responses(rows, bit_responses)
    others, learned = effects.merge(truth, on="run"), pd.Series("", table.index)
    for name, effect in EFFECT.items():
        lag = table[["run", name]].rename(columns={name: "lag"})
        at = lag.merge(effects, "left", validate="1:1")
        response = tables.interval_of(f"{name}_response")
        table[[f"{name}_kept", *response]] = at[["kept", *tables.SPREAD]]
        half = (at[["low", "high"]] / effect > 0.5).all(axis=1)
        learned += np.where(half, np.where(learned != "", f" and {name}", name), "")
        others = others[others["lag"] != others[name]]
    table["largest_other"] = table["run"].map(others["median"].abs().groupby(others["run"]).max())
    table["learned"] = learned.replace("", "neither").where(table["n"] > 1, "")
    return table.drop(columns=list(EFFECT))


def responses(rows: pd.DataFrame, bit_responses: pd.DataFrame) -> pd.DataFrame:
    """Aggregate the effect of each lag's bit after the last update of each run over its seeds."""
    found = some(tables.at_end(bit_responses, rows), "snapshot after training")
    table = tables.with_settings(found, rows)
    keys = [c for c in (*tables.PANEL, *tables.LINE) if c in table]
    return tables.aggregate(table, [*keys, "lag", "kept"], "response", np.nan)


def draw_ladder(rows: pd.DataFrame) -> Figure:
    """Draw the loss against the ladder of entropies: in training, a panel for each length, and at the end."""
    named, lengths = plots.looks(rows["strategy"]), tables.distinct_lengths(rows)
    table, label = tables.curves(rows, "validation_loss"), plots.loss_label(rows)
    rungs = tables.references(rows, "validation_loss")
    last = table[table["update"] == table["update"].max()]
    down = len(lengths) // 2 + 1
    figure, axes = figure_layout.figure(
        down, 2, (13, 2.4 + 3.5 * down),
        "The add task: how far down the ladder of entropies does each strategy come?",
        "y is 1 with probability ½ + ½ x(t - t1) - ¼ x(t - t2), x fair bits. Dotted: the least expected loss "
        "for whoever knows neither bit, one of them, or both. In training, by truncation length, and at the "
        "end (without a truncation length, as Full: line and band across). "
        f"{plots.spread(table, 'Line and marker', 'band and bar')} {plots.runs(rows)}",
        plots.handles(named, markers=True),
        sharey=True,
    )  # fmt: skip
    axes[0, 0].set_ylim(plots.limits(last, rungs.values()))
    *panels, end = axes.ravel()[: len(lengths) + 1]
    for ax in axes.ravel()[len(lengths) + 1 :]:
        ax.remove()
    for length, ax in zip(lengths, panels, strict=True):
        plots.learning_curves(tables.of_length(table, length), ax, named, "tokens", label)
        ax.set_title(
            "in training" + f", truncation length {tables.text(length)}" * pd.notna(length)
        )
    plots.scores(tables.final_scores(rows, "validation_loss"), end, named, label)
    end.set_title("after the last update")
    for ax in axes[:, 0]:
        plots.references(rungs, ax, named=False)
    for ax in axes[:, 1]:
        plots.references(rungs, ax)
        ax.set_ylabel("")
    return figure


def draw_lags(rows: pd.DataFrame, bit_responses: pd.DataFrame) -> Figure:
    """Draw a panel per strategy and length: the effect of each lag's bit, and the gradient that it gets."""
    named, lengths = plots.looks(rows["strategy"]), tables.distinct_lengths(rows)
    truth = {int(rows[name].iloc[0]): effect for name, effect in EFFECT.items()}
    effects = responses(rows, bit_responses)
    figure, axes = figure_layout.figure(
        len(lengths), len(named), (max(10, 1.6 + 2.4 * len(named)), 2.4 + 2.5 * len(lengths)),
        "The add task: which lags each strategy has learned",
        "What the bit of lag k does to the odds that the network gives: P(y = 1) with that bit 1 minus the "
        "same with that bit 0, mean over the validation streams, after the last update. "
        f"{plots.spread(effects, 'Marker', 'bar')} Full has no truncation length and is shown in every row. "
        f"{plots.runs(rows)}",
        [
            Line2D([], [], color="0.2", marker="o", label="learned effect of the bit at lag k"),
            Line2D([], [], label="truth: ½ at t1, -¼ at t2", **THEORY),
            Patch(color="0.88", label="share of its gradient let through"),
        ],
        sharex=True,
        sharey=True,
    )  # fmt: skip
    for length, panels in zip(lengths, axes, strict=True):
        for (name, look), ax in zip(named.items(), panels, strict=True):
            own = tables.of_length(effects[effects["strategy"] == name], length)
            draw_stems(own, truth, look, ax)
            ax.set_title(look.name.replace(" (", "\n(").replace(", ", ",\n"))
        panels[0].set_ylabel(
            f"length {tables.text(length)}\n" * pd.notna(length) + "effect on P(y = 1)"
        )
    for ax in axes[-1]:
        ax.set_xlabel(plots.LABELS["lag"])
    return figure


def draw_stems(own: pd.DataFrame, truth: dict[int, float], look: plots.Look, ax: Axes) -> Axes:
    """Draw median and interval at each lag from 0; behind them the share kept, and the truth as circles."""
    ax.fill_between(own["lag"], own["kept"], step="mid", color="0.88", linewidth=0, zorder=0)
    ax.axhline(0, color="0.5", linewidth=1)
    ax.vlines(own["lag"], 0, own["median"], look.color, linewidth=2)
    ax.vlines(own["lag"], own["low"], own["high"], look.color, linewidth=5, alpha=0.35)
    ax.plot(own["lag"], own["median"], "o", color=look.color, markersize=4)
    ax.plot(list(truth), list(truth.values()), **THEORY)
    ax.set(ylim=(-0.35, 1.05))
    return ax


STUDY = Study(
    question=__doc__,
    tables={"lags": lags},
    figures={"ladder": draw_ladder, "lags": draw_lags},
    check=partial(tables.told_by, names=("strategy", "truncation_length"), numbers=True),
)
