"""Files are what is looked at here; the tests of `report/` and `experiments/` draw the pictures."""

import pytest
from matplotlib.figure import Figure

from bptt_study.report import figure_layout

BLANK = {
    (Figure, "draw_without_rendering"): lambda figure: None,
    (Figure, "savefig"): lambda figure, file, **settings: file.write(b"blank"),
    (figure_layout, "_indexed"): lambda picture: picture.getvalue(),
}
PAINTED = {place: getattr(*place) for place in BLANK}


def patched(patch, functions):
    for place, function in functions.items():
        patch.setattr(*place, function)


@pytest.fixture(scope="module", autouse=True)
def blank_figures():
    """Every figure of a sweep is made and saved to its files, but neither laid out nor painted."""
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, BLANK)
        yield


@pytest.fixture
def painted_figures(monkeypatch):
    """They are, as in another process."""
    patched(monkeypatch, PAINTED)
