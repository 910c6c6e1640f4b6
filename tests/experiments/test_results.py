"""The committed results: complete, described, and quoted as the tables say."""

import atexit
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import layout
import pytest
import quotes

from bptt_study.report import csv_tables, figure_layout
from bptt_study.runner import gather

CHECKOUT = Path(__file__).parents[2]


def committed() -> Path:
    """results/ and README.md as committed: `make study` writes new ones, with other seconds, over them."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    git = ["git", "-C", CHECKOUT, "archive", "HEAD", "results", "README.md"]
    try:
        archive = subprocess.run(git, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no checkout: an unpacked source archive
        return CHECKOUT
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


RESULTS = committed() / "results"
STUDIES = sorted(f.parent.name for f in RESULTS.glob("*/table.csv"))


def quoted():
    for file in quotes.readmes(RESULTS):
        for number, where in quotes.QUOTE.findall(file.read_text(encoding="utf-8")):
            yield pytest.param(number, where, id=f"{number} {where}")


@pytest.mark.parametrize(("number", "where"), list(quoted()))
def test_quoted_numbers_are_in_the_table(number, where):
    assert quotes.now(RESULTS, number, where) == number.replace("−", "-")


def test_stale_numbers_are_written_anew_and_named(tmp_path):
    where = "s/t: a=1: x"
    (tmp_path / "results" / "s").mkdir(parents=True)
    (tmp_path / "results" / "s" / "t.csv").write_text("a,x\n1,0.126\n2,5\n")
    file = tmp_path / "README.md"
    file.write_text(f"now 0.25<!--{where}-->, new ?.?<!--{where}-->, gone 7<!--s/t: a=3: x-->")
    changed = quotes.requote(tmp_path / "results")
    assert (
        file.read_text()
        == f"now 0.13<!--{where}-->, new 0.1<!--{where}-->, gone 7<!--s/t: a=3: x-->"
    )
    assert "0.25 -> 0.13" in changed[0]
    assert "cannot be looked up: a=3 selects 0 rows" in changed[2]
    assert len(quotes.requote(tmp_path / "results")) == 1


def test_numbers_are_quoted_at_all():
    assert len(list(quoted())) >= 10


@pytest.mark.parametrize("name", STUDIES)
def test_every_file_is_described_and_every_described_file_is_there(name):
    readme = (RESULTS / name / "README.md").read_text(encoding="utf-8")
    assert f"experiment={name}" in readme
    for file in (RESULTS / name).iterdir():
        stem = file.stem.removesuffix(".csv")
        assert f"`{stem}." in readme or file.name == "README.md", file.name
    for file in re.findall(r"`([\w.]+\.(?:csv|gz|png|svg))`", readme):
        assert (RESULTS / name / file).is_file(), file


def test_every_study_is_in_the_index():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    described = sorted(f.parent.name for f in RESULTS.glob("*/README.md"))
    assert sorted(re.findall(r"\]\((\w+)/README\.md\)", index)) == described
    assert set(STUDIES) <= set(described)


@pytest.mark.parametrize("name", STUDIES)
def test_figures_can_be_drawn_from_the_committed_tables(name, tmp_path, monkeypatch):
    figures = []

    def keep(figure, folder, name):  # the layout, and no file: `covered` draws what was laid out
        figures.append(figure)
        return [folder / f"{name}.{kind}" for kind in ("png", "svg")]

    monkeypatch.setattr(figure_layout, "save", keep)
    for table in (RESULTS / name).glob("*.csv*"):
        shutil.copy(table, tmp_path)
    drawn = {file.name for file in gather.draw(name, tmp_path)}
    assert drawn == {f.name for f in (RESULTS / name).iterdir() if f.suffix in (".png", ".svg")}
    covered = [layout.covered(figure) for figure in figures]
    if name != "bias_variance":  # whose numbers stand on the lines that they belong to
        assert covered == [[]] * len(figures)


def test_the_headline_is_what_it_must_be():
    """Full, fixed and randomized on text and digits, 5 seeds and more, learned and finished."""
    table = csv_tables.read_table(RESULTS / "compare_strategies" / "summary.csv")
    for task in ("char_lm", "digits"):
        part = table[table["task"] == task]
        assert {"full", "fixed", "randomized"} <= set(part["strategy"])
        assert (part["n"] >= 5).all()
        assert part["learned"].all()
    text = table[table["task"] == "char_lm"]
    assert (text["validation_loss_high"] < text["bigram_loss"]).any()
    digits = table[(table["task"] == "digits") & (table["strategy"] == "full")]
    assert (digits["accuracy_low"] > 0.8).all()
