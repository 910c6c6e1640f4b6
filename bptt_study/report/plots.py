"""Functions that draw a table into axes, and the one palette with its display names. No files, no jax.

The functions of `tables` make the tables: one row per point, with median, low, high, n and diverged. The
argument `named` holds the looks of all strategies of a study, so that all its panels agree.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import offset_copy

from bptt_study.report import tables, untold
from bptt_study.report.figure_layout import FAR
from bptt_study.validation import counted


class Look(NamedTuple):
    """The display name and the style of a strategy, the same in every figure."""

    name: str
    color: Any
    dashes: Any = ""  # in seaborn's notation; an empty string is a solid line
    marker: str = "o"
    width: float = 2.0  # points

    @property
    def line(self) -> dict[str, Any]:
        """The style of its line, without markers."""
        style = (0, self.dashes) if self.dashes else "-"
        return {"color": self.color, "linestyle": style, "linewidth": self.width}


# a colour-blind palette: one family of colours for fixed truncation, one for randomized truncation
COLORS = sns.color_palette("colorblind")
LOOKS = {
    "full": Look("Full", "#222222", marker="", width=3.5),
    "fixed": Look("Fixed (chunks)", COLORS[0], marker="s"),
    "sliding": Look("Fixed (sliding window)", COLORS[9], (4, 1.5), marker="v"),
    "randomized": Look("Randomized (constant law)", COLORS[3], marker="o"),
    "randomized_power_law": Look("Randomized (power law)", COLORS[1], (4, 1.5), marker="^"),
    "randomized_uncompensated": Look("Randomized, uncompensated", COLORS[4], (1.5, 1), marker="X"),
    "randomized_power_law_uncompensated": Look(
        "Power law, uncompensated", COLORS[5], (1, 1.5), marker="P"
    ),
    "checkpointed": Look("Full, checkpointed", COLORS[7], (1, 1), marker="d"),
    "discounted": Look("Discounted", COLORS[2], (4, 1, 1, 1), marker="D"),
    "frozen": Look("Frozen past", "#6e4b1e", (2, 1), marker="X"),
    "rtrl": Look("RTRL", "#555555", (6, 2), marker="D", width=3),
    "snap": Look("SnAp-1", "#117788", marker="p"),
    "eprop": Look("e-prop", "#557711", (4, 1.5), marker="p"),
    "rflo": Look("RFLO", "#99aa22", marker="P"),
    "uoro": Look("UORO", "#882255", marker="v"),
    "kf_rtrl": Look("KF-RTRL", "#ee3377", marker="h"),
    "reverse_kf": Look("Reverse KF-RTRL", "#f08aa8", (4, 1.5), marker="H"),
    "ok": Look("OK", "#bb2233", marker="8"),
    "sketched": Look("Sketched RTRL", "#009988", (1.5, 1), marker="*"),
    "pp_prop": Look("pp-prop", "#33bbee", (1, 1.5), marker="<"),
    "forward_gradient": Look("Forward gradient", "#332288", marker="^"),
    "forward_errors": Look("Full, errors forward", "#bbbbbb", (1, 1), marker="d"),
    "pes": Look("PES", "#117733", marker="o"),
    "nres": Look("NRES (ES-Single)", "#66bb99", marker="s"),
    "truncated_es": Look("Truncated ES", "#888822", marker="X"),
    "full_es": Look("ES", "#bbaa33", (4, 1.5), marker="d"),
    "dni": Look("Synthetic gradients (DNI)", "#cc6677", marker="*"),
    "bp_lambda": Look("Synthetic gradients, BP(λ)", "#aa4499", (4, 1.5), marker="H"),
    "telescope": Look("Telescope", "#6699cc", marker="<"),
    "adaptive": Look("Adaptive truncation", "#224477", (4, 1.5), marker=">"),
}
TITLE = 50  # letters in a line of a panel's title
# for strategies of one's own: far from the colours above
FREE = [COLORS[6], COLORS[8], "#00e600", "#0000e6", "#e600e6", "#7e7ee6"]
FREE_DASHES = ((3, 1, 1, 1), (5, 1), (1, 2), (5, 1, 1, 1, 1, 1), (2, 1))

# what `runs` says of a run, by column
FACTS = {
    "corpus": "{}", "t1": "t1 = {}", "t2": "t2 = {}", "lag": "lag {}", "hidden": "{} units",
}  # fmt: skip
UNITS = {"char_lm": "character", "digits": "image", "copy": "symbol", "add": "time step"}
TASKS = {"char_lm": "text", "digits": "digits", "copy": "copying", "add": "adding"}
LABELS = {
    "tokens": "tokens seen in training",
    "seconds": "seconds of training, one seed",
    "time": "time step $t$",
    "lag": "lag $k$ (time steps)",
    "accuracy": "validation accuracy\n(share)",
    "length": "truncation length (time steps)",
    "position": "position in the text (characters)",
}
NORMS = {
    "time": "$\\|\\partial L / \\partial h_t\\|$\n(nats per token)",
    "lag": "$\\|\\partial l_T / \\partial h_{T-k}\\|$\n(nats)",
}
END: dict[str, Any] = {"linestyle": (0, (1, 1)), "linewidth": 2, "marker": "o", "markersize": 6}
LEADER: dict[str, Any] = {
    "arrowstyle": "-", "color": "0.6", "linewidth": 0.8,
    "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5), "patchA": None,
}  # fmt: skip
REFERENCE: dict[str, Any] = {
    "color": "0.45",
    "linewidth": 1.2,
    "linestyle": (0, (1, 2)),
    "zorder": 1,
}
# the paper behind numbers that stand on lines
PAPER: dict[str, Any] = {
    "boxstyle": "square,pad=0.1",
    "facecolor": "white",
    "alpha": 0.8,
    "linewidth": 0,
}
# the line of full BPTT where differences to it are drawn
FULL: dict[str, Any] = {"color": LOOKS["full"].color, "linewidth": 1.5, "zorder": 1}


def looks(strategies: Iterable[str]) -> dict[str, Look]:
    """Choose the look of each strategy: known strategies first; others get the next free colours by name.

    Where the free colours begin again, the next dashes tell the lines apart.
    """
    found = set(strategies)
    styles = ((color, dashes) for dashes in FREE_DASHES for color in FREE)
    own = zip(sorted(found - set(LOOKS)), cycle(styles), cycle("P*hdp"), strict=False)
    return {n: look for n, look in LOOKS.items() if n in found} | {
        name: Look(name, *style, marker) for name, style, marker in own
    }


def handles(named: Mapping[str, Look], markers: bool = False) -> list[Line2D]:
    """Make the legend's entries for these strategies: their lines, or their markers with a bar."""
    return [
        Line2D(
            [], [], color=look.color, label=look.name, linewidth=look.width,
            marker=look.marker if markers else "", markersize=8,
            linestyle=(0, look.dashes) if look.dashes and not markers else "-",
        )
        for look in named.values()
    ]  # fmt: skip


def shades(values: Iterable[float]) -> dict[float, Any]:
    """Choose a colour for each of these numbers, the darker the larger."""
    found = sorted(set(values))
    return dict(zip(found, sns.color_palette("viridis_r", len(found)), strict=True))


def tones(color: Any, n: int) -> list[Any]:
    """Choose n tones of a strategy's colour, the last of which is the colour itself."""
    return list(sns.light_palette(color, n + 1)[1:])


def shade_handles(colors: Mapping[float, Any], label: str) -> list[Line2D]:
    """Make the legend's entries for `shades`; `label` has a place for the number, such as `lag {}`."""
    return [
        Line2D([], [], color=color, linewidth=2.5, label=label.format(tables.text(value)))
        for value, color in colors.items()
    ]


def full_handle(name: str = LOOKS["full"].name) -> Line2D:
    """Make the legend's entry for the line FULL."""
    return Line2D([], [], label=name, **FULL)


def end_handle() -> Line2D:
    """Make the legend's entry for the end of a gradient."""
    return Line2D([], [], color="0.4", label="ends here: nothing beyond the window", **END)


def norm_label(axis: str, unit: str = "nats") -> str:
    """Make the label of a gradient norm over `axis`, the time step or the lag, with the unit of the loss."""
    label = NORMS[axis]
    return label.replace("nats", unit) if unit else label.partition("\n")[0]


def loss_label(rows: pd.DataFrame) -> str:
    """Make the label of the validation loss of one task, with the unit that its loss has, if any."""
    task, unit = rows["task"].iloc[0], tables.unit(rows)
    return (
        f"validation loss\n({unit} per {UNITS.get(task, 'token')})" if unit else "validation loss"
    )


def task_name(row: pd.Series) -> str:
    """Make the name of a task."""
    return str(TASKS.get(row["task"], row["task"]))


def cell_name(row: pd.Series) -> str:
    """Make the name of a cell, with its spectral radius if that is set."""
    radius = row.get("spectral_radius", np.nan)
    return (
        str(row["cell"])
        if pd.isna(radius)
        else f"{row['cell']}, spectral radius {tables.text(radius)}"
    )


def panels(
    table: pd.DataFrame,
    by: str | list[str],
    axes: Iterable[Axes],
    title: Callable[[Any], str] = lambda task: TASKS.get(task, task),
) -> Iterator[tuple[Any, pd.DataFrame, Axes]]:
    """Give each part of a table, in the order of its rows, the next of the axes, with a title.

    Args:
      table: The table.
      by: The columns that tell the parts apart, such as `task`.
      axes: The axes, as many as there are parts.
      title: The function from the value of these columns to a title; the default names a task.

    Yields:
      The value, the rows that have it, and the axes.
    """
    parts = table.groupby(by, sort=False, dropna=False)
    for (key, part), ax in zip(parts, axes, strict=True):
        yield key, part, titled(ax, title(key))


def titled(ax: Axes, name: str) -> Axes:
    """Give the axes a title, in lines of TITLE letters; a name may have a $."""
    ax.set_title(textwrap.fill(name, TITLE), parse_math=False)
    return ax


def network_name(row: pd.Series, also: Iterable[str] = ()) -> str:
    """Make the name of a network: its cell, and the values of the columns `also`."""
    return ", ".join([cell_name(row), *(setting_name(name, row[name]) for name in also)])


def panel_name(row: pd.Series, also: Iterable[str] = ()) -> str:
    """Make the title of a panel: task, cell, and the values of the columns `also`."""
    return ", ".join([task_name(row), network_name(row, also)])


def setting_name(name: str, value: Any) -> str:
    """Put a setting and its value into words, such as `learning rate 0.01`.

    A nested setting keeps its full name: `task.rate` is not `optimizer.rate`. A function that a part of the
    configuration names is that part: `lag mass` for `probes.lag_mass._target_`.
    """
    *_, part, last = "", *name.split(".")
    function = last == "_target_"
    words = (part if function else name).strip("_").replace("_", " ")
    if pd.isna(value):
        return f"no {words}"
    if function and str(value).startswith("bptt_study.") and str(value).endswith(f".{part}"):
        return words
    return f"{words} {tables.text(value)}"


def values(rows: pd.DataFrame, name: str) -> str:
    """Write the values of a setting in these runs, such as `0.01`, or `0.01 and 0.1` if runs differ."""
    found = (v for v in rows[name].unique() if not pd.isna(v))
    return " and ".join(map(tables.text, found))


def span(counts: Iterable[int], noun: str) -> str:
    """Write the range of the counts with their noun: `6 seeds`, or `3 to 9 turns`."""
    least, most = min(counts), max(counts)
    return f"{least} to " * (least < most) + counted(most, noun)


def seeds(table: pd.DataFrame, also: Iterable[str] = ()) -> str:
    """Write the number of seeds behind the medians, and how many diverged: of which lines, if that is known.

    Args:
      table: A row per point; `n` and `diverged` count seeds.
      also: Columns that a line's name has, beside task and cell.

    Returns:
      The text.
    """
    lost = [str(table["diverged"].max())] if table["diverged"].any() else []
    if {"run", "strategy", "length"} <= set(table):
        worst = table.sort_values("diverged").drop_duplicates("run", keep="last").sort_index()
        named = looks(table["strategy"])
        lost = [
            f"{row['diverged']} of {row['n']} {named[row['strategy']].name}"
            + ("" if pd.isna(row["length"]) else f" {tables.text(row['length'])}")
            + f" ({panel_name(row, also)})"
            for _, row in worst[worst["diverged"] > 0].iterrows()
        ]
    return f"n = {span(table['n'], 'seed')}; diverged: {', '.join(lost) or 'none'}"


def spread(table: pd.DataFrame, median: str = "Line", interval: str = "band") -> str:
    """Write what the marks of medians and their intervals mean, and the number of seeds behind them."""
    return f"{marks(table['n'], median, interval, seeds(table))}."


def marks(counts: Iterable[int], median: str, interval: str, seeds: str) -> str:
    """Write what the marks mean, and of how many seeds: one seed alone has no interval."""
    if max(counts) == 1:
        return f"{median}: {seeds}"
    return f"{median}: median; {interval}: its 95 % bootstrap interval over {seeds}"


def trained(rows: pd.DataFrame) -> str:
    """Name the strategies that train these runs, with their lengths, such as `full BPTT`."""
    runs = rows.assign(length=tables.lengths(rows)).drop_duplicates(["strategy", "length"])
    words = {name: look.name for name, look in looks(runs["strategy"]).items()}
    words |= {"full": "full BPTT"}
    pairs = zip(runs["strategy"], runs["length"].map(tables.text), strict=True)
    return " and ".join(f"{words[name]} {length}".rstrip() for name, length in pairs)


def runs(rows: pd.DataFrame, shown: pd.DataFrame | None = None) -> str:
    """Put the runs into words: data, network and budget of each panel; one name for panels that agree in all.

    Settings that differ within a panel and that nothing tells come at the end, see `untold.untold`.

    Args:
      rows: The rows of the runs.
      shown: A table of the runs that count. None: all of them.

    Returns:
      The words, with a full stop.
    """
    rows = rows if shown is None else rows[rows["run"].isin(shown["run"])]
    names: dict[str, list[pd.Series]] = {}
    also, differ = tables.apart(rows), dict[str, None]()
    for part in tables.panels(rows, also):
        row, last = part.iloc[0], part.groupby("run")["update"].max()
        told = {name: tables.text(row.get(name)) for name in FACTS}
        facts = [word.format(told[name]) for name, word in FACTS.items() if told[name]]
        steps, size = (values(part, name) for name in ("steps", "batch_size"))
        facts += [f"{span(last, 'update')} of {steps} time steps × {size} sequences"]
        names.setdefault(", ".join(facts), []).append(row)
        told_here = [*tables.varying(part), *FACTS, "updates", "steps", "batch_size"]
        differ |= dict.fromkeys(untold.untold(part, told_here))
    said = (
        f"{panel_name(alike[0], also) if len(alike) == 1 else task_name(alike[0])}: {facts}"
        for facts, alike in names.items()
    )
    return f"{'; '.join(said)}. {untold.sentence(list(differ))}".rstrip()


def limits(
    table: pd.DataFrame,
    also: Iterable[float] = (),
    log: bool = False,
    names: Sequence[str] = tables.SPREAD,
) -> tuple[float, float]:
    """Compute the limits of an axis that shows all finite numbers of these columns and `also`."""
    values = np.append(table[list(names)].to_numpy(float).ravel(), list(also))
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return (0.1, 1.0) if log else (0.0, 1.0)
    if log:
        return float(values.min() / 1.5), float(values.max() * 1.5)
    margin = 0.04 * (np.ptp(values) or abs(values[0]) or 1.0)
    return float(values.min() - margin), float(values.max() + margin)


def after_the_start(table: pd.DataFrame) -> pd.DataFrame:
    """Select the rows after the first tenth of each run, which is steep and would flatten the rest.

    Rows whose intervals have no finite end are left out.
    """
    finite = table[np.isfinite(table["low"]) | np.isfinite(table["high"])]
    return finite[finite["tokens"] >= finite.groupby("run")["tokens"].transform("max") / 10]


def curves(table: pd.DataFrame, ax: Axes, named: Mapping[str, Look], x: str) -> Axes:
    """Draw the median over `x`, one line per run, and its interval as a band; set the y limits before."""
    for name, look in named.items():  # the last strategy on top
        for _, line in table[table["strategy"] == name].groupby("run", sort=False):
            trace(line, x, ax, **look.line)
    for _, line in table.groupby("run", sort=False):
        shade(line, x, ax, named[line["strategy"].iloc[0]].color)
    return ax


def trace(line: pd.DataFrame, x: str, ax: Axes, y: str = "median", **style: Any) -> Axes:
    """Draw `y` over `x`. A number that the axis does not have is a gap; a point between gaps is a marker."""
    line = line.sort_values(x)
    for part in _stretches(line, _on_axis(line[y], ax) & np.isfinite(line[y])):
        marker = style.get("marker") or "o" * (len(part) == 1)
        ax.plot(part[x], part[y], **{**style, "marker": marker})
    return ax


def shade(
    line: pd.DataFrame, x: str, ax: Axes, color: Any, names: Sequence[str] = tables.SPREAD
) -> Axes:
    """Draw the intervals of medians over `x` as a band, and that of a point between gaps as a bar.

    An end that the axis does not have, such as an infinite one, lies far beyond it.
    """
    line = line.sort_values(x)
    shown = _on_axis(line[names[0]], ax) & line[list(names)].notna().all(axis=1)
    for part in _stretches(line, shown):
        lower, upper = (part[[x, end]].to_numpy(float) for end in names[1:])
        if len(part) == 1:
            _add(LineCollection, [*lower, *upper], ax, color=color, linewidth=2)
        else:
            corners = [*lower, *upper[::-1]]
            _add(PolyCollection, corners, ax, color=color, alpha=0.15, linewidth=0)
    return ax


def _add(kind: Any, points: Sequence[Any], ax: Axes, **style: Any) -> None:
    """Add a polygon or a line. Points beyond what the axes have move no limits; `save` moves them nearer."""
    scales = ax.get_xscale(), ax.get_yscale()
    far = [(1e-300, 1e300) if scale == "log" else (-1e100, 1e100) for scale in scales]
    drawn = np.clip(np.asarray(points, float), *np.transpose(far))
    ax.add_collection(kind([drawn], **style), autolim=False)
    ax.update_datalim(drawn[np.isfinite(points).all(axis=1) & (drawn == points).all(axis=1)])
    ax.autoscale_view()


def _on_axis(values: pd.Series, ax: Axes) -> pd.Series:
    """Return True where the axis has such a number: on a log scale only above 0."""
    return values.notna() & ((values > 0) | (ax.get_yscale() != "log"))


def _stretches(line: pd.DataFrame, shown: pd.Series) -> Iterator[pd.DataFrame]:
    """Yield the parts of a line between its gaps, the rows that are not shown."""
    for _, part in line[shown].groupby((~shown).cumsum()[shown]):
        yield part


def band(
    table: pd.DataFrame,
    x: str,
    color: Any,
    ax: Axes,
    y: str = "",
    **line: Any,
) -> Axes:
    """Draw a median over `x` and its interval as a band; `y` names it, as in `tables.named`."""
    names = tables.interval_of(y) if y else tables.SPREAD
    shade(table, x, ax, color, names)
    return trace(table, x, ax, names[0], color=color, **{"linewidth": 2.5, **line})


def lines(table: pd.DataFrame, x: str, y: str, named: Mapping[str, Look], ax: Axes) -> Axes:
    """Draw `y` over `x` with markers, a line and its band for each estimator; `y` as in `tables.named`."""
    for name, look in named.items():
        part = table[table["estimator"] == name]
        band(part, x, ax=ax, y=y, marker=look.marker, **look.line)
    return ax


def above(table: pd.DataFrame, x: str, y: str, named: Mapping[str, Look], ax: Axes) -> Axes:
    """Name the points above the axes, such as `↑ 10⁵`, each below that to its left; set the limits before."""
    top = ax.get_ylim()[1]
    for n, (_, row) in enumerate(table[table[y] > top].sort_values([x, y]).iterrows()):
        size = f"↑ $10^{{{np.log10(row[y]):.0f}}}$" if np.isfinite(row[y]) else "↑ ∞"
        color = named[row["estimator"]].color
        note(size, (row[x], top), (2, -14 - 16 * n), color, ax, ha="left")
    return ax


def note(
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    color: Any,
    ax: Axes,
    ha: str = "center",
) -> None:
    """Write a number beside a place, `offset` in points, so that it can be read on lines."""
    ax.annotate(
        text, at, offset, textcoords="offset points", ha=ha, color=color, fontsize="small", bbox=PAPER
    )  # fmt: skip


def powers_of_two(ax: Axes) -> Axes:
    """Make the x axis logarithmic, with a tick at each power of two: …, 1/2, 1, 2, …"""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=2, subs=(1,), numticks=20))
    ax.xaxis.set_major_formatter(lambda x, _: f"{Fraction(x)}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def decades(axis: Axis, step: int = 1) -> None:
    """Give a logarithmic axis a tick at each power of ten, or at each `step` of them, and no others."""
    axis.set_major_locator(LogLocator(base=10.0**step, numticks=20))
    axis.set_minor_locator(NullLocator())


def point(
    x: float, y: Sequence[float], look: Look, ax: Axes, size: float = 8, **marker: Any
) -> Axes:
    """Draw a median and its interval, `y`, as a marker with a bar; an infinite end lies beyond the axes."""
    median, low, high = y
    for at, one, other in np.broadcast(x, low, high):
        if not np.isnan([one, other]).any():
            _add(LineCollection, [(at, one), (at, other)], ax, color=look.color, linewidth=2)
    ax.plot(x, median, look.marker or "*", color=look.color, markersize=size, **marker)
    return ax


def cross(
    x: Sequence[float], y: Sequence[float], look: Look, ax: Axes, size: float = 8, **marker: Any
) -> Axes:
    """Draw two medians with their intervals, `x` and `y`, as a marker with two bars."""
    (across, left, right), (up, _, _) = x, y
    _add(LineCollection, [(left, up), (right, up)], ax, color=look.color, linewidth=2)
    return point(across, y, look, ax, size, **marker)


def listed(names: Sequence[str], ax: Axes) -> Axes:
    """Make a y axis of rows with these names, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    return ax


def beside(text: str, y: float, ax: Axes, color: Any = "0.3") -> Axes:
    """Write a text to the right of the axes, at the height of `y`."""
    ax.annotate(
        text, (1, y), (8, 0), va="center", color=color,
        xycoords=ax.get_yaxis_transform(), textcoords="offset points",
    )  # fmt: skip
    return ax


def drawable(values: pd.Series, ax: Axes) -> np.ndarray:
    """Move what the axis does not have far outside of it, so that edges towards it are vertical."""
    low, high = ax.get_ylim()
    far = (
        (1e-300, 1e300)
        if ax.get_yscale() == "log"
        else (low - FAR * (high - low), high + FAR * (high - low))
    )
    drawable: np.ndarray = np.clip(values.to_numpy(float), *far)
    return drawable


def learning_curves(
    table: pd.DataFrame, ax: Axes, named: Mapping[str, Look], x: str, label: str
) -> Axes:
    """Draw a score over tokens or seconds; `label` is the name of the score."""
    if x == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.2M
    return _labelled(curves(table, ax, named, x), LABELS[x], label)


def gradient_norms(
    table: pd.DataFrame, ax: Axes, named: Mapping[str, Look], axis: str, unit: str = "nats"
) -> Axes:
    """Draw gradient norms over `axis`, the time step or the lag, on a log scale; `unit` is that of the loss.

    A line that falls to exactly zero, beyond the window, ends with a drop to the axis (END).
    """
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(LogLocator(subs=(3,)))
    curves(table, ax, named, "step")
    for run, line in table[table["median"] > 0].groupby("run", sort=False):
        end = line.sort_values("step").iloc[-1]
        if (table.loc[table["run"] == run, "step"] > end["step"]).any():
            color = named[end["strategy"]].color
            down = [ax.get_ylim()[0], end["median"]]
            ax.plot([end["step"]] * 2, down, color=color, markevery=[1], **END)
    return _labelled(ax, LABELS[axis], norm_label(axis, unit))


def scores(table: pd.DataFrame, ax: Axes, named: Mapping[str, Look], label: str) -> Axes:
    """Draw a score and its interval over the truncation length, or as a line and band if it has no length."""
    across, points = table[table["length"].isna()], table[table["length"].notna()]
    places = {length: i for i, length in enumerate(sorted(points["length"].unique()))}
    for _, row in across.iterrows():
        low, high = drawable(row[["low", "high"]], ax)
        color = named[row["strategy"]].color
        ax.axhspan(low, high, color=color, alpha=0.12, linewidth=0)
        ax.axhline(row["median"], color=color, linewidth=2)
    strategies = [name for name in named if name in set(points["strategy"])]
    for i, name in enumerate(strategies):
        part = points[points["strategy"] == name].sort_values("length")
        x = part["length"].map(places) + 0.13 * (i - (len(strategies) - 1) / 2)
        low, median, high = (drawable(part[c], ax) for c in ("low", "median", "high"))
        look = named[name]
        ax.vlines(x, low, high, look.color, linewidth=2)
        ax.plot(x, part["median"], look.marker, color=look.color, markersize=8)
        for place, at, (_, row) in zip(x, median, part.iterrows(), strict=True):
            if row["diverged"]:
                ax.annotate(
                    f"{row['diverged']} of {row['n']} diverged", (place, np.clip(at, *ax.get_ylim())),
                    (4, -4), textcoords="offset points", rotation=90, va="top", color=look.color,
                )  # fmt: skip
    ax.set_xticks(list(places.values()), list(map(tables.text, places)))
    ax.set_xlim(-0.5, max(len(places), 1) - 0.5)
    return _labelled(ax, LABELS["length"], label)


def references(values: Mapping[str, float], ax: Axes, named: bool = True) -> Axes:
    """Draw a line per reference within the y limits, named at its right end; arrows name the others.

    If a name has to make room for others, a thin line leads to it.
    """
    low, high = ax.get_ylim()
    falling = sorted(values.items(), key=lambda item: -item[1])
    for _, value in falling:
        if low <= value <= high:
            ax.axhline(value, **REFERENCE)
    ends = [(value - low) / (high - low) for _, value in falling]
    places = _apart([*ends])
    moved = [
        0 <= end <= 1 and abs(end - place) > 0.02 for end, place in zip(ends, places, strict=True)
    ]
    beside = offset_copy(
        ax.transAxes, ax.get_figure(root=True), x=14 if any(moved) else 5, units="points"
    )
    labels = zip(falling if named else [], ends, places, moved, strict=False)
    for (name, value), end, place, led in labels:
        arrow = "↑ " if value > high else "↓ " if value < low else ""
        ax.annotate(
            f"{arrow}{name} {tables.short(value, 2)}", (1, end if led else place), (1, place),
            xycoords="axes fraction", textcoords=beside, va="center", color="0.3", fontsize="small",
            parse_math=False, arrowprops=LEADER if led else None, annotation_clip=False,
        )  # fmt: skip
    return ax


def _apart(places: list[float], gap: float = 0.09) -> list[float]:
    """Move the falling positions of labels, as shares of the axes, inside the axes and apart."""
    for i, place in enumerate(places):
        places[i] = min(place, places[i - 1] - gap if i else 1 - gap / 2)
    for i in reversed(range(len(places))):
        places[i] = max(places[i], places[i + 1] + gap if i + 1 < len(places) else gap / 2)
    return places


def cut_text(table: pd.DataFrame, ax: Axes, named: Mapping[str, Look]) -> Axes:
    """Draw the characters in one row per strategy, with a box around each segment.

    Args:
      table: Columns position, character, cut (whether the link before this character is cut), strategy, length.
      ax: The axes.
      named: The looks of the strategies.
    """
    for y, (name, row) in enumerate(table.groupby("strategy", sort=False)):
        look = named[str(name)]
        segment = row["cut"].cumsum()
        for _, part in row.groupby(segment):
            first, last = part["position"].iloc[[0, -1]]
            corner, width = (first + 0.1, y - 0.25), last - first + 0.8
            ax.add_patch(Rectangle(corner, width, 0.5, color=look.color, alpha=0.16, linewidth=0))
            ax.add_patch(Rectangle(corner, width, 0.5, fill=False, ec=look.color, linewidth=1.5))
        for position, character in zip(row["position"], row["character"], strict=True):
            shown = "␣" if character == " " else character
            ax.text(position + 0.5, y, shown, family="monospace", ha="center", va="center")
        length = row["length"].iloc[0]
        title = (
            look.name
            if pd.isna(length)
            else f"{look.name}, truncation length {tables.text(length)}"
        )
        ax.text(0.1, y - 0.31, title, color=look.color, va="bottom", weight="bold")
    ax.set(xlim=(0, table["position"].max() + 1), yticks=[])
    ax.set_ylim(table["strategy"].nunique() - 0.65, -0.65)
    ax.grid(False)
    sns.despine(ax=ax, left=True)
    return _labelled(ax, LABELS["position"], "")


def _labelled(ax: Axes, x: str, y: str) -> Axes:
    """Label the axes."""
    ax.set(xlabel=x, ylabel=y)
    return ax
