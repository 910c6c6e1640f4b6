"""Figures show the numbers of their table, all of them, and a strategy looks the same in each."""

from itertools import combinations, pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import studies
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from bptt_study.report import figure_layout, plots, tables


@pytest.fixture
def ax() -> Axes:
    return Figure().subplots()


NAMED = plots.looks(plots.LOOKS)


def lines(ax: Axes) -> dict[str, np.ndarray]:
    """Colour -> points [N, 2] of each line with points."""
    found = {to_hex(line.get_color()): line.get_xydata() for line in ax.lines}
    return {color: np.asarray(points) for color, points in found.items() if len(points)}


def color(strategy: str) -> str:
    return to_hex(plots.looks([strategy])[strategy].color)  # of those known, always the same


def test_a_narrow_figure_with_a_long_legend_is_higher(tmp_path):
    figure, [[ax]] = figure_layout.figure(
        1, 1, (7.2, 7), "a title", "a caption " * 60, plots.handles(NAMED)
    )
    ax.set(xlabel="x", ylabel="y")
    figure_layout.save(figure, tmp_path, "long")
    assert figure.get_figheight() > 7
    assert ax.get_position().height * figure.get_figheight() > 1, "inches"
    low, _ = figure_layout.figure(1, 1, (7.2, 7), "a title", "a caption")
    assert low.get_figheight() == 7


@pytest.mark.parametrize("letters", ["mmmmmmm WWW ", "illi ", "$5 or $6 \\frac{ ", "\u6c49\u5b57 "])
def test_a_caption_is_as_wide_as_its_letters_allow(letters):
    """Wide letters ran beyond the edge of a narrow figure."""
    figure, _ = figure_layout.figure(1, 1, (6.8, 6.6), "a title", letters * 60)
    with figure_layout._no_word_of_glyphs():
        FigureCanvasAgg(figure).draw()
        box = figure.texts[1].get_window_extent()
    assert box.x1 < figure.bbox.x1
    assert box.y0 >= 0


@pytest.mark.parametrize(
    ("letters", "width", "columns"),
    [((), 9, 1), ((20,), 1, 1), ((20,) * 6, 18, 6), ((20,) * 6, 13, 3)],
)
def test_a_legend_has_the_fewest_rows_that_fit_and_fills_them_evenly(letters, width, columns):
    assert figure_layout._columns(letters, width) == columns


def test_a_cross_has_a_bar_for_either_interval(ax):
    plots.cross((2, 1, 4), (5, 3, 6), NAMED["fixed"], ax)
    bars = [bar.get_segments()[0].tolist() for bar in ax.collections]
    assert bars == [[[1, 5], [4, 5]], [[2, 3], [2, 6]]]
    assert ax.lines[0].get_xydata().tolist() == [[2, 5]]


def test_rows_are_listed_from_the_top_with_a_text_beside_each(ax):
    plots.listed(["a", "b"], ax)
    for y, text in enumerate(("to", "away")):
        plots.beside(text, y, ax, "red")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    high, low = (ax.transData.transform((0, y))[1] for y in ax.get_yticks())
    assert high > low
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [(box.y0 + box.y1) / 2 for box in boxes] == pytest.approx([high, low], abs=3)
    assert all(box.x0 > ax.get_window_extent().x1 for box in boxes)


def test_panels_give_each_part_its_axes_and_a_title():
    axes = Figure().subplots(1, 2)
    found = list(plots.panels(studies.headline(), "task", axes))
    assert [(key, set(part["task"])) for key, part, _ in found] == [
        ("char_lm", {"char_lm"}),
        ("digits", {"digits"}),
    ]
    assert [ax.get_title() for ax in axes] == ["text", "digits"]
    with pytest.raises(ValueError, match="shorter"):
        list(plots.panels(studies.headline(), "task", axes[:1]))


def test_tones_end_with_the_colour_itself():
    tones = plots.tones(plots.COLORS[0], 3)
    assert len({to_hex(tone) for tone in tones}) == 3
    assert to_hex(tones[-1]) == to_hex(plots.COLORS[0])


def of_text() -> pd.DataFrame:
    return tables.panels(studies.headline())[0]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("x", ["tokens", "seconds"])
def test_learning_curves_are_the_medians_of_the_table(ax, x):
    rows = of_text()
    table = tables.curves(tables.with_costs(rows, studies.costs(rows)), "validation_loss")
    table = table[table["length"].isna() | (table["length"] == 4)]
    ax.set_ylim(plots.limits(table))
    plots.learning_curves(table, ax, NAMED, x, "loss")
    place = {"tokens": [0, 1000, 2000], "seconds": [0, 2.5, 5]}[x]
    expected = {"full": [3.4, 2.1, 1.1], "fixed": [3.4, 2.5, 2.1], "randomized": [3.4, 2.6, 1.7]}
    found = lines(ax)
    assert len(found) == 3
    for strategy, medians in expected.items():
        np.testing.assert_allclose(found[color(strategy)], np.transpose([place, medians]))
    assert (ax.get_xlabel(), ax.get_ylabel()) == (plots.LABELS[x], "loss")


def test_bands_are_the_intervals_and_reach_beyond_the_axes_where_they_are_infinite(ax):
    table = tables.curves(of_text(), "validation_loss")
    table = table[table["run"].isin(["z1", "w1"])]
    ax.set_ylim(0, 4)
    plots.curves(table, ax, NAMED, "tokens")
    full, randomized = (band.get_paths()[0].vertices for band in ax.collections)
    assert {(2000.0, 1.0), (2000.0, 1.2)} <= set(map(tuple, full))
    at_end = randomized[randomized[:, 0] == 2000, 1]
    assert at_end.min() == 1.3
    assert at_end.max() > 4


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_an_edge_of_a_band_from_beyond_the_axes_has_its_slope(ax, scale):
    """A line beside it has its own; from an infinity an edge comes down beside the finite number."""
    table = pd.DataFrame({"run": "a", "x": [0.0, 1, 2], "median": [0.9, 0.2, 0.1]})
    table = table.assign(low=[0.9, 0.1, 0.1], high=[50, 0.2, np.inf])
    ax.set(yscale=scale, ylim=(0.01, 1))
    plots.shade(table, "x", ax, "black")
    figure_layout._move_nearer(ax)
    path = ax.transData.transform_path(ax.collections[0].get_paths()[0])
    height = ax.transAxes.transform([0, 0.999])[1]
    at = [ax.transData.inverted().transform(p)[0] for p in _crossings(path.vertices, height)]
    falls = np.interp(-1, [-50, -0.2], [0, 1]) if scale == "linear" else np.log(50) / np.log(250)
    np.testing.assert_allclose(at, [0, falls, 1, 2], atol=0.02)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_an_infinite_end_of_an_interval_is_beyond_the_axes_and_moves_no_limits(scale):
    """Of bands, lone points, bars and crosses; they had none, and medians looked certain."""
    look = plots.looks(["fixed"])["fixed"]
    table = pd.DataFrame({"estimator": "fixed", "x": [1.0, 2, 3, 4], "mse": [1, 2, np.nan, 4]})
    table = table.assign(mse_low=[0.5, 1, np.nan, 3], mse_high=[2, np.inf, np.nan, np.inf])
    ax = Figure().subplots()
    ax.set_yscale(scale)
    plots.lines(table, "x", "mse", {"fixed": look}, ax)
    plots.point(5, (2, 1, np.inf), look, ax)
    plots.cross((6, 5.5, np.inf), (3, 2, np.inf), look, ax)
    assert ax.get_ylim()[1] < 10 and ax.get_xlim()[1] < 10
    figure_layout._move_nearer(ax)
    band, lone, bar, across, up = (drawn.get_paths()[0].vertices for drawn in ax.collections)
    assert {tuple(p) for p in band} >= {(1, 0.5), (2, 1), (1, 2)}
    for drawn in (band, lone, bar, up):
        assert drawn[:, 1].max() > 100
    assert across[:, 0].tolist() == [5.5, across[:, 0].max()] and across[:, 0].max() > 100
    assert all(np.abs(d.get_paths()[0].vertices[:, 0]).max() < 1e7 for d in ax.collections)


def test_full_s_lone_point_is_seen(ax):
    table = pd.DataFrame({"estimator": "full", "x": [1.0, 2, 3], "mse": [1, np.nan, 4]})
    table = table.assign(mse_low=table["mse"], mse_high=table["mse"])
    plots.lines(table, "x", "mse", plots.looks(["full"]), ax)
    assert [line.get_marker() for line in ax.lines] == ["o", "o"]


def _crossings(vertices: np.ndarray, height: float) -> list[np.ndarray]:
    """Return the points, from the left to the right, where a polygon crosses a height."""
    pairs = pairwise(np.vstack([vertices, vertices[:1]]))
    crossed = [(a, b) for a, b in pairs if (a[1] - height) * (b[1] - height) < 0]
    points = (a + (b - a) * (height - a[1]) / (b[1] - a[1]) for a, b in crossed)
    return sorted(points, key=lambda point: point[0])


def test_the_axes_hold_the_finite_end_of_an_interval_whose_median_is_infinite():
    """Half of the seeds diverged; the others' losses were cut off."""
    table = pd.DataFrame({"run": "a", "tokens": [0.0, 50, 100], "median": [9, 2, np.inf]})
    table = table.assign(low=[9, 1.5, 0.5], high=[9, np.inf, np.inf])
    low, high = plots.limits(plots.after_the_start(table))
    assert low < 0.5 and 2 < high < 9


def test_a_line_ends_where_the_median_has_diverged(ax):
    rows = studies.run("a", studies.TEXT | studies.FULL, [[3.0, 2.0], [3.0, np.inf], [3.0, np.nan]])
    table = tables.curves(rows, "validation_loss")
    ax.set_ylim(plots.limits(table))
    plots.curves(table, ax, NAMED, "tokens")
    np.testing.assert_allclose(lines(ax)[color("full")], [[0, 3]])
    assert "diverged: 2 of 3 Full (text, elman)" in plots.seeds(table)


def of_estimators() -> pd.DataFrame:
    """Errors of two estimators at lengths 1, 2, 4, of which two points and one interval leave the axes."""
    numbers = {"fixed": [1.0, 0.5, 0.1], "uoro": [3e7, 2e5, 8.0]}
    return pd.concat(
        pd.DataFrame({"estimator": name, "length": [4, 2, 1], "mse": y[::-1]})
        for name, y in numbers.items()
    ).assign(mse_low=lambda t: t["mse"] / 2, mse_high=lambda t: 2 * t["mse"])


def test_lines_of_estimators_have_markers_and_bands_in_their_colours(ax):
    ax.set(yscale="log", ylim=(0.01, 100))
    table, named = of_estimators(), plots.looks(["fixed", "uoro"])
    assert plots.lines(table, "length", "mse", named, ax) is ax
    assert lines(ax)[color("fixed")].tolist() == [[1, 1], [2, 0.5], [4, 0.1]]
    markers = {to_hex(line.get_color()): line.get_marker() for line in ax.lines}
    assert markers == {color(n): look.marker for n, look in named.items()}
    fixed, _ = (band.get_paths()[0].vertices for band in ax.collections)
    assert (fixed[:, 1].min(), fixed[:, 1].max()) == (0.05, 2)


def test_points_above_the_axes_are_named_from_left_to_right(ax):
    ax.set(yscale="log", ylim=(0.01, 100))
    plots.above(of_estimators(), "length", "mse", plots.looks(["fixed", "uoro"]), ax)
    assert [text.get_text() for text in ax.texts] == ["↑ $10^{7}$", "↑ $10^{5}$"]
    assert [text.xy for text in ax.texts] == [(1, 100), (2, 100)]
    lost = of_estimators().assign(mse=np.inf)[:1]
    other = plots.above(lost, "length", "mse", plots.looks(["fixed"]), Figure().subplots())
    assert [text.get_text() for text in other.texts] == ["↑ ∞"]
    first, second = (text.xyann[1] for text in ax.texts)
    assert second < first < 0
    assert {to_hex(text.get_color()) for text in ax.texts} == {color("uoro")}


def test_ticks_are_powers_of_two_and_of_ten(ax):
    ax.set(yscale="log", ylim=(1e-4, 1e4))
    plots.powers_of_two(ax).set_xlim(0.25, 16)
    plots.decades(ax.yaxis, step=2)
    ax.figure.draw_without_rendering()
    shown = [t.get_text() for t in ax.get_xticklabels() if 0.2 < t.get_position()[0] < 17]
    assert shown == ["1/4", "1/2", "1", "2", "4", "8", "16"]
    low, high = ax.get_ylim()
    assert [y for y in ax.get_yticks() if low <= y <= high] == pytest.approx(
        [1e-4, 1e-2, 1, 1e2, 1e4]
    )
    assert len(ax.get_yticks(minor=True)) == 0


def test_scores_are_points_with_bars_and_full_goes_across(ax):
    table = tables.final_scores(of_text(), "validation_loss")
    ax.set_ylim(plots.limits(table))
    plots.scores(table, ax, NAMED, "loss")
    found = lines(ax)
    assert found[color("full")][:, 1].tolist() == [1.1, 1.1]
    assert found[color("fixed")][:, 1].tolist() == [2.1, 1.5]
    assert found[color("randomized")][:, 1].tolist() == [1.7, 1.3]
    assert found[color("fixed")][:, 0].round().tolist() == [0, 1]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["4", "16"]
    bars = {to_hex(c.get_color()[0]): np.array(c.get_segments()) for c in ax.collections}
    np.testing.assert_allclose(bars[color("fixed")][:, :, 1], [[2.0, 2.2], [1.4, 1.6]])
    assert bars[color("randomized")][0, 1, 1] > ax.get_ylim()[1]
    assert texts(ax) == ["1 of 3 diverged"]
    (band,) = ax.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((1.0, 1.2))


def test_a_score_whose_median_diverged_is_named_at_the_edge(ax):
    rows = studies.run("a", studies.TEXT | studies.fixed(4), [[np.nan], [np.nan], [1.0]])
    table = tables.final_scores(rows, "validation_loss")
    ax.set_ylim(plots.limits(table))
    plots.scores(table, ax, NAMED, "loss")
    (note,) = ax.texts
    assert note.get_text() == "2 of 3 diverged"
    assert note.xy[1] == ax.get_ylim()[1]


@pytest.mark.parametrize("axis", ["time", "lag"])
def test_gradient_norms_end_where_they_are_zero(ax, axis):
    rows = studies.networks()
    table = tables.norms(studies.norms(rows), rows)
    table = table[(table["run"].isin(["7full", "7fixed"])) & (table["axis"] == axis)]
    table = table[table["update"] == 0]
    assert len(table) == 12
    ax.set_ylim(plots.limits(table, log=True))
    plots.gradient_norms(table, ax, NAMED, axis)
    step = np.arange(6) + (axis == "time")
    curve = {to_hex(line.get_color()): line.get_xydata() for line in ax.lines[:2]}
    np.testing.assert_allclose(curve[color("full")], np.transpose([step, 1.5 * 2.0**-step]))
    kept = step[:3] if axis == "lag" else step
    np.testing.assert_allclose(curve[color("fixed")], np.transpose([kept, 1.5 * 2.0**-kept]))
    drops = ax.lines[2:]
    assert len(drops) == (axis == "lag")
    for drop in drops:
        assert to_hex(drop.get_color()) == color("fixed")
        np.testing.assert_allclose(drop.get_xydata(), [[2, ax.get_ylim()[0]], [2, 0.375]])
    assert ax.get_yscale() == "log"


def test_references_are_named_and_those_out_of_sight_are_told(ax):
    ax.set_ylim(2, 3)
    plots.references({"chance": 3.3, "1-gram": 2.8, "2-gram": 1.9}, ax)
    assert [line.get_ydata()[0] for line in ax.lines] == [2.8]
    assert texts(ax) == ["↑ chance 3.30", "1-gram 2.80", "↓ 2-gram 1.90"]


@pytest.mark.parametrize("values", [[3.0, 3.0, 3.0], [1.0, 1.0, 1.0], [9, 2.99, 2.98], [2.5, 1, 0]])
def test_names_of_references_lie_apart_and_beside_the_axes(ax, values):
    ax.set_ylim(2, 3)
    plots.references({f"r{i}": value for i, value in enumerate(values)}, ax)
    places = [text.xyann[1] for text in ax.texts]
    assert len(places) == 3
    assert (np.diff(places) < -0.089).all()
    assert 0 < min(places) < max(places) < 1


def test_a_line_leads_from_a_reference_to_a_name_that_makes_room(ax):
    """It stood beside another line, or beside none. The controls: names at their lines, and out of sight."""
    ax.set_ylim(2, 3)
    plots.references({"chance": 2.9, "1-gram": 2.1, "2-gram": 1.9, "3-gram": 1.8}, ax)
    ends = [text.arrow_patch and text.xy[1] for text in ax.texts]
    assert ends == [None, pytest.approx(0.1), None, None]


def test_cut_text_has_a_box_per_segment(ax):
    rows = studies.headline()
    table = tables.opening(studies.text_cuts(rows, 20), rows, ("randomized", "fixed", "full"))
    plots.cut_text(table, ax, NAMED)
    boxes = [p for p in ax.patches if not p.get_fill()]
    spans = [(round(b.get_x()), round(b.get_x() + b.get_width())) for b in boxes]
    assert spans == [(0, 1), (1, 9), (9, 20), (0, 16), (16, 20), (0, 20)]
    names = [to_hex(b.get_edgecolor()) for b in boxes]
    assert names == [color("randomized")] * 3 + [color("fixed")] * 2 + [color("full")]
    shown = [t for t in texts(ax) if len(t) == 1]
    assert "".join(shown) == "the␣assert␣statement" * 3
    assert "Fixed (chunks), truncation length 16" in texts(ax)


# what is left of a colour, in linear light, without one kind of cone (Machado, Oliveira & Fernandes 2009)
WITHOUT = {
    "M": [[0.3673, 0.8607, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "L": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
}
TRUNCATIONS = [name for name in plots.LOOKS if name.startswith(("fixed", "sliding", "randomized"))]


def seen(color, cones):
    linear = np.asarray(to_rgb(color)) ** 2.2
    return np.clip(np.asarray(WITHOUT[cones]) @ linear, 0, 1) ** (1 / 2.2)


def test_palette_is_one_and_colour_blind():
    """Looks with one marker are told apart without red or green cones, too."""
    known = plots.looks(plots.LOOKS)
    assert len({to_hex(look.color) for look in known.values()}) == len(known)
    safe = {to_hex(c) for c in sns.color_palette("colorblind")}
    assert {to_hex(known[name].color) for name in TRUNCATIONS} <= safe
    for one, other in combinations(known.values(), 2):
        if one.marker == other.marker:
            for cones in WITHOUT:
                apart = np.linalg.norm(seen(one.color, cones) - seen(other.color, cones))
                assert apart > 0.1, (one.name, other.name, cones)
    for name, look in known.items():
        assert plots.looks([name, "mine"])[name] == look
        assert look.name


def test_a_strategy_of_ones_own_gets_its_name_and_the_next_free_colour():
    found = plots.looks(["zebra", "fixed", "ant", "full"])
    assert list(found) == ["full", "fixed", "ant", "zebra"]
    assert found == plots.looks(["ant", "full", "zebra", "fixed"])
    assert [found[n].name for n in ("ant", "zebra")] == ["ant", "zebra"]
    assert [found[n].color for n in ("ant", "zebra")] == plots.FREE[:2]
    taken = {to_hex(look.color) for look in plots.LOOKS.values()}
    assert taken.isdisjoint(map(to_hex, plots.FREE))
    assert len(plots.looks([f"own{i}" for i in range(20)])) == 20


def test_legend_has_the_colours_of_the_lines():
    for markers in (False, True):
        entries = plots.handles(plots.looks(["fixed", "full", "mine"]), markers)
        assert [e.get_label() for e in entries] == ["Full", "Fixed (chunks)", "mine"]
        assert [to_hex(e.get_color()) for e in entries] == [
            color(n) for n in ("full", "fixed", "mine")
        ]


def test_a_picture_of_few_colours_keeps_its_hues(tmp_path, monkeypatch):
    """Bands over each other make thousands of colours; each common one keeps its own within 5 of 255."""
    given = []
    indexed = figure_layout._indexed
    monkeypatch.setattr(figure_layout, "_indexed", lambda made: given.append(made) or indexed(made))
    drawn, [[ax]] = figure_layout.figure(1, 1, (8, 5), "many bands", "caption")
    for i, one in enumerate([*plots.COLORS, "0.8", "0.5"]):
        ax.fill_between([0, 1], [0, i], [i + 3, 9], color=one, alpha=0.2)
        ax.plot([0, 1], [i, 9 - i], color=one)
    [file] = figure_layout.save(drawn, tmp_path, "bands")
    before, after = (np.asarray(Image.open(f).convert("RGB")).astype(int) for f in (given[0], file))
    colours, counts = np.unique(before.reshape(-1, 3), axis=0, return_counts=True)
    common = colours[np.argsort(-counts)[:12]]
    assert len(colours) > 1000
    for one in common:
        here = (before == one).all(-1)
        assert np.abs(after[here] - one).max() <= 5


@pytest.mark.parametrize(("height", "indexed"), [(73, True), (76, False)])
def test_a_large_picture_keeps_its_colours(tmp_path, monkeypatch, height, indexed):
    """Pillow's k-means overflows above 2³² / 255 white pixels: a figure of many panels was black."""
    given = []
    monkeypatch.setattr(figure_layout, "_indexed", lambda made: given.append(1) or made.getvalue())
    drawn, _ = figure_layout.figure(1, 1, (10, height), "many panels", "caption")
    [file] = figure_layout.save(drawn, tmp_path, "panels")
    assert bool(given) == indexed
    with Image.open(file) as picture:
        assert picture.convert("L").getextrema() == (0, 255)


def test_seeds_are_counted():
    table = tables.final_scores(studies.headline(), "validation_loss")
    told = "n = 3 seeds; diverged: 1 of 3 Randomized (constant law) 4 (text, elman)"
    assert plots.seeds(table) == told
    assert plots.seeds(table[table["diverged"] == 0]) == "n = 3 seeds; diverged: none"
    assert plots.seeds(table.assign(n=[2] + [3] * 6)).startswith("n = 2 to 3 seeds")
    assert plots.seeds(table.assign(n=1, diverged=0)) == "n = 1 seed; diverged: none"


def test_limits_hold_all_that_is_finite():
    table = pd.DataFrame({"median": [1.0, np.inf], "low": [-np.inf, 2.0], "high": [5.0, np.nan]})
    low, high = plots.limits(table)
    assert low < 1
    assert 5 < high < 6
    assert plots.limits(table * 0 + 1)[0] < 1 < plots.limits(table * 0 + 1)[1]
    low, high = plots.limits(table.assign(low=0.0), log=True)
    assert 0 < low < 1
    assert np.isfinite(plots.limits(table * np.nan)).all()
    low, high = plots.limits(table * 0 + 1e30)
    assert low < 1e30 < high, "one number, beside which 1 is nothing"


def test_no_figure_is_left_open():
    assert mpl.pyplot.get_fignums() == []


def test_a_matplotlibrc_of_the_user_changes_no_figure():
    """It may want LaTeX, which is not installed, or letters of another size."""
    with figure_layout.style():
        usual = dict(mpl.rcParams)
    with mpl.rc_context({"text.usetex": True, "font.size": 40, "savefig.bbox": "tight"}):
        with figure_layout.style():
            assert dict(mpl.rcParams) == usual
        assert mpl.rcParams["text.usetex"]
