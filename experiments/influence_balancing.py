"""Which truncations give the gradient the right sign, by lag profiles alone, and does training agree?

`task.states=… task.positive=…` chooses another system.

On this system a gradient is one number, and a truncation with the lag profile w_k has the expected gradient
S_w = Σ_k w_k G_k, where at rest -G_k = (Aᵏv)_1 · (1 - s¹). So one table of the system, its response (Aᵏv)_1,
predicts for every truncation whether it leads to θ* or away from it. Training then tests the predictions.
Losses near 0 need float64: `make lab` sets JAX_ENABLE_X64=1.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

import bptt_study as bs
from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study, some

# states, positive: the system of Tallec & Ollivier 2017, and their lengths below
PUBLISHED = (23, 10)
OTHERS = ((16, 7), (9, 3))  # further systems
SYSTEM = ["states", "positive"]
TOLD = [*SYSTEM, "strategy", "stride", "alpha", "truncation_length", "schedule"]
CONVERGED = 0.1  # share of the loss of θ = 0 that may be left
CURVES = [*(("fixed", length) for length in (10, 50, 80, 200)), ("randomized_power_law", 16)]
# Tallec & Ollivier's descent takes 200 000 time steps with the rate 3e-4/√(1 + t) on the sum of the losses.
# Here an update takes the mean of 400 losses, so the rate is 3e-4 · 400 = 0.12
DESCENT = [
    "optimizer=sgd", "optimizer.learning_rate=0.12", "optimizer/schedule=inverse_sqrt",
    "budget.steps=400", "budget.updates=500", "budget.logs=50",
    "budget.divergence_bound=null",  # a loss may rise by many orders before it converges
]  # fmt: skip
# Slopes nearer to zero than this share of the steepest predict nothing: training cannot tell them from zero,
ROUNDING = 1e-5  # for rounding in float32,
NOISE = 0.002  # or for the noise of the draws.


class Family(NamedTuple):
    """Truncations that differ in one number, their window or mean length."""

    strategy: str
    make: Callable[[Any, int], Any]  # (problem, window) -> strategy
    stride: int | None = None  # stride of the window; None: chunks, or random cuts
    alpha: float | None = None
    resolution: float = ROUNDING

    @property
    def random(self) -> bool:
        return self.strategy != "fixed"

    @property
    def least(self) -> int:
        return self.stride or 1

    @property
    def settings(self) -> dict[str, Any]:
        return {"stride": self.stride, "alpha": self.alpha}


def families() -> list[Family]:
    """List all biased truncations; compensated ones point the right way at every length."""
    fixed = bs.strategies.fixed
    constant = partial(bs.strategies.randomized_constant, compensate=False)
    power_law = partial(bs.strategies.randomized_power_law, alpha=6.0, compensate=False)
    return [
        *(Family("fixed", partial(fixed, stride=s), stride=s) for s in (1, 5, 10, 20)),
        Family("fixed", fixed),
        Family("randomized_uncompensated", constant, resolution=NOISE),
        Family("randomized_power_law_uncompensated", power_law, alpha=6.0, resolution=NOISE),
    ]


# Predicted


class System(NamedTuple):
    """One system with its response, and the predictions from it."""

    states: int
    positive: int
    problem: Any
    response: np.ndarray  # (Aᵏv)_1, k = 0 … K - 1: the effect of θ on s¹ after k steps

    @property
    def limit(self) -> int:
        """The limit of the response's sum, which is the slope of the full gradient."""
        return 2 * (2 * self.positive - self.states)

    @property
    def peak(self) -> float:
        """The steepest slope of all windows."""
        return float(np.abs(np.cumsum(self.response)).max()) / abs(self.limit)

    def slope(self, family: Family, window: int) -> float:
        """Compute S_w as a share of the full gradient: 1 is exact, below 0 leads away from θ*."""
        import jax

        with jax.enable_x64(True):
            kept = bs.lags.window(family.make(self.problem, window), len(self.response))
            return float(np.asarray(kept) @ self.response) / self.limit

    def threshold(self, family: Family, resolution: float) -> int:
        """Find the least window from which all slopes are right by more than this share of the peak."""
        right = resolution * self.peak
        widest = len(self.response)  # from this window on the slope only rises
        while self.slope(family, widest) <= right:
            widest *= 2
        windows = range(widest, family.least - 1, -1)
        wrong = next((w for w in windows if self.slope(family, w) <= right), family.least - 1)
        return wrong + 1

    def tried(self, family: Family) -> list[int]:
        """List the windows to train: from one that clearly leads away to the predicted one, and a wide one."""
        unclear = family.resolution * self.peak
        turn = self.threshold(family, family.resolution)
        below = range(turn - 1, family.least - 1, -1)
        before = next((w for w in below if self.slope(family, w) < -unclear), turn)
        # a window whose slope is zero to rounding leads nowhere
        told = {w for w in range(before, turn) if abs(self.slope(family, w)) > ROUNDING * self.peak}
        return sorted({*told, turn, max(8 * self.states, turn)})


@cache
def system(states: int, positive: int) -> System:
    """Measure the response of a system: -G_k of a last loss at θ = 0, where the loss falls as s¹ rises."""
    import jax

    steps, key = 8 * states + 32, jax.random.key(0)
    with jax.enable_x64(True):
        task = bs.tasks.influence_balancing(states, positive, burn_in=steps - 1)
        problem = bs.Problem(bs.cells.influence(1, states, positive), task.readout, task.loss)
        last, _ = task.sampler(steps, 1).sample((), key, 0)
        table = bs.lags.gradients(problem, problem.init(key), last, steps)
    return System(states, positive, problem, -np.asarray(table["cell"]["theta"]))


# Trained


def more_runs(config: Any) -> list[list[str]]:
    """Return the overrides of more runs: each truncation at its windows, and the published ones."""
    own = (config.task.states, config.task.positive)
    sizes, curves = ([own, *OTHERS], CURVES) if own == PUBLISHED else ([own], [])
    descents = [[f"strategy={name}", f"truncation={n}", *DESCENT] for name, n in curves]
    return [line for size in sizes for line in _trained(system(*size))] + descents


def _trained(one: System) -> Iterator[list[str]]:
    """Yield the overrides of the runs that show whether a truncation leads to θ*.

    An update begins with a burn-in, after which the system is at rest and every loss has its full window. The
    losses that count fill one phase of the grid, so that their mean weight at lag k is w_k. For random cuts the
    number of losses is large enough.
    """
    for family in families():
        turn = one.threshold(family, family.resolution)
        for window in one.tried(family):
            # until 1e-6 of the past is left; the cuts of a power law remember the start for longer
            silent = max(len(one.response) // 2, 8 * turn if family.alpha else window)
            counted = max(400, 8 * turn) if family.random else family.stride or window
            yield [
                f"task.states={one.states}",
                f"task.positive={one.positive}",
                f"task.burn_in={silent}",
                f"budget.steps={silent + counted}",
                # a share of the way to θ*, because Adam's steps do not shrink with the small slope
                f"optimizer.learning_rate={0.05 * abs(1 / one.limit):.3g}",
                f"strategy={family.strategy}",
                f"truncation={window}",
                *(["seeds=3", "strategy.draws=16"] if family.random else ["seeds=1"]),
                *(f"strategy.{n}={tables.text(v)}" for n, v in family.settings.items() if v),
            ]


def systems(rows: pd.DataFrame) -> list[System]:
    """List the systems that were trained for their thresholds, the study's own first."""
    return [system(*size) for size in rows[SYSTEM].drop_duplicates().to_numpy()]


def thresholds(rows: pd.DataFrame) -> pd.DataFrame:
    """Make one line per truncation: its predicted window, and the window from which training converges."""
    ends = tables.aggregate(tables.final(rows), ["run", "window", *TOLD], "validation_loss")
    found = []
    for one, family in product(systems(rows), families()):
        losses = ends[_members(one, family, ends)].groupby("truncation_length")["median"].max()
        there = losses < CONVERGED * rows["nothing_loss"].iloc[0]
        failed, converged = there.index[~there], there.index[there]
        line = {
            "strategy": family.strategy,
            **family.settings,
            "predicted_window": one.threshold(family, family.resolution),
            "observed_window": converged[converged > max(failed, default=0)].min(),
            "states": one.states,
            "positive": one.positive,
            "turning_window": one.threshold(family, 0),
            "failed_windows": " ".join(map(tables.text, failed)),
            "converged_windows": " ".join(map(tables.text, converged)),
        }
        found.append(line)
    return pd.DataFrame(found)


def _members(one: System, family: Family, rows: pd.DataFrame) -> pd.Series:
    """Mark the rows of this system and family; chunks of 5 are the least window of stride 5, too."""
    stride, alpha, window = (rows[name].fillna(0) for name in ("stride", "alpha", "window"))
    of_system = (rows["states"] == one.states) & (rows["positive"] == one.positive)
    of_law = (rows["strategy"] == family.strategy) & (alpha == (family.alpha or 0))
    return of_system & of_law & (stride == (family.stride or window))


def slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the expected gradient over the window, as a share of the full gradient."""
    found = []
    for one, family in product(systems(rows), families()):
        of = {"states": one.states, "positive": one.positive, "strategy": family.strategy}
        turn = one.threshold(family, 0)
        grid = np.geomspace(family.least, 4 * turn, 80).round().astype(int)
        for window in np.union1d(grid, [turn]):
            share = one.slope(family, int(window))
            found.append({**of, **family.settings, "window": window, "gradient_share": share})
    return pd.DataFrame(found)


# Drawn


def _label(row: pd.Series) -> str:
    """Name a truncation."""
    stride, alpha = tables.text(row["stride"]), tables.text(row["alpha"])
    if row["strategy"] != "fixed":
        return "random cuts,\n" + (f"power law, α = {alpha}" if alpha else "constant law")
    return f"stride {stride}{' (sliding)' * (stride == '1')}" if stride else "chunks"


TITLE = "{0[0]} states, {0[1]} of them +1".format
PREDICTED: dict[str, Any] = {
    "color": "#222222", "linewidth": 2.5, "label": "predicted: right from here on",
}  # fmt: skip
TRAINED: dict[str, Any] = {"linestyle": "", "markersize": 9}
FAILS = TRAINED | {"color": plots.COLORS[3], "marker": "X", "label": "training does not"}
CONVERGES = TRAINED | {"color": plots.COLORS[2], "marker": "o", "label": "training converges"}


def draw_thresholds(thresholds: pd.DataFrame) -> Figure:
    """Draw the predicted and the trained thresholds, a panel per system."""
    systems = thresholds["states"].nunique()
    agree = thresholds["predicted_window"] == thresholds["observed_window"]
    early = (thresholds["predicted_window"] - thresholds["turning_window"]).max()
    figure, axes = figure_layout.figure(
        1, systems, (3 + 3.8 * systems, 6.6),
        "Which truncations lead to θ*: predicted from lag windows alone, and trained",
        "Bar: the least window (stride, chunks) or mean length (random cuts, uncompensated) from which on the "
        "expected gradient, known in closed form, points to θ* by more than training can tell from 0: "
        f"{ROUNDING:.3%} of the steepest slope, for random cuts {NOISE:.2%}; its sign turns at most {early} "
        f"before. Markers: windows trained at; ● ends below {CONVERGED:.0%} of the loss at θ = 0, ✕ does not; "
        "median of n = 3 seeds for random cuts, n = 1 where nothing is drawn. Prediction and training agree "
        f"in {agree.sum()} of {len(agree)} rows.",
        [Line2D([], [], **look) for look in (PREDICTED, CONVERGES, FAILS)],
        sharey=True,
    )  # fmt: skip
    for _, part, ax in plots.panels(thresholds, SYSTEM, axes[0], TITLE):
        draw_system(part.reset_index(drop=True), ax)
    return figure


def draw_system(part: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a row per truncation: the trained windows, and a bar at the predicted one."""
    for y, row in part.iterrows():
        for column, look in (("failed_windows", FAILS), ("converged_windows", CONVERGES)):
            windows = [float(w) for w in str(row[column]).split() if w != "nan"]
            ax.plot(windows, [y] * len(windows), **look, zorder=3)
        at = row["predicted_window"]
        ax.vlines(at, y - 0.42, y + 0.42, **PREDICTED, zorder=2)
        ax.annotate(f"{at:g}", (at, y - 0.42), (4, -1), textcoords="offset points", va="top")
    plots.listed([_label(row) for _, row in part.iterrows()], ax)
    return _over_windows(ax)


def _over_windows(ax: Axes) -> Axes:
    """Make an x axis of windows and mean lengths."""
    ax.set(xscale="log", xlabel="window or mean length\n(time steps)")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def draw_slopes(slopes: pd.DataFrame) -> Figure:
    """Draw the expected gradient over the window: sliding windows, chunks and random cuts in two systems."""
    ends = slopes["states"].isin([slopes["states"].min(), slopes["states"].max()])
    shown = slopes[ends & (slopes["stride"].isna() | (slopes["stride"] == 1))]
    shown = shown.assign(strategy=shown["strategy"].mask(shown["stride"] == 1, "sliding"))
    systems, named = shown["states"].nunique(), plots.looks(shown["strategy"])
    lowest = 1.1 * shown["gradient_share"].min()
    away: dict[str, Any] = {"color": "0.93", "linewidth": 0, "zorder": 0}
    figure, axes = figure_layout.figure(
        1, systems, (1.5 + 5.5 * systems, 6.4),
        "Influence balancing: which windows lead away from θ*?",
        "Expected gradient of a truncation as a share of the full gradient, which is 1. From lag windows in "
        "closed form and the system's response; nothing is trained. Random cuts are not compensated: with "
        "compensation they are at 1. Windows of other strides, and other systems, are in slopes.csv.",
        [*plots.handles(named), plots.full_handle(), Patch(label="leads away from θ*", **away)],
        sharey=True,
    )  # fmt: skip
    for _, part, ax in plots.panels(shown, SYSTEM, axes[0], TITLE):
        for strategy, line in part.groupby("strategy", sort=False):
            ax.plot(line["window"], line["gradient_share"], **named[str(strategy)].line)
        ax.axhspan(lowest, 0, **away)
        ax.axhline(1, **plots.FULL)
        _over_windows(ax)
    axes[0, 0].set(ylim=(lowest, 1.2), ylabel="expected gradient\n÷ full gradient")
    return figure


def draw_curves(rows: pd.DataFrame) -> Figure:
    """Draw the descents of Tallec & Ollivier."""
    rows = some(rows[rows["schedule"] == "inverse_sqrt"], "published descent")
    values, nothing = partial(plots.values, rows), rows["nothing_loss"].iloc[0]
    table = tables.curves(rows, "validation_loss")
    ends = table.drop_duplicates("run", keep="last").sort_values(["strategy", "length"])
    named = {}
    for strategy, own in ends.groupby("strategy"):
        look = plots.LOOKS[str(strategy)]._replace(width=2.5)
        kind = "chunks of" if strategy == "fixed" else "random cuts, mean"
        for (_, end), tone in zip(own.iterrows(), plots.tones(look.color, len(own)), strict=True):
            fate = "converged" if end["median"] < CONVERGED * nothing else "diverged"
            name = f"{kind} {tables.text(end['length'])}: {fate}"
            named[end["run"]] = look._replace(name=name, color=tone)
    figure, [[ax]] = figure_layout.figure(
        1, 1, (11, 7),
        "Influence balancing: which chunks and which random cuts converge?",
        f"{values('states')} states, {values('positive')} of them +1 (Tallec & Ollivier 2017). Gradient "
        f"descent with rate {values('learning_rate')}/√(1 + updates); an update every {values('steps')} time "
        "steps, within which the cuts fall. Line: median; band: 95 % bootstrap interval over n = "
        f"{plots.span(table['n'], 'seed')}, which differ only where cuts are drawn. ✕: beyond the axis "
        "until the end. Dotted: the loss at θ = 0.",
        plots.handles(named),
    )  # fmt: skip
    high = 1e20
    ax.set(yscale="log", ylim=(1e-33, high))
    label = "validation loss (½ (s¹ - 1)² per step)"
    plots.learning_curves(table.assign(strategy=table["run"]), ax, named, "tokens", label)
    beyond = table[~(table["median"] < high)].groupby("run")["tokens"].min()
    for run in ends.loc[~(ends["median"] < high), "run"]:
        ax.plot(beyond[run], high, "X", color=named[run].color, markersize=10, clip_on=False)
    ax.axhline(nothing, **plots.REFERENCE)
    ax.set_xlabel("time steps seen in training")
    return figure


STUDY = Study(
    question=__doc__,
    tables={"thresholds": thresholds, "slopes": slopes},
    figures={"thresholds": draw_thresholds, "slopes": draw_slopes, "learning_curves": draw_curves},
    more_runs=more_runs,
    check=partial(tables.told_by, names=TOLD),
)
