"""Files are what is looked at here; the tests of `report/` and `experiments/` draw the pictures."""

import pytest
from matplotlib.figure import Figure

PAINTED = {name: getattr(Figure, name) for name in ("draw_without_rendering", "savefig")}
BLANK = {
    "draw_without_rendering": lambda figure: None,
    "savefig": lambda figure, file, **settings: file.write(b"blank"),
}


@pytest.fixture(scope="module", autouse=True)
def blank_figures():
    """Every figure of a sweep is made and saved to its files, but neither laid out nor painted."""
    with pytest.MonkeyPatch.context() as patch:
        for name, blank in BLANK.items():
            patch.setattr(Figure, name, blank)
        yield


@pytest.fixture
def painted_figures(monkeypatch):
    """They are, as in another process."""
    for name, painted in PAINTED.items():
        monkeypatch.setattr(Figure, name, painted)
