"""Files are what is looked at here; the tests of `report/` and `experiments/` draw the pictures."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="module", autouse=True)
def blank_figures():
    """Every figure of a sweep is made and saved to its files, but neither laid out nor painted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw_without_rendering", lambda figure: None)
        patch.setattr(Figure, "savefig", lambda figure, file, **settings: file.write(b"blank"))
        yield
