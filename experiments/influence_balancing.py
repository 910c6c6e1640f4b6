"""Which truncations give the gradient the right sign, by lag profiles alone, and does training agree?

`task.states=… task.positive=…` chooses another system.

On this system a gradient is one number, and a truncation with the lag profile w_k has the expected gradient
S_w = Σ_k w_k G_k, where at rest -G_k = (Aᵏv)_1 · (1 - s¹). So one table of the system, its response (Aᵏv)_1,
predicts for every truncation whether it leads to θ* or away from it. Training then tests the predictions.
Losses near 0 need float64: `make lab` sets JAX_ENABLE_X64=1.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

import bptt_study as bs
from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study, some
from bptt_study.validation import counted

# states, positive: the system of Tallec & Ollivier 2017, and their lengths below
PUBLISHED = (23, 10)
OTHERS = ((16, 7), (9, 3))  # further systems
STRIDES = (1, 5, 10, 20)
SYSTEM = ["states", "positive"]
WIDEST = 8  # times the states: a window tried for every truncation; the others are next to the prediction
CONVERGED = 0.1  # share of the loss of θ = 0 that may be left
RANDOM = ["seeds=3", "strategy.draws=16"]  # draws are averaged
FIXED = ["seeds=1"]  # neither cuts nor data are drawn
CURVES = {
    "fixed": (10, 50, 80, 200),
    "randomized_power_law": (16,),
}
# Tallec & Ollivier's descent takes 200 000 time steps with the rate 3e-4/√(1 + t) on the sum of the losses.
# Here an update takes the mean of 400 losses, so the rate is 3e-4 · 400 = 0.12
DESCENT = [
    "optimizer=sgd",
    "optimizer.learning_rate=0.12",
    "optimizer.clip_norm=null",
    "optimizer/schedule=inverse_sqrt",
    "budget.steps=400",
    "budget.updates=500",
    "budget.logs=50",
    "budget.divergence_bound=null",  # a loss may rise by many orders before it converges
    "task.burn_in=0",
]

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


def families() -> list[Family]:
    """List all biased truncations; compensated ones point the right way at every length."""
    fixed, constant = bs.strategies.fixed, bs.strategies.randomized_constant
    cuts = partial(Family, resolution=NOISE)
    return [
        *(Family("fixed", partial(fixed, stride=s), stride=s) for s in STRIDES),
        Family("fixed", fixed),
        cuts("randomized_uncompensated", partial(constant, compensate=False)),
        cuts(
            "randomized_power_law_uncompensated",
            partial(bs.strategies.randomized_power_law, alpha=6.0, compensate=False),
            alpha=6.0,
        ),
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
        return sorted({*told, turn, max(WIDEST * self.states, turn)})


def rest(states: int) -> int:
    """Compute the time steps until less than 1e-6 of the past is left in the first variable."""
    return 4 * states + 16


@cache
def system(states: int, positive: int) -> System:
    """Measure the response of a system: -G_k of a last loss at θ = 0, where the loss falls as s¹ rises."""
    import jax

    steps, key = 2 * rest(states), jax.random.key(0)
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
    sizes = [own, *(OTHERS if own == PUBLISHED else ())]
    lines = [line for size in sizes for line in _trained(system(*size))]
    if own == PUBLISHED:
        lines += [
            [f"strategy={name}", f"truncation={length}", *DESCENT]
            for name, lengths in CURVES.items()
            for length in lengths
        ]
    return lines


def _trained(one: System) -> Iterator[list[str]]:
    """Yield the overrides of the runs that show whether a truncation leads to θ*.

    An update begins with a burn-in, after which the system is at rest and every loss has its full window. The
    losses that count fill one phase of the grid, so that their mean weight at lag k is w_k. For random cuts the
    number of losses is large enough.
    """
    for family in families():
        turn = one.threshold(family, family.resolution)
        for window in one.tried(family):
            # the cuts of a power law remember the start for a long time
            silent = max(rest(one.states), 8 * turn if family.alpha else window)
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
                *(RANDOM if family.random else FIXED),
                *([f"strategy.stride={family.stride}"] if family.stride else []),
                *([f"strategy.alpha={tables.text(family.alpha)}"] if family.alpha else []),
            ]


# the settings that the figures show of a truncation with its window
THRESHOLDS = (*SYSTEM, "strategy", "truncation_length", "stride", "alpha", "schedule")


def systems(rows: pd.DataFrame) -> list[System]:
    """List the systems that were trained for their thresholds, the study's own first."""
    sizes = rows[SYSTEM].drop_duplicates()
    return [system(*size) for size in sizes.to_numpy()]


def thresholds(rows: pd.DataFrame) -> pd.DataFrame:
    """Compare prediction and training on the study's own system."""
    return of_system(systems(rows)[0], rows)


def thresholds_others(rows: pd.DataFrame) -> pd.DataFrame:
    """Compare prediction and training on further systems."""
    found = [of_system(one, rows) for one in systems(rows)[1:]]
    return pd.concat(found) if found else pd.DataFrame()


def slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the expected gradient over the window, as a share of the full gradient."""
    found = []
    for one in systems(rows):
        for family in families():
            turn = one.threshold(family, 0)
            grid = np.geomspace(family.least, 4 * turn, 80).round().astype(int)
            names = {"states": one.states, "positive": one.positive, "strategy": family.strategy}
            names |= {"stride": family.stride, "alpha": family.alpha}
            for window in np.union1d(grid, [turn]):
                share = one.slope(family, int(window))
                found.append({**names, "window": window, "gradient_share": share})
    return pd.DataFrame(found).astype({"stride": "Int64"})


def of_system(one: System, rows: pd.DataFrame) -> pd.DataFrame:
    """Make one line per truncation: its predicted window, and the window from which training converges."""
    last = tables.final(rows, "validation_loss")
    last = last[(last["states"] == one.states) & (last["positive"] == one.positive)]
    found = []
    for family in families():
        runs = last[_members(family, last)]
        ends = (
            runs["validation_loss"].fillna(np.inf).groupby([runs["truncation_length"], runs["run"]])
        )
        there = ends.median().groupby(level=0).max() < CONVERGED * last["nothing_loss"].iloc[0]
        failed = there.index[~there]
        after = there.index[there.index > max(failed, default=0)]
        found.append(
            {
                "strategy": family.strategy,
                "stride": family.stride,
                "alpha": family.alpha,
                "predicted_window": one.threshold(family, family.resolution),
                "observed_window": min(after, default=None),
                "states": one.states,
                "positive": one.positive,
                "turning_window": one.threshold(family, 0),
                "failed_windows": " ".join(map(tables.text, failed)),
                "converged_windows": " ".join(map(tables.text, there.index[there])),
            }
        )
    whole = ["stride", "predicted_window", "observed_window"]
    return pd.DataFrame(found).astype(dict.fromkeys(whole, "Int64"))


def _members(family: Family, rows: pd.DataFrame) -> pd.Series:
    """Mark the rows of this family; chunks of 5 are the least window of stride 5, too."""
    own = rows["strategy"] == family.strategy
    if family.random:
        return own & (rows["alpha"].fillna(0) == (family.alpha or 0))
    return own & (rows["stride"] == (family.stride or rows["window"]))


# Drawn


def _title(system: tuple[int, int]) -> str:
    """Name a system."""
    return f"{system[0]} states, {system[1]} of them +1"


def _label(row: pd.Series) -> str:
    """Name a truncation."""
    if row["strategy"] == "fixed":
        sliding = " (sliding)" * (row["stride"] == 1)
        return (
            "chunks" if pd.isna(row["stride"]) else f"stride {tables.text(row['stride'])}{sliding}"
        )
    law = "constant law" if pd.isna(row["alpha"]) else f"power law, α = {tables.text(row['alpha'])}"
    return f"random cuts,\n{law}"


PREDICTED: dict[str, Any] = {"color": "#222222", "linewidth": 2.5}
CONVERGES: dict[str, Any] = {
    "color": plots.COLORS[2],
    "marker": "o",
    "linestyle": "",
    "markersize": 9,
}
FAILS: dict[str, Any] = {
    "color": plots.COLORS[3],
    "marker": "X",
    "linestyle": "",
    "markersize": 9,
}


def draw_thresholds(
    thresholds: pd.DataFrame, thresholds_others: pd.DataFrame | None = None
) -> Figure:
    """Draw the predicted and the trained thresholds, a panel per system."""
    thresholds = pd.concat([thresholds, thresholds_others], ignore_index=True)
    systems = thresholds["states"].nunique()
    agree = thresholds["predicted_window"] == thresholds["observed_window"]
    early = (thresholds["predicted_window"] - thresholds["turning_window"]).max()
    figure, axes = figure_layout.figure(
        1,
        systems,
        (3 + 3.8 * systems, 6.6),
        "Which truncations lead to θ*: predicted from lag windows alone, and trained",
        "Bar: the least window (stride, chunks) or mean length (random cuts) whose expected gradient points "
        "to θ*, from the closed form of its lag window and the system's response alone, by more than training "
        f"can tell from 0, {ROUNDING:.3%} of the steepest slope, and {NOISE:.2%} for the "
        f"noise of random cuts; the sign itself turns {early} before at most. Markers: windows "
        f"trained at; ● ends below {CONVERGED:.0%} of the loss at θ = 0, ✕ does not. Prediction and training "
        f"agree in {agree.sum()} of {len(agree)} rows. Random cuts are not compensated: median of n = 3 "
        "seeds; n = 1 where nothing is drawn.",
        [
            Line2D([], [], **PREDICTED, label="predicted: right from here on"),
            Line2D([], [], **CONVERGES, label="training converges"),
            Line2D([], [], **FAILS, label="training does not"),
        ],
        sharey=True,
    )
    for _, part, ax in plots.panels(thresholds, SYSTEM, axes[0], _title):
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
    _over_windows(ax)
    ax.set_yticks(range(len(part)), [_label(row) for _, row in part.iterrows()])
    ax.set_ylim(len(part) - 0.4, -0.6)
    return ax


def _over_windows(ax: Axes) -> Axes:
    """Make an x axis of windows and mean lengths."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("window or mean length\n(time steps)")
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
        1,
        systems,
        (1.5 + 5.5 * systems, 6.4),
        "Influence balancing: which windows lead away from θ*?",
        "Expected gradient of a truncation as a share of the full gradient, which is 1. From lag windows in "
        "closed form and the system's response; nothing is trained. Random cuts are not compensated: with "
        "compensation they are at 1. Windows of other strides, and other systems, are in slopes.csv.",
        [*plots.handles(named), plots.full_handle(), Patch(label="leads away from θ*", **away)],
        sharey=True,
    )
    for _, part, ax in plots.panels(shown, SYSTEM, axes[0], _title):
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
    table = tables.curves(rows, "validation_loss")
    runs = table.drop_duplicates("run", keep="last").sort_values(["strategy", "length"])
    lines = {}
    for strategy, own in runs.groupby("strategy"):
        look = plots.LOOKS[str(strategy)]
        for run, tone in zip(own["run"], plots.tones(look.color, len(own)), strict=True):
            lines[run] = look._replace(color=tone, width=2.5).line
    row = rows.iloc[0]
    figure, [[ax]] = figure_layout.figure(
        1,
        1,
        (11, 7),
        "Influence balancing: which chunks and which random cuts converge?",
        f"{row['states']} states, {row['positive']} of them +1 (Tallec & Ollivier 2017). Gradient descent "
        f"with rate {plots.values(rows, 'learning_rate')}/√(1 + updates); an update every "
        f"{plots.values(rows, 'steps')} time "
        "steps, within which the cuts fall. Line: median; band: 95 % bootstrap interval over n = "
        f"{counted(table['n'].max(), 'seed')}, which differ only where cuts are drawn. ✕: beyond the axis "
        "until the end. Dotted: the loss at θ = 0.",
        [
            Line2D([], [], label=_end(r, row["nothing_loss"]), **lines[r["run"]])
            for _, r in runs.iterrows()
        ],
    )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(1e-33, 1e20)
    for _, run in runs.iterrows():
        color = lines[run["run"]]["color"]
        line = table[(table["run"] == run["run"]) & np.isfinite(table["median"])]
        low, high = (line[c].clip(*ax.get_ylim()) for c in ("low", "high"))
        ax.fill_between(line["tokens"], low, high, color=color, alpha=0.2, linewidth=0)
        ax.plot(line["tokens"], line["median"], **lines[run["run"]])
        top = ax.get_ylim()[1]
        if not run["median"] < top:
            beyond = (table["run"] == run["run"]) & ~(table["median"] < top)
            gone = table.loc[beyond, "tokens"].min()
            ax.plot(gone, top, "X", color=color, markersize=10, clip_on=False)
    ax.axhline(row["nothing_loss"], **plots.REFERENCE)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("time steps seen in training")
    ax.set_ylabel("validation loss (½ (s¹ - 1)² per step)")
    return figure


def _end(run: pd.Series, nothing: float) -> str:
    """Name a published run, and say how it ended."""
    kind = "chunks of" if run["strategy"] == "fixed" else "random cuts, mean"
    there = run["median"] < CONVERGED * nothing
    return f"{kind} {tables.text(run['length'])}: {'converged' if there else 'diverged'}"


def check(rows: pd.DataFrame) -> None:
    """Check that the thresholds tell their runs apart."""
    tables.told_by(rows, THRESHOLDS)


STUDY = Study(
    question=__doc__,
    tables={
        "thresholds": thresholds,
        "thresholds_others": thresholds_others,
        "slopes": slopes,
    },
    figures={
        "thresholds": draw_thresholds,
        "slopes": draw_slopes,
        "learning_curves": draw_curves,
    },
    more_runs=more_runs,
    check=check,
)
