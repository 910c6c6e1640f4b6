"""Is the noise of perturbations less if they are drawn anew in each unroll, or kept? On three kinds of text.

Nothing is sampled: the probe `perturbation_variance` has both variances in closed form.
"""

from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bptt_study.report import figure_layout, plots, snapshots, tables
from bptt_study.report.study import Study

TEXTS = {
    "stdlib_docs": "real text",
    "random_letters": "random letters",
    "one_letter": "one letter, repeated",
}
DASHES = {"start": "-", "end": "--"}
TICKS = (1, 4, 20, 100)


def noise(rows: pd.DataFrame, perturbation_variance: pd.DataFrame) -> pd.DataFrame:
    """Compute for each text, moment, estimator and number of unrolls the noise, variance ÷ ‖∇L‖².

    With noise_low and noise_high, the median over n seeds and its 95 % interval; ratio (_low, _high): the same
    of the noise ÷ that of nres, seed by seed; lower: whether the whole interval of the ratio lies below 1. One
    seed has no interval, so it is never lower.
    """
    seeds = tables.with_settings(perturbation_variance, rows)
    seeds["moment"] = snapshots.moments(seeds)
    kept = seeds[seeds["estimator"] == "nres"].rename(columns={"noise": "kept"})
    at = ["run", "seed", "update", "unrolls"]
    seeds = seeds.merge(kept[[*at, "kept"]], "left", on=at, validate="m:1")
    seeds["ratio"] = seeds["noise"] / seeds["kept"]
    keys = ["corpus", "moment", "estimator", "unrolls"]
    found = tables.aggregate_all(seeds, keys, ["noise", "ratio"])
    return found.assign(lower=(found["ratio_high"] < 1) & (found["n"] > 1))


def draw(noise: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Draw the noise over the number of unrolls before and after training, a panel per text."""
    noise = noise[noise["moment"].isin(DASHES)]
    looks, texts = plots.looks(noise["estimator"]), noise["corpus"].nunique()
    values = partial(plots.values, rows)
    figure, axes = figure_layout.figure(
        1,
        texts,
        (2 + 4.4 * texts, 6.6),
        "Perturbations drawn anew in each unroll, or kept: which is noisier?",
        "Exact variance of one pair of perturbations, σ → 0, over the squared norm of the gradient. "
        f"{values('steps')} time steps are divided into unrolls. PES draws a perturbation in each; NRES keeps "
        f"one, with the noise P - 1, P the cell's parameters. {values('cell')} of {values('hidden')} units, "
        f"one sequence from the zero state, before {'and after ' * ('end' in set(noise['moment']))}"
        f"{values('updates')} updates of "
        f"{plots.trained(rows)}. {plots.spread(noise)}",
        [
            *plots.handles(looks),
            *(
                Line2D([], [], color="0.4", linestyle=dashes, label=snapshots.WHEN[moment])
                for moment, dashes in DASHES.items()
                if moment in set(noise["moment"])
            ),
        ],
        sharey=True,
    )
    for _, part, ax in plots.panels(noise, "corpus", axes[0], lambda text: TEXTS.get(text, text)):
        draw_text(part, looks, ax)
    axes[0, 0].set_ylabel("variance ÷ ‖∇L‖²")
    return figure


def draw_text(table: pd.DataFrame, looks: dict[str, plots.Look], ax: Axes) -> Axes:
    """Draw the noise over the number of unrolls, a line per estimator and moment."""
    ax.set(xscale="log", yscale="log", xlabel="unrolls of the sequence")
    for (name, moment), line in table.groupby(["estimator", "moment"], sort=False):
        color, dashes = looks[str(name)].color, DASHES[str(moment)]
        plots.band(line, "unrolls", color, ax, "noise", linestyle=dashes)
    most = max(table["unrolls"])
    ticks = [n for n in sorted(set(table["unrolls"])) if n in TICKS or n == most]
    ax.set_xticks(ticks, [f"{n}" for n in ticks])
    ax.set_xticks([], minor=True)
    return ax


STUDY = Study(
    question=__doc__,
    tables={"noise": noise},
    figures={"noise": draw},
    check=partial(tables.told_by, names=("task", "corpus"), by=("task", "corpus"), numbers=True),
)
