"""Any sweep has figures, in which no two runs look alike; what cannot be drawn is said."""

from itertools import product

import layout
import numpy as np
import pandas as pd
import pytest
import studies
from matplotlib.figure import Figure

from bptt_study.report import csv_tables, plots, sweep_figures, tables
from bptt_study.runner import figures, stories
from bptt_study.validation import SettingError

LOSSES = [[3.4, 2.4, 2.0], [3.4, 2.5, 2.1], [3.4, 2.6, 2.2]]


def grid(**values) -> pd.DataFrame:
    """A run for each combination of the values, each with a loss of its own."""
    runs = []
    for i, found in enumerate(product(*values.values())):
        settings = studies.TEXT | studies.FULL | dict(zip(values, found, strict=True))
        if settings["strategy"] != "full":
            settings["window"] = settings["truncation_length"]
        losses = [[start, *(loss + 0.1 * i for loss in rest)] for start, *rest in LOSSES]
        runs.append(studies.run(f"r{i}", settings, losses))
    return pd.concat(runs, ignore_index=True).assign(study="own")


SWEEPS = {
    "one": {},
    "rates": {"learning_rate": [0.001, 0.01, 0.1]},
    "lengths": {"strategy": ["fixed", "sliding"], "truncation_length": [4, 16]},
    "options": {"cell": ["elman", "gru"], "optimizer.transform._target_": ["optax.adam", "optax.lion"]},
    "four": {"strategy": ["fixed", "mine"], "truncation_length": [4, 16], "hidden": [8, 16],
             "learning_rate": [0.001, 0.01]},
    "many lengths": {"strategy": ["fixed", "sliding"], "truncation_length": [1, 2, 3, 4, 5, 6, 8]},
    "many texts": {"optimizer.label": list("abcdefghijkl")},
    "strategies of one's own": {"strategy": ["fixed", "a", "b", "c"]},
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEPS)
def test_each_run_looks_its_own(name, kept, tmp_path):
    rows = grid(**SWEEPS[name])
    drawn = sweep_figures.draw(studies.write(tmp_path / name, table=rows))
    alone = name == "one"
    assert len(drawn.left_out) == 2 * alone, drawn.left_out
    assert set(kept) >= {"learning_curves_validation_loss", "learning_curves_accuracy"}
    curves = kept["learning_curves_validation_loss"]
    looks = [
        (ax.get_title(), line.get_color(), line.get_linestyle(), line._dash_pattern)
        for ax in curves.axes for line in ax.lines if len(line.get_xdata()) == 3
    ]  # fmt: skip
    assert len(set(map(str, looks))) == len(looks) == rows["run"].nunique()
    told = " ".join(text.get_text() for legend in curves.legends for text in legend.get_texts())
    told += " ".join(ax.get_title() for ax in curves.axes)
    for setting in SWEEPS[name]:
        word = {
            "truncation_length": "length",
            "strategy": "Fixed",
            "optimizer.transform._target_": "transform",
        }.get(setting, setting)
        assert word.rpartition(".")[2].strip("_").replace("_", " ") in told
    assert ("batch" in told, "hidden" in told) == (False, name == "four"), "and nothing else"
    for figure in kept.values():
        layout.check(figure)


@pytest.mark.parametrize(
    ("role", "name", "most", "count"),
    [
        ("style", "learning_rate", 6, 7),
        ("hue", "optimizer.label", 10, 12),
        ("hue", "strategy", 6, 7),
    ],
)
def test_a_role_that_cannot_tell_its_values_apart_is_refused(
    role, name, most, count, kept, tmp_path
):
    values = {"learning_rate": list(range(1, 8)), "optimizer.label": list("abcdefghijkl")}
    values["strategy"] = list("abcdefg")
    rows = grid(**{name: values[name]}, **({"hidden": [4, 8]} if role == "style" else {}))
    folder = studies.write(tmp_path / "own", table=rows)
    drawn = sweep_figures.draw(folder, **{role: name})
    said = f"--{role} shows at most {most} values, and {name} has {count}; --facet {name} gives each a panel"
    assert f"figure learning_curves_validation_loss: {said}" in drawn.left_out
    assert not drawn.failed and "learning_curves_validation_loss" not in kept
    assert ("final_scores_validation_loss" in kept) == (role == "style"), "there are 8 markers"
    assert not sweep_figures.draw(folder, facet=name).failed
    axes = kept["learning_curves_validation_loss"].axes
    assert len({ax.get_title() for ax in axes if ax.lines}) == count


def test_thirty_strategies_of_ones_own_look_different_in_every_figure():
    found = plots.looks([f"mine{i}" for i in range(30)]).values()
    assert len({(look.color, str(look.dashes)) for look in found}) == 30
    assert len({(look.color, look.marker) for look in found}) == 30
    colors = {str(look.color) for look in plots.LOOKS.values()}
    assert len(colors | set(map(str, plots.FREE))) == len(plots.LOOKS) + len(plots.FREE)


def test_final_scores_stand_at_the_values_that_were_swept(kept, tmp_path):
    sweep_figures.draw(studies.write(tmp_path / "own", table=grid(learning_rate=[0.001, 0.1])))
    (ax,) = kept["final_scores_validation_loss"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.001", "0.1"]
    points = [line.get_xydata()[0].tolist() for line in ax.lines if len(line.get_xdata()) == 1]
    np.testing.assert_allclose(points, [[0, 2.1], [1, 2.2]])


def test_roles_are_chosen_in_the_words_of_seaborn(kept, tmp_path):
    rows = grid(**SWEEPS["four"])
    folder = studies.write(tmp_path / "own", table=rows)
    sweep_figures.draw(folder, x="hidden", hue="optimizer.learning_rate", facet="strategy")
    axes = kept["final_scores_validation_loss"].axes
    assert [ax.get_title() for ax in axes] == ["Fixed (chunks)", "mine"]
    assert [t.get_text() for t in axes[0].get_xticklabels()] == ["8", "16"]


@pytest.mark.parametrize("name", ["hue_of", "seed", "update", "validation_loss", "diverged"])
def test_a_role_takes_a_setting_and_nothing_that_was_measured(name, tmp_path):
    """One line per run would join several of its values."""
    folder = studies.write(tmp_path / "own", table=grid(learning_rate=[0.001, 0.1]))
    message = rf"`--\w+` must be a setting in table.csv.gz; got {name}. learning_rate varies"
    for role in ("hue", "x") if name != "update" else ("hue",):
        with pytest.raises(SettingError, match=message):
            sweep_figures.draw(folder, **{role: name})


@pytest.mark.slow
def test_a_role_takes_the_run_and_a_fact_of_a_task_of_ones_own(tmp_path):
    rows = grid(hidden=[8, 16], symbols_of_mine=[3, 4])
    folder = studies.write(tmp_path / "own", table=rows)
    assert sweep_figures.draw(folder, hue="symbols_of_mine", facet="run").failed == []


def lines(kept) -> list[tuple]:
    """How each learning curve looks, and its values."""
    axes = kept["learning_curves_validation_loss"].axes
    found = [(ax, line) for ax in axes for line in ax.lines if len(line.get_xdata()) == 3]
    return [
        ((ax.get_title(), str(line.get_color()), str(line._dash_pattern)), ax, line)
        for ax, line in found
    ]


def test_learning_curves_tell_runs_apart_that_differ_in_the_other_figure_s_x(kept, tmp_path):
    rows = grid(learning_rate=[0.001, 0.01, 0.1], strategy=["full", "fixed"])
    folder = studies.write(tmp_path / "own", table=rows, norms=studies.norms(rows.assign(window=3)))
    sweep_figures.draw(folder, x="learning_rate", hue="strategy")
    assert len({look for look, *_ in lines(kept)}) == rows["run"].nunique()
    for name in ("learning_curves_validation_loss", "gradient_norms_lag"):
        (legend,) = kept[name].legends
        assert "learning rate 0.01" in [text.get_text() for text in legend.get_texts()]


def test_a_short_run_is_seen_beside_a_long_one_and_so_is_one_that_diverged(kept, tmp_path):
    long = studies.run("long", studies.TEXT | studies.FULL, [[4.0, *np.linspace(1, 0.5, 39)]] * 2)
    short = studies.run("short", studies.TEXT | studies.fixed(4), [[4.0, 3.0, 2.5]] * 2)
    lost = studies.run("lost", studies.TEXT | studies.fixed(8), [[4.0, 3.5, *[np.inf] * 38]] * 2)
    rows = pd.concat([long, short, lost])
    sweep_figures.draw(studies.write(tmp_path / "own", table=rows))
    (ax,) = kept["learning_curves_validation_loss"].axes
    low, high = ax.get_ylim()
    assert low < 0.5 and 3.5 < high < 4, "the start of all runs is not what fits the axis"
    compared = stories.shipped("compare_strategies")
    figures.make(compared, tmp_path / "own")
    assert all(ax.get_ylim()[1] > 3 for ax in kept["learning_curves_tokens"].axes[:2])


def test_close_settings_have_words_of_their_own(kept, tmp_path):
    rates = [0.001, 0.0010000001]
    rows = grid(learning_rate=rates, strategy=["full", "fixed"])
    folder = studies.write(tmp_path / "own", table=rows)
    sweep_figures.draw(folder, facet="learning_rate")
    titles = [ax.get_title() for ax in kept["learning_curves_validation_loss"].axes]
    assert titles == [f"learning rate {rate}" for rate in rates]
    sweep_figures.draw(folder, x="learning_rate")
    (ax,) = kept["final_scores_validation_loss"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(rate) for rate in rates]


def test_panels_of_numbers_are_in_order_whatever_was_run_first(kept, tmp_path):
    """As after a second sweep. The control: texts keep the order of the runs; a missing number is last."""
    rows = grid(task=["copy", "add"], hidden=[3, 5, 2, 1], strategy=["full", "fixed"])
    radius = rows["hidden"].map({3: 0.9, 5: np.nan, 2: 0.5, 1: 1.1})
    folder = studies.write(tmp_path / "own", table=rows)
    sweep_figures.draw(folder, facet="hidden", hue="strategy")
    titles = [ax.get_title() for ax in kept["learning_curves_validation_loss"].axes]
    said = [title for title in titles if title]
    assert said == [f"hidden {n}, {task}" for n in (1, 2, 3, 5) for task in ("copying", "adding")]
    parts = tables.panels(rows.drop(columns="hidden").assign(spectral_radius=radius))
    found = [(part["task"].iloc[0], part["spectral_radius"].iloc[0]) for part in parts]
    ordered = [(task, r) for task in ("copy", "add") for r in (0.5, 0.9, 1.1, np.nan)]
    np.testing.assert_equal(found, ordered)


def test_panels_come_in_one_order_whatever_a_probe_has_seen(kept, tmp_path):
    """The first run has no norms; its text still has the first panel of every figure."""
    rows = grid(
        learning_rate=[0.1, 0.2], corpus=["z", "a"], strategy=["fixed"], truncation_length=[4]
    )
    norms = studies.norms(rows[rows["run"] != "r0"])
    drawn = sweep_figures.draw(studies.write(tmp_path / "own", table=rows, norms=norms))
    assert not drawn.failed
    titles = {name: [ax.get_title() for ax in figure.axes] for name, figure in kept.items()}
    assert {"final_scores_accuracy", "gradient_norms_lag"} <= {*titles}
    assert {*map(tuple, titles.values())} == {("z", "a")}


def test_a_line_that_begins_beyond_the_axis_is_told(kept, tmp_path):
    """The control: a first score within the range of the others."""
    for start, told in ((3.4, True), (2.2, False)):
        rows = pd.concat(
            studies.run(f"r{n}", studies.TEXT | studies.fixed(n), [[start, 2.4, 2.0]] * 2)
            for n in (4, 8)
        )
        sweep_figures.draw(studies.write(tmp_path / f"{told}", table=rows), facet="truncation")
        figure = kept["learning_curves_validation_loss"]
        assert (figure.axes[0].get_ylim()[1] < start) == told
        caption = figure.texts[1].get_text().replace("\n", " ")
        assert ("first tenth of each run; a line may begin beyond them." in caption) == told
        layout.check(figure)


@pytest.mark.parametrize(
    ("seeds", "told"),
    [(1, "Line: 1 seed. "), (2, "Line: median; band: its 95 % bootstrap interval over 2 seeds. ")],
)
def test_a_caption_promises_no_interval_of_one_seed(kept, tmp_path, seeds, told):
    rows = pd.concat(
        studies.run(f"r{n}", studies.TEXT | studies.fixed(n), [[2.9, 2.4, 2.0]] * seeds)
        for n in (4, 8)
    )
    sweep_figures.draw(studies.write(tmp_path / "own", table=rows))
    caption = kept["learning_curves_validation_loss"].texts[1].get_text().replace("\n", " ")
    assert caption.startswith(told)
    assert plots.spread(pd.DataFrame({"n": [1], "diverged": [0]})) == (
        "Line: n = 1 seed; diverged: none."
    )


def test_a_refused_role_names_the_settings_that_vary(tmp_path):
    rows = grid(learning_rate=[0.001, 0.1], hidden=[4, 8])
    with pytest.raises(SettingError, match=r"hidden, learning_rate vary\."):
        sweep_figures.draw(studies.write(tmp_path / "own", table=rows), hue="nothing")


def test_settings_that_change_together_are_named_in_the_caption(kept, tmp_path):
    rows = grid(strategy=["full", "fixed"])
    sweep_figures.draw(studies.write(tmp_path / "own", table=rows))
    assert "Also different" not in kept["learning_curves_accuracy"].texts[1].get_text()
    rates = rows["strategy"].map({"full": 0.03, "fixed": 0.003})
    sweep_figures.draw(studies.write(tmp_path / "two", table=rows.assign(learning_rate=rates)))
    for name in ("learning_curves_accuracy", "final_scores_accuracy"):
        assert "Also different: learning_rate." in kept[name].texts[1].get_text()
        layout.check(kept[name])


def test_the_norms_of_a_seed_that_had_stopped_count_as_diverged(kept, tmp_path):
    """They are those of the parameters of an earlier update."""
    rows = studies.networks().assign(study="own")
    found = studies.norms(rows)
    stopped = np.where((found["seed"] == 1) & (found["update"] == 10), True, None)
    folder = studies.write(tmp_path / "own", table=rows, norms=found.assign(stopped=stopped))
    assert sweep_figures.draw(folder).failed == []
    table = tables.norms(csv_tables.read_table(folder / "gradient_norms.csv.gz"), rows)
    late = table["update"] == 10
    assert set(table.loc[late, "diverged"]) == {1} and set(table.loc[~late, "diverged"]) == {0}
    assert np.isposinf(table.loc[late, "high"]).all()


def test_norms_are_drawn_where_the_probe_looked(kept, tmp_path):
    rows = studies.networks().assign(study="own")
    folder = studies.write(tmp_path / "own", table=rows, norms=studies.norms(rows))
    assert sweep_figures.draw(folder).left_out == []
    lag = kept["gradient_norms_lag"]
    layout.check(lag)
    assert sum(len(ax.lines) for ax in lag.axes) == rows["run"].nunique()
    assert {ax.get_yscale() for ax in lag.axes} == {"log"}
    ends = {line.get_xdata()[-1] for ax in lag.axes for line in ax.lines}
    assert ends == {2, 5}, "a window of 3 ends at lag 2"
    assert "No line is drawn where a median is 0" in lag.texts[1].get_text().replace("\n", " ")


def test_norms_of_other_runs_are_none(tmp_path):
    """As those of an earlier sweep: the line said that none was finite."""
    rows = studies.networks().assign(study="own")
    folder = studies.write(tmp_path / "own", table=rows, norms=studies.norms(rows).assign(run="x"))
    left_out = sweep_figures.draw(folder).left_out
    assert "figure gradient_norms_lag: the probe looked at none of these runs" in left_out


def test_norms_have_the_unit_of_their_task_and_the_moment_of_their_run(kept, tmp_path):
    """A squared error has no unit, and a run that was looked at before training alone is said to be."""
    nats = studies.run("a", studies.TEXT | studies.FULL | {"loss_unit": "nats"}, LOSSES)
    none = studies.run("b", studies.DIGITS | studies.fixed(3) | {"loss_unit": None}, LOSSES)
    unseen = studies.run("c", studies.TEXT | studies.fixed(9) | {"loss_unit": "nats"}, LOSSES)
    rows = pd.concat([nats, none, unseen]).assign(study="own")
    norms = studies.norms(rows[rows["run"] != "c"])
    norms = norms[(norms["run"] == "b") | (norms["update"] == 0)]
    folder = studies.write(tmp_path / "own", table=rows, norms=norms)
    assert sweep_figures.draw(folder).failed == []
    figure = kept["gradient_norms_lag"]
    assert [ax.get_ylabel().endswith("(nats)") for ax in figure.axes] == [True, False]
    assert (
        "After 0 to 10 updates, the last at which the probe looked in each run: not the same for all."
        in (figure.texts[1].get_text().replace("\n", " "))
    )
    assert tables.unit(rows) == ""
    one = norms[norms["run"] == "a"]
    sweep_figures.draw(studies.write(tmp_path / "one", table=rows, norms=one))
    lag = kept["gradient_norms_lag"]
    assert not lag.legends, "nothing is said of runs that are not drawn"
    assert "No line is drawn" not in lag.texts[1].get_text()
    figures.make(
        stories.shipped("gradient_norms"), studies.write(tmp_path / "of", table=none, norms=norms)
    )
    assert [ax.get_ylabel() for ax in kept["gradient_norms_end"].axes] == [
        plots.norm_label(axis, "") for axis in ("time", "lag")
    ]


def test_a_score_that_a_run_cannot_have_has_no_marker(kept, tmp_path):
    rows = grid(task=["copy", "series"], strategy=["full", "fixed"])
    rows.loc[rows["task"] == "series", "accuracy"] = np.nan
    sweep_figures.draw(studies.write(tmp_path / "own", table=rows), x="task")
    (ax,) = kept["final_scores_accuracy"].axes
    seen = [line.get_xdata()[0] for line in ax.lines if np.isfinite(line.get_ydata()).all()]
    assert [round(x) for x in seen] == [0, 0], "series has no accuracy"


def test_a_task_has_no_panel_for_a_score_that_it_has_not(kept, tmp_path):
    """Also where a seed diverges, which would be the worst. Control: the panels of the loss."""
    rows = grid(task=["copy", "series"], strategy=["full", "fixed"])
    lost = (rows["task"] == "series") & (rows["seed"] == 0) & (rows["update"] > 0)
    rows.loc[rows["task"] == "series", "accuracy"] = np.nan
    rows.loc[lost, ["diverged", "validation_loss"]] = True, np.inf
    assert not sweep_figures.draw(studies.write(tmp_path / "own", table=rows)).left_out
    for kind in ("learning_curves", "final_scores"):
        assert len(kept[f"{kind}_validation_loss"].axes) == 2
        (ax,) = kept[f"{kind}_accuracy"].axes
        assert "copy" in ax.get_title().lower()


GAPS = {  # norms over the lag: the parts of the line that are drawn
    (0.8, 0, 0, 0, 0, 0): [[[0, 0.8]]],
    (0.8, 0, 0.2, 0.1, 0, 0.3): [[[0, 0.8]], [[2, 0.2], [3, 0.1]], [[5, 0.3]]],
    (0, 0.5, 0.4, 0.3, 0.2, 0.1): [[[1, 0.5], [2, 0.4], [3, 0.3], [4, 0.2], [5, 0.1]]],
}


@pytest.mark.parametrize(("norms", "parts"), GAPS.items())
def test_a_norm_beside_zeros_is_seen_and_none_is_joined_across_them(norms, parts, kept, tmp_path):
    rows = studies.run("a", studies.TEXT | studies.fixed(4), LOSSES).assign(study="own")
    found = studies.norms(rows)
    found["gradient_norm"] = (
        found.groupby(["axis", "update", "seed"]).cumcount().map(norms.__getitem__)
    )
    folder = studies.write(tmp_path / "own", table=rows, norms=found)
    assert sweep_figures.draw(folder).failed == []
    (of_sweep,) = kept["gradient_norms_lag"].axes
    table = tables.norms(found[(found["axis"] == "lag") & (found["update"] == 0)], rows)
    ax = Figure().subplots()
    ax.set_ylim(plots.limits(table, log=True))
    plots.gradient_norms(table, ax, plots.looks(["fixed"]), "lag")
    for panel in (of_sweep, ax):
        drawn = [line for line in panel.lines if line.get_linestyle() != plots.END["linestyle"]]
        drawn = [line for line in drawn if line.get_markevery() is None]
        np.testing.assert_equal([line.get_xydata().tolist() for line in drawn], parts)
        assert [line.get_marker() for line in drawn] == ["o" * (len(part) == 1) for part in parts]


def test_a_score_alone_is_seen(kept, tmp_path):
    whole = studies.run("whole", studies.TEXT | studies.fixed(4), LOSSES)
    alone = studies.run("alone", studies.TEXT | studies.fixed(8), [[3.3, np.inf, np.inf]] * 3)
    rows = pd.concat([whole, alone]).assign(study="own")
    sweep_figures.draw(studies.write(tmp_path / "own", table=rows))
    (ax,) = kept["learning_curves_validation_loss"].axes
    (point,) = ax.lines[1].get_xydata()
    assert (point[1], ax.lines[1].get_marker()) == (3.3, "o")
    assert ax.get_ylim()[0] < 3.3 < ax.get_ylim()[1]


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([[np.nan] * 3] * 2, "no score is finite"),
        ([[3.0, np.inf, np.nan]] * 2, "two finite scores"),
    ],
)
def test_what_cannot_be_drawn_is_said(losses, reason, kept, tmp_path):
    runs = [studies.run(f"r{w}", studies.TEXT | studies.fixed(w), losses) for w in (4, 8)]
    drawn = sweep_figures.draw(studies.write(tmp_path / "own", table=pd.concat(runs)))
    assert any(reason in line for line in drawn.left_out)
    assert "learning_curves_validation_loss" not in kept


def test_a_study_whose_own_figures_fail_gets_those_of_any_sweep(kept, tmp_path):
    rows = grid(**SWEEPS["lengths"]).assign(validation_fraction=0.1)
    folder = studies.write(tmp_path / "own", table=rows)
    made = figures.make(stories.shipped("book_verdict"), folder)
    assert "table shares: there is no table lag_mass" in made.left_out
    assert {file.stem for file in made.files} == set(kept)
    assert made.failed == []


def test_one_strategy_alone_has_the_figures_of_its_experiment(kept, tmp_path):
    rows = studies.run("a", studies.TEXT | studies.fixed(4) | {"strategy": "sliding"}, LOSSES)
    pattern = studies.run("a", studies.TEXT | studies.fixed(4), LOSSES)
    cuts = studies.text_cuts(pattern).assign(strategy="sliding")
    folder = studies.write(tmp_path / "own", table=rows, cuts=cuts)
    made = figures.make(stories.shipped("compare_strategies"), folder)
    assert made.failed == []
    assert made.left_out == [
        "figure differences: there is no run beside full BPTT of the same network"
    ]
    assert "cuts" in kept


def test_the_command_draws_again(tmp_path, capsys):
    folder = studies.write(tmp_path / "own", table=grid(**SWEEPS["rates"]))
    figures.main([str(folder), "--hue", "learning_rate"])
    said = capsys.readouterr()
    assert str(folder / "learning_curves_accuracy.png") in said.out
    assert "left out: figure final_scores_accuracy" in said.err
    with pytest.raises(SystemExit, match="2"):
        figures.main([str(tmp_path)])
    assert "must be a folder with a table.csv.gz" in capsys.readouterr().err
    assert tables.varying(csv_tables.read_table(folder / "table.csv.gz")) == ["learning_rate"]


def test_a_corpus_may_have_dollars(kept, tmp_path):
    """They are no formula, which could not be parsed."""
    rows = grid(corpus=["a$x_$b.txt", r"$\\nothing$"], strategy=["full", "fixed"])
    drawn = sweep_figures.draw(studies.write(tmp_path / "own", table=rows))
    assert not [line for line in drawn.left_out if "$" in line or "Parse" in line]
    titles = {ax.get_title() for ax in kept["learning_curves_validation_loss"].axes}
    assert any("$x_$" in title for title in titles)
    sweep_figures.draw(tmp_path / "own", x="corpus")
    layout.check(kept["final_scores_validation_loss"])
