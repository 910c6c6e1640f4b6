"""The textbook's verdict on randomized truncation, and its three reasons with one figure each.

(1) A few steps back capture the dependence. (2) The variance outweighs the better expectation. (3) A short
range regularises.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bptt_study.report import figure_layout, paired_tests, plots, tables
from bptt_study.report.study import Study, some

# the share held out, which leaves little data for training
LITTLE = {"char_lm": 0.97, "digits": 0.8}
LEAST = {"char_lm": 0.02, "digits": 0.05}  # nats: the smallest difference of interest
SHORT = 4  # time steps: the length at which bias and variance are separated
DRAWS = (4, 16, 64)
# The number of draws with mean length 16 whose variance in training is near that of uncompensated cuts of
# length SHORT. With mean length SHORT, no affordable number of draws comes near it
EVEN = {"digits": 20}
SEEDS = ["task", "data", "name", "seed"]


def more_runs(config: Any) -> list[list[str]]:
    """Return the overrides of more runs: little data, one step back, averaged draws, biased expectations."""
    strategy, task = config.strategy, config.task["_target_"].rpartition(".")[2]
    length = strategy.get("window", strategy.get("mean_length", SHORT))
    compensated = strategy.get("compensate", False)
    if length != SHORT:
        even = compensated and length == 16 and task in EVEN
        return [[f"strategy.draws={EVEN[task]}"]] if even else []
    more = [[f"task.validation_fraction={LITTLE[task]}"]] if task in LITTLE else []
    if "window" in strategy:
        more += [["strategy.window=1"]]
    if compensated:
        more += [[f"strategy.draws={n}"] for n in DRAWS]
        more += [["strategy=randomized_uncompensated"], ["strategy=discounted"]]
    return more


class Question(NamedTuple):
    """A comparison of the first strategy with the second."""

    question: str
    first: str
    second: str
    score: str = "validation_loss"
    data: str = "all"


def questions(matched: str) -> list[Question]:
    """Make the family of comparisons; `matched` has about the variance of uncompensated cuts."""
    many = [f"randomized {SHORT}", *(f"randomized {SHORT} × {n}" for n in DRAWS)]
    biased, expected = f"randomized_uncompensated {SHORT}", f"discounted {SHORT}"
    short = (f"fixed {SHORT}", f"randomized {SHORT}")
    return [
        *(Question("verdict", f"randomized {n}", f"fixed {n}") for n in (SHORT, 16)),
        *(Question("window", f"fixed {n}", "full") for n in (1, SHORT, 16)),
        *(Question("variance alone", name, "full") for name in many),
        Question("variance alone", biased, expected),
        Question("bias alone", expected, "full"),
        Question("bias alone", biased, matched),
        *(
            Question("gap", name, "full", "gap", data)
            for data in ("all", "little")
            for name in short
        ),
        *(Question("little data", name, "full", data="little") for name in short),
    ]


def last(rows: pd.DataFrame) -> pd.DataFrame:
    """Select the last rows, with names: `name` of strategy, length and draws; `data`, all or little."""
    rows = tables.final(rows)
    lengths, draws = tables.lengths(rows), rows.reindex(columns=["draws"])["draws"]
    names = rows["strategy"] + lengths.map(lambda n: "" if np.isnan(n) else f" {n:g}")
    names += draws.map(lambda n: f" × {n:g}" if n > 1 else "")
    little = rows["validation_fraction"] == rows["task"].map(LITTLE)
    data = np.where(little, "little", "all")
    return rows.assign(length=lengths, name=names, data=data, draws=draws.fillna(1))


def of_runs(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add the names of the runs in the comparisons to a probe's table."""
    names = ["run", "task", "data", "name", "strategy", "length", "draws"]
    keys = last(rows)[names].drop_duplicates()
    return table.drop(columns=[c for c in keys if c in table and c != "run"]).merge(keys, on="run")


def shares(lag_mass: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the share of the gradient mass Σ_k ‖G_k‖ that each strategy keeps, per seed and update.

    `share` is measured in the network that full BPTT trained with the same seed and updates, and `own` in the
    strategy's own network.
    """
    table = of_runs(lag_mass, rows)
    at = ["task", "data", "seed", "update", "lag"]
    full = table[table["name"] == "full"].set_index(at)["mass"].rename("mass_of_full")
    table = table.join(full, on=at)
    # a lag without losses has no gradient
    kept = table["kept"].fillna(0)
    by = [*SEEDS[:-1], "length", "update", "seed"]
    sums = (
        table.assign(share=kept * table["mass_of_full"], own=kept * table["mass"])
        .groupby(by, dropna=False, sort=False)[["share", "own", "mass_of_full", "mass"]]
        .sum(min_count=1)
        .reset_index()
    )
    sums["share"] /= sums.pop("mass_of_full")
    sums["own"] /= sums.pop("mass")
    return sums


def errors(gradient_error: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Compute bias² and variance of each strategy ÷ ‖g‖², at its own networks, as medians over the seeds."""
    table = of_runs(gradient_error, rows)
    by = [*SEEDS[:-1], "strategy", "draws", "update"]
    parts = []
    for column in ("bias2", "variance"):
        relative = table.assign(value=table[column] / table["norm2"])
        relative = relative.assign(diverged=~np.isfinite(relative["value"]))
        part = tables.aggregate(relative, by, "value").set_index([*by, "n", "diverged"])
        parts.append(part.rename(columns=lambda c, name=column: f"{name}_{c}"))
    return pd.concat(parts, axis=1).reset_index()


def gaps(generalisation: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the loss on the training and the validation part after training, and their gap, per seed."""
    table = of_runs(generalisation, rows)
    table = table[table["update"] == table["update"].max()]
    wide = table.pivot(index=SEEDS, columns="part", values="loss").reset_index()
    wide = wide.rename(columns={"training": "training_part", "validation": "validation_part"})
    return wide.assign(gap=wide["validation_part"] - wide["training_part"]).rename_axis(
        columns=None
    )


def matched(errors: pd.DataFrame) -> str:
    """Find the compensated strategy whose variance in training is nearest to that of uncompensated cuts.

    These cuts have the length SHORT. The expectation of the strategy is full BPTT's gradient for any mean
    length and number of draws. The nearest variance need not be near: errors.csv has both.
    """
    late = errors[(errors["update"] > 0) & (errors["variance_median"] > 0)]
    log = np.log(late.set_index("name")["variance_median"]).groupby(level=0).mean()
    asked = log.get(f"randomized_uncompensated {SHORT}", np.nan)
    names = log.index.str.startswith("randomized ")
    away = (log[names] - asked).abs()
    return str(away.idxmin()) if away.notna().any() else f"randomized {SHORT}"


def comparisons(rows: pd.DataFrame, gaps: pd.DataFrame, errors: pd.DataFrame) -> pd.DataFrame:
    """Make all comparisons of all tasks as one family; comparisons without runs are left out."""
    found = []
    scores = last(rows)[[*SEEDS, "validation_loss"]].merge(gaps, on=SEEDS, how="left")
    for task, of_task in scores.groupby("task", sort=False):
        own = errors[(errors["task"] == task) & (errors["data"] == "all")]
        for q in questions(matched(own)):
            part = of_task[of_task["data"] == q.data].set_index("seed")
            first, second = (
                part.loc[part["name"] == name, q.score] for name in (q.first, q.second)
            )
            if len(first) and len(second):
                row = {"question": q.question, "task": task, "data": q.data, "score": q.score}
                row |= {"first": q.first, "second": q.second}
                found.append(
                    row | paired_tests.compare(first, second) | {"least": LEAST.get(task, 0.02)}
                )
    table = some(pd.DataFrame(found), "pair of runs to compare")
    table = paired_tests.family(table.assign(larger_is_better=False))
    return table.drop(columns="larger_is_better")


def _looks(strategies: Iterable[str]) -> dict[str, plots.Look]:
    """Return the looks of all figures, with a marker for full."""
    looks = plots.looks(strategies)
    return {
        name: look._replace(marker="D", width=2.0) if name == "full" else look
        for name, look in looks.items()
    }


def _over_seeds(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Aggregate the score of each run after training over its seeds."""
    keys = [c for c in (*tables.PANEL, "data", "name", "strategy", "length", "draws") if c in rows]
    return tables.aggregate(rows, [*keys, "run"], score)


def draw_window(rows: pd.DataFrame, lag_mass: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """Draw where the gradient lies, and the final loss over the share of it that a window keeps."""
    rows = last(rows)
    part = rows[(rows["data"] == "all") & rows["strategy"].isin(["full", "fixed"])]
    tasks = list(some(part[part["strategy"] == "full"], "run of full BPTT")["task"].unique())
    scores = _over_seeds(part, "validation_loss")
    named_looks = _looks(["full", "fixed"])
    figure, axes = figure_layout.figure(
        2,
        len(tasks),
        (1 + 5 * len(tasks), 9.4),
        "Reason 1: do a few steps back capture the dependence?",
        "Top: share of the gradient mass Σ‖G_k‖ at lags below a number of steps, in networks that full BPTT "
        "trains, along training; line and band: median and 95 % bootstrap interval. Bottom: final loss "
        "against the share that each window keeps of it after training (number: window; vertical bar: "
        "interval of the loss, horizontal: of the share); hollow: the share in the strategy's own network. "
        f"{plots.seeds(scores)}. {plots.runs(part)}",
        plots.handles(named_looks, markers=True),
    )
    for task, (top, bottom) in zip(tasks, axes.T, strict=True):
        own = scores[scores["task"] == task]
        full = own.loc[own["name"] == "full", "run"]
        draw_cumulative(lag_mass[lag_mass["run"].isin(full)], top)
        top.set_title(plots.panel_name(own.iloc[0]))
        found = shares[(shares["task"] == task) & (shares["data"] == "all")]
        found = found[found["update"] == found["update"].max()]
        bottom.set_ylim(plots.limits(own))
        draw_against_share(own, found, bottom, named_looks)
        bottom.set_ylabel(plots.loss_label(task))
    return figure


def draw_cumulative(mass: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the share of the mass at lags below n, over n, one line per update."""
    table = mass.sort_values(["seed", "update", "lag"]).assign(diverged=False)
    sums = table.groupby(["seed", "update"])["mass"]
    table["share"] = sums.cumsum() / sums.transform("sum")
    over = tables.aggregate(table, ["update", "lag"], "share")
    updates = sorted(over["update"].unique())
    for update, tone in zip(updates, np.linspace(0.75, 0.0, len(updates)), strict=True):
        line = over[over["update"] == update].assign(steps=lambda table: table["lag"] + 1)
        color = plots.sns.color_palette("viridis", as_cmap=True)(tone)
        plots.band(line, "steps", color, ax, label=update, linewidth=2)
    for share in (0.5, 0.9, 0.99):
        ax.axhline(share, **plots.REFERENCE)
    ax.set_xscale("log", base=2)
    ticks = [n for n in (1, 4, 16, 64, 256) if n <= over["lag"].max() + 1]
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.set_ylim(0, 1.03)
    # shares only grow, so this corner is free
    ax.legend(loc="lower right", title="updates")
    ax.set(xlabel="steps back (lags below this)", ylabel="share of the gradient mass")
    return ax


def draw_against_share(scores: pd.DataFrame, shares: pd.DataFrame, ax: Axes, looks: Any) -> Axes:
    """Draw the final loss over the share of the mass that a strategy keeps, in full's and its own network."""
    for _, row in scores.iterrows():
        look = looks[row["strategy"]]
        own = shares[shares["name"] == row["name"]]
        x, low, high = tables.interval(own["share"])
        ax.plot([x, x], [row["low"], row["high"]], color=look.color, linewidth=1.5)
        ax.plot([low, high], [row["median"]] * 2, color=look.color, linewidth=1.5)
        ax.plot(x, row["median"], look.marker, color=look.color, markersize=8)
        ax.plot(own["own"].median(), row["median"], look.marker, color=look.color, mfc="none", ms=8)
        if row["length"] > 0:  # full has no length, and its own marker
            at = {"xytext": (-6, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
            ax.annotate(f"{row['length']:g}", (x, row["median"]), **at)
    ax.set_xlim(-0.03, 1.12)
    ax.set_xlabel("share of the gradient mass within the window")
    return ax


def _plain(relative: float) -> str:
    """Write two digits; a number below float32's rounding is 0."""
    return f"{relative:.2g}" if relative > 1e-9 else "0"


def draw_bias_variance(rows: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """Draw final losses of strategies that differ in variance alone, and of pairs that differ in bias alone."""
    rows = last(rows)
    part = rows[rows["data"] == "all"]
    tasks = list(some(part[part["strategy"] != "fixed"], "run but of fixed")["task"].unique())
    scores = _over_seeds(part, "validation_loss")
    end = errors[(errors["data"] == "all") & (errors["update"] == errors["update"].max())]
    names = ["task", "name"]
    scores = scores.merge(end[[*names, "bias2_median", "variance_median"]], on=names)
    shown = []
    for task in tasks:
        own = scores[scores["task"] == task]
        of_task = errors[(errors["task"] == task) & (errors["data"] == "all")]
        chosen = ["full", f"discounted {SHORT}", matched(of_task)]
        chosen += [f"randomized_uncompensated {SHORT}"]
        left = own[(own["strategy"] == "randomized") & (own["length"] == SHORT)]
        right = own.set_index("name").reindex(chosen).dropna(subset=["median"]).reset_index()
        shown.append((task, left.sort_values("draws"), right, own[own["name"] == "full"]))
    named_looks = _looks(
        [n for _, left, right, _ in shown for n in (*left["strategy"], *right["strategy"])]
    )
    figure, axes = figure_layout.figure(
        len(tasks),
        2,
        (13, 2.2 + 4.2 * len(tasks)),
        "Reason 2: variance alone, and bias alone",
        f"Marker and bar: median and 95 % bootstrap interval of the final loss. Left: randomized truncation of "
        f"mean length {SHORT}, averaged over n draws: the expectation of full BPTT, the variance of one draw "
        "divided by n; line and band: full, without variance. Right: bias without and with, in two pairs: "
        "of no variance, and of the nearest variance that compensated draws come to; bias² and variance "
        f"relative to ‖g‖², measured after training; L × n: mean length and draws. "
        f"{plots.seeds(pd.concat([r for _, _, r, _ in shown]))}. "
        f"{plots.runs(part)}",
        plots.handles(named_looks, markers=True),
    )
    for (task, left, right, full), (a, b) in zip(shown, axes, strict=True):
        for ax in (a, b):
            ax.set_ylim(plots.limits(pd.concat([left, right, full])))
        draw_points(left, [f"{n:g}" for n in left["draws"]], a, named_looks)
        for _, row in full.iterrows():
            a.axhspan(row["low"], row["high"], color="#222222", alpha=0.12, linewidth=0)
            a.axhline(row["median"], color="#222222", linewidth=2)
        a.set(xlabel="draws averaged, n", ylabel=plots.loss_label(task))
        a.set_title(f"{plots.TASKS.get(task, task)}: equal expectation")
        draw_points(right, [_with_error(row) for _, row in right.iterrows()], b, named_looks)
        b.set(xlabel="strategy, with its bias² and variance", ylabel="")
        b.set_title(f"{plots.TASKS.get(task, task)}: no variance, and the nearest")
    return figure


def _with_error(row: pd.Series) -> str:
    """Name a strategy, and its bias² and variance below."""
    bias2, variance = (_plain(row[f"{name}_median"]) for name in ("bias2", "variance"))
    return f"{_short(row)}\nbias² {bias2}\nvariance {variance}"


def _short(row: pd.Series) -> str:
    """Name a strategy, or its mean length and number of draws if draws are averaged."""
    if row["draws"] > 1:
        return f"{row['length']:g} × {row['draws']:g}"
    return str(row["strategy"]).removeprefix("randomized_")


def draw_points(table: pd.DataFrame, ticks: list[str], ax: Axes, looks: Any) -> Axes:
    """Draw median and interval of each row at its tick; a diverged median lies at the upper end."""
    top = ax.get_ylim()[1]
    for x, (_, row) in enumerate(table.iterrows()):
        y = min(row["median"], top), row["low"], min(row["high"], 2 * top)
        plots.point(x, y, looks[row["strategy"]], ax)
    ax.set_xticks(range(len(table)), ticks)
    ax.set_xlim(-0.5, max(len(table), 1) - 0.5)
    return ax


def draw_gap(rows: pd.DataFrame, gaps: pd.DataFrame) -> Figure:
    """Draw the loss on the training and the validation part after training."""
    rows = last(rows)
    order = {"full": 0, "fixed": 1, "randomized": 2}
    part = rows[(rows["draws"] == 1) & rows["strategy"].isin(order)].merge(gaps, on=SEEDS)
    some(part, "run of full, fixed or randomized")
    panels = [
        own.sort_values(
            ["strategy", "length"],
            key=lambda c: c.map(order) if c.name == "strategy" else -c,
            kind="stable",
        )
        for _, own in part.groupby(["task", "data"], sort=False)
    ]
    named_looks = _looks(part["strategy"])
    scores = [
        {c: _over_seeds(own, c) for c in ("training_part", "validation_part", "gap")}
        for own in panels
    ]
    figure, axes = figure_layout.figure(
        1,
        len(panels),
        (1.5 + 3.9 * len(panels), 6.6),
        "Reason 3: does a short range regularise?",
        "Loss after training, of the training part (hollow) and of as much of the validation part (filled), "
        "both evaluated alike; their distance is the gap. Median and 95 % bootstrap interval; learning rates "
        f"tuned for each strategy. {plots.seeds(pd.concat([s['gap'] for s in scores]))}. {plots.runs(part)}",
        plots.handles(named_looks, markers=True),
    )
    for own, score, ax in zip(panels, scores, axes[0], strict=True):
        row = own.iloc[0]
        both = [score["training_part"], score["validation_part"]]
        ax.set_ylim(plots.limits(pd.concat(both)))
        places = np.arange(len(score["gap"]))
        for table, shift, fill in zip(both, (-0.12, 0.12), ("white", None), strict=True):
            for x, (_, line) in zip(places, table.iterrows(), strict=True):
                look = named_looks[line["strategy"]]
                plots.point(
                    x + shift, line[["median", "low", "high"]], look, ax, mfc=fill or look.color
                )
        ax.set_xticks(places, ["–" if np.isnan(n) else f"{n:g}" for n in score["gap"]["length"]])
        ax.set_xlim(-0.5, len(places) - 0.5)
        held = f"{1 - row['validation_fraction']:.0%}"
        ax.set_title(f"{plots.TASKS.get(row['task'], row['task'])}, trained on {held}")
        ax.set(
            xlabel=plots.LABELS["length"],
            ylabel=plots.loss_label(row["task"]).replace("validation ", ""),
        )
    return figure


STUDY = Study(
    question=__doc__,
    tables={"shares": shares, "errors": errors, "gaps": gaps, "comparisons": comparisons},
    figures={
        "reason_1_window": draw_window,
        "reason_2_variance": draw_bias_variance,
        "reason_3_gap": draw_gap,
    },
    more_runs=more_runs,
    check=tables.same_data,
)
