"""The frame of a figure: title, legend and caption around the axes, and the files of the figure.

No display is needed, and pyplot keeps no figure open. The same table gives the same bytes.
"""

import argparse
import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image

from bptt_study import files
from bptt_study.report import csv_tables, fonts

LEAST = 1.8  # the smallest height of a row of axes with its labels, inches
FAR = 1000  # heights of the axes, to where numbers beyond them are moved
DPI = 150  # print has 300 where a figure is set at half its size, for which its letters are made
INDEXED = 2**24  # pixels; Pillow sums the colours of more in too few bits, and its picture is black
UNDATED: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
}  # metadata of each format
_note: ContextVar[str] = ContextVar("note", default="")
_format: ContextVar[str] = ContextVar("format", default="png")


@contextmanager
def of(folder: Path) -> Iterator[None]:
    """Mark figures as unfinished within this block, if the tables in the folder lack runs."""
    token = _note.set(_unfinished(folder))
    try:
        yield
    finally:
        _note.reset(token)


@contextmanager
def write_as(format: str) -> Iterator[None]:
    """Within this block, `save` writes pictures of this format: png or svg."""
    token = _format.set(format)
    try:
        yield
    finally:
        _format.reset(token)


@contextmanager
def style() -> Iterator[None]:
    """Set the style within this block: letters legible at half the size, and fixed ids in svg files."""
    theme = {**sns.axes_style("whitegrid"), **sns.plotting_context("notebook", font_scale=1.15)}
    theme |= {
        "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
        "svg.fonttype": "path",
        "svg.hashsalt": "bptt_study",
        "grid.color": "0.9",
        "axes.edgecolor": "0.6",
        "axes.titlesize": "medium",
    }
    with mpl.rc_context():
        mpl.rcdefaults()  # a matplotlibrc of the user's may want LaTeX, or other sizes
        mpl.rcParams.update(theme)
        yield


def figure(
    rows: int,
    columns: int,
    size: tuple[float, float],
    title: str,
    caption: str,
    legend: Sequence[Artist] = (),
    **subplots: Any,
) -> tuple[Figure, np.ndarray]:
    """Make a figure, with title and legend above the axes and the caption below, so that none covers data.

    Args:
      rows: The number of rows of axes.
      columns: The number of columns of axes.
      size: Width and height, inches. A figure becomes higher if its legend and caption ask for it.
      title: The title; a note on missing runs is added to it.
      caption: The text below the axes.
      legend: The entries of the legend.
      **subplots: Further arguments of matplotlib's `Figure.subplots`.

    Returns:
      The figure, and its axes [rows, columns].
    """
    width, height = size
    title = f"{title} ({note})" if (note := _note.get()) else title
    made = Figure(size, layout="constrained")
    title = textwrap.fill(title, int(width * 6.8))  # letters
    caption = _filled(caption, width)
    per_row = _columns([len(str(entry.get_label())) for entry in legend], width)
    head = 0.4 + 0.27 * title.count("\n")  # inches
    top = head + 0.1 + 0.3 * -(-len(legend) // per_row)
    bottom = 0.12 + 0.22 * (caption.count("\n") + 1)
    height = max(height, top + bottom + LEAST * rows)  # a narrow figure may have a long legend
    made.set_figheight(height)
    engine = made.get_layout_engine()
    assert engine is not None
    rect = (0, bottom / height, 1, 1 - (top + bottom) / height)
    engine.set(rect=rect, w_pad=0.12, h_pad=0.08)  # type: ignore[call-arg]
    x = 0.1 / width
    plain: Any = {"parse_math": False}  # a name may have a $
    made.text(x, 1 - 0.1 / height, title, va="top", size="large", weight="bold", **plain)
    made.text(x, 0.06 / height, caption, va="bottom", color="0.3", size="small", **plain)
    if legend:
        entries = made.legend(
            handles=list(legend), loc="upper left", ncols=per_row, frameon=False,
            bbox_to_anchor=(0, 1 - head / height), columnspacing=1.5,
        )  # fmt: skip
        for text in entries.get_texts():
            text.set_parse_math(False)
    return made, made.subplots(rows, columns, squeeze=False, **subplots)


def _filled(caption: str, width: float) -> str:
    """Break a caption into lines: of as many letters as fit into this width in inches, whatever they are."""
    measured = partial(text_to_path.get_text_width_height_descent, ismath=False)
    font = FontProperties(size="small")
    with _no_word_of_glyphs():
        for letters in range(int(width * 12), 1, -1):
            lines = textwrap.wrap(caption, letters)
            if all(measured(line, font)[0] / 72 < width - 0.15 for line in lines):
                break
    return "\n".join(lines)


def _columns(letters: Sequence[int], width: float) -> int:
    """Choose the columns of a legend: the fewest rows that fit, filled evenly.

    Args:
      letters: The number of letters of each entry; a column is as wide as its longest entry.
      width: The width, inches.

    Returns:
      The number of columns.
    """
    n = len(letters)
    fit = (
        columns
        for columns in range(n, 1, -1)
        if sum(0.8 + 0.11 * max(part) for part in np.array_split(letters, columns)) <= width
    )
    rows = -(-n // next(fit, 1)) if n else 1
    return max(1, -(-n // rows))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write the figure to `name`.png in the folder, or as `write_as` says, without date and version.

    The positions of the axes are rounded, because the last bits of the layout's solver are random. So the same
    table gives the same bytes.
    """
    with _no_word_of_glyphs():
        return _saved(figure, folder, name)


@contextmanager
def _no_word_of_glyphs() -> Iterator[None]:
    """Within this block, matplotlib names no missing letter: the figure does, once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _saved(figure: Figure, folder: Path, name: str) -> list[Path]:
    figure.draw_without_rendering()
    if (note := fonts.complete(figure)) is not None:
        if note:
            _note_below(figure, note)
        figure.draw_without_rendering()  # other fonts have other widths
    figure.set_layout_engine("none")
    for ax in figure.axes:
        ax.set_position(np.round(ax.get_position().bounds, 6).tolist())
        _move_nearer(ax)
    kind = _format.get()
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=DPI, metadata=UNDATED[kind])
    file = folder / f"{name}.{kind}"
    few = np.prod(DPI * figure.get_size_inches()) < INDEXED
    files.write(file, _indexed(picture) if kind == "png" and few else picture.getvalue())
    return [file]


def _move_nearer(ax: Axes) -> None:
    """Move what bands and bars have far beyond the axes to where viewers of svg can still count."""
    low, high = np.sort([ax.get_xlim(), ax.get_ylim()]).T
    away = np.where(
        [ax.get_xscale() == "log", ax.get_yscale() == "log"], np.inf, FAR * (high - low)
    )
    drawn = (d for d in ax.collections if isinstance(d, LineCollection | PolyCollection))
    for path in (path for collection in drawn for path in collection.get_paths()):
        path.vertices = np.clip(path.vertices, low - away, high + away)


def _note_below(figure: Figure, note: str) -> None:
    """Write a line below the caption, for which everything but the title moves up."""
    line = 0.22 / figure.get_figheight()
    caption = figure.texts[1]
    x, y = caption.get_position()
    caption.set_y(y + line)
    figure.text(x, y, note, va="bottom", color="0.3", size="small")
    engine = figure.get_layout_engine()
    assert engine is not None
    left, bottom, width, height = engine.get()["rect"]
    engine.set(rect=(left, bottom + line, width, height - line))  # type: ignore[call-arg]


def _indexed(picture: io.BytesIO) -> bytes:
    """The picture in 192 colours: a quarter of the bytes, and no difference that an eye can see."""
    made = io.BytesIO()
    indexed = Image.open(picture).convert("RGB").quantize(192, Image.Quantize.MAXCOVERAGE, kmeans=1)
    indexed.save(made, "png", optimize=True)
    return made.getvalue()


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the option --format to a command that draws."""
    parser.add_argument(
        "--format", choices=UNDATED, default="png", help="kind of the pictures (default: png)"
    )


def _unfinished(folder: Path) -> str:
    """Read the note on missing runs beside the tables; empty if there is none."""
    file = folder / csv_tables.UNFINISHED
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
