"""The page of a study: whole, safe, readable without a network."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import studies

from bptt_study.report.csv_tables import TABLE, read_rows, write_table
from bptt_study.runner import page, run_folder
from bptt_study.validation import SettingError

pytest.importorskip("jinja2")


class Parts(HTMLParser):
    """The elements that are open, and the attributes and texts that were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(file: Path) -> Parts:
    parts = Parts()
    parts.feed(file.read_text(encoding="utf-8"))
    parts.close()
    assert parts.open == []
    return parts


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = studies.headline().assign(study="own", diverged_at=np.nan)
    made = studies.write(tmp_path / "own", table=rows)
    summary = rows.drop_duplicates("run")[["run", "strategy"]]
    write_table(
        summary.assign(validation_loss=[np.inf, 9, 10, np.nan, 2, 1, 0]), made / "summary.csv"
    )
    (made / "README.md").write_text(
        "# Own\n\n<!-- made -->\n\n**Full** <wins> by *0.3* ([words](../README.md#words)).\n\n| a |\n|---|\n"
    )
    (made / "scores.png").write_bytes(b"\x89PNG")
    (made / "unfinished.txt").write_text("unfinished: 3 of 4 runs\n")
    return made


def test_the_page_of_a_folder_whose_name_is_no_utf_8(folder):
    (file,) = page.write(folder.rename(os.fsdecode(os.fsencode(folder.parent) + b"/r\xff")))
    assert "r\\udcff" in file.read_text(encoding="utf-8")


def test_a_page_holds_what_a_reader_needs(folder):
    (file,) = page.write(str(folder))
    parts = parsed(file)
    for said in (
        "Full <wins> by 0.3 (words).",
        "summary.csv",
        "unfinished: 3 of 4 runs",
        "0 1 2",
        "none is recorded",
    ):
        assert said in parts.text  # fmt: skip
    assert "<!--" not in file.read_text()
    images = [found["src"] for tag, found in parts.seen if tag == "img"]
    assert images == ["data:image/png;base64,iVBORw=="]
    heads = [tag for tag, _ in parts.seen if tag == "th"]
    assert len(heads) > 6


def test_a_page_has_the_figure_that_was_drawn_last(folder):
    """An older picture of the other format stood beside new tables, and one of svg alone not at all."""

    def images():
        page.main([str(folder)])
        return [seen["src"] for tag, seen in parsed(folder / page.PAGE).seen if tag == "img"]

    png, svg = "data:image/png;base64,iVBORw==", "data:image/svg+xml;base64,PHN2Zy8+"
    for name, time, shown in (("scores", 2, [svg]), ("scores", 0, [png]), ("other", 1, [svg, png])):
        (folder / f"{name}.svg").write_text("<svg/>")
        os.utime(folder / f"{name}.svg", (time, time))
        os.utime(folder / "scores.png", (1, 1))
        assert images() == shown
        (folder / f"{name}.svg").unlink()


def test_a_page_needs_no_other_file(folder):
    page.write(folder)
    parts = parsed(folder / page.PAGE)
    links = [
        value for _, found in parts.seen for name, value in found.items() if name in ("src", "href")
    ]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://|@import|url\(", (folder / page.PAGE).read_text())


def test_an_experiment_brings_its_question(folder):
    study = folder.rename(folder.with_name("compare_strategies"))
    page.write(study)
    text = " ".join(parsed(study / page.PAGE).text.split())
    assert "Question. The headline: what does each way of truncating cost" in text
    assert "bptt-study -m experiment=compare_strategies" in text


def test_the_command_of_an_experiment_has_its_environment(folder):
    """Runs in float64 are other runs. Control: without an environment the command stands alone."""
    rows = read_rows(folder)
    assert page._commands(folder, "mine", rows) == ["bptt-study -m experiment=mine"]
    rows = rows.assign(environment='{"enable_x64": true, "xla_flags": ["--a=1", "--b=2"]}')
    (command,) = page._commands(folder, "mine", rows)
    assert command == "JAX_ENABLE_X64=True XLA_FLAGS='--a=1 --b=2' bptt-study -m experiment=mine"
    for edited in ("{", "[]", "3"):
        rows = rows.assign(environment=edited)
        assert page._commands(folder, "mine", rows) == ["bptt-study -m experiment=mine"]


def test_half_a_character_of_a_command_is_on_the_page(folder, monkeypatch):
    """As an argument has it that is not UTF-8."""
    monkeypatch.setattr(page, "_commands", lambda *_: ["bptt-study task.path=\udcff"])
    page.write(folder)
    assert r"task.path=\udcff" in (folder / page.PAGE).read_text(encoding="utf-8")


def test_a_sweep_of_ones_own_is_not_the_experiment_of_its_name(folder):
    """Its sweep is noted, and has no experiment."""
    named = folder.rename(folder.with_name("gradient_norms"))
    assert page.question(named).startswith("How far does the gradient reach?")
    run_folder.Sweep(named.parent, named.name, None, {}).save()
    assert page.question(named) == ""


def test_settings_that_change_together_are_named_below_the_runs(folder):
    said = "Also different: learning_rate."
    assert said not in parsed(page.write(folder)[0]).text
    rows = read_rows(folder)
    write_table(
        rows.assign(learning_rate=rows["strategy"].map({"full": 0.03}).fillna(0.003)),
        folder / TABLE,
    )
    assert said in parsed(page.write(folder)[0]).text


@pytest.mark.parametrize("name", ["learning_rate", "length", "optimizer.own"])
def test_close_settings_are_told_apart_and_measured_numbers_are_short(folder, name):
    table = pd.DataFrame({name: [0.0012345671, 0.0012345679], "validation_loss": [1.23456, 2.0]})
    write_table(table, folder / "summary.csv")
    (file,) = page.write(str(folder))
    cells = re.findall("<td.*?>(.*?)</td>", file.read_text(encoding="utf-8"))
    assert cells[:4] == ["0.0012345671", "1.235", "0.0012345679", "2"]


def test_an_index_lists_the_studies(folder):
    shutil.copytree(folder, folder.with_name("second"))
    pages = page.write(folder.parent)
    assert [file.parent.name for file in pages[:2]] == ["own", "second"]
    parts = parsed(pages[2])
    assert [found["href"] for tag, found in parts.seen if tag == "a"] == [
        "own/report.html",
        "second/report.html",
    ]


def test_a_damaged_study_keeps_no_page_from_the_others(folder):
    """The index lists those that can be read."""
    shutil.copytree(folder, folder.with_name("damaged"))
    (folder.with_name("damaged") / "table.csv.gz").write_bytes(b"")
    (folder / "README.md").write_bytes(b"# Own\n\nCaf\xe9")
    with pytest.raises(SettingError, match="damaged"):
        page.write(folder.parent)
    assert "Caf\ufffd" in parsed(folder / "report.html").text
    parts = parsed(folder.parent / "report.html")
    assert [found["href"] for tag, found in parts.seen if tag == "a"] == ["own/report.html"]


def test_a_folder_without_a_study_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        page.main([str(tmp_path)])
    assert "`FOLDER` must be the folder of a study with a table.csv.gz" in capsys.readouterr().err


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
def test_a_browser_sorts_the_tables_and_complains_of_nothing(folder, tmp_path):
    """Numbers by value, infinity last, missing values always last; nothing is wider than a phone."""
    (file,) = page.write(folder)
    sort = """<script>
    const table = document.querySelector("table"), button = table.tHead.rows[0].cells[2].firstChild;
    const shown = () => [...table.tBodies[0].rows].map(row => row.cells[2].textContent).join();
    button.click(); document.title = shown(); button.click(); document.title += " | " + shown();
    document.title += " | " + (document.documentElement.scrollWidth <= innerWidth);
    </script></body>"""
    tried = tmp_path / "tried.html"
    tried.write_text(file.read_text().replace("</body>", sort))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--dump-dom",
         "--enable-logging=stderr", tried.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>0,1,2,9,10,inf, | inf,10,9,2,1,0, | true</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
