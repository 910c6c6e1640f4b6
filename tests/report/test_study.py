"""What a study makes of its tables: what is missing is left out, what fails is named, and the rest is made."""

from pathlib import Path

import pandas as pd
import pytest
import studies

from bptt_study.report import csv_tables, figure_layout, study
from bptt_study.report.study import Study
from bptt_study.runner import figures, page, run_folder, status, stories
from bptt_study.validation import SettingError


def twice(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[["run", "seed"]].assign(twice=2 * rows["validation_loss"])


def thrice(twice: pd.DataFrame) -> pd.DataFrame:
    return twice.assign(thrice=1.5 * twice["twice"])


def drawn(thrice: pd.DataFrame):
    figure, [[ax]] = figure_layout.figure(1, 1, (4, 3), "a title", "a caption")
    ax.plot(thrice["thrice"])
    return figure


def several(thrice: pd.DataFrame, cuts: pd.DataFrame | None = None):
    yield "one", drawn(thrice)
    yield "alone" if cuts is None else "with", drawn(thrice)
    raise KeyError("later")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tables": {"summary": twice}},
        {"tables": {"../elsewhere": twice}},
        {"figures": {"a/b": drawn}},
        {"figures": {"": drawn}},
    ],
)
def test_names_that_are_no_files_of_the_studys_own(wrong, monkeypatch):
    """Another table would be replaced, or a file outside of the folder."""
    monkeypatch.setattr(stories, "imported", lambda name: Study("?", **wrong))
    with pytest.raises(SettingError, match=r"`Study\.(tables|figures)` must be letters"):
        stories.find("mine.STUDY", None)


def test_a_table_of_a_probe_is_not_replaced_and_a_suffix_is_a_word(tmp_path):
    rows = studies.run("a", studies.TEXT | studies.FULL, [[1.0]])
    for name in ("table.csv.gz", "twice.csv.gz"):
        csv_tables.write_table(rows, tmp_path / name)

    def suffixed(rows: pd.DataFrame):
        yield "a/b", drawn(rows.assign(thrice=1.0))

    made = study.make(Study("?", {"twice": twice}, {"suffixed": suffixed}), tmp_path)
    assert [line.partition(":")[0] for line in made.failed] == ["table twice", "figure suffixed"]
    assert "another name than that of a probe's table" in made.failed[0]
    assert "the suffix of suffixed" in made.failed[1]
    assert made.files == []


def nothing(rows: pd.DataFrame):
    return study.some(rows[rows["seed"] > 99], "run of seed 99")


def broken(rows: pd.DataFrame):
    return rows["no such column"]


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = studies.run("a", studies.TEXT | studies.FULL, [[3.0, 2.0]] * 2)
    return studies.write(tmp_path / "own", table=rows)


def test_a_table_may_read_the_ones_before_it_and_a_figure_all(folder):
    made = study.make(Study("?", {"twice": twice, "thrice": thrice}, {"scores": drawn}), folder)
    assert [file.name for file in made.files] == ["twice.csv", "thrice.csv", "scores.png"]
    assert made.left_out == made.failed == []
    assert csv_tables.read_table(folder / "thrice.csv")["thrice"].tolist() == [9, 6] * 2


def test_a_table_keeps_its_index(folder):
    """A CSV file has none: medians by strategy would be numbers without their strategies."""

    def medians(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.groupby("strategy")[["validation_loss"]].median()

    def nameless(rows: pd.DataFrame) -> pd.DataFrame:
        return medians(rows).rename_axis(None)

    made = study.make(
        Study("?", {"medians": medians, "nameless": nameless, "twice": twice}), folder
    )
    assert "`Study.tables.nameless` must be a table whose index has a name" in made.failed[0]
    assert list(csv_tables.read_table(folder / "medians.csv")) == ["strategy", "validation_loss"]
    assert list(csv_tables.read_table(folder / "twice.csv")) == ["run", "seed", "twice"]


def test_a_table_may_have_several_levels_of_columns(folder):
    """It ended in a KeyError of `csv_tables`."""

    def wide(rows: pd.DataFrame) -> pd.DataFrame:
        last = rows[rows["update"] == rows["update"].max()]
        scores = ["validation_loss", "accuracy"]
        return last.pivot_table(index="run", columns="seed", values=scores, aggfunc="last")

    made = study.make(Study("?", {"wide": wide}), folder)
    assert made.failed == []
    names = list(csv_tables.read_table(folder / "wide.csv"))
    assert names[0] == "run"
    assert "validation_loss_0" in names


def test_two_figures_of_one_name_are_refused(folder):
    def plain(rows: pd.DataFrame):
        return drawn(rows.assign(thrice=3))

    def two(rows: pd.DataFrame):
        yield "all", plain(rows)
        yield "all", plain(rows)

    made = study.draw(Study("?", figures={"f": two, "f_all": plain, "g": plain}), folder)
    assert [line.partition("; got")[0] for line in made.failed] == [
        f"figure {name}: SettingError: `Study.figures` must be the name of one figure"
        for name in ("f", "f_all")
    ]
    assert (folder / "f_all.png").exists() and made.files[-1].name == "g.png"


@pytest.mark.parametrize("wrong", [broken, lambda rows: exec("raise SystemExit(3)")])
def test_a_check_that_fails_is_named_and_the_figures_of_any_sweep_are_drawn(folder, wrong):
    made = figures.make(Study("?", {"twice": twice}, {"scores": drawn}, check=wrong), folder)
    (line,) = made.failed
    assert line.startswith("check: ") and "test_study.py, line" in line
    assert [file.name for file in made.files] == [
        "learning_curves_validation_loss.png",
        "learning_curves_accuracy.png",
    ]


def test_what_lacks_its_table_is_left_out_and_the_rest_is_made(folder):
    tables = {"first": nothing, "second": lambda first: first, "empty": lambda rows: rows[:0]}
    tables |= {"twice": twice, "thrice": thrice}
    wanted = {"a": lambda cuts: drawn(cuts), "b": nothing, "c": drawn}
    made = study.make(Study("?", tables, wanted), folder)
    assert [file.name for file in made.files] == ["twice.csv", "thrice.csv", "c.png"]
    assert made.left_out == [
        "table first: there is no run of seed 99",
        "table second: there is no table first",
        "table empty: there is no row for it",
        "figure a: there is no table cuts",
        "figure b: there is no run of seed 99",
    ]
    assert made.failed == []


def test_an_error_is_no_gap_and_says_where_it_is(folder):
    tables = {"twice": twice, "thrice": thrice, "bad": broken}
    wanted = {
        "x": several,
        "y": broken,
        "z": lambda bad: bad,
        "none": lambda rows: None,
        "ok": drawn,
    }
    made = study.make(Study("?", tables, wanted), folder)
    names = [file.name for file in made.files]
    assert names == ["twice.csv", "thrice.csv", "x_one.png", "x_alone.png", "ok.png"]
    assert made.left_out == ["figure z: there is no table bad"]
    table, x, y, none = made.failed
    assert table == y.replace("figure y", "table bad")
    assert y.startswith("figure y: KeyError: 'no such column' (test_study.py, line ")
    assert x.startswith("figure x: KeyError: 'later' (test_study.py, line ")
    assert none.startswith("figure none: TypeError: ")


def test_an_older_table_of_a_step_that_fails_is_not_drawn(folder):
    (folder / "thrice.csv").write_text("thrice\n1\n2\n")
    old = Study("?", {"thrice": broken}, {"c": drawn})
    made = study.make(old, folder)
    assert made.left_out == ["figure c: there is no table thrice"]
    assert study.draw(old, folder).files == [folder / "c.png"]


def test_an_older_table_of_a_step_that_fails_is_not_read_by_the_next(folder):
    """It is of other runs, such as those before one was added."""
    made = study.make(Study("?", {"twice": twice, "thrice": thrice}), folder)
    assert len(made.files) == 2
    made = study.make(Study("?", {"twice": broken, "thrice": thrice}), folder)
    assert made.files == [] and made.left_out == ["table thrice: there is no table twice"]


def test_no_function_changes_the_table_of_another(folder):
    def changes(rows):
        rows["validation_loss"] = 0.0
        return rows

    study.make(Study("?", {"changed": changes, "twice": twice}), folder)
    assert csv_tables.read_table(folder / "twice.csv")["twice"].tolist() == [6, 4] * 2


def test_the_command_ends_with_1_if_a_figure_fails(folder, monkeypatch, capsys):
    mine = Study("?", {"twice": twice, "thrice": thrice}, {"c": drawn, "y": broken})
    monkeypatch.setattr(stories, "shipped", lambda experiment: mine)
    with pytest.raises(SystemExit, match="1"):
        figures.main([str(folder)])
    said = capsys.readouterr()
    assert "failed: figure y: KeyError" in said.err
    assert str(folder / "c.png") in said.out
    monkeypatch.setattr(stories, "shipped", lambda experiment: mine._replace(figures={"c": drawn}))
    figures.main([str(folder), "--only-figures"])
    assert capsys.readouterr().out.split() == [str(folder / "c.png")]


EVIL = "from pathlib import Path\nPath({!r}).touch()\nSTUDY = None\n"


@pytest.mark.parametrize("command", [figures.main, page.main, status.main])
def test_a_story_that_a_note_names_is_shown_and_not_imported(
    command, folder, tmp_path, monkeypatch, capsys
):
    ran = tmp_path / "ran"
    (tmp_path / "evil_story.py").write_text(EVIL.format(str(ran)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    noted = run_folder.Sweep(tmp_path, "own", "mine", {}, "evil_story.STUDY", "<b>Why</b>?")
    noted.save()
    if command is status.main:
        with pytest.raises(SystemExit, match="2"):
            command([str(folder), "--gather"])  # there is no run to gather
    else:
        command([str(folder)])
    assert not ran.exists()
    if command is figures.main:
        assert "--story=evil_story.STUDY makes the study's own" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):  # negative control: the user names it
            command([str(folder), "--story", "evil_story.STUDY"])
        assert ran.exists()
        assert "`story` must be the name of a bptt_study.Study" in capsys.readouterr().err
    if command is page.main:
        assert "&lt;b&gt;Why&lt;/b&gt;?" in (folder / page.PAGE).read_text()


@pytest.mark.parametrize("story", ["../evil", "evil", 3, "a b.c", "x.y;z"])
def test_a_story_of_a_note_is_a_name(tmp_path, story):
    run_folder.Sweep(tmp_path, "own", None, {}, story).save()
    with pytest.raises(SettingError, match="was not written by this version"):
        run_folder.latest_sweep(tmp_path, "own")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.STUDY", "Reason: ModuleNotFoundError: No module named 'nowhere'."),
        ("json.STUDY", "Reason: AttributeError: module 'json' has no attribute 'STUDY'."),
        ("json.loads", "got json.loads, a function."),
        ("mine", "Reason: ValueError: Empty module name."),
        (7, "got 7"),
    ],
)
def test_a_story_that_is_none_is_one_line(name, reason):
    with pytest.raises(SettingError) as caught:
        stories.imported(name)
    assert str(caught.value).startswith(
        "`story` must be the name of a bptt_study.Study that Python can import"
    )
    assert reason in str(caught.value)
