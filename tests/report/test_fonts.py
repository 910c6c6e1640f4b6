"""Letters beyond DejaVu's reach: drawn with a font of the machine, or the figure says so once."""

import warnings

import layout
import pytest
import studies
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.font_manager import findfont

from bptt_study.report import figure_layout, fonts, sweep_figures

CHINESE, EMOJI = "中文.txt", "🫠.txt"
LOSSES = [[3.0, 2.0], [3.0, 2.1]]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine whose fonts are the list that this returns, beside those of matplotlib."""
    found: list[str] = []
    own = [f for f in font_manager.fontManager.ttflist if "matplotlib" in f.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    font_manager.fontManager._findfont_cached.cache_clear()
    fonts._covering.cache_clear()
    yield found
    font_manager.fontManager._findfont_cached.cache_clear()
    fonts._covering.cache_clear()


@pytest.fixture
def chinese(tmp_path) -> str:
    """The file of a font in which 中 and 文 look like A and B."""
    font = TTFont(findfont("DejaVu Sans"))
    for table in font["cmap"].tables:
        table.cmap = {ord("中"): "A", ord("文"): "B"}
    for record in font["name"].names:
        record.string = record.toUnicode().replace("DejaVu Sans", "Chinese")
    font.save(tmp_path / "chinese.ttf")
    return str(tmp_path / "chinese.ttf")


def drawn(tmp_path, monkeypatch, *corpora):
    """The figure of a study of these texts, with the warnings of matplotlib as errors."""
    kept = []
    saved = figure_layout._saved
    monkeypatch.setattr(
        figure_layout, "_saved", lambda figure, *to: kept.append(figure) or saved(figure, *to)
    )
    runs = [
        studies.run(f"r{i}", studies.TEXT | studies.FULL | {"corpus": c}, LOSSES)
        for i, c in enumerate(corpora)
    ]
    table = studies.pd.concat(runs).assign(study="own")
    left_out = sweep_figures.draw(studies.write(tmp_path / "own", table=table)).left_out
    assert not [line for line in left_out if "no setting that varies" not in line]
    return kept[0]


def said(figure) -> list[str]:
    return [text.get_text() for text in figure.texts if "No font" in text.get_text()]


def test_letters_are_drawn_with_a_font_of_the_machine(tmp_path, monkeypatch, machine, chinese):
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    machine += [str(tmp_path / "damaged.ttf"), chinese]
    figure = drawn(tmp_path, monkeypatch, CHINESE, "b.txt")
    assert said(figure) == []
    assert "Chinese" in figure.axes[0].title.get_fontfamily()


@pytest.mark.slow
def test_a_figure_says_once_which_letters_no_font_has(tmp_path, monkeypatch, machine, chinese):
    figure = drawn(tmp_path, monkeypatch, CHINESE, EMOJI)
    assert said(figure) == [
        "No font on this machine has U+4E2D, U+6587, U+1FAE0: a box stands for each."
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        layout.check(figure)
    machine.append(chinese)
    fonts._covering.cache_clear()
    (tmp_path / "other").mkdir()
    figure = drawn(tmp_path / "other", monkeypatch, CHINESE, EMOJI)
    assert said(figure) == ["No font on this machine has U+1FAE0: a box stands for each."]


def test_letters_of_dejavu_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", None)
    figure = drawn(tmp_path, monkeypatch, "Äpfel ☺ ру́сский عربى.txt", "b.txt")
    assert said(figure) == []
