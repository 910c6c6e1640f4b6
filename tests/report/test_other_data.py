"""Runs on different data share no panel, no reference score and no aggregate, whatever tells them apart."""

import numpy as np
import pandas as pd
import pytest
import studies
from matplotlib.figure import Figure

from bptt_study.report import columns, plots, sweep_figures, tables
from bptt_study.runner import figures, stories
from bptt_study.validation import SettingError

LOSSES = [[3.4, 2.4, 2.0], [3.4, 2.5, 2.1], [3.4, 2.6, 2.2]]
KNOWN = {"uniform_loss": 2.31, "unigram_loss": 2.22, "bigram_loss": 2.13, "chance_accuracy": 0.53}
OTHER = {name: round(value + 0.05, 2) for name, value in KNOWN.items()}
PLACES = [
    {"corpus": "a.txt", "corpus_sha256": str(i) * 64, "path": f"{folder}/a.txt"}
    for i, folder in enumerate(("one", "two"))
]
X64 = '{"enable_x64": true}'
PAIRS = {  # the settings of two runs on different data, and what names the difference
    "corpora": ([{"corpus": "a.txt"}, {"corpus": "b.txt"}], "b.txt"),
    "alphabets": ([{"alphabet": "letters"}, {"alphabet": "all"}], "alphabet all"),
    "orders": ([studies.DIGITS | {"order": o} for o in ("rows", "permuted")], "order permuted"),
    "paragraphs": ([{"distinct": False}, {"distinct": True}], "distinct True"),
    "files of one name": (PLACES, "path two/a.txt"),
    "one changed file": ([place | {"path": "a.txt"} for place in PLACES], "1" * 12),
    "alphabets that follow from the strategy": (
        [{"alphabet": "letters"} | studies.FULL, {"alphabet": "all"} | studies.fixed(4)],
        "alphabet all",
    ),
    "float64 and float32": ([{"environment": X64}, {}], "no environment"),
    "float64 that follows from the strategy": (
        [studies.FULL | {"environment": X64}, studies.fixed(4)],
        "no environment",
    ),
}


def study(pair) -> pd.DataFrame:
    """Full and fixed on each of the data, or one run on each if the pair names the strategies."""
    runs = [
        studies.run(
            f"{i}{strategy['strategy']}", studies.TEXT | strategy | settings | known, LOSSES
        )
        for i, (settings, known) in enumerate(zip(pair, (KNOWN, OTHER), strict=True))
        for strategy in ([{}] if "strategy" in settings else [studies.FULL, studies.fixed(4)])
        for strategy in [{"strategy": "", **strategy}]
    ]
    return pd.concat(runs, ignore_index=True).assign(study="own")


def check(figure, named: str) -> None:
    """Each panel has the reference lines of one of the data alone, and a title of its own."""
    panels = [ax for ax in figure.axes if "loss" in ax.get_ylabel()]
    titles = [ax.get_title() for ax in panels]
    assert len(set(titles)) == len(titles) == 2
    assert named in titles[1].replace("\n", " ") + titles[1].replace("\n", "")
    for ax, known in zip(panels, (KNOWN, OTHER), strict=True):
        lines = [line for line in ax.lines if line.get_color() == plots.REFERENCE["color"]]
        assert {line.get_ydata()[0] for line in lines} <= set(known.values())
        names = zip(("chance", "1-gram", "2-gram"), known.values(), strict=False)
        said = {text.get_text().strip("↑↓ ") for text in ax.texts}
        assert said == {f"{name} {value:.2f}" for name, value in names}


@pytest.mark.parametrize("name", PAIRS)
def test_different_data_have_panels_and_reference_scores_of_their_own(name, kept, tmp_path):
    pair, named = PAIRS[name]
    folder = studies.write(tmp_path / "own", table=study(pair))
    assert sweep_figures.draw(folder).left_out == [] or "strategy" in name
    check(kept["learning_curves_validation_loss"], named)
    kept.clear()
    made = figures.make(stories.shipped("compare_strategies"), folder)
    assert not made.failed
    assert "figure cuts: there is no table cuts" in made.left_out
    check(kept["final_scores"], named)


def test_seeds_in_float32_and_float64_are_no_pairs(kept, tmp_path):
    """A seed draws other weights and data there. Control: in one environment they are pairs."""
    rows = study(PAIRS["float64 that follows from the strategy"][0])
    for name, pairs in (("two", False), ("one", True)):
        folder = studies.write(tmp_path / name, table=rows)
        made = figures.make(stories.shipped("compare_strategies"), folder)
        said = "figure differences: there is no run beside full BPTT of the same network"
        assert ("differences" in kept, said in made.left_out) == (pairs, not pairs)
        rows["environment"] = X64


@pytest.mark.parametrize("name", PAIRS)
def test_the_printed_summary_has_a_line_for_each(name):
    rows = study(PAIRS[name][0])
    summary = tables.summary(rows)
    lines = tables.as_text(summary, studies.costs(rows)).partition("Reference validation losses:\n")
    own, other = lines[2].splitlines()
    assert "chance 2.310, 1-gram 2.220" in own and "chance 2.360, 1-gram 2.270" in other
    assert own.partition(":")[0] != other.partition(":")[0]


@pytest.mark.parametrize(
    ("loss", "printed", "drawn"),
    [
        (1.386e-30, "1.4e-30", "1.4e-30"),
        (0.0136, "0.014", "0.014"),
        (0.00136, "0.0014", "0.0014"),
        (0.693, "0.693", "0.69"),
        (0.0, "0.000", "0.00"),
        (1.386e30, "1.386e+30", "1.386e+30"),
    ],
)
def test_reference_losses_small_and_large_have_few_digits(loss, printed, drawn):
    rows = study(PAIRS["corpora"][0]).assign(uniform_loss=loss)
    said = tables.as_text(tables.summary(rows), studies.costs(rows))
    assert f"chance {printed}" in said
    ax = plots.references({"chance": loss}, Figure().subplots())
    assert [text.get_text().split()[-1] for text in ax.texts] == [drawn]


def test_a_panel_that_mixes_data_by_wish_has_no_reference_score_of_one_of_them(kept, tmp_path):
    folder = studies.write(
        tmp_path / "own", table=study(PAIRS["corpora"][0]).assign(uniform_loss=2.3)
    )
    sweep_figures.draw(folder, hue="corpus")
    (ax,) = kept["learning_curves_validation_loss"].axes
    assert [text.get_text() for text in ax.texts] == ["chance 2.30"]


def test_lags_share_a_panel_and_the_lines_that_they_share(kept, tmp_path):
    rows = study([{"lag": 3.0}, {"lag": 5.0}]).assign(task="copy", uniform_loss=2.3)
    sweep_figures.draw(studies.write(tmp_path / "own", table=rows), style="lag")
    (ax,) = kept["learning_curves_validation_loss"].axes
    assert [text.get_text() for text in ax.texts] == ["chance 2.30"]
    same = rows.assign(unigram_loss=np.nan, bigram_loss=np.nan)
    text = tables.as_text(tables.summary(same), studies.costs(same))
    assert "copy, lag 3; copy, lag 5: chance 2.300 nats" in text


@pytest.mark.parametrize("name", PAIRS)
def test_a_study_that_has_one_panel_a_task_refuses_different_data(name):
    rows = study(PAIRS[name][0])
    with pytest.raises(SettingError, match=r"must be the same in all runs of one task; got .*, "):
        tables.same_data(rows)
    one = rows[rows["run"].str.startswith("0")]
    assert tables.same_data(one) is one
    other = studies.run("d", studies.DIGITS | studies.FULL | {"task": "mine"}, LOSSES)
    tables.same_data(pd.concat([one, other]))


def test_one_text_at_two_paths_is_the_same_data():
    rows = study([place | {"corpus_sha256": "0" * 64} for place in PLACES])
    assert tables.data(rows) == []
    assert tables.same_data(rows) is rows


@pytest.mark.parametrize(
    "experiment", ["bias_variance", "estimator_errors", "alignment", "book_verdict", "add_task"]
)
def test_then_it_has_the_figures_of_any_sweep(experiment, kept, tmp_path):
    folder = studies.write(tmp_path / "own", table=study(PAIRS["alphabets"][0]))
    for name in ("estimator_quality", "alignment", "lag_mass", "bit_responses"):
        (folder / f"{name}.csv.gz").write_bytes(b"")  # the probe looked
    made = figures.make(stories.shipped(experiment), folder)
    assert "`alphabet` must be the same in all runs of one task" in made.left_out[0]
    assert not made.failed
    assert "learning_curves_validation_loss" in kept


@pytest.mark.parametrize("experiment", ["compare_strategies", "gradient_norms"])
def test_a_study_refuses_runs_that_its_strategies_and_lengths_do_not_tell_apart(
    experiment, kept, tmp_path
):
    same = studies.TEXT | studies.randomized(4)
    rows = pd.concat([studies.run(f"r{n}", same | {"draws": n}, LOSSES) for n in (1, 4)])
    apart = [rows.assign(learning_rate=rate) for rate in (0.1, 0.2)]
    rates = [part[part["draws"] == 1].assign(run=f"l{i}") for i, part in enumerate(apart)]
    for name, table in (("draws", rows), ("rates", pd.concat(rates))):
        norms = studies.norms(table.assign(window=4))
        folder = studies.write(tmp_path / name, table=table.assign(study="own"), norms=norms)
        made = figures.make(stories.shipped(experiment), folder)
        refused = [line for line in made.left_out if line.startswith("`draws` must be the same")]
        assert len(refused) == (name == "draws") and not made.failed


def test_gradient_norms_at_the_end_are_those_of_each_run(kept, tmp_path):
    """A run with fewer updates is in the figure, and one that was looked at before training alone is not."""
    runs = [
        studies.run(n, studies.TEXT | studies.FULL | {"hidden": h}, LOSSES)
        for h, n in enumerate("abc")
    ]
    rows = pd.concat(runs)
    norms = studies.norms(rows.assign(window=3))
    late = norms["update"] > 0
    norms.loc[late & (norms["run"] == "a"), "update"] *= 2
    norms = norms[~late | (norms["run"] != "c")]
    folder = studies.write(tmp_path / "own", table=rows.assign(study="own"), norms=norms)
    assert not figures.make(stories.shipped("gradient_norms"), folder).failed
    start, end = kept["gradient_norms_start"], kept["gradient_norms_end"]
    assert [len(figure.axes) for figure in (start, end)] == [6, 4]
    assert "after 10 to 20 updates" in end.texts[0].get_text().replace("\n", " ")
    assert "before training" in start.texts[0].get_text().replace("\n", " ")


def test_the_length_of_the_copy_task_is_no_truncation_length(kept, tmp_path):
    """Two words, in tables, summaries and figures."""
    row = columns.settings({"task": "copy"}, {"task": {"length": 2, "lag": 4}})
    assert row == {"task": "copy", "task.length": 2, "lag": 4}
    copy = studies.TEXT | {"task": "copy", "corpus": None}
    rows = pd.concat(
        studies.run(f"{length}{name}", copy | {"task.length": length} | strategy, LOSSES)
        for length in (2, 4)
        for name, strategy in (("full", studies.FULL), ("fixed", studies.fixed(3)))
    ).assign(study="own")
    folder = studies.write(tmp_path / "own", table=rows, norms=studies.norms(rows.assign(window=3)))
    assert not figures.make(stories.shipped("gradient_norms"), folder).failed
    figure = kept["gradient_norms_end"]
    assert [ax.get_title() for ax in figure.axes[:2]] == [
        "elman, task.length 2",
        "elman, task.length 4",
    ]
    rows["steps"] = rows["task.length"] + 4
    said = tables.as_text(tables.summary(rows), studies.costs(rows))
    assert "strategy task.length" in " ".join(said.splitlines()[1].split())
    two = rows.assign(window=rows["window"].where(rows["task.length"] == 2, 4), strategy="fixed")
    two["truncation_length"] = two["window"] = two["window"].fillna(8)
    sweep_figures.draw(
        studies.write(tmp_path / "two", table=two), hue="task.length", style="truncation"
    )
    (legend,) = kept["learning_curves_accuracy"].legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == [
        "task.length 2",
        "task.length 4",
        *(f"truncation length {n}" for n in (3, 4, 8)),
    ]


def test_networks_on_different_data_have_names_of_their_own(kept, tmp_path):
    rows = study(PAIRS["alphabets"][0])
    folder = studies.write(tmp_path / "own", table=rows, norms=studies.norms(rows))
    figures.make(stories.shipped("gradient_norms"), folder)
    (figure, *_) = kept.values()
    titles = [ax.get_title() for ax in figure.axes[:2]]
    assert titles == ["elman, alphabet letters", "elman, alphabet all"]
