"""What is an estimate of the gradient worth? Bias², variance and MSE against length and arithmetic.

`bptt-study -m experiment=bias_variance` makes the tables and draws the figures;
`python experiments/bias_variance.py [FOLDER]` draws them again.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bptt_study.backprop.schedules import revolve
from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.csv_tables import read_table, write_table

PARTS = {
    "relative_bias2": "bias²  $\\|E\\hat g - g\\|^2 / \\|g\\|^2$",
    "relative_variance": "variance  $E\\|\\hat g - E\\hat g\\|^2 / \\|g\\|^2$",
    "relative_mse": "MSE  $E\\|\\hat g - g\\|^2 / \\|g\\|^2$",
}
SETTING = ["task", "moment", "update", "estimator", "length"]
SEED = ["run", "seed", *SETTING]
BUDGETS = 2.0 ** np.arange(-4, 6)  # in full gradients of one training batch
MEMORY = (1, 32)  # the budgets for which a figure shows the states held
ZERO = 1e-9  # relative numbers below this are float32's rounding
SHOWN = (1e-4, 1e3)  # the range of relative numbers that the axes show
WHEN = {"start": "before training", "middle": "half-way", "end": "after training"}
UNBIASED = ("randomized", "randomized_power_law")
RIVALS = ("fixed", "sliding", "randomized_uncompensated")


# Tables

# the box behind numbers that stand on lines
FREE = {"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.8, "linewidth": 0}


def analyse(folder: Path) -> list[Path]:
    """Write moments.csv, frontier.csv, memory.csv and crossings.csv from the probe's table."""
    file = folder / "estimator_quality.csv.gz"
    if not file.is_file():  # snapshots=0
        return []
    tables.same_data(read_table(folder / "table.csv.gz"))
    seeds = by_seed(read_table(file))
    found = {"moments": moments, "frontier": frontier, "memory": memory, "crossings": crossings}
    for name, make in found.items():
        write_table(make(seeds), folder / f"{name}.csv")
    return [folder / f"{name}.csv" for name in found]


def by_seed(probed: pd.DataFrame) -> pd.DataFrame:
    """Compute the relative numbers of each seed, and add rows with over = both for one draw on one batch."""
    updates = probed.groupby("run")["update"].unique().map(sorted)
    names = {run: _names([int(u) for u in found]) for run, found in updates.items()}
    moment = [names[run][u] for run, u in zip(probed["run"], probed["update"], strict=True)]
    full = probed[probed["estimator"] == "full"].groupby("run")["arithmetic"].first()
    table = probed.assign(
        moment=moment,
        relative_arithmetic=probed["arithmetic"] / probed["run"].map(full),
        relative_forward=probed["forward_arithmetic"] / probed["run"].map(full),
    )
    table = table[[*SEED, "over", "relative_arithmetic", "relative_forward", "cosine", *PARTS]]
    draws, batches = (table[table["over"] == over] for over in ("draws", "batches"))
    both = batches.merge(draws[[*SEED, "relative_variance"]], on=SEED, suffixes=("", "_draws"))
    both["relative_variance"] += both.pop("relative_variance_draws")
    both["relative_mse"] = both["relative_bias2"] + both["relative_variance"]
    return pd.concat([table, both.assign(over="both", cosine=np.nan)], ignore_index=True)


def _names(updates: list[int]) -> dict[int, str]:
    middle = {u: "middle" if len(updates) == 3 else f"update {u}" for u in updates[1:-1]}
    return {updates[-1]: "end", updates[0]: "start", **middle}


def moments(seeds: pd.DataFrame) -> pd.DataFrame:
    """Compute the median over seeds of each relative number, with its interval."""
    keys = [*SETTING, "over", "relative_arithmetic"]
    columns = {}
    for part in (*PARTS, "cosine"):
        found = _aggregate(seeds, keys, part)
        columns |= {
            part: found["median"],
            f"{part}_low": found["low"],
            f"{part}_high": found["high"],
        }
    unknown = found["over"] == "both"
    table = found[[*keys, "n", "diverged"]].assign(**columns)
    table.loc[unknown, ["cosine", "cosine_low", "cosine_high"]] = np.nan
    return table


def _aggregate(seeds: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    lost = ~np.isfinite(seeds["relative_mse"])
    return tables.aggregate(seeds.assign(diverged=lost), keys, value)


def frontier(seeds: pd.DataFrame) -> pd.DataFrame:
    """Find the length of least MSE for each budget of arithmetic and estimator, and the best estimator.

    A budget pays for n = budget ÷ arithmetic independent batches and draws. Their mean has the MSE
    bias² + variance/n; n < 1 is a batch with fewer sequences. A bias² below 0 counts as 0.
    """
    one = seeds[seeds["over"] == "both"]
    found = []
    for budget in BUDGETS:
        table = _aggregate(_paid(one, budget), [*SETTING, "batches"], "mse")
        groups = table.groupby([*SETTING[:-1]], sort=False)
        found.append(table.loc[groups["median"].idxmin()].assign(budget=budget))
    names = {"median": "relative_mse", "low": "relative_mse_low", "high": "relative_mse_high"}
    table = pd.concat(found, ignore_index=True).rename(columns=names)
    least = table.groupby(["task", "moment", "budget"])["relative_mse"].transform("min")
    return table.assign(best=table["relative_mse"] == least)


def _paid(one: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Compute the number of batches that the budget pays for, and the MSE of their mean."""
    batches = budget / one["relative_arithmetic"]
    mse = one["relative_bias2"].clip(lower=0) + one["relative_variance"] / batches
    return one.assign(budget=budget, batches=batches, mse=mse)


def memory(seeds: pd.DataFrame) -> pd.DataFrame:
    """Compute the MSE for a budget by the states held at once: windows, and full with recomputation.

    Full with m states recomputes the others in the best order. It runs its forward pass more than once, so the
    budget pays for fewer batches. From T states on it is full itself.
    """
    one = seeds[seeds["over"] == "both"]
    windows = one[one["estimator"].isin(["fixed", "sliding"])]
    found = [windows.assign(states=windows["length"])]
    for task, full in one[one["estimator"] == "full"].groupby("task", sort=False):
        lengths = windows.loc[windows["task"] == task, "length"].astype(int).unique()
        steps = int(lengths.max())
        for states in (m for m in lengths if m > 1):
            unit, places = revolve.layout(steps, states) if states < steps else (steps, 1)
            again = unit * revolve.forward_steps(steps // unit, places) / steps - 1
            cost = 1 + again * full["relative_forward"]
            found.append(
                full.assign(estimator="checkpointed", states=states, relative_arithmetic=cost)
            )
    each = pd.concat(found, ignore_index=True)
    paid = pd.concat([_paid(each, budget) for budget in MEMORY], ignore_index=True)
    table = _aggregate(paid, [*SETTING[:-1], "states", "budget", "relative_arithmetic"], "mse")
    names = {"median": "relative_mse", "low": "relative_mse_low", "high": "relative_mse_high"}
    return table.rename(columns=names)


def crossings(seeds: pd.DataFrame) -> pd.DataFrame:
    """Find the budget from which an unbiased estimator has a smaller MSE than a biased one of the same length.

    At this budget, bias² + variance · arithmetic/budget is equal for both.
    """
    one = seeds[seeds["over"] == "both"]
    keys = [k for k in SEED if k != "estimator"]
    found = []
    for unbiased in UNBIASED:
        for rival in RIVALS:
            a, b = (one[one["estimator"] == name] for name in (unbiased, rival))
            pair = a.merge(b, on=keys, suffixes=("", "_rival"))
            noise = pair["relative_variance"] * pair["relative_arithmetic"]
            less = pair["relative_variance_rival"] * pair["relative_arithmetic_rival"]
            bias2 = pair["relative_bias2_rival"]
            known = bias2 > ZERO
            budget = ((noise - less) / bias2.where(known, 1)).clip(lower=0).where(known, np.inf)
            pair = pair.assign(unbiased=unbiased, rival=rival, batches=budget)
            found.append(pair)
    names = {"median": "batches", "low": "batches_low", "high": "batches_high"}
    keys = ["task", "moment", "update", "unbiased", "rival", "length"]
    table = tables.aggregate(pd.concat(found).assign(diverged=False), keys, "batches")
    return table.drop(columns="diverged").rename(columns=names)


# Figures


def draw(folder: Path) -> list[Path]:
    """Draw all figures of the study from the tables in the folder, and return their files."""
    if not (folder / "moments.csv").is_file():
        return []
    rows = tables.same_data(read_table(folder / "table.csv.gz"))
    table = read_table(folder / "moments.csv")
    files = []
    with figure_layout.style():
        for moment in table["moment"].unique():
            part = table[table["moment"] == moment]
            files += _parts(part, rows, moment, folder, "length")
            files += _parts(part, rows, moment, folder, "arithmetic")
        files += _frontier(read_table(folder / "frontier.csv"), rows, folder)
        if (folder / "memory.csv").is_file():
            files += _memory(read_table(folder / "memory.csv"), rows, folder)
    return files


def _parts(
    table: pd.DataFrame, rows: pd.DataFrame, moment: str, folder: Path, x: str
) -> list[Path]:
    tasks = list(table["task"].unique())
    draws = table[table["over"] == "draws"]
    named = plots.looks(set(draws["estimator"]) - {"full"})
    noise = table[(table["over"] == "batches") & (table["estimator"] == "full")]
    title = {
        "length": "Bias², variance and mean squared error of the gradient by truncation length",
        "arithmetic": "Bias², variance and mean squared error of the gradient against arithmetic",
    }[x]
    said = {
        "length": "Arrows: beyond the axis. ",
        "arithmetic": "Operations counted from the program; a marker per length, larger for longer. What costs "
        "as much as full (grey) is spread sideways to be told apart. Black: the frontier, the least error for "
        "a given arithmetic, which falls to 0 at full. Arrows: beyond the axis. ",
    }[x]
    spread = {"length": "band", "arithmetic": "bar"}[x]
    figure, axes = figure_layout.figure(
        len(PARTS),
        len(tasks),
        (2 + 3.9 * len(tasks), 12),
        f"{title}, {WHEN.get(moment, moment)}",
        "Of one estimate on one training batch, over the strategy's draws, relative to the squared norm of the "
        "full gradient on it. Full BPTT is 0 in all three; compensated cuts have no bias and fixed windows no "
        "variance, and are missing there. Bias² and the variance of compensated cuts are exact, the other "
        "variances sampled. Dotted: variance of the full gradient over batches, the noise that training has "
        f"anyway. {said}Line: median; {spread}: its 95 % bootstrap interval over "
        f"{_seeds(draws)}. {_runs(rows)}",
        [*plots.handles(named, markers=True), _noise_handle()],
        sharey=True,
        sharex=True if x == "arithmetic" else "col",
    )
    for part, panels in zip(PARTS, axes, strict=True):
        for task, ax in zip(tasks, panels, strict=True):
            ax.set_yscale("log")
            ax.set_ylim(*SHOWN)
            ax.set_xscale("log", base=2)
            here = draws[draws["task"] == task]
            if part != "relative_bias2":
                level = noise.loc[noise["task"] == task, "relative_variance"].iloc[0]
                ax.axhline(level, **_NOISE)
            lines(here, ax, named, x, part)
            ax.set_title(plots.TASKS.get(task, task))
            ax.set_xlabel(XLABELS[x])
        panels[0].set_ylabel(PARTS[part])
    return figure_layout.save(figure, folder, f"{x}_{moment.replace(' ', '_')}")


XLABELS = {
    "length": "window or mean length (time steps)",
    "arithmetic": "arithmetic ÷ that of full",
}
_NOISE = {"color": "0.25", "linewidth": 1.8, "linestyle": (0, (1, 1.5)), "zorder": 1}


def _noise_handle() -> Line2D:
    line = {k: v for k, v in _NOISE.items() if k != "zorder"}
    return Line2D([], [], label="noise of the minibatch", **line)


def lines(table: pd.DataFrame, ax: Axes, named: dict[str, plots.Look], x: str, value: str) -> Axes:
    """Draw one line per estimator over length, or over arithmetic with larger markers for longer ones."""
    low, high = ax.get_ylim()
    if x == "arithmetic":
        ax.axvspan(0.8, 1.25, color="0.93", linewidth=0, zorder=0)
        if value == "relative_mse":
            _pareto(table, ax, value)
    above = []
    for i, (name, look) in enumerate(named.items()):
        part = table[(table["estimator"] == name) & (table[value] > ZERO)].sort_values("length")
        if part.empty:
            continue
        at = part["length"]
        if x == "arithmetic":
            spread = 1.07 ** (i - (len(named) - 1) / 2)
            at = part["relative_arithmetic"] * np.where(
                part["relative_arithmetic"] < 1.02, spread, 1
            )
        style = (0, look.dashes) if look.dashes else "-"
        ax.plot(at, part[value], color=look.color, linestyle=style, linewidth=look.width)
        sizes = 36 if x == "length" else 14 * (1 + np.log2(part["length"]))
        inside = part[value].between(low, high)
        ax.scatter(at, part[value].where(inside), sizes, [look.color], marker=look.marker, zorder=3)
        band = part[[f"{value}_low", f"{value}_high"]].clip(low / 2, 2 * high).to_numpy().T
        if x == "length":
            ax.fill_between(at, *band, color=look.color, alpha=0.15, linewidth=0)
        else:
            ax.vlines(at, *band, color=look.color, linewidth=1)
        above += [(a, v, look.color) for a, v in zip(at, part[value], strict=True) if v > high]
    for n, (a, v, color) in enumerate(sorted(above, key=lambda item: item[:2])):
        ax.annotate(
            f"↑ $10^{{{np.log10(v):.0f}}}$", (a, high), (2, -14 - 16 * n), color=color, bbox=FREE,
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    ax.yaxis.set_major_locator(LogLocator(numticks=20))
    ax.yaxis.set_minor_locator(LogLocator(subs=(), numticks=20))
    return _ticks(ax)


def _pareto(table: pd.DataFrame, ax: Axes, value: str) -> None:
    """Draw the least of `value` over arithmetic, down to full's 0 at 1."""
    low, high = ax.get_ylim()
    cheaper = table[table["relative_arithmetic"] < 0.999].sort_values("relative_arithmetic")
    error = cheaper[value].cummin()
    points = [*zip(cheaper["relative_arithmetic"], error, strict=True)] or [(1, high)]
    x, y = zip(*points, (1, low), strict=True)
    ax.step(x, y, where="post", color=plots.LOOKS["full"].color, linewidth=3, zorder=1)


def _ticks(ax: Axes) -> Axes:
    ax.xaxis.set_major_locator(LogLocator(base=2, subs=(1,), numticks=20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{Fraction(x)}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def _frontier(table: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> list[Path]:
    tasks, times = list(table["task"].unique()), list(table["moment"].unique())
    named = plots.looks(table["estimator"])
    figure, axes = figure_layout.figure(
        len(times),
        len(tasks),
        (2 + 3.9 * len(tasks), 1.5 + 3.5 * len(times)),
        "The frontier: least mean squared error of the gradient for a given arithmetic",
        "Against the gradient of all data, relative to the mean squared norm of a batch's. A budget pays for n "
        "independent batches and draws, whose mean has the error bias² + variance/n; below 1, for a batch with "
        "fewer sequences. Each line has at every budget its best length (numbers: that of the best of all, "
        "where it changes). Grey band: the frontier, the least of all lines. Bar: its 95 % bootstrap interval "
        f"over {_seeds(table)}. {_runs(rows)}",
        plots.handles(named, markers=True),
        sharex=True,
        sharey="row",
    )
    for moment, panels in zip(times, axes, strict=True):
        for task, ax in zip(tasks, panels, strict=True):
            here = table[(table["task"] == task) & (table["moment"] == moment)]
            ax.set(yscale="log")
            ax.set_xscale("log", base=2)
            frontier_lines(here, ax, named)
            ax.set_title(f"{plots.TASKS.get(task, task)}, {WHEN.get(moment, moment)}")
            ax.set_xlabel("arithmetic (full gradients of one batch)")
        panels[0].set_ylabel("MSE  $E\\|\\hat g - g\\|^2 / E\\|g_{batch}\\|^2$")
    return figure_layout.save(figure, folder, "frontier")


def frontier_lines(table: pd.DataFrame, ax: Axes, named: dict[str, plots.Look]) -> Axes:
    """Draw the MSE of each estimator at its best length over the budget, and the least of all as a band."""
    best = table[table["best"]].drop_duplicates("budget").sort_values("budget")
    ax.plot(best["budget"], best["relative_mse"], color="0.8", linewidth=11, zorder=0)
    for name, look in named.items():
        part = table[table["estimator"] == name].sort_values("budget")
        style = (0, look.dashes) if look.dashes else "-"
        ax.plot(
            part["budget"], part["relative_mse"], color=look.color, linestyle=style,
            linewidth=look.width, zorder=1 if name == "full" else 2,
        )  # fmt: skip
    for _, row in best.iterrows():
        look = named[row["estimator"]]
        at, low, high = row["budget"], row["relative_mse_low"], row["relative_mse_high"]
        ax.vlines(at, low, high, look.color, linewidth=2, zorder=3)
        ax.plot(at, row["relative_mse"], look.marker or "D", color=look.color, zorder=4)
    setting = best["estimator"] + best["length"].astype(str)
    for _, row in best[setting != setting.shift()].iterrows():
        if np.isfinite(row["length"]):
            ax.annotate(
                f"{row['length']:g}", (row["budget"], row["relative_mse"]), (-4, -16),
                textcoords="offset points", ha="right", fontsize="small",
                color=named[row["estimator"]].color,
            )  # fmt: skip
    return _ticks(ax)


def _memory(table: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> list[Path]:
    table = table[table["moment"] == "end"]
    tasks = list(table["task"].unique())
    exact = plots.LOOKS["full"]._replace(name="Full, checkpointed", marker="D", width=2.0)
    named = {"checkpointed": exact, **plots.looks(set(table["estimator"]) - {"checkpointed"})}
    figure, axes = figure_layout.figure(
        len(MEMORY),
        len(tasks),
        (2 + 3.9 * len(tasks), 2.5 + 3.5 * len(MEMORY)),
        "What truncation must beat: the exact gradient with as few states, the others computed again",
        "Mean squared error of the gradient after training, for the arithmetic of so many full gradients of "
        "one batch (the budget of the frontier), over the states of a sequence that are held at once. "
        "Checkpointed: full BPTT that keeps m states and runs the others forward again in the best order, "
        "which buys fewer batches; at the right end it is full. A window holds as many states as it is long. "
        "Numbers: arithmetic ÷ that of full. "
        f"Line: median; band: its 95 % bootstrap interval over {_seeds(table)}. {_runs(rows)}",
        plots.handles(named, markers=True),
        sharex="col",
        sharey="row",
    )
    for budget, panels in zip(MEMORY, axes, strict=True):
        for task, ax in zip(tasks, panels, strict=True):
            here = table[(table["task"] == task) & (table["budget"] == budget)]
            ax.set(yscale="log")
            ax.set_xscale("log", base=2)
            ax.margins(y=0.15)
            memory_lines(here, ax, named)
            gradients = f"{budget:g} full gradient{'s' * (budget != 1)}"
            ax.set_title(f"{plots.TASKS.get(task, task)}, for {gradients}")
            ax.set_xlabel("states held at once")
        panels[0].set_ylabel("MSE  $E\\|\\hat g - g\\|^2 / E\\|g_{batch}\\|^2$")
    return figure_layout.save(figure, folder, "memory")


def memory_lines(table: pd.DataFrame, ax: Axes, named: dict[str, plots.Look]) -> Axes:
    """Draw the MSE over the states held, with the cost of the exact gradient as numbers."""
    for name, look in named.items():
        part = table[table["estimator"] == name].sort_values("states")
        style = (0, look.dashes) if look.dashes else "-"
        ax.plot(
            part["states"], part["relative_mse"], color=look.color, linestyle=style,
            linewidth=look.width, marker=look.marker,
        )  # fmt: skip
        band = part[["relative_mse_low", "relative_mse_high"]].to_numpy().T
        ax.fill_between(part["states"], *band, color=look.color, alpha=0.15, linewidth=0)
        for _, row in part[part["estimator"] == "checkpointed"].iterrows():
            ax.annotate(
                f"{row['relative_arithmetic']:.2g}", (row["states"], row["relative_mse"]), (0, 7),
                textcoords="offset points", ha="center", fontsize="small", color=look.color,
                bbox=FREE,
            )  # fmt: skip
    return _ticks(ax)


def _seeds(table: pd.DataFrame) -> str:
    """Write the number of seeds behind the medians, and the tasks on which some diverged."""
    worst = table.groupby("task", sort=False)["diverged"].max()
    lost = ", ".join(f"{count} ({task})" for task, count in worst.items() if count)
    return f"n = {plots.span(table['n'], 'seed')}; diverged: {lost or 'none'}"


def _runs(rows: pd.DataFrame) -> str:
    """Describe task, network and budget of the runs in words."""
    said = []
    for part in tables.panels(rows):
        row, last = part.iloc[0], part["update"].max()
        corpus = row.get("corpus")
        said.append(
            f"{plots.panel_name(row)}{'' if pd.isna(corpus) else f', {corpus}'}: {last} updates of "
            f"{row.get('steps'):g} time steps × {row.get('batch_size'):g} sequences"
        )
    return f"Trained by full BPTT, {rows.iloc[0].get('hidden'):g} units; {'; '.join(said)}."


if __name__ == "__main__":
    print(*draw(figure_layout.folder(__file__)), sep="\n")
