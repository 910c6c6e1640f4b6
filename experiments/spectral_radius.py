"""Where does the variance of randomized truncation explode, and where do gradients vanish or explode?"""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study, some
from bptt_study.validation import SettingError

KEYS = (*tables.PANEL, *tables.LINE)
THEORY = {"color": "0.3", "linestyle": (0, (1, 1.5)), "linewidth": 1.6}
LEAST = 1e-17  # the smallest gradient norm that is drawn
SHOWN = 4  # the largest number of radii in a figure with intervals


def growth(rows: pd.DataFrame, cut_variance: pd.DataFrame) -> pd.DataFrame:
    """Say for each run and law how the variance of the cuts grows with T.

    growth is the factor per time step by which the exact variance of the gradient of l_T grows, from T = half
    an update to a whole one; with growth_low and growth_high it is the median over n seeds and its 95 %
    interval. predicted is the factor of a linear cell for long T, max(1, ρ² m), where m is the growth of the
    second moment of the longest lag's weight, 1/(1 - c) for the constant law. variance, signal (‖∇l_T‖²) and
    noise, their ratio, are medians at the full length. sampled is the variance from draws ÷ the exact
    variance there.
    """
    table = variances(rows, cut_variance)
    lengths = sorted(set(table["horizon"]), reverse=True)
    longest, half = (table[table["horizon"].isin(lengths[n : n + 1])] for n in (0, 1))
    half = some(half, "second length at whose end losses count")
    by = ["run", "law", "seed"]
    both = longest.merge(half, on=by, suffixes=("", "_half"), validate="1:1")
    steps = both["horizon"] - both["horizon_half"]
    both["growth"] = (both["variance"] / both["variance_half"]) ** (1 / steps)
    moment = (both["second_moment"] / both["second_moment_half"]) ** (1 / steps)
    both["predicted"] = np.maximum(1, both["spectral_radius"] ** 2 * moment)
    both["noise"] = both["variance"] / both["signal"]
    both["sampled"] = both["sampled_variance"] / both["variance"]
    keys = ["run", "cell", "spectral_radius", "law", "predicted"]
    found = tables.aggregate_all(both, keys, ["growth"])
    for name in ("variance", "signal", "noise", "sampled"):
        found[name] = tables.aggregate(both, keys, name)["median"]
    return found


def variances(rows: pd.DataFrame, cut_variance: pd.DataFrame) -> pd.DataFrame:
    """Join the probe's table before training with its runs' settings; what is not finite has diverged."""
    names = ["signal", "variance", "sampled_variance"]
    first = cut_variance[cut_variance["update"] == cut_variance["update"].min()]
    table = tables.with_settings(first, rows)
    finite = np.isfinite(table[names]).all(axis=1)
    return table.assign(diverged=~finite)


def _spread(rows: pd.DataFrame, shown: pd.DataFrame, median: str, interval: str) -> str:
    values = partial(plots.values, rows)
    return (
        f"{plots.spread(shown, median, interval)} {values('batch_size')} sequences each; {values('hidden')} "
        "units before training, W_hh drawn from a normal distribution and scaled to its radius ρ, inputs "
        "random bits (task add)."
    )


def draw_norms(rows: pd.DataFrame, gradient_norms: pd.DataFrame) -> Figure:
    """Draw ‖∂l_T/∂h_{T-k}‖ over the lag, and ρ^k."""
    norms = tables.norms(gradient_norms, rows)
    norms = norms[(norms["axis"] == "lag") & (norms["update"] == norms["update"].min())]
    cells, colors = norms["cell"].nunique(), plots.shades(rows["spectral_radius"])
    figure, axes = figure_layout.figure(
        1, cells, (2 + 5.5 * cells, 6.6),
        "How gradients shrink and grow with the spectral radius",
        "Norm of the last step's loss by the state k steps before, exact (full BPTT), mean over the "
        "sequences. Dotted: ρ^k through the value at lag 0; of the linear cell every Jacobian is W_hh, so "
        "that its lines end up parallel to the dotted ones. tanh saturates and shrinks the Jacobians. "
        f"Norms below {LEAST:g} are left out. "
        + _spread(rows, norms, "Line", "band"),
        [
            *plots.shade_handles(colors, "spectral radius {}"),
            Line2D([], [], label="theory: ρ^k", **THEORY),
        ],
        sharey=True,
    )  # fmt: skip
    for _, own, ax in plots.panels(norms, "cell", axes[0], "{} cell".format):
        ax.set_yscale("log")
        for radius, color in colors.items():
            part = own[own["spectral_radius"] == radius]
            kept = part[tables.SPREAD].where(part["median"] > LEAST)
            plots.band(part.assign(**kept), "step", color, ax)
            k = np.sort(part["step"])
            start = part.loc[part["step"] == 0, "median"].to_numpy()
            ax.plot(k, start * radius**k, **THEORY | {"color": color})
        ax.set_xlabel(plots.LABELS["lag"])
    axes[0, 0].set(ylim=(LEAST, None), ylabel=plots.NORMS["lag"])
    return figure


def draw_variance(rows: pd.DataFrame, cut_variance: pd.DataFrame) -> Figure:
    """Draw the variance of both laws ÷ the squared gradient over the length, a row of panels for each cell."""
    table = variances(rows, cut_variance)
    table["noise"] = table["variance"] / table["signal"]
    colors = plots.shades(rows["spectral_radius"])
    shown = list(colors)[:: -(-len(colors) // SHOWN)]
    keys = [*(c for c in KEYS if c in table), "law", "horizon"]
    noise = tables.aggregate(table[table["spectral_radius"].isin(shown)], keys, "noise")
    cells, named = noise["cell"].nunique(), plots.looks(noise["law"])
    figure, axes = figure_layout.figure(
        cells, len(named), (2 + 5.2 * len(named), 2.6 + 3.6 * cells),
        "Where does the noise of random cuts outgrow the gradient?",
        "Gradient of the loss of step T alone by the cell's parameters, with compensated cuts: its exact "
        "variance, from the second moments of the weights, ÷ the squared norm of the exact gradient. At the "
        "dotted line the noise is as large as the gradient. Other radii are in cut_variance.csv.gz. "
        + _spread(rows, noise, "Marker", "bar"),
        plots.shade_handles({radius: colors[radius] for radius in shown}, "spectral radius {}"),
        sharex=True,
        sharey=True,
    )  # fmt: skip

    def title(key: tuple[str, str]) -> str:
        return f"{key[0]} cell: {named[key[1]].name}"

    for _, own, ax in plots.panels(noise, ["cell", "law"], axes.flat, title):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.axhline(1, **plots.REFERENCE)
        for place, radius in enumerate(shown):
            part = own[own["spectral_radius"] == radius]
            bars = part["median"] - part["low"], part["high"] - part["median"]
            # apart, so that no bar hides another
            x = part["horizon"] * 1.04 ** (place - (len(shown) - 1) / 2)
            ax.errorbar(x, part["median"], bars, color=colors[radius], marker="o", linewidth=2)
    horizons = sorted(set(noise["horizon"]))
    axes[0, 0].set_xticks(horizons, [f"{T}" for T in horizons])
    for ax in axes[:, 0]:
        ax.set_ylabel("variance ÷ ‖∇$l_T$‖²")
    for ax in axes[-1]:
        ax.set_xlabel("time steps $T$ up to the loss")
    return figure


def draw_growth(rows: pd.DataFrame, cut_variance: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """Draw the growth of the variance per step over ρ, with the predicted thresholds."""
    cells, named = growth["cell"].nunique(), plots.looks(growth["law"])
    half, full = sorted(set(cut_variance["horizon"]))[-2:]
    figure, axes = figure_layout.figure(
        1, cells, (2 + 5.5 * cells, 6.4),
        "Where the variance of random cuts explodes",
        "Factor per time step by which the exact variance of the gradient of l_T grows from "
        f"T = {half} to T = {full}; 1: it stays finite. Dotted: predicted for a linear cell and long T, "
        "max(1, ρ² m), m the growth of the weights' second moment: 1/(1 - c) for the constant law of cut "
        "probability c, for the power law that of a power of T, which tends to 1. Vertical: ρ² = 1 - c. "
        + _spread(rows, growth, "Marker", "bar"),
        [*plots.handles(named, markers=True), Line2D([], [], label="predicted", **THEORY)],
        sharey=True,
    )  # fmt: skip
    moments = cut_variance.groupby(["law", "horizon"])["second_moment"].first()
    for _, own, ax in plots.panels(growth, "cell", axes[0], "{} cell".format):
        for law, look in named.items():
            part = own[own["law"] == law]
            x = part["spectral_radius"]
            plots.point(x, [part[c] for c in tables.interval_of("growth")], look, ax)
            m = (moments[law, full] / moments[law, half]) ** (1 / (full - half))
            fine = np.linspace(x.min(), x.max(), 301)
            ax.plot(fine, np.maximum(1, m * fine**2), **THEORY | {"color": look.color})
            if np.isclose(
                moments[law, full] ** (1 / (full - 1)), m, rtol=1e-5
            ):  # the moment is m^k, as the law has no memory of cuts
                ax.axvline(m**-0.5, color="0.5", linewidth=1)
        ax.set_xlabel("spectral radius ρ of $W_{hh}$")
    axes[0, 0].set_ylabel("growth of the variance\n(factor per time step)")
    return figure


def check(rows: pd.DataFrame) -> None:
    """Check that the runs are those of the captions: full BPTT on random bits, of cells with a radius."""
    tables.told_by(rows, ("cell", "spectral_radius"), numbers=True)
    for name, wanted in (("task", "add"), ("strategy", "full"), ("steps", rows["steps"].iloc[0])):
        if others := sorted(set(rows[name]) - {wanted}):
            raise SettingError(name, others[0], f"{wanted} in this study")
    if others := sorted(set(rows.loc[rows["spectral_radius"].isna(), "cell"])):
        way_out = "This study draws its figures over the radius."
        raise SettingError("cell", ", ".join(others), "one with a spectral radius", way_out)


STUDY = Study(
    question=__doc__,
    tables={"growth": growth},
    figures={"norms": draw_norms, "variance": draw_variance, "growth": draw_growth},
    check=check,
)
