"""The textbook's verdict on randomized truncation, and its three reasons with one figure each.

(1) A few steps back capture the dependence. (2) The variance outweighs the better expectation. (3) A short
range regularises.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

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
SHOWN = ("task", "strategy", "truncation_length", "validation_fraction", "draws")
# behind differences that are smaller than LEAST
SMALL: dict[str, Any] = {"color": "0.9", "linewidth": 0, "zorder": 0}


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
    names = rows["strategy"] + lengths.map(lambda n: "" if np.isnan(n) else f" {tables.text(n)}")
    names += draws.map(lambda n: f" × {tables.text(n)}" if n > 1 else "")
    held_out = rows.reindex(columns=["validation_fraction"])["validation_fraction"]
    little = held_out == rows["task"].map(LITTLE)
    data = np.where(little, "little", "all")
    return rows.assign(length=lengths, name=names, data=data, draws=draws.fillna(1))


def of_runs(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add the names of the runs in the comparisons to a probe's table."""
    names = ["run", "task", "data", "name", "strategy", "length", "draws"]
    keys = last(rows)[names].drop_duplicates()
    return table.drop(columns=[c for c in keys if c in table and c != "run"]).merge(keys, on="run")


def of_end(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of each task after its last update."""
    trained = table["update"] == table["task"].map(rows.groupby("task")["update"].max())
    return some(table[trained], "snapshot after training")


def shares(lag_mass: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the share of the gradient mass Σ_k ‖G_k‖ that each strategy keeps, per seed and update.

    `share` is measured in the network that full BPTT trained with the same seed and updates, and `own` in the
    strategy's own network.
    """
    table = of_runs(tables.unless_stopped(lag_mass, "mass"), rows)
    at = ["task", "data", "seed", "update", "lag"]
    full = table[table["name"] == "full"].set_index(at)["mass"].rename("mass_of_full")
    table = table.join(full, on=at)
    kept = table["kept"].fillna(0)  # a lag without losses has no gradient
    table = table.assign(share=kept * table["mass_of_full"], own=kept * table["mass"])
    groups = table.groupby([*SEEDS[:-1], "length", "update", "seed"], dropna=False, sort=False)
    sums = groups[["share", "own", "mass_of_full", "mass"]].sum(skipna=False).reset_index()
    sums["share"] /= sums.pop("mass_of_full")
    sums["own"] /= sums.pop("mass")
    return sums


def errors(gradient_error: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Compute bias² and variance of each strategy ÷ ‖g‖², at its own networks, as medians over the seeds."""
    table = of_runs(gradient_error, rows)
    by = [*SEEDS[:-1], "strategy", "draws", "update"]
    both = ["bias2", "variance"]
    table[both] = table[both].div(table["norm2"], axis=0)
    found = tables.aggregate_all(table, by, both)
    return found.rename(columns={name: f"{name}_median" for name in both})


def gaps(generalisation: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the loss on the training and the validation part after training, and their gap, per seed."""
    probed = tables.at_end(tables.unless_stopped(generalisation, "loss"), rows)
    table = of_runs(some(probed, "snapshot after training"), rows)
    wide = table.pivot(index=SEEDS, columns="part", values="loss").add_suffix("_part")
    wide["gap"] = wide["validation_part"] - wide["training_part"]
    return wide.rename_axis(columns=None).reset_index()


def matched(errors: pd.DataFrame) -> str:
    """Find the compensated strategy whose variance in training is nearest to that of uncompensated cuts.

    These cuts have the length SHORT. The expectation of the strategy is full BPTT's gradient for any mean
    length and number of draws. The nearest variance need not be near: errors.csv has both.
    """
    late = errors[(errors["update"] > 0) & (errors["variance_median"] > 0)]
    log = np.log(late.set_index("name")["variance_median"]).groupby(level=0).mean()
    asked = log.get(f"randomized_uncompensated {SHORT}", np.nan)
    names = log.index.str.startswith("randomized ")
    away = (log[names] - asked).abs().replace(np.inf, np.nan).dropna()  # inf: every seed diverged
    return f"randomized {SHORT}" if away.empty else str(away.idxmin())


def comparisons(
    rows: pd.DataFrame, errors: pd.DataFrame, gaps: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Make all comparisons of all tasks as one family; those without common seeds or gaps are left out."""
    found = []
    scores = tables.unless_stopped(last(rows), "validation_loss")[[*SEEDS, "validation_loss"]]
    scores = scores if gaps is None else scores.merge(gaps, on=SEEDS, how="left")
    for task, of_task in scores.groupby("task", sort=False):
        own = errors[(errors["task"] == task) & (errors["data"] == "all")]
        for q in (q for q in questions(matched(own)) if q.score in scores):
            part = of_task[of_task["data"] == q.data].set_index("seed")
            pair = [part.loc[part["name"] == name, q.score] for name in (q.first, q.second)]
            first, second = pair[0].align(pair[1], "inner")
            if len(first):
                row = {"question": q.question, "task": task, "data": q.data, "score": q.score}
                row |= {"first": q.first, "second": q.second}
                found.append(
                    row | paired_tests.compare(first, second) | {"least": LEAST.get(task, 0.02)}
                )
    table = some(pd.DataFrame(found), "pair of runs to compare")
    table = paired_tests.family(table.assign(larger_is_better=False))
    return table.drop(columns="larger_is_better")


def draw_reach(rows: pd.DataFrame, lag_mass: pd.DataFrame) -> Figure:
    """Draw the share of the gradient at lags below n, over n, along the training of full BPTT."""
    rows = last(rows)
    full = rows[(rows["data"] == "all") & (rows["strategy"] == "full")]
    mass = of_runs(lag_mass, some(full, "run of full BPTT"))
    mass = mass.sort_values(["task", "seed", "update", "lag"])
    sums = mass.groupby(["run", "seed", "update"])["mass"]
    mass = mass.assign(share=sums.cumsum() / sums.transform("sum"), steps=mass["lag"] + 1)
    over = tables.aggregate(mass, ["task", "update", "steps"], "share", np.nan)
    tasks, colors = full["task"].nunique(), plots.shades(over["update"])
    figure, axes = figure_layout.figure(
        1, tasks, (1 + 5.5 * tasks, 6),
        "Reason 1: how many steps back does the gradient reach?",
        "Share of the gradient at lags below n, of the sum of its norms over all lags, Σ‖G_k‖, in networks "
        f"that full BPTT trains. {plots.spread(over)} {plots.runs(full)}",
        plots.shade_handles(colors, "after {} updates"),
        sharey=True,
    )  # fmt: skip
    for _, own, ax in plots.panels(over, "task", axes[0]):
        for update, line in own.groupby("update"):
            plots.band(line, "steps", colors[update], ax)
        ax.set_xscale("log", base=2)
        ticks = [n for n in (1, 4, 16, 64, 256) if n <= over["steps"].max()]
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.set(xlabel="steps back, n", ylim=(0, 1.03))
    axes[0, 0].set_ylabel("share of the gradient\nat lags below n")
    return figure


def _pairs(comparisons: pd.DataFrame, *questions: str) -> pd.DataFrame:
    """Select the comparisons that answer these questions; a line has the look of the first strategy."""
    asked = comparisons[comparisons["question"].isin(questions)]
    table = some(asked, f"pair for {questions[0]}").rename(columns={"difference": "median"})
    lost = table["diverged_first"] + table["diverged_second"]
    return table.assign(diverged=lost, strategy=table["first"].str.partition(" ")[0])


def _handles(named: dict[str, plots.Look], alike: str) -> list[Artist]:
    """Make the legend of differences, with the line of no difference under the name `alike`."""
    small = Patch(label="differences of no interest", **SMALL)
    return [*plots.handles(named, markers=True), plots.full_handle(alike), small]


def draw_window(rows: pd.DataFrame, comparisons: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """Draw what each window costs, over the share of the gradient that it keeps."""
    end = of_end(shares[shares["data"] == "all"], rows)
    by = ["task", "name", "length"]
    kept = tables.aggregate_all(end, by, ["share"], {"share": np.nan})
    kept = kept.drop(columns=["n", "diverged"]).rename(columns={"name": "first"})
    table = _pairs(comparisons, "window").merge(kept, on=["task", "first"])
    tasks, named = table["task"].nunique(), plots.looks(table["strategy"])
    figure, axes = figure_layout.figure(
        1, tasks, (1.5 + 5.5 * tasks, 6.4),
        "Reason 1: does the share of the gradient within a window tell what the window costs?",
        "Δ: final loss less that of full BPTT with the same seed. Number: window, in time steps. Share: of the "
        "sum of the gradient's norms over all lags, Σ‖G_k‖, in the networks that full BPTT has trained. "
        f"{plots.spread(table, 'Marker', 'bars')} {_trained(rows)}",
        _handles(named, "Full"),
    )  # fmt: skip
    for task, own, ax in plots.panels(table, "task", axes[0]):
        least = own["least"].iloc[0]
        ax.set(xlim=(0, 1.02), ylim=plots.limits(own, (-least, least)))
        ax.axhspan(-least, least, **SMALL)
        ax.axhline(0, **plots.FULL)
        for _, row in own.iterrows():
            share, cost = row[tables.interval_of("share")], row[tables.SPREAD]
            plots.cross(share, cost, named[row["strategy"]], ax)
            at = {"xytext": (7, 5), "textcoords": "offset points", "va": "bottom"}
            ax.annotate(tables.text(row["length"]), (row["share"], row["median"]), **at)
        ax.set_xlabel("share of the gradient within the window")
        ax.set_ylabel(f"Δ {plots.loss_label(rows[rows['task'] == task])}")
    return figure


def draw_costs(rows: pd.DataFrame, comparisons: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """Draw what variance alone costs, and below it what bias alone costs, a row for each pair."""
    measures = {"variance alone": "variance", "bias alone": "bias2"}
    end = of_end(errors[errors["data"] == "all"], rows)
    end = end[["task", "name", "variance_median", "bias2_median"]]
    names = {"left_on": ["task", "first"], "right_on": ["task", "name"]}
    table = _pairs(comparisons, *measures).merge(end, **names)
    tasks, named = table["task"].nunique(), plots.looks(table["strategy"])
    rows_of = [table[table["question"] == q].groupby("task").size().max() for q in measures]
    figure, axes = figure_layout.figure(
        len(measures), tasks, (1 + 6 * tasks, 4 + 0.62 * sum(rows_of)),
        "Reason 2: does variance cost more than bias?",
        "Δ: final loss of the first strategy of a pair less that of the second with the same seed. Variance "
        "alone: both have the same expectation. Bias alone: neither has variance, or theirs are as near as "
        "draws come. L × n: n draws of mean length L are averaged. Bias² and variance: of the first "
        "strategy ÷ ‖g‖², after training; in closed form, and of uncompensated cuts from draws. "
        f"{plots.spread(table, 'Marker', 'bar')} {_trained(rows)}",
        _handles(named, "no difference"),
        sharex="col",
        height_ratios=rows_of,
    )  # fmt: skip
    for (question, measure), across in zip(measures.items(), axes, strict=True):
        for task, own, ax in plots.panels(table[table["question"] == question], "task", across):
            draw_pairs(own.reset_index(drop=True), named, measure, ax)
            ax.set_title(f"{ax.get_title()}: {question}")
            if ax in axes[-1]:
                ax.set_xlabel(f"Δ {plots.loss_label(rows[rows['task'] == task])}")
    return figure


def draw_pairs(own: pd.DataFrame, named: dict[str, plots.Look], measure: str, ax: Axes) -> Axes:
    """Draw the difference of each pair as a row, named with the first strategy's bias² or variance."""
    for y, row in own.iterrows():
        ax.axvspan(-row["least"], row["least"], **SMALL)
        plots.cross(row[tables.SPREAD], (y, y, y), named[row["strategy"]], ax)
    ax.axvline(0, **plots.FULL)
    first = own["first"].str.removeprefix("randomized_") + f", {measure.replace('2', '²')} "
    sizes = own[f"{measure}_median"].map(lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.2g}")
    ax.locator_params(axis="x", nbins=4)
    ax.set_yticks(range(len(own)), first + sizes + "\n− " + own["second"])
    ax.set_ylim(len(own) - 0.5, -0.5)
    return ax


def draw_gap(rows: pd.DataFrame, gaps: pd.DataFrame, tuning: pd.DataFrame | None = None) -> Figure:
    """Draw how a short range changes the validation loss, over how it changes the training loss."""
    parts = ["training_part", "validation_part"]
    part = last(rows).merge(gaps, on=SEEDS)
    chosen = part["strategy"].isin(["full", "fixed", "randomized"]) & (part["draws"] == 1)
    part = part[chosen & (part["length"].isna() | (part["length"] == SHORT))]
    all_tuned = tuning is not None and {*part["run"]} <= {*tuning["candidate_for"]}
    tuned = "Learning rates are tuned for each strategy. " * all_tuned
    less = some(tables.less_full(part, ["task", "data", "seed"], parts), "run beside full BPTT")
    keys = [c for c in (*tables.PANEL, "data", *tables.LINE) if c in less]
    table = tables.aggregate_all(less, keys, parts)
    tasks, named = list(less["task"].unique()), plots.looks(less["strategy"])
    few = ", ".join(f"{1 - LITTLE[t]:.0%} of the {plots.TASKS[t]}" for t in tasks if t in LITTLE)
    kind: dict[str, Any] = {"color": "0.2", "marker": "o", "linestyle": "", "markersize": 8}
    better: dict[str, Any] = {"color": "#d5ebe1", "linewidth": 0, "zorder": 0}
    figure, axes = figure_layout.figure(
        1, len(tasks), (1 + 5.8 * len(tasks), 7.6),
        "Reason 3: does a short range regularise?",
        f"Δ: loss after training less that of full BPTT with the same seed, at truncation length {SHORT}. A "
        "regulariser gives a higher training loss and a lower validation loss. Below the diagonal the gap "
        f"between the two is smaller than with full BPTT. Both losses are taken over as many steps: those of "
        f"the shorter part. Little data: {few}. {tuned}"
        f"{plots.spread(table, 'Marker', 'bars')} {_trained(part)}",
        [
            *plots.handles(named, markers=True),
            plots.full_handle(),
            Line2D([], [], label="all data", **kind),
            Line2D([], [], label="little data", mfc="white", **kind),
            Line2D([], [], label="same gap as full", **plots.REFERENCE),
            Patch(label="where a regulariser would be", **better),
        ],
    )  # fmt: skip
    across, up = map(tables.interval_of, parts)
    for task, own, ax in plots.panels(table, "task", axes[0]):
        ends = plots.limits(own, (0,), names=[*across, *up])
        ax.set(xlim=ends, ylim=ends, box_aspect=1)
        ax.fill_between([0, ends[1]], ends[0], 0, **better)
        ax.axline((0, 0), slope=1, **plots.REFERENCE)
        ax.axhline(0, **plots.FULL)
        ax.axvline(0, **plots.FULL)
        for _, row in own.iterrows():
            look = named[row["strategy"]]
            fill = "white" if row["data"] == "little" else look.color
            plots.cross(row[across], row[up], look, ax, mfc=fill)
        label = f"Δ {plots.loss_label(rows[rows['task'] == task])}"
        ax.set(xlabel=label.replace("validation", "training"), ylabel=label)
    return figure


def _trained(rows: pd.DataFrame) -> str:
    """Put the runs on all data into words."""
    found = last(rows)
    return plots.runs(rows, found[found["data"] == "all"])


STUDY = Study(
    question=__doc__,
    tables={"shares": shares, "errors": errors, "gaps": gaps, "comparisons": comparisons},
    figures={
        "reason_1_reach": draw_reach,
        "reason_1_window": draw_window,
        "reason_2_variance": draw_costs,
        "reason_3_gap": draw_gap,
    },
    more_runs=more_runs,
    check=partial(tables.told_by, names=SHOWN),
)
