"""The figures of any sweep: learning curves, final scores, gradient norms, styled by the settings that vary.

A sweep with a `Study` has figures of its own. `draw` serves all others. It uses seaborn's words: `x`, `hue`,
`style` and `facet` are columns of the table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from bptt_study.report import columns, csv_tables, figure_layout, plots, provenance, tables, untold
from bptt_study.report.study import Made, NothingToDrawError, attempt
from bptt_study.validation import SettingError, counted, one_of

COURSES = ("tokens", "update", "seconds")  # the possible x axes of a learning curve
DASHES = [(), (4, 1.5), (1, 1), (4, 1, 1, 1), (6, 2), (2, 2)]
MARKERS = "os^DvPX*"
WIDTH, HEIGHT = 5.4, 3.6  # size of a panel, inches
PER_ROW = 3
WORDS = {"time": "time step", "lag": "lag"}
BEYOND = " The y axes fit what follows the first tenth of each run; a line may begin beyond them."
LEGEND = 16  # the largest number of values that a legend can name


class Roles(NamedTuple):
    """The columns that place and style a run."""

    x: str | None
    hue: str | None
    style: str | None
    facet: tuple[str, ...]


def draw(folder: Path, **given: str | None) -> Made:
    """Draw the figures of a sweep from the tables in its folder.

    Args:
      folder: The study's folder.
      **given: Columns by role: x, hue, style, facet. A role without a column gets a setting that varies. All
        settings without a role make panels.

    Returns:
      The files, and a line for each figure that was left out or failed.

    Raises:
      SettingError: For a column that the table does not have.
    """
    rows = csv_tables.read_rows(folder)
    rows = rows.assign(truncation_length=tables.lengths(rows))
    named = {role: _checked(rows, role, name) for role, name in given.items() if name}
    wanted: dict[str, Callable[[], Any]] = {}
    for score in [s for s in tables.SCORES if s == "validation_loss" or tables.measured(rows, s)]:
        wanted[f"learning_curves_{score}"] = partial(_curves, rows, folder, named, score)
        wanted[f"final_scores_{score}"] = partial(_final, rows, folder, named, score)
    if (folder / "gradient_norms.csv.gz").is_file():
        for axis in ("time", "lag"):
            wanted[f"gradient_norms_{axis}"] = partial(_norms, rows, folder, named, axis)

    def saved(name: str) -> list[Path]:
        return figure_layout.save(wanted[name](), folder, name)

    with figure_layout.of(folder), figure_layout.style():
        return attempt({f"figure {name}": partial(saved, name) for name in wanted})


def _checked(rows: pd.DataFrame, role: str, name: str) -> str:
    """Find the column that a user names, as in the table or as on the command line."""
    found = "truncation_length" if name == "truncation" else columns.column(name)
    one_of("role", role, Roles._fields)
    if not (_of_runs(rows, found) or (role == "x" and found in COURSES)):
        varying = tables.varying(rows) or ["no setting"]
        verb = "varies" if len(varying) == 1 else "vary"
        allowed = f"a setting in {csv_tables.TABLE}"
        raise SettingError(f"--{role}", name, allowed, f"{', '.join(varying)} {verb}.")
    return found


def _of_runs(rows: pd.DataFrame, name: str) -> bool:
    """Return True for `run`, a setting, and a task's own fact: a column with one value per run."""
    known = name in rows and (name == "run" or columns.kind(name) in ("setting", None))
    return known and len(rows[["run", name]].drop_duplicates()) == rows["run"].nunique()


def roles(rows: pd.DataFrame, given: Mapping[str, str], with_x: bool) -> Roles:
    """Give each setting that varies a role, so that no two lines look alike.

    A setting with more values than a role has looks does not get this role, but another one or panels.

    Args:
      rows: The rows of the study.
      given: The columns that have a role already.
      with_x: Whether the x axis takes a setting, and markers show the style. If not, dashes do, and a setting
        that is given for the x axis gets another role.

    Returns:
      The roles.

    Raises:
      NothingToDrawError: If a given column has more values than its role has looks.
    """
    given = {role: name for role, name in given.items() if with_x or role != "x"}
    free = [name for name in tables.varying(rows) if name not in given.values()]

    def take(role: str, *preferred: str) -> str | None:
        fitting = [n for n in free if len(_values(rows, n)) <= _most(rows, role, n, with_x)]
        found = next((n for n in (*preferred, *fitting) if n in fitting), None)
        if found:
            free.remove(found)
        return found

    for role in {"hue", "style"} & set(given):
        name = given[role]
        most, count = _most(rows, role, name, with_x), len(_values(rows, name))
        if count > most:
            way_out = f"{name} has {count}; --facet {name} gives each a panel"
            raise NothingToDrawError(f"--{role} shows at most {most} values, and {way_out}")

    facet = [given["facet"]] if "facet" in given else []
    for name in tables.data(rows, numbers=False):  # scores on different data do not compare
        if name not in given.values():
            facet.append(name)
            free = [other for other in free if other != name]
    x = None
    if with_x:
        numbers = [name for name in free if pd.api.types.is_numeric_dtype(rows[name])]
        numbers.sort(key=lambda name: (name != "truncation_length", -rows[name].nunique()))
        x = (
            given["x"]
            if given.get("x") not in (None, *COURSES)
            else take("x", *numbers, "strategy")
        )
    hue = given.get("hue") or take("hue", "strategy")
    style = given.get("style") or take("style", "truncation_length")
    return Roles(x, hue, style, (*facet, *free))


def _most(rows: pd.DataFrame, role: str, name: str, markers: bool) -> float:
    """Return the largest number of values that a role tells apart; a place or a number's shade: any."""
    if role == "style":
        return len(MARKERS if markers else DASHES)
    if role != "hue" or (name != "strategy" and pd.api.types.is_numeric_dtype(rows[name])):
        return np.inf
    if name == "strategy":
        return len({look.color for look in plots.looks(rows[name]).values()})
    return len(plots.COLORS)


class _Looks:
    """The colours and dashes of the values of two settings."""

    def __init__(self, rows: pd.DataFrame, roles: Roles, markers: bool) -> None:
        self.roles, self.markers = roles, markers
        self.colors = self._palette(rows, roles.hue)
        found = _values(rows, roles.style)
        found = [v for v in found if v == ""] + [v for v in found if v != ""]
        self.dashes = dict(zip(found, DASHES, strict=False))
        self.marks = dict(zip(found, MARKERS, strict=False))

    @staticmethod
    def _palette(rows: pd.DataFrame, hue: str | None) -> dict[Any, Any]:
        found = _values(rows, hue)
        if hue == "strategy":
            return {name: look.color for name, look in plots.looks(found).items()}
        numeric = hue is not None and pd.api.types.is_numeric_dtype(rows[hue])
        bright = sns.color_palette("viridis_r", len(found) + 1)[1:]
        return dict(zip(found, bright if numeric else plots.COLORS, strict=False))

    def of(self, row: pd.Series) -> dict[str, Any]:
        """Choose the style of a run."""
        hue, style = (_key(row[c]) if c else None for c in (self.roles.hue, self.roles.style))
        made = {"color": self.colors.get(hue, "#222222")}
        if self.markers:
            return {**made, "marker": self.marks.get(style, "o"), "linestyle": ""}
        return {**made, "linestyle": (0, self.dashes.get(style, ()))}

    def handles(self) -> list[Line2D]:
        """Make the legend: the values of hue, then those of style."""
        shape: dict[str, Any] = {"marker": "o", "linestyle": ""} if self.markers else {}
        found = [
            Line2D([], [], color=color, linewidth=2.5, label=_said(self.roles.hue, value), **shape)
            for value, color in self.colors.items()
        ]
        for value, dashes in self.dashes.items():
            kind: dict[str, Any] = {"marker": self.marks[value], "linestyle": ""}
            kind = kind if self.markers else {"linestyle": (0, dashes)}
            label = _said(self.roles.style, value)
            found.append(Line2D([], [], color="0.3", linewidth=2, label=label, **kind))
        if len(found) > 2 * LEGEND:
            raise NothingToDrawError(
                f"a legend of {len(found)} entries; --x, --hue and --facet choose"
            )
        return found


def _key(value: Any) -> Any:
    """Turn a value into a key, the same for all missing values."""
    return "" if pd.isna(value) else value


def _values(rows: pd.DataFrame, name: str | None) -> list[Any]:
    """Return the values of a setting in order, the missing value last."""
    if name is None:
        return []
    found = sorted(rows[name].dropna().unique())
    return [*found, ""] if rows[name].isna().any() else found


def _said(name: str | None, value: Any) -> str:
    """Put a value into words: a strategy by its display name."""
    if name == "strategy":
        return plots.looks([value])[value].name
    return plots.setting_name(str(name), np.nan if isinstance(value, str) and not value else value)


def _panels(
    rows: pd.DataFrame, table: pd.DataFrame, roles: Roles
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the title and the part of the table of each panel, in the order of all rows of the study."""
    if not roles.facet:
        yield "", table
        return
    names = list(roles.facet)
    for values, part in tables.in_order(table, names, rows).groupby(
        names, sort=False, dropna=False
    ):
        found: Any = values
        words = [
            plots.TASKS.get(v, v) if n in ("task", "corpus") else _said(n, _key(v))
            for n, v in zip(names, found, strict=True)
            if not (columns.group(n) == "task" and pd.isna(v))
        ]
        yield ", ".join(map(str, words)), part


def _figure(
    rows: pd.DataFrame, panels: Sequence[Any], what: str, caption: str, legend: Sequence[Line2D]
) -> tuple[Any, list[Axes]]:
    """Make a figure with axes for all panels; the rest of the last row stays empty."""
    across = min(len(panels), PER_ROW)
    down = -(-len(panels) // across)
    width = max(8.0, 1.2 + WIDTH * across)
    legend_rows = -(-len(legend) // max(1, int(width / 3.2)))
    height = 1.6 + 0.3 * legend_rows + 0.22 * (len(caption) / (width * 12)) + HEIGHT * down
    title = f"{rows['study'].iloc[0]}: {what}" if "study" in rows else what
    figure, axes = figure_layout.figure(down, across, (width, height), title, caption, legend)
    for ax in axes.ravel()[len(panels) :]:
        ax.set_axis_off()
    return figure, list(axes.ravel()[: len(panels)])


def _aggregated(rows: pd.DataFrame, roles: Roles, score: str, *also: str) -> pd.DataFrame:
    names = [n for n in (roles.x, roles.hue, roles.style, *roles.facet) if n]
    return tables.aggregate(rows, list(dict.fromkeys(["run", *names, *also])), score)


def _course(rows: pd.DataFrame, folder: Path, x: str) -> pd.DataFrame:
    """Add the column of the learning curve's x axis to the rows."""
    if x != "seconds":
        return rows
    if not (folder / provenance.FILE).is_file():
        raise NothingToDrawError(f"there are no seconds, for lack of {provenance.FILE}")
    return tables.with_costs(rows, provenance.read(folder))


def _curves(rows: pd.DataFrame, folder: Path, given: Mapping[str, str], score: str) -> Any:
    x = given["x"] if given.get("x") in COURSES else "tokens"
    role = roles(rows, given, with_x=False)
    having = _course(tables.scored(rows, score), folder, x)
    table = _aggregated(having, role, score, "update", x, "tokens")
    if np.isfinite(table["median"]).groupby(table["run"]).sum().max() < 2:
        raise NothingToDrawError("no run has two finite scores")
    looks = _Looks(rows, role, markers=False)
    panels = list(_panels(rows, table, role))
    limits = [plots.limits(plots.after_the_start(part)) for _, part in panels]
    of_all = [plots.limits(part) for _, part in panels]
    said = _caption(rows, table, "Line", "band") + BEYOND * (limits != of_all)
    figure, axes = _figure(rows, panels, "learning curves", said, looks.handles())
    for (title, part), ax, fitting in zip(panels, axes, limits, strict=True):
        ax.set_ylim(fitting)
        for _, line in part.groupby("run", sort=False):
            _line(line, x, looks, ax)
        _finish(rows, part, ax, score, title)
        ax.set_xlabel(plots.LABELS.get(x, "updates"))
        if x == "tokens":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _line(line: pd.DataFrame, x: str, looks: _Looks, ax: Axes) -> None:
    """Draw the medians of a run over `x` and their intervals."""
    style = looks.of(line.iloc[0])
    plots.trace(line, x, ax, linewidth=2, **style)
    plots.shade(line, x, ax, style["color"])


def _final(rows: pd.DataFrame, folder: Path, given: Mapping[str, str], score: str) -> Any:
    role = roles(rows, given, with_x=True)
    if role.x is None:
        raise NothingToDrawError("no setting that varies is left for the x axis")
    table = _aggregated(tables.final(tables.scored(rows, score)), role, score)
    if not np.isfinite(table["median"]).any():
        raise NothingToDrawError("no score is finite")
    looks = _Looks(rows, role, markers=True)
    panels = list(_panels(rows, table, role))
    said = _caption(rows, table, "Marker", "bar")
    figure, axes = _figure(rows, panels, "final scores", said, looks.handles())
    places = {value: i for i, value in enumerate(_values(rows, role.x))}
    for (title, part), ax in zip(panels, axes, strict=True):
        ax.set_ylim(plots.limits(part))
        for value, beside in part.groupby(role.x, sort=False, dropna=False):
            shifts = np.arange(len(beside)) - (len(beside) - 1) / 2
            for (_, row), shift in zip(beside.iterrows(), shifts, strict=True):
                at = places[_key(value)] + shift * min(0.12, 0.8 / len(beside))
                _point(row, at, looks.of(row), ax)
        ticks = [_tick(role.x, value) for value in places]
        ax.set_xticks(list(places.values()), ticks, parse_math=False)
        ax.set_xlim(-0.6, len(places) - 0.4)
        _finish(rows, part, ax, score, title)
        label = plots.LABELS["length"] if role.x == "truncation_length" else role.x
        ax.set_xlabel(label.replace("_", " "))
    return figure


def _point(row: pd.Series, at: float, style: dict[str, Any], ax: Axes) -> None:
    """Draw a median and its interval, and say how many of the seeds diverged."""
    low, median, high = plots.drawable(row[["low", "median", "high"]], ax)
    ax.vlines(at, low, high, style["color"], linewidth=2)
    ax.plot([at], [np.clip(median, *ax.get_ylim())], markersize=8, clip_on=False, **style)
    if row["diverged"]:
        ax.annotate(
            f"{row['diverged']} of {row['n']} diverged", (at, np.clip(median, *ax.get_ylim())), (4, -4),
            textcoords="offset points", rotation=90, va="top", color=style["color"], fontsize="small",
        )  # fmt: skip


def _tick(name: str, value: Any) -> str:
    """Write the value at an axis."""
    if name == "strategy":
        return "\n".join(_said(name, value).split(" ", 1))
    return tables.text(value) or "none"


def _finish(rows: pd.DataFrame, part: pd.DataFrame, ax: Axes, score: str, title: str) -> None:
    """Add the title, the label of the score, and the reference scores if they belong to one task."""
    own = rows[rows["run"].isin(part["run"])]
    plots.titled(ax, title)
    if len(own["task"].unique()) == 1:
        name = plots.loss_label(own)
        ax.set_ylabel(name if score == "validation_loss" else plots.LABELS[score])
        plots.references(tables.references(own, score), ax)
    else:
        ax.set_ylabel(score.replace("_", " "))


def _norms(rows: pd.DataFrame, folder: Path, given: Mapping[str, str], axis: str) -> Any:
    """Draw the norms of the last snapshot over `axis`: the time step or the lag."""
    found = csv_tables.read_table(folder / "gradient_norms.csv.gz")
    found = found[found["axis"] == axis]
    last = found.groupby("run")["update"].max()
    found = found[found["update"] == found["run"].map(last)]
    every, rows = rows, rows[rows["run"].isin(last.index)]
    if rows.empty:
        raise NothingToDrawError("the probe looked at none of these runs")
    role = roles(rows, given, with_x=False)
    names = list(dict.fromkeys(n for n in (role.hue, role.style, *role.facet) if n and n != "run"))
    settings = rows.drop_duplicates("run")[["run", *names]]
    found = found.drop(columns=names, errors="ignore").merge(settings, on="run")
    table = _aggregated(found, role, "gradient_norm", "step")
    drawn = np.isfinite(table["median"]) & (table["median"] > 0)
    if not drawn.any():
        raise NothingToDrawError("no norm is finite and greater than 0")
    looks = _Looks(rows, role, markers=False)
    panels = list(_panels(every, table, role))
    said = f"{_caption(rows, table, 'Line', 'band')} After {plots.span(last, 'update')}, the last at which "
    said += "the probe looked" + " in each run: not the same for all" * (len({*last}) > 1) + "."
    said += " No line is drawn where a median is 0 or not finite." * (not drawn.all())
    figure, axes = _figure(
        rows, panels, f"gradient norms over the {WORDS[axis]}", said, looks.handles()
    )
    for (title, part), ax in zip(panels, axes, strict=True):
        ax.set_yscale("log")
        ax.set_ylim(plots.limits(part, log=True))
        for _, line in part.groupby("run", sort=False):
            _line(line, "step", looks, ax)
        ax.set_xlabel(plots.LABELS[axis])
        plots.titled(ax, title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        unit = tables.unit(rows[rows["run"].isin(part["run"])])
        ax.set_ylabel(plots.norm_label(axis, unit))
    return figure


def _caption(rows: pd.DataFrame, table: pd.DataFrame, median: str, spread: str) -> str:
    """Write the meaning of the marks, the number of seeds, and the settings that all runs share."""
    lost = int((tables.final(rows).groupby("run")["diverged"].sum() > 0).sum())
    names = ("task", "corpus", "cell", "hidden", "strategy", "updates")
    common = [_in_words(rows, n) for n in names]
    said = f"{plots.marks(table['n'], median, spread, plots.span(table['n'], 'seed'))}. "
    said += f"{counted(lost, 'run')} with diverged seeds. " if lost else "No seed diverged. "
    shared = ", ".join(word for word in common if word)
    said += f"All runs: {shared}. " if shared else ""
    shown = [*tables.varying(rows), *tables.data(rows, numbers=False)]
    return (said + untold.also_differ(rows, shown)).rstrip()


def _in_words(rows: pd.DataFrame, name: str) -> str:
    """Put a setting that all runs share into words; empty if they do not share it."""
    if name not in rows or len(rows[name].unique()) > 1 or rows[name].isna().any():
        return ""
    value = tables.text(rows[name].iloc[0])
    units = {"hidden": "units", "updates": "updates"}
    return f"{value} {units[name]}" if name in units else value
