"""Which estimators predict a chaotic series with an update at every step, and does it ask for credit at all?

The protocol is that of a published table, whose numbers stand beside ours. It lacks the line below which no
credit through time is needed, `frozen`. Where that line is as good as all others, the task cannot tell
estimators of credit apart, so another task is beside it: to recall a past input.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study
from bptt_study.validation import SettingError

# Yi & Wang 2026, sketched RTRL, Table 6 (results/TIMESERIES_TABLES.md of sonaradarcn/sketched-rtrl): NMSE, mean
# and standard deviation over so many seeds, by the name that the strategy has here
SYSTEMS = ("henon", "lorenz", "mackey_glass")
PUBLISHED = {
    "rtrl": ((0.0052, 0.0010), (0.0051, 0.0040), (0.0180, 0.0218), 10),
    "snap": ((0.0052, 0.0012), (0.0024, 0.0008), (0.0050, 0.0010), 10),
    "kf_rtrl": ((0.0384, 0.0709), (0.0126, 0.0079), (0.0286, 0.0181), 10),
    "rflo": ((0.0704, 0.0163), (0.0442, 0.0124), (0.0572, 0.0331), 10),
    "uoro": ((0.6583, 0.2966), (0.0425, 0.0431), (0.0497, 0.0238), 10),
    "full": ((0.0311, 0.0030), (0.0054, 0.0007), (0.0080, 0.0010), 5),
}
ORDER = ("frozen", "rflo", "uoro", "kf_rtrl", "snap", "rtrl", "full")
# the settings of a published number
COMPARED = ["strategy", "system", "horizon", "cell", "hidden", "time_steps"]
RECORDS = 5  # log points whose mean is the error, as in the published table
EXACT = ("henon", "mackey_glass")  # the systems of exact RTRL, which takes a minute a seed
CHUNK, PROFILED = 25, 50  # time steps per update of the runs that are not online

# The one-step gradient sends little to this delay before training, and recall as much as to lag 1: profiles.png
RECALL = [
    "task.system=henon",
    "task.horizon=-6",
    "hidden=16",
    "spectral_radius=null",
    "cell.input_scale=null",
    "budget.reset_every=null",
]
TRACE = ["strategy=rflo", "strategy.leak=0.1"]  # the published rule: a trace that the cell lacks
TITLES = {
    ("henon", 1): "Hénon,\none step ahead",
    ("lorenz", 1): "Lorenz,\none step ahead",
    ("mackey_glass", 1): "Mackey-Glass,\none step ahead",
    ("henon", -6): "Hénon,\n6 steps ago",
}


def more_runs(config: Any) -> list[list[str]]:
    """List the overrides of chunks, lag profiles, random estimators, exact ones, and recall with all."""
    steps = config.budget.updates
    chunks = ["strategy=full", f"budget.steps={CHUNK}", f"budget.updates={steps // CHUNK}"]
    profile = ["strategy=full", "snapshots=2", "seeds=3", f"budget.steps={PROFILED}"]
    profile += [f"budget.updates={2 * steps // 15}", "budget.logs=2"]
    noisy = [["strategy=kf_rtrl"], ["strategy=uoro"], TRACE]
    online = [["strategy=frozen"], ["strategy=snap"], ["strategy=rtrl"], *noisy]
    recall = [[*RECALL, *line] for line in (*online, profile)]
    published = [[f"task.system={name}", *line] for name in SYSTEMS for line in noisy]
    exact = [[f"task.system={name}", "strategy=rtrl"] for name in EXACT]
    return [chunks, profile, *published, *exact, *recall]


def by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the normalised squared error of each seed at the end of training.

    It is twice the mean training loss of the last five log points, `last_steps` time steps.
    """
    rows = rows[rows["steps"] != PROFILED].sort_values("update", kind="stable")
    seeds = rows.groupby(["run", "seed"], sort=False)
    loss = seeds["train_loss"].transform(lambda losses: losses.tail(RECORDS).mean())
    logs = rows[["logs", "updates"]].min(axis=1)
    span = logs.clip(upper=RECORDS) * rows["steps"] * rows["updates"] // logs
    return tables.final(rows.assign(nmse=2 * loss, last_steps=span), "nmse")


def nmse(rows: pd.DataFrame) -> pd.DataFrame:
    """Put the error of each task and estimator beside the published numbers.

    nmse is its median over n seeds with the interval; mean and sd are as the published ones. agrees says
    whether the means differ by less than twice the standard error of their difference, for the published
    network and its number of steps. A run with a diverged seed has neither mean nor sd, and does not agree.
    """
    seeds = by_seed(rows)
    keys = ["strategy", "system", "horizon", "hidden", "steps", "updates", "last_steps"]
    found = tables.aggregate(seeds, ["run", *keys, "cell"], "nmse")
    moments = {"mean": lambda v: v.mean(skipna=False), "sd": lambda v: v.std(ddof=0, skipna=False)}
    spread = seeds.groupby("run")["nmse"].agg(**moments).reset_index()
    table = found.rename(columns={"median": "nmse"}).merge(spread, on="run")
    table = table.assign(time_steps=table["steps"] * table["updates"])
    table = table.merge(published(), "left", COMPARED).drop(columns=["time_steps", "cell"])
    errors = table["sd"] ** 2 / table["n"], table["published_sd"] ** 2 / table["published_n"]
    close = (table["mean"] - table["published_mean"]).abs() < 2 * np.sqrt(sum(errors))
    table["agrees"] = np.where(table["published_mean"].isna(), "", np.where(close, "yes", "no"))
    names = ordered(table["strategy"])
    place = [
        (-h, s, names.index(n)) for h, s, n in table[["horizon", "system", "strategy"]].to_numpy()
    ]
    return table.assign(place=place).sort_values("place").drop(columns="place")


def ordered(strategies: Iterable[str]) -> list[str]:
    """Put the names of estimators in the order of ORDER, and others after these."""
    found = set(strategies)
    return [*(n for n in ORDER if n in found), *sorted(found - set(ORDER))]


def published() -> pd.DataFrame:
    """Make the published table, of 64 Elman units after 15,000 steps: a row per estimator and system."""
    rows = [
        (name, system, 1, "elman", 64, 15_000, *numbers, n)
        for name, (*systems, n) in PUBLISHED.items()
        for system, numbers in zip(SYSTEMS, systems, strict=True)
    ]
    numbers = ["published_mean", "published_sd", "published_n"]
    return pd.DataFrame(rows, columns=[*COMPARED, *numbers])


def profiles(lag_mass: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Compute the share of all gradient that lies at each lag, ‖G_k‖ ÷ Σ ‖G_j‖, before and after training."""
    settings = rows.drop_duplicates("run")[["run", "system", "horizon"]]
    names = ["task", "cell", "strategy"]
    table = lag_mass.drop(columns=names, errors="ignore").merge(settings, on="run")
    total = table.groupby(["run", "seed", "update"])["mass"].transform("sum")
    table["share"] = table["mass"] / total
    keys = ["run", "system", "horizon", "update", "lag"]
    return tables.aggregate(table, keys, "share", np.nan).rename(columns={"median": "share"})


THEIRS: dict[str, Any] = {"color": "0.55", "marker": "D", "linestyle": "", "markersize": 7}
OURS: dict[str, Any] = {"color": "0.2", "marker": "o", "markersize": 8}


def panels(table: pd.DataFrame, axes: Any) -> Iterator[tuple[pd.DataFrame, Axes]]:
    """Yield the rows of each task with its axes, and give these their title."""
    for ((system, horizon), title), ax in zip(TITLES.items(), axes[0], strict=True):
        ax.set_title(title)
        yield table[(table["system"] == system) & (table["horizon"] == horizon)], ax


def draw_errors(nmse: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Draw a panel per task, an estimator per place: ours, and the published number beside it."""
    table, seeds = nmse, by_seed(rows)
    names = ordered([*table["strategy"], *PUBLISHED])
    named = plots.looks(names)
    named["full"] = named["full"]._replace(name="BPTT, chunks")
    online = table[table["steps"] == 1]
    ahead = online[online["horizon"] > 0]
    figure, axes = figure_layout.figure(
        1, len(TITLES), (15, 6.4),
        "Which estimators predict a chaotic series, and which recall it, with an update at every step?",
        f"Normalised squared error while learning, an update at every time step (BPTT: at every {CHUNK}), "
        f"{plots.values(online, 'updates')} time steps, mean of the last {plots.values(online, 'last_steps')}; "
        "1: the mean as the answer. "
        f"Dots: seeds. {plots.spread(table, 'Marker', 'bar')} "
        "Diamonds: mean and standard deviation published by Yi & Wang 2026, Table 6, "
        f"which has no frozen past. {plots.values(rows, 'cell').capitalize()} networks of "
        f"{plots.values(ahead, 'hidden')} units, for recall "
        f"{plots.values(table[table['horizon'] < 0], 'hidden')}; {plots.values(rows, 'batch_size')} streams.",
        [
            Line2D([], [], label="ours: median and interval", **OURS),
            Line2D([], [], label="published: mean ± sd", **THEIRS),
        ],
        sharey=True,
    )  # fmt: skip
    for (own, ax), (theirs, _) in zip(panels(table, axes), panels(published(), axes), strict=True):
        draw_panel(own, seeds, names, named, ax)
        draw_published(theirs, names, ax)
    axes[0, 0].set_ylabel("normalised squared error")
    return figure


def draw_panel(
    own: pd.DataFrame, seeds: pd.DataFrame, names: list[str], named: dict[str, plots.Look], ax: Axes
) -> Axes:
    """Draw the seeds, median and interval of each estimator."""
    ax.set_yscale("log")
    for _, row in own.iterrows():
        x, look = names.index(row["strategy"]) - 0.15, named[row["strategy"]]._replace(marker="o")
        values = seeds.loc[seeds["run"] == row["run"], "nmse"]
        ax.plot([x] * len(values), values, ".", color=look.color, alpha=0.4, markersize=6)
        plots.point(x, row[["nmse", "low", "high"]], look, ax)
    ax.set_xticks(range(len(names)), [named[n].name for n in names], rotation=90)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xlabel("estimator")
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ax


def draw_published(theirs: pd.DataFrame, names: list[str], ax: Axes) -> None:
    """Draw mean and standard deviation; a bar that would reach below 0 ends at a tenth of the mean."""
    for _, row in theirs.iterrows():
        x, mean, sd = names.index(row["strategy"]) + 0.2, row["published_mean"], row["published_sd"]
        ax.vlines(x, max(mean - sd, mean / 10), mean + sd, "0.55", linewidth=1.5)
        ax.plot(x, mean, **THEIRS)


def draw_profiles(profiles: pd.DataFrame) -> Figure:
    """Draw where the gradient lies, before and after training, a panel per task."""
    look = plots.LOOKS["full"]
    figure, axes = figure_layout.figure(
        1, len(TITLES), (15, 4.8),
        "At which lags the gradient lies, to predict a chaotic series and to recall it",
        "Share of the gradient's norm at each lag, ‖G_k‖ ÷ Σ ‖G_j‖, on validation streams of "
        f"{profiles['lag'].max() + 1} steps, in networks trained by full BPTT. {plots.spread(profiles)}",
        [
            Line2D([], [], color=look.color, linewidth=2.5, label="after training"),
            Line2D([], [], color="0.6", linestyle="--", linewidth=2, label="before training"),
        ],
        sharex=True,
        sharey=True,
    )  # fmt: skip
    for own, ax in panels(profiles, axes):
        for update, line in own.groupby("update"):
            color, style = ("0.6", "--") if update == 0 else (look.color, "-")
            share = line.rename(columns={"share": "median"})
            plots.band(share, "lag", color, ax, linestyle=style)
        ax.set(yscale="log", ylim=(1e-4, 1), xlim=(0, 25), xlabel=plots.LABELS["lag"])
        plots.decades(ax.yaxis)
    axes[0, 0].set_ylabel("share of the gradient")
    return figure


def check(rows: pd.DataFrame) -> None:
    """Check that the runs have a panel that tells them apart, and an update as often as the caption says."""
    task = ("system", "horizon")
    seldom = rows["steps"].isin([CHUNK, PROFILED])
    for _, row in rows[~seldom.where(rows["strategy"] == "full", rows["steps"] == 1)].iterrows():
        allowed = f"1 in this study; of full BPTT {CHUNK} or {PROFILED}"
        raise SettingError("budget.steps", f"{row['steps']} of {row['strategy']}", allowed)
    tables.told_by(rows, (*task, "strategy", "steps"), by=task)
    others = rows[~rows[["system", "horizon"]].apply(tuple, axis=1).isin(TITLES)]
    for _, row in others.iterrows():
        known = " or ".join(f"{system}, {horizon}" for system, horizon in TITLES)
        raise SettingError("system, horizon", f"{row['system']}, {row['horizon']:g}", known)


STUDY = Study(
    question=__doc__,
    tables={"nmse": nmse, "profiles": profiles},
    figures={"nmse": draw_errors, "profiles": draw_profiles},
    more_runs=more_runs,
    check=check,
)
