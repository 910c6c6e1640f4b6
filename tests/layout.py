"""Whether a figure can be read: nothing covers the data or leaves the page, letters are large enough."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def words(figure: Figure) -> str:
    """Everything written around the axes, on one line."""
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def check(figure: Figure) -> None:
    """Hold the figure to all of this, and its axes to labels."""
    legible(figure)
    assert any(ax.get_xlabel() for ax in figure.axes) and any(ax.get_ylabel() for ax in figure.axes)


def legible(figure: Figure) -> None:
    FigureCanvasAgg(figure).draw()
    page = figure.bbox
    inside = [ax.get_tightbbox() for ax in figure.axes]
    around = [part.get_window_extent() for part in (*figure.texts, *figure.legends)]
    for i, box in enumerate(around):
        assert not any(box.overlaps(o) for o in (*inside, *around[:i])), (words(figure)[:60], i)
    for box in [*inside, *around]:
        assert box.x0 >= page.x0 and box.x1 <= page.x1 + 1
        assert box.y0 >= page.y0 and box.y1 <= page.y1 + 1
    shown = 800 / figure.get_figwidth() / 72  # pixels per point, on a page 800 pixels wide
    for ax in figure.axes:
        assert min(ax.title.get_fontsize(), ax.xaxis.label.get_fontsize()) * shown >= 6


def covered(figure: Figure) -> list[str]:
    """What words, numbers and legends within axes cover there: lines, markers, bands."""
    FigureCanvasAgg(figure).draw()
    found = []
    for ax in figure.axes:
        legend = ax.get_legend()
        over = {text.get_text(): text.get_window_extent() for text in ax.texts}
        over |= {"legend": legend.get_window_extent()} if legend else {}
        for name, box in over.items():
            for drawn in (*ax.lines, *ax.collections):
                paths = [drawn.get_path()] if drawn in ax.lines else drawn.get_paths()
                to_page = drawn.get_transform()
                if any(to_page.transform_path(p).intersects_bbox(box) for p in paths):
                    found.append(f"{ax.get_title()}: {name}")
    return found
