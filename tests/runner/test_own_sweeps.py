"""From a sweep of one's own to an answer: load it, gather what belongs to it, draw it."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import studies
from support import TINY, run_folders, run_here

import bptt_study as bs
from bptt_study.report import csv_tables
from bptt_study.runner import (
    array_files,
    census,
    environment,
    figures,
    gather,
    page,
    run_folder,
    status,
)
from bptt_study.runner.locks import locked
from bptt_study.validation import SettingError

TWO = [
    "-m",
    *TINY,
    "optimizer.learning_rate=0.01,0.1",
    "strategy=fixed",
    "truncation=2",
    "study=acc",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A study of two sweeps: two learning rates of fixed, then full, whose probe has looked."""
    folder = tmp_path_factory.mktemp("own") / "results"
    target = f"results_dir={folder}"
    assert run_here(*TWO, target) == 0
    more = ["cell=stacked", "snapshots=2", "first_seed=3", "cell.hidden=3", "strategy=full"]
    assert run_here("-m", *TINY, *more, "study=acc", target) == 0
    return folder


@pytest.mark.slow
def test_a_study_is_all_its_finished_runs(results, capsys):
    table = csv_tables.read_table(results / "acc" / "table.csv.gz")
    assert table["run"].nunique() == 3
    with pytest.raises(SystemExit, match="0"):
        status.main([str(results / "acc")])
    shown = capsys.readouterr().out
    assert "acc: 1 run: 1 finished; complete" in shown
    assert "2 of 2 runs of an earlier sweep" in shown
    assert shlex.join(["bptt-study", *TWO, f"results_dir={results}"]) in shown


def test_the_page_has_the_commands_of_all_its_sweeps_as_they_were_typed(results):
    """A grid of all overrides would do other runs, and lack what is no override."""
    page.write(results / "acc")
    text = html.unescape((results / "acc" / page.PAGE).read_text(encoding="utf-8"))
    shown = text.partition("The commands that make it again")[2]
    first, second = shown.partition("<pre>")[2].partition("</pre>")[0].splitlines()
    assert second.endswith(
        f"JAX_ENABLE_X64=True {shlex.join(['bptt-study', *TWO, f'results_dir={results}'])}"
    )
    assert "strategy=full study=acc" in first


def test_studies_without_a_finished_run_keep_no_other_from_its_tables(results, tmp_path, capsys):
    shutil.copytree(results, tmp_path / "all")
    entry = {"overrides": [], "rows": 1, "corpus_sha256": None, "config": {}, "choices": {}}
    runs = {"0" * 12: entry}
    for name in ("aaa", "zzz"):
        run_folder.Sweep(tmp_path / "all", name, None, runs).save()
    (tmp_path / "all" / "acc" / "table.csv.gz").unlink()
    with pytest.raises(SystemExit, match="2"):
        status.main([str(tmp_path / "all"), "--gather"])
    first, second = capsys.readouterr().err.strip().splitlines()[-2:]
    assert "`study` must be a study with at least one finished run; got aaa" in first
    assert second.startswith("bptt-study-status: `study` must be") and "got zzz" in second
    assert (tmp_path / "all" / "acc" / "table.csv.gz").exists()
    with pytest.raises(SystemExit, match="2"):
        figures.main([str(tmp_path / "all" / name) for name in ("aaa", "acc")])
    assert "learning_curves" in capsys.readouterr().out


@pytest.mark.slow
def test_a_search_of_another_sweeper_keeps_its_command_and_what_is_unfinished(
    results, tmp_path, capsys, monkeypatch
):
    """Its runs were "started one by one", and the tables looked finished."""
    shutil.copytree(results, tmp_path / "results")
    target, folder = f"results_dir={tmp_path}/results", tmp_path / "results" / "acc"
    last = run_folder.noted(folder)
    shutil.rmtree(last.paths(*last.runs).folder)
    (folder.parent / "runs" / "acc" / "sweeps" / "0.json").write_bytes(b"\xe9")
    monkeypatch.chdir(tmp_path)
    search = ["-m", "hydra/sweeper=basic", *TINY, "strategy=frozen", "study=acc", target]
    assert run_here(*search) == 0
    assert (folder / "unfinished.txt").exists()
    page.write(folder)
    assert shlex.join(["bptt-study", *search]) in html.unescape((folder / page.PAGE).read_text())
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        status.main([str(folder)])
    assert shlex.join(["bptt-study", *search]) in capsys.readouterr().out


def test_a_command_has_what_the_shell_told_it_before(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/my own/code")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.setattr(
        sys, "argv", ["/bin/bptt-study", "--config-dir", "conf", "-m", "task.text=a b"]
    )
    with jax.enable_x64(False), jax.default_prng_impl("rbg"):
        said = environment.command()
    named = "PYTHONPATH='/my own/code' JAX_DEFAULT_PRNG_IMPL=rbg"
    assert said == f"{named} bptt-study --config-dir conf -m 'task.text=a b'"


def test_the_command_is_known_before_jax_starts():
    """A search is noted before its first run, which says on which devices JAX starts."""
    program = (
        "import sys; from bptt_study.runner import environment; print(environment.command())\n"
    )
    here = str(Path(bs.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"{program}assert 'jax' not in sys.modules", "-m", "seeds=2"],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))},
            "JAX_ENABLE_X64": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_cpu_max_isa=AVX",
            "PYTHONPATH": here,
        },
        capture_output=True,
        text=True,
    )
    told = "XLA_FLAGS=--xla_cpu_max_isa=AVX JAX_ENABLE_X64=1"
    said = f"PYTHONPATH={shlex.quote(here)} {told} bptt-study -m seeds=2\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_a_record_of_an_earlier_version_has_the_grid_of_its_overrides(tmp_path):
    entry = {"rows": 1, "corpus_sha256": None, "config": {}, "choices": {}}
    runs = {name: entry | {"overrides": ["task=copy", f"hidden={name}"]} for name in ("4", "8")}
    older = run_folder.Sweep(tmp_path, "mine", None, runs)
    file = older.save()
    record = json.loads(file.read_text())
    del record["command"]
    content = json.dumps(record, indent=1)
    name = run_folder._record_name(content.encode())
    file.unlink()
    (file.parent / name).write_text(content)
    (file.parent / "latest.json").write_text(json.dumps(name))
    assert run_folder.latest_sweep(tmp_path, "mine") == older
    assert older.command == "bptt-study -m task=copy hidden=4,8"
    newer = run_folder.Sweep(
        tmp_path, "mine", None, {"8": runs["8"]}, typed="bptt-study -m hidden=8"
    )
    newer.save()
    found, rest = run_folder.by_sweep(run_folder.latest_sweep(tmp_path, "mine"), ["4", "9", "8"])
    assert found == [(newer, ["8"]), (older, ["4"])]
    assert rest == ["9"]


@pytest.mark.slow
def test_the_last_sweep_alone_on_demand(results, capsys):
    with pytest.raises(SystemExit, match="0"):
        status.main([str(results / "acc"), "--gather", "--only-latest"])
    shown = capsys.readouterr().out
    assert "earlier" not in shown
    assert set(csv_tables.read_table(results / "acc" / "table.csv.gz")["strategy"]) == {"full"}
    with pytest.raises(SystemExit, match="0"):
        status.main([str(results / "acc"), "--gather"])
    assert "with 2 runs beside the last sweep's" in capsys.readouterr().out
    assert csv_tables.read_table(results / "acc" / "table.csv.gz")["run"].nunique() == 3


def test_single_runs_are_gathered_too(command, tmp_path, capsys, monkeypatch):
    assert command(*TINY, "study=one")[0] == 0
    with pytest.raises(SystemExit, match="1"):
        status.main([str(tmp_path / "results" / "one")])
    said = "one: tables: they were not gathered; bptt-study-status --gather makes them"
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        status.main([str(tmp_path / "results" / "one"), "--gather"])
    assert "1 run started one by one" in capsys.readouterr().out
    assert (tmp_path / "results" / "one" / "summary.csv").is_file()
    assert len(bs.results.load("results/one").runs) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(bs.results.load("~/results/one").runs) == 1
    with pytest.raises(SystemExit, match="0"):
        status.main([str(tmp_path / "results")])
    assert "one: no sweep" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        status.main([str(tmp_path / "results" / "one"), "--gather", "--only-latest"])
    said = "`only_latest` must be false for a study whose runs are all of another sweeper"
    assert said in capsys.readouterr().err


def test_a_study_is_loaded_with_its_types(results):
    study = bs.results.load(str(results / "acc"))
    runs = study.runs
    assert runs.index.name == "run"
    assert next(iter(runs)) == "cell", "what tells the runs apart comes first"
    assert {str(runs[c].dtype) for c in ("window", "stride", "hidden", "steps")} == {"Int64"}
    assert runs["exact"].dtype == "boolean"
    assert {str(runs[c].dtype) for c in ("learning_rate", "clip_norm")} == {"float64"}
    assert runs["optimizer.transform.b1"].tolist() == [0.9] * 3
    assert len(study.table) == 3 * 2 * 3
    assert study.summary().loc[runs.index, "n"].tolist() == [2] * 3


@pytest.mark.launchers
def test_parquet_keeps_the_types_of_the_table(results, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed; make test-launchers has it")
    table = bs.results.load(results / "acc").table
    table.to_parquet(tmp_path / "acc.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "acc.parquet"), table)


@pytest.mark.slow
def test_a_trained_run_is_ready_for_the_instruments(results):
    study = bs.results.load(results / "acc")
    run = study.run(study.runs.index[study.runs["cell"] == "stacked"][0])
    assert run.config["cell"]["hidden"] == 3
    params = run.params(4)
    assert array_files.load(str(run.folder / "params.npz"))["readout"]["b_q"].shape[0] == 2
    profile = bs.lags.mass(bs.lags.gradients(run.problem, params, run.batch, lags=3))
    assert profile.shape == (3,)
    assert (profile > 0).all()
    state = run.strategy.init(params, run.batch.mask.shape[1])
    estimate, _ = run.strategy.estimate(params, state, run.batch, jax.random.key(0))
    assert np.isfinite(float(estimate.loss))
    with pytest.raises(SettingError, match=r"`seed` must be in 3 … 4; got 0"):
        run.params(0)


def test_the_parameters_are_those_of_the_last_row(results):
    """The validation loss of the loaded parameters is the table's; that of the other seed is not."""
    study = bs.results.load(results / "acc")
    run = study.run(study.runs.index[study.runs["strategy"] == "fixed"][0])
    last = run.table[run.table["update"] == run.table["update"].max()].set_index("seed")
    strategy, batch = bs.strategies.full(run.problem), run.task.validation

    def loss(seed, params=None):
        params = run.params(seed) if params is None else params
        state = strategy.init(params, batch.mask.shape[1])
        return float(strategy.estimate(params, state, batch, jax.random.key(0))[0].loss)

    assert loss(1) == pytest.approx(last.loc[1, "validation_loss"], rel=1e-6)
    assert loss(0) != pytest.approx(last.loc[1, "validation_loss"], rel=1e-6)
    first = run.table[run.table["update"] == 0].set_index("seed")
    for seed in (0, 1):
        assert loss(seed, run.start(seed)) == pytest.approx(
            first.loc[seed, "validation_loss"], rel=1e-6
        )


def test_a_run_of_other_random_numbers_is_refused(results, monkeypatch):
    """Its task and the start of its seeds would be others."""
    study = bs.results.load(results / "acc")
    run, now = study.run(study.runs.index[0]), environment.environment()
    monkeypatch.setattr(environment, "environment", lambda: now | {"default_prng_impl": "rbg"})
    why = "jax_default_prng_impl=threefry2x32, now it is rbg"
    with pytest.raises(array_files.UnusableError, match=why):
        run.params(run.seeds[0])


def test_the_start_of_a_run_of_another_precision_is_refused(results, monkeypatch):
    """Its weights would be others; the data of the tasks are not."""
    study = bs.results.load(results / "acc")
    run, now = study.run(study.runs.index[0]), environment.environment()
    monkeypatch.setattr(environment, "environment", lambda: now | {"enable_x64": False})
    run.params(run.seeds[0])
    with pytest.raises(array_files.UnusableError, match="jax_enable_x64=True, now it is False"):
        run.start(run.seeds[0])


def test_what_cannot_be_loaded_is_named(results, tmp_path):
    with pytest.raises(SettingError, match="folder of a study"):
        bs.results.load(tmp_path / "nothing")
    study = bs.results.load(results / "acc")
    for wrong in ("xyz", 10**12):
        with pytest.raises(SettingError, match="beginning of one of"):
            study.run(wrong)
    run = study.run(study.runs.index[0])
    with pytest.raises(SettingError, match="`seed` must be in"):
        run.params(run.seeds.stop)
    jax.tree.map(
        np.testing.assert_array_equal, run.params(float(run.seeds[0])), run.params(run.seeds[0])
    )


def test_a_sweep_ends_in_figures_of_its_own(results):
    found = {file.stem for file in (results / "acc").glob("*.png")}
    assert found == {
        *(f"{what}_{score}" for what in ("learning_curves", "final_scores")
          for score in ("validation_loss", "accuracy")),
        "gradient_norms_time", "gradient_norms_lag",
    }  # fmt: skip


OWN = """import bptt_study as bs
from bptt_study.report import figure_layout, tables

def last(rows):
    return tables.final(rows)[["run", "validation_loss"]]

def good(last):
    figure, [[ax]] = figure_layout.figure(1, 1, (5, 4), "a title", "a caption")
    ax.plot(last["validation_loss"])
    return figure

def bad(last):
    return last["no such column"]

STUDY = bs.Study("Why?", {"last": last}, {"good": good, "bad": bad})
"""


@pytest.fixture
def own(results, tmp_path, monkeypatch) -> Path:
    """An experiment of one's own, its story beside it, and a results folder in which its runs are finished."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    lines = "# @package _global_\nstory: own_story.STUDY\nhydra: { mode: MULTIRUN }\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(lines)
    (tmp_path / "own_story.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(results, tmp_path / "results")
    for file in (tmp_path / "results" / "acc").glob("*.png"):
        file.unlink()
    return tmp_path / "results" / "acc"


LATEST = "hydra.sweeper.only_latest=true"
MINE = [*TWO, "experiment=mine", LATEST]


def test_a_story_of_ones_own_makes_its_tables_and_figures(own, capsys):
    assert run_here("--config-dir", "conf", *MINE) == 0
    said = capsys.readouterr().out
    assert "table: results/acc/last.csv" in said
    assert "figure: results/acc/good.png" in said
    assert "FAILED: figure bad: KeyError: 'no such column' (own_story.py, line 13)" in said
    assert [file.name for file in own.glob("*.png")] == ["good.png"]
    page.write(own)
    assert "Why?" in (own / "report.html").read_text()
    with pytest.raises(SystemExit, match="1"):
        figures.main([str(own), "--story", "own_story.STUDY"])
    assert "failed: figure bad: KeyError" in capsys.readouterr().err


def test_gathering_again_imports_no_story_that_is_not_named(own, capsys):
    assert run_here("--config-dir", "conf", *MINE) == 0
    (own / "good.png").unlink()
    sys.modules.pop("own_story")
    with pytest.raises(SystemExit, match="0"):
        status.main([str(own), "--gather"])
    assert "own_story" not in sys.modules
    assert "--story=own_story.STUDY makes the study's own" in capsys.readouterr().out
    assert not (own / "good.png").exists()
    with pytest.raises(SystemExit, match="0"):
        status.main([str(own), "--gather", "--story", "own_story.STUDY"])
    assert (own / "good.png").exists()


def test_what_the_command_made_goes_with_the_tables_that_it_was_made_of(own, capsys):
    with pytest.raises(SystemExit, match="1"):
        figures.main([str(own), "--story", "own_story.STUDY", "--format", "svg"])
    assert (own / "good.svg").exists() and (own / "last.csv").exists()
    (own / "mine.png").touch()
    with pytest.raises(SystemExit, match="0"):
        status.main([str(own), "--gather", "--only-latest"])
    assert not (own / "good.svg").exists() and not (own / "last.csv").exists()
    assert re.search("removed: .*good.svg.*, made before", capsys.readouterr().out)
    assert (own / "mine.png").exists(), "nobody but the user made it"


@pytest.mark.slow
def test_a_tuning_goes_with_the_tables_of_its_runs(tmp_path, capsys, monkeypatch):
    """The page had the choice of a learning rate beside a run at another, and so had a caption."""
    file, seen, make = tmp_path / "tu" / "tuning.csv", [], figures.make
    monkeypatch.setattr(figures, "make", lambda *given: seen.append(file.exists()) or make(*given))
    target = [*TINY, "strategy=fixed", "truncation=2", "study=tu", f"results_dir={tmp_path}"]
    values = "{setting:optimizer.learning_rate,values:[0.01,0.1],seeds:1,first_seed:9}"
    assert run_here("-m", *target, f"hydra.sweeper.tune={values}") == 0
    assert file.exists()
    assert run_here("-m", *target, "optimizer.learning_rate=0.5") == 0
    assert file.exists() and seen[-1], "the tables have its run, too"
    assert run_here("-m", *target, "optimizer.learning_rate=0.3", LATEST) == 0
    assert not file.exists()
    assert not seen[-1], "no figure reads it"
    assert re.search("removed: .*tuning.csv, made before", capsys.readouterr().out)


def test_a_choice_is_written_by_one_process_at_a_time(tmp_path, monkeypatch):
    settings = studies.TEXT | studies.FULL | {"learning_rate": 0.1}
    runs = (studies.run(name, settings, [[3.0, loss]]) for name, loss in (("a", 2.0), ("b", 1.0)))
    rows, held = pd.concat(runs), []

    def write(*_):
        folders = (run_folder.runs_folder(tmp_path, study) for study in ("s", "s_tuning"))
        held.append([locked(folder / ".locks" / "tables.lock") for folder in folders])

    monkeypatch.setattr(gather, "rows_of", lambda _: rows)
    monkeypatch.setattr(csv_tables, "write_table", write)
    monkeypatch.setattr(census, "write", write)
    tried = run_folder.Sweep(tmp_path, "s_tuning", None, {})
    candidates = [("a", "r", 0.1), ("b", "r", 0.2)]
    table = gather.compare(tried, "optimizer.learning_rate", candidates)
    assert table.loc[table["chosen"], ["candidate_for", "value"]].to_numpy().tolist() == [
        ["r", 0.2]
    ]
    gather.write_choice(tried, "s", "optimizer.learning_rate", table)
    assert held == [[True, True]] * 2


def test_a_choice_among_candidates_that_all_diverge_says_so(tmp_path, monkeypatch, capsys):
    """The first was marked as chosen without a word."""
    losses = {("a", 1): np.inf, ("a", 2): np.nan, ("b", 1): np.inf, ("b", 2): 3.0}
    candidates = [(f"{name}{rate}", name, float(rate)) for name, rate in losses]
    rows = [studies.run(f"{name}{rate}", studies.TEXT | studies.FULL | {"learning_rate": float(rate)},
                        [[0.0, loss]] * 2) for (name, rate), loss in losses.items()]  # fmt: skip
    monkeypatch.setattr(gather, "rows_of", lambda _: pd.concat(rows))
    tried = run_folder.Sweep(tmp_path, "mine_tuning", None, {})
    (tmp_path / "runs" / "mine_tuning").mkdir(parents=True)
    setting = "optimizer.learning_rate"
    table = gather.compare(tried, setting, candidates)
    best = table.loc[table["chosen"], ["candidate_for", "value", "at_edge"]]
    assert best.to_numpy().tolist() == [["a", 1.0, True], ["b", 2.0, True]]
    gather.write_choice(tried, "mine", setting, table)
    said = capsys.readouterr().out
    assert said.count("diverged") == 1
    assert (
        f"half of the seeds or more diverged at every candidate: {setting}=1.0, the first, for a\n"
        in said
    )


def test_a_story_may_change_the_configuration_that_it_gets(tmp_path, monkeypatch):
    """The runs were done under other identities, and the sweep missed its own for ever."""

    def more_runs(config):
        config.cell.hidden = 3
        return []

    story = bs.Study("?", more_runs=more_runs)
    monkeypatch.setattr("bptt_study.runner.stories.find", lambda *_: story)
    assert run_here("-m", *TINY, f"results_dir={tmp_path}", "study=edits") == 0
    assert set(bs.results.load(tmp_path / "edits").table["hidden"]) != {3}


def test_a_story_that_is_none_stops_a_sweep_before_it_trains(own, capsys):
    assert run_here("--config-dir", "conf", *MINE, "story=own_story.OTHER", "seeds=3") == 2
    said = capsys.readouterr().err
    assert "`story` must be the name of a bptt_study.Study" in said
    assert "no attribute 'OTHER'" in said


def test_the_page_of_a_sweep_says_how_to_make_it_again(results):
    (file,) = page.write(results / "acc")
    text = file.read_text()
    assert "bptt-study -m task=copy size=smoke" in text
    assert "_target_: optax.adam" in text, "the configuration of each run"


@pytest.mark.slow
def test_the_python_of_its_page_runs(results):
    page = (Path(__file__).parents[2] / "docs" / "results_of_your_own.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    seen: dict = {}
    for block in blocks:
        exec(block.replace("results/mine", str(results / "acc")).replace("lags=6", "lags=3"), seen)
    assert seen["profile"].shape == (3,)


def test_now_is_when_the_sweep_started(command):
    """Time passes while its runs are composed, and they would lie in several places."""
    now = "results_dir=x/${now:%H-%M-%S-%f}"
    code, _, err = command("-m", *TINY, "seeds=1", "first_seed=1,2", now, "study=mine")
    assert code == 0, err
    (results,) = Path("x").iterdir()
    assert set(csv_tables.read_rows(results / "mine")["seed"]) == {1, 2}
    assert len(run_folders(results / "runs" / "mine")) == 2


@pytest.mark.slow
def test_what_an_earlier_gathering_made_does_not_stay_beside_the_new(command, tmp_path):
    """Its figures and tables show runs that are not in the table any more."""
    sweep = ["-m", *TINY, "study=z", "hydra.sweeper.only_latest=true"]
    assert command(*sweep, "strategy=full,fixed", "snapshots=1", "probe=gradient_norms")[0] == 0
    folder = tmp_path / "results" / "z"
    (folder / "mine.csv").write_text("a\n1\n")
    before = {file.name for file in folder.iterdir()}
    assert "gradient_norms.csv.gz" in before
    assert command(*sweep, "strategy=fixed", "truncation=1")[0] == 0
    after = {file.name for file in folder.iterdir()}
    gone = before - after
    assert "gradient_norms.csv.gz" in gone and any(name.endswith(".png") for name in gone)
    assert {"mine.csv", "table.csv.gz", "summary.csv"} <= after
    with pytest.raises(SystemExit, match="0"):
        status.main([str(folder)])
