"""Odd inputs: texts in tables stay what they are, and settings beyond all bounds are one line."""

import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import studies
from omegaconf import DictConfig
from support import TINY

from bptt_study import files, validation
from bptt_study.report import csv_tables, plots, sweep_figures, tables
from bptt_study.runner import configure, page, results
from bptt_study.runner.run import _indented
from bptt_study.tasks import corpora
from bptt_study.validation import SettingError

LOOK_LIKE_OTHERS = ["NA", "null", "NaN", "None", "007", "1e3", "2024_01_15", "True", "inf", "#N/A"]


@pytest.mark.parametrize("name", ["cuts.csv", "cuts.csv.gz"])
def test_every_character_survives(tmp_path, name):
    """From U+0000 to U+2FFF; a carriage return alone and within a text; and numbers stay numbers."""
    texts = [
        *map(chr, range(0x3000)),
        *LOOK_LIKE_OTHERS,
        "a\r\nb",
        'say "no", twice',
        " ",
        "=1+1",
        "'=1+1",
        "''@a",
        "'a",
    ]
    numbers = np.where(np.arange(len(texts)) % 7, 1.5, np.nan)
    table = pd.DataFrame({"character": texts, "study": texts[::-1], "number": numbers})
    csv_tables.write_table(table, tmp_path / name)
    pd.testing.assert_frame_equal(csv_tables.read_table(tmp_path / name), table)


def gathered(folder: Path, *settings: dict) -> pd.DataFrame:
    """The rows of runs with these settings, as the study's table has them on disk."""
    parts = []
    for i, found in enumerate(settings):
        (folder / str(i)).mkdir()
        rows = studies.run(f"r{i}", studies.TEXT | studies.FULL | found, [[3.4, 2.0 + i / 10]] * 2)
        csv_tables.write_table(rows.assign(study="own"), folder / str(i) / "rows.csv")
        parts.append(folder / str(i))
    table = csv_tables.gather(parts, "rows.csv")
    csv_tables.write_table(table, folder / csv_tables.TABLE)
    return table


def test_runs_without_a_table_have_the_types_of_the_table(tmp_path):
    """A number beside texts was a number until the study was gathered, and a text from then on."""
    about = {"rows": 4, "diverged": 0, "corpus_sha256": None, "code": {}}
    for run, label in (("a" * 12, "abc"), ("b" * 12, 1), ("c" * 12, True)):
        rows = studies.run(
            run, studies.TEXT | studies.FULL | {"task.label": label}, [[3.4, 2.0]] * 2
        )
        texts = {
            "rows.csv": csv_tables.packed(rows, "rows.csv"),
            "run.json": json.dumps(about).encode(),
        }
        files.write_folder(tmp_path / "runs" / "own" / run, texts)
    alone = results.load(tmp_path / "own").table
    (tmp_path / "own").mkdir()
    folders = sorted((tmp_path / "runs" / "own").iterdir())
    csv_tables.write_table(
        csv_tables.gather(folders, "rows.csv"), tmp_path / "own" / "table.csv.gz"
    )
    pd.testing.assert_frame_equal(alone, results.load(tmp_path / "own").table)
    assert alone["task.label"].unique().tolist() == ["abc", "1", "True"]


SEEDS = [
    (20261128, 20261129),
    (2**60, 2**60 + 1),
    (10**30, 10**30 + 1),
    (0.12345671, 0.12345672),
    (20261128.5, 20261129.5),
]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("gap", [{}, {"task.seed": None}])
def test_a_setting_keeps_its_digits_beside_runs_that_lack_it(tmp_path, seeds, gap):
    one, two = ({"task.seed": seed, "first_seed": 1} for seed in seeds)
    for others in ([one, two, gap], [gap, one, two]):
        folder = tmp_path / str(len(others[0]))
        folder.mkdir()
        table = gathered(folder, *others)
        text = pd.read_csv(folder / csv_tables.TABLE, dtype=str)["task.seed"].dropna().unique()
        assert text.tolist() == [str(seed) for seed in seeds]
        assert "run" not in tables.varying(table), "the seeds tell the runs apart"


def test_flags_stay_flags_and_whole_numbers_are_told_to_the_last_digit(tmp_path):
    flags = (
        {"task.label": None},
        {"task.label": True},
        {"task.seed": 20261128},
        {"task.seed": 20261129},
    )
    table = gathered(tmp_path, *flags)
    read = csv_tables.read_rows(tmp_path)
    for found in (table, read):
        assert found["task.label"].dropna().unique().tolist() == [True]
        assert found["task.label"].dropna().map(type).unique().tolist() == [bool]
        assert tables.data(found, numbers=False) == ["task.label"], (
            "a flag is no number of the data"
        )
    said = tables.as_text(tables.summary(table), studies.costs(table))
    for word in ("True", "20261128", "20261129"):
        assert word in said
    names = {plots.setting_name("task.seed", seed) for seed in read["task.seed"].dropna()}
    assert names == {"task.seed 20261128", "task.seed 20261129"}
    assert {sweep_figures._tick("task.seed", seed) for seed in (2e7 + 1, 20000002)} == {
        "20000001",
        "20000002",
    }
    assert plots.setting_name("x", np.True_) == "x True"
    assert plots.setting_name("hidden", 4) != plots.setting_name("task.hidden", 4)
    assert plots.setting_name("task.rate", 4) != plots.setting_name("optimizer.transform.rate", 4)
    assert plots.setting_name("cell.seed", 4) == "cell.seed 4", "it is not the seed of the run"
    probe = partial(plots.setting_name, "probes.lag_mass._target_")
    assert probe("bptt_study.probes.lag_mass") == "lag mass"
    assert probe("mine.lag_mass") == "lag mass mine.lag_mass"
    assert probe(np.nan) == "no lag mass"
    shown = page._shown(
        pd.DataFrame({"task.seed": [20261128.0, 0.123456, np.inf], "loss": 1.23456})
    )
    assert [row[0].text for row in shown.rows] == ["20261128", "0.123456", "inf"]
    assert shown.rows[0][1].text == "1.235"
    late = page._shown(pd.DataFrame({"first divergence, update": [12345.0, np.nan]}))
    assert [row[0].text for row in late.rows] == ["12345", ""]


def test_measured_numbers_have_seven_digits_and_counts_all(tmp_path):
    table = pd.DataFrame({
        "diverged_at": [12345678.0, np.nan], "validation_loss": [0.123456789, np.inf],
        "learning_rate": [1e-5, 0.1], "operations": [1234567890.0, np.nan],
    })  # fmt: skip
    lines = csv_tables.packed(table, "t.csv").decode().splitlines()
    assert lines[1:] == ["12345678,0.1234568,1e-05,1.234568e+09", ",inf,0.1,"]


@pytest.mark.parametrize("beside", [[], ["other"]], ids=["alone", "beside another"])
def test_large_counts_of_a_probe_keep_their_digits_beside_gaps(tmp_path, beside):
    """pandas reads such a column as floats, and a measured float has seven digits when it is written again."""
    counts = pd.array([2**53 + 1, None, -12345678], dtype="Int64")
    for name, table in (
        ("one", pd.DataFrame({"count": counts, "measured": [1234567890.5, np.nan, 2.0]})),
        ("other", pd.DataFrame({"count": [7]})),
    ):
        (tmp_path / name).mkdir()
        csv_tables.write_table(table, tmp_path / name / "own.csv.gz")
    found = csv_tables.gather([tmp_path / name for name in ("one", *beside)], "own.csv.gz")
    lines = csv_tables.packed(found, "own.csv").decode().splitlines()
    assert lines[1:4] == ["9007199254740993,1.234568e+09", ",", "-12345678,2"]


LABELS = (
    ["1", "01", "1.0"],
    ["1e3", "'1e3", "INF", ".5"],
    ["True", "false", "nan"],
    ["-1", "+1"],
    ["'-1", " 7 "],
    ["40", "40,41", "'40"],
    ["'40", None],
    ["-40", "'-x", None],
)


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_texts_of_an_own_setting_stay_texts(tmp_path, labels):
    table = pd.DataFrame({"task.label": labels, "loss": 0.5})
    csv_tables.write_table(table, tmp_path / "t.csv")
    found = csv_tables.read_table(tmp_path / "t.csv")
    assert found["task.label"].dropna().tolist() == table["task.label"].dropna().tolist()
    assert found["task.label"].isna().sum() == table["task.label"].isna().sum()


def test_texts_of_a_long_table_stay_texts(tmp_path):
    """Longer than what pandas would read at a time, with texts that look like numbers in a part alone."""
    names, gaps = ",".join(f"c{n}" for n in range(100)), "," * 100
    rows = [f"label,{names}", *[f"007{gaps}"] * 9000, f"x{gaps}"]
    (tmp_path / "long.csv").write_text("\n".join(rows))
    assert set(csv_tables.read_table(tmp_path / "long.csv")["label"]) == {"007", "x"}


@pytest.mark.parametrize(
    "labels", [["007", 12], ["1e3", 5], ["true", True], ["inf", 1.5, None], ["-5", 5], ["'40", 40]]
)
def test_a_text_that_looks_like_a_number_stays_one_beside_numbers(tmp_path, labels):
    """The numbers then are texts, too, as a column has one type."""
    table = gathered(tmp_path, *({"task.label": label} for label in labels))
    assert list(table["task.label"].dropna().unique()) == [v for v in labels if v is not None]
    found = csv_tables.read_rows(tmp_path)["task.label"].dropna().unique()
    assert found.tolist() == [str(label) for label in labels if label is not None]


def test_numbers_and_flags_of_an_own_setting_stay_what_they_are(tmp_path):
    table = pd.DataFrame({"task.a": [1, 2], "task.b": [True, False], "task.c": [0.5, None]})
    csv_tables.write_table(table.assign(**{"task.d": [True, None]}), tmp_path / "t.csv")
    found = csv_tables.read_table(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(found[["task.a", "task.b", "task.c"]], table)
    assert found["task.d"].tolist()[0] is True and found["task.d"].isna().tolist() == [False, True]


def test_a_table_without_one_is_written_as_ever():
    table = pd.DataFrame({"study": ["a", "b,c"], "loss": [1.0, np.nan]})
    assert csv_tables.packed(table, "summary.csv") == b'study,loss\na,1\n"b,c",\n'


@pytest.mark.parametrize("text", ["7", "1e3", "2024_01_15", "true", "null"])
def test_a_text_of_the_command_line_that_looks_like_a_number(command, tmp_path, text):
    """Hydra reads it as one, so its text is lost: refused, with the quotes that keep it."""
    code, _, err = command(*TINY, f"study={text}")
    assert code == 2
    assert re.search("`study` must be a text; got", err), err
    assert """such as 'study="007"'""" in err
    if text != "null":  # it means that there is no path
        code, _, err = command("task=char_lm", "size=smoke", f"task.path={text}")
        assert code == 2
        assert re.search("`task.path` must be a .*text file.*; got", err), err
    assert """such as 'study="007"'""" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_study_in_quotes_and_one_like_nothing(command, tmp_path):
    for written, study in (('study="1e3"', "1e3"), ("study=007", "007"), ("study=NA", "NA")):
        code, _, err = command("-m", *TINY, "seeds=1", written)
        assert code == 0, err
        table = csv_tables.read_table(tmp_path / "results" / study / "table.csv.gz")
        assert set(table["study"]) == {study}


def test_a_pipe_a_device_and_a_large_file_are_no_corpus(tmp_path):
    """In a moment, before a byte is read: the first two have no end, and the third is sparse."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)
    for path, said in ((tmp_path / "pipe", "a pipe or a device"), ("/dev/zero", "a pipe or a device"),
                       (tmp_path / "large", "at most 1073741824 bytes")):  # fmt: skip
        with pytest.raises(SettingError, match=rf"`path` must be .*{said}"):
            corpora.text_file(path)


def test_a_text_that_memory_does_not_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """References and checks take many times its size; the system would kill the run without a word."""
    (tmp_path / "text").write_text("a" * 1000)
    monkeypatch.setattr(validation.os, "sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(SettingError, match="`path` must be such that the run fits into memory"):
        corpora.text_file(tmp_path / "text")
    (tmp_path / "text").write_text("a" * 500)
    assert corpora.text_file(tmp_path / "text").text == "a" * 500


MEMORY = "must be such that the run fits into memory"
ODD = {
    "cell.hidden=2147483648": "`cell.hidden` must be a whole number of at most 2147483647",
    "cell.hidden=10000000000000000000": "`cell.hidden` must be a whole number of at most",
    "cell.hidden=100000": "`cell` must be a cell of at most 2147483647 parameters",
    "budget.updates=3000000000": "`budget.updates` must be a whole number of at most",
    "task.lag=10000000000": "`task.lag` must be a whole number of at most",
    "task.lag=1000000000": "`task.lag` must be such that the run fits into memory; got 1000000000",
    "budget.batch_size=2000000000": "`budget.batch_size` must be such that the run fits into memory",
    "seeds=2000000000": "`seeds` must be such that the run fits into memory",
    "task=char_lm sample_length=2147483647": "`sample_length` must be such that the run fits into memory",
    "strategy=randomized strategy.draws=2147483647": "`strategy` must be such that the run fits into memory; "
    "got randomized, mean_length=4, compensate=True, draws=2147483647",
    "strategy=pes strategy.pairs=2147483647": "`strategy` must be such that the run fits into memory",
    "strategy=truncated_es strategy.pairs=2147483647": "`strategy` must be such that the run fits into",
    "strategy=forward_gradient strategy.tangents=2147483647": "`strategy` must be such that the run fits",
    "strategy=snap strategy.n=1000000000": "`strategy.n` must be less for a cell as dense as this one",
    "cell=stacked cell.layers=1000000000": "`cell.layers` must be a whole number of at most 1000; got",
    **{
        f"snapshots=1 probe=[{name.split('.')[0]}] probes.{name}=2147483647": f"`probes.{name}` {MEMORY}"
        for name in (
            "cut_variance.draws",
            "estimator_quality.draws",
            "estimator_quality.batches",
            "alignment.batches",
        )
    },
    "results_dir='~no_such_user/x'": "`results_dir` must be a path whose ~ is known",
}


@pytest.mark.parametrize("setting", ODD)
def test_numbers_beyond_all_bounds_are_one_line(command, tmp_path, setting):
    base = ["size=smoke"] if setting.startswith("task=") else TINY
    code, _, err = command(*base, *setting.split())
    assert code == 2
    assert ODD[setting] in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_of_results(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert command("-m", *TINY, "seeds=1", "study=mine", "results_dir='~/x'")[0] == 0
    assert (tmp_path / "home" / "x" / "mine" / "table.csv.gz").is_file()
    assert not (tmp_path / "~").exists()
    assert configure.results_folder(DictConfig({"results_dir": "~/y"})) == tmp_path / "home" / "y"
    with pytest.raises(SettingError, match="null character"):
        configure.results_folder(DictConfig({"results_dir": "a\0b"}))


@pytest.mark.parametrize("name", ["=1+1", "@SUM(1)", "+cmd|' /C calc'!A0", "-2+3", "'=1"])
def test_a_name_that_a_spreadsheet_would_run_is_quoted(tmp_path, name):
    table = pd.DataFrame({"corpus": [name], "prefix": ["-"], "loss": [-1.5]})
    csv_tables.write_table(table, tmp_path / "table.csv")
    line = (tmp_path / "table.csv").read_text().splitlines()[1]
    assert line == f"'{name},-,-1.5"
    pd.testing.assert_frame_equal(csv_tables.read_table(tmp_path / "table.csv"), table)
    table = table.rename(columns={"corpus": name})  # a fact of one's own task
    csv_tables.write_table(table, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == f"'{name},prefix,loss"
    pd.testing.assert_frame_equal(csv_tables.read_table(tmp_path / "table.csv"), table)


def test_a_return_before_a_formula_hides_it_from_no_spreadsheet():
    written = csv_tables.packed(pd.DataFrame({"corpus": ["\r=1+1"]}), "table.csv").decode()
    assert written == '"corpus"\n"\'\r=1+1"\n'


def test_a_file_whose_name_is_no_utf_8(tmp_path):
    """It could not be written into a table, after all training."""
    file = os.fsencode(tmp_path) + b"/a\xff.txt"
    with open(file, "w") as text:  # noqa: PTH123
        text.write("abc")
    with pytest.raises(SettingError, match=r"`path` must be a path in UTF-8; got '.*udcff"):
        corpora.text_file(os.fsdecode(file))


def test_a_sweep_beyond_a_stated_size_is_refused_before_it_is_formed(command, tmp_path):
    code, _, err = command("-m", *TINY, "first_seed=range(1000000000)")
    assert code == 2
    assert "`hydra.sweeper.most_runs` must be at least the number of runs" in err
    code, _, err = command("-m", *TINY, "first_seed=1,2", "seeds=1,2", "hydra.sweeper.most_runs=3")
    assert code == 2
    assert "; got 3. This grid has more; hydra.sweeper.most_runs=30 allows it." in err
    assert list(tmp_path.iterdir()) == []


def test_a_sample_of_text_keeps_its_lines_apart_from_those_of_seeds():
    said = _indented("a\nseed 1: b\x1b[2J\rc\u2028d")
    assert said == "a\n  seed 1: b\\x1b[2J\\rc\\u2028d"
