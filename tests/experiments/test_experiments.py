"""Every experiment draws its figures from its tables alone: complete, legible, the same each time."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import layout
import numpy as np
import pandas as pd
import pytest
import studies
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from bptt_study.report import figure_layout, plots
from bptt_study.report.study import question
from bptt_study.runner import stories

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Each experiment's tables."""
    rows, networks = studies.headline(), studies.networks()
    base = tmp_path_factory.mktemp("results")
    verdict = studies.write(base / "book_verdict", **studies.verdict())
    studies.make_tables("book_verdict", verdict)
    return {
        "book_verdict": verdict,
        "compare_strategies": studies.write(
            base / "compare_strategies", table=rows, cuts=studies.text_cuts(rows)
        ),
        "gradient_norms": studies.write(
            base / "gradient_norms", table=networks, norms=studies.norms(networks)
        ),
        "influence_balancing": studies.write(base / "influence_balancing", **studies.balancing()),
        "online_descents": studies.write(base / "online_descents", **studies.descents()),
    }


FIGURES = {
    "book_verdict": ["reason_1_reach", "reason_1_window", "reason_2_variance", "reason_3_gap"],
    "compare_strategies": [
        "cuts",
        "differences",
        "final_scores",
        "learning_curves_tokens",
    ],
    "gradient_norms": ["gradient_norms_end", "gradient_norms_start"],
    "influence_balancing": ["learning_curves", "slopes", "thresholds"],
    "online_descents": ["estimators"],
}
SAID = {  # which data, network and seeds, by the figures of each experiment that show seeds
    "book_verdict": ("stdlib_docs", "8 units", " seeds; diverged: "),
    "compare_strategies": ("stdlib_docs", "8 units", " seeds; diverged: "),
    "gradient_norms": ("stdlib_docs", "8 units", " seeds; diverged: "),
    "influence_balancing": (" seeds",),
    "online_descents": (" seeds",),
}
WITHOUT_SEEDS = ("cuts", "slopes")


@pytest.fixture(scope="module")
def drawn(folders) -> dict[str, dict[str, Figure]]:
    """The figures of each experiment, by name, and their files in the experiment's folder."""
    found: dict[str, dict[str, Figure]] = {}
    saved = figure_layout.save
    with pytest.MonkeyPatch.context() as patch:
        for experiment, folder in folders.items():
            figures: dict[str, Figure] = {}

            def save(figure: Figure, folder: Path, name: str, figures=figures) -> list[Path]:
                figures[name] = figure
                return saved(figure, folder, name)

            patch.setattr(figure_layout, "save", save)
            files = studies.draw(experiment, folder)
            assert sorted(files) == sorted(folder.glob("*.png"))
            found[experiment] = figures
    return found


@pytest.mark.parametrize("experiment", sorted(file.stem for file in EXPERIMENTS.glob("*.py")))
def test_every_study_has_a_question_and_figures(experiment):
    story = stories.shipped(experiment)
    assert question(story)[-1] in "?.", question(story)
    assert story.figures


def test_all_figures_are_drawn(drawn, folders):
    for experiment, names in FIGURES.items():
        assert sorted(drawn[experiment]) == names
        for name in names:
            assert (folders[experiment] / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_indexed_picture_looks_like_the_figure(drawn):
    """256 colours are enough: no pixel is off by a tenth, white is white, and the file is small."""
    exact = io.BytesIO()
    drawn["compare_strategies"]["learning_curves_tokens"].savefig(exact, format="png")
    indexed = figure_layout._indexed(exact)
    before, after = (
        np.asarray(Image.open(picture).convert("RGB"), int)
        for picture in (exact, io.BytesIO(indexed))
    )
    assert np.abs(before - after).max() < 25
    assert (after[0, 0] == 255).all()
    assert len(indexed) < len(exact.getvalue()) / 2


def test_svg_on_demand(folders, tmp_path):
    with figure_layout.write_as("svg"):
        (file,) = figure_layout.save(figure_layout.figure(1, 1, (4, 3), "", "")[0], tmp_path, "a")
    assert file.name == "a.svg"
    assert "<svg" in file.read_text(encoding="utf-8")


def test_each_figure_says_what_it_shows(drawn):
    for experiment, figures in drawn.items():
        for name, figure in figures.items():
            for ax in figure.axes:
                assert ax.get_xlabel() or not ax.xaxis.get_tick_params()["labelbottom"], name
            labelled = [
                ax.get_ylabel() or any(t.get_text() for t in ax.get_yticklabels())
                for ax in figure.axes
            ]
            assert labelled[0] or name == "cuts"
            said = layout.words(figure)
            for what in SAID[experiment]:
                assert what in said or (name in WITHOUT_SEEDS and "seeds" in what), name
    assert "1 of 3 Randomized (constant law) 4" in layout.words(
        drawn["compare_strategies"]["final_scores"]
    )


def test_figures_can_be_read(drawn):
    for figures in drawn.values():
        for figure in figures.values():
            layout.legible(figure)


def test_full_is_in_every_panel_and_each_line_in_its_own(drawn):
    of = drawn["compare_strategies"]
    counts = [
        len([n for n in ax.lines if len(n.get_xdata()) == 3])
        for ax in of["learning_curves_tokens"].axes
    ]
    assert counts == [3, 3, 2, 1, 2, 1]  # text, digits' loss and accuracy at lengths 4 and 16
    for figure in drawn["gradient_norms"].values():
        titles = [ax.get_title() for ax in figure.axes]
        assert titles == ["elman, spectral radius 0.7", "elman, spectral radius 1.3", "gru"] * 2
        assert [len(ax.lines) for ax in figure.axes] == [2] * 3 + [3] * 3  # over the lag one ends


def test_a_strategy_has_one_colour_in_all_panels_and_figures(kept, tmp_path):
    """Two of one's own, of which no panel has both."""
    mine = {"strategy": "mine", "mean_length": 4, "truncation_length": 4}
    other = {"strategy": "other", "mean_length": 16, "truncation_length": 16}
    losses = [[3.0, 2.0, 1.5]] * 2
    runs = [
        studies.run("a", studies.TEXT | mine, losses),
        studies.run("b", studies.TEXT | other, losses),
    ]
    studies.draw("compare_strategies", studies.write(tmp_path / "own", table=pd.concat(runs)))
    tokens, scores = kept.values()
    curves = [
        to_hex(next(n for n in ax.lines if len(n.get_xdata()) == 3).get_color())
        for ax in tokens.axes
    ]
    assert curves[0] != curves[1]
    for figure in (tokens, scores):
        assert [to_hex(n.get_color()) for n in figure.legends[0].get_lines()] == curves
    assert [to_hex(n.get_color()) for n in scores.axes[0].lines[:2]] == curves


def test_before_and_after_training_are_different_figures(drawn):
    start, end = (drawn["gradient_norms"][f"gradient_norms_{m}"] for m in ("start", "end"))
    assert start.axes[0].lines[0].get_ydata()[0] == 0.75
    assert end.axes[0].lines[0].get_ydata()[0] == 1.5
    assert "before training" in layout.words(start)
    assert "after 10 updates" in layout.words(end)


def test_balancing_shows_agreement_and_its_lack(drawn):
    figures = drawn["influence_balancing"]
    assert "agree in 4 of 8 rows" in layout.words(figures["thresholds"])
    assert [ax.get_title() for ax in figures["slopes"].axes] == [
        "23 states, 10 of them +1",
        "9 states, 3 of them +1",
    ]
    law = "randomized_power_law_uncompensated"
    names = ("fixed", "sliding", "randomized_uncompensated", law)
    shown = figures["slopes"].axes[0].lines[: len(names)]
    assert {to_hex(line.get_color()) for line in shown} == {
        to_hex(plots.LOOKS[name].color) for name in names
    }
    shown = [text.get_text() for text in figures["learning_curves"].legends[0].get_texts()]
    assert shown == [
        "chunks of 10: diverged",
        "chunks of 200: converged",
        "random cuts, mean 16: converged",
    ]


@pytest.mark.slow
def test_redrawing_gives_the_same_bytes_without_jax_or_display(drawn, folders, tmp_path):
    """By the command, in a new process."""
    code = """import sys
from bptt_study.runner import figures
figures.main(['--only-figures', *sys.argv[1:]])
assert 'jax' not in sys.modules, 'jax was imported'
import matplotlib.pyplot
assert not matplotlib.pyplot.get_fignums()"""
    again = [tmp_path / experiment for experiment in folders]
    for folder in again:
        left_out = shutil.ignore_patterns("*.png")
        shutil.copytree(folders[folder.name], folder, ignore=left_out)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, again)],
        env={k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert len(files) == sum(map(len, FIGURES.values()))
    for file in files:
        assert file.read_bytes() == (folders[file.parent.name] / file.name).read_bytes(), file.name


def test_a_study_without_cuts_or_norms_draws_what_it_has(tmp_path):
    rows = studies.run("a", studies.DIGITS | studies.FULL, [[2.0, 1.0]] * 2)
    folder = studies.write(tmp_path / "own", table=rows)
    names = {file.stem for file in studies.draw("compare_strategies", folder)}
    assert names == {"learning_curves_tokens", "final_scores"}
    assert studies.draw("gradient_norms", folder) == []


@pytest.mark.parametrize(
    ("script", "argument"), [("benchmark/sweep", "--help"), ("benchmark/sweep", "--smol")]
)
def test_a_script_says_what_it_takes_and_does_nothing(script, argument, tmp_path):
    done = subprocess.run(
        [sys.executable, EXPERIMENTS / f"{script}.py", argument],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if argument == "--help" else 2)
    assert f"usage: {Path(script).name}.py [-h]" in done.stdout + done.stderr


def test_a_difference_has_the_settings_of_both_runs(monkeypatch, tmp_path):
    """The caption had those of the others, and full BPTT at another rate was compared without a word."""
    runs = [
        studies.run(
            "a", studies.TEXT | studies.FULL | {"learning_rate": 0.003}, [[3.0, 2.0, 1.0]] * 2
        ),
        studies.run(
            "b", studies.TEXT | studies.fixed(4) | {"learning_rate": 0.3}, [[3.0, 2.0, 1.1]] * 2
        ),
    ]
    figures = {}
    monkeypatch.setattr(
        figure_layout, "save", lambda figure, folder, name: figures.update({name: figure}) or []
    )
    studies.draw("compare_strategies", studies.write(tmp_path / "own", table=pd.concat(runs)))
    for name in ("differences", "learning_curves_tokens"):
        said = figures[name].texts[1].get_text().replace("\n", " ")
        assert "Also different: learning_rate." in said, name


def test_differences_to_full_are_paired_by_seed(monkeypatch, tmp_path):
    """The median of differences, 0.2; that of the medians would be 0.3."""
    full = [[3.0, 2.0, last] for last in (1.0, 1.2, 1.4)]
    fixed = [[3.0, 2.0, last] for last in (1.1, 1.5, 1.6)]
    runs = [
        studies.run("a", studies.TEXT | studies.FULL | {"strategy": "full"}, full),
        studies.run("b", studies.TEXT | studies.fixed(4), fixed),
    ]
    figures = {}
    monkeypatch.setattr(
        figure_layout, "save", lambda figure, folder, name: figures.update({name: figure}) or []
    )
    studies.draw("compare_strategies", studies.write(tmp_path / "own", table=pd.concat(runs)))
    lines = [line.get_ydata() for line in figures["differences"].axes[0].lines]
    ends = [round(float(y[-1]), 9) for y in lines]
    assert sorted(ends) == [0, 0.2]
