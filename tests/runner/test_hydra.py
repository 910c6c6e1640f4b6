"""What Hydra users expect: other sweepers, optimizers of one's own, errors that name the setting."""

import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import studies
import yaml
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from support import TINY, run_folders

import bptt_study as bs
from bptt_study import __main__ as shell
from bptt_study.runner import callbacks, cli, figures, page, run_folder, status
from bptt_study.runner import run as run_module
from bptt_study.runner.configure import configure
from bptt_study.validation import SettingError

INF = float("inf")


@pytest.mark.parametrize(
    ("ends", "result"),
    [([1.0, 3.0, 2.0], 2.0), ([1.0, INF, 2.0], 2.0), ([1.0, INF, INF], INF), ([1.0, 2.0], 1.5)],
)
def test_a_run_returns_its_last_validation_loss(ends, result):
    rows = studies.run("a", studies.TEXT | studies.FULL, [[0.0, end] for end in ends])
    assert cli._objective(rows) == result
    assert isinstance(cli._objective(rows), float)


@pytest.mark.parametrize("swept", ["study=b1,b2", "results_dir=a,b"])
def test_the_basic_sweeper_refuses_several_studies(command, tmp_path, swept):
    status, _, errors = command("-m", "hydra/sweeper=basic", *TINY, swept)
    key = swept.partition("=")[0]
    assert status == 2 and f"`{key}` must be the same for all runs of a sweep" in errors
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_the_basic_sweeper_lands_in_the_study(command, tmp_path, capsys, monkeypatch):
    returned = []
    run_once = cli.run_once

    def told(*given):
        result, paths = run_once(*given)
        returned.append(result)
        return result, paths

    monkeypatch.setattr(cli, "run_once", told)
    arguments = [
        "-m",
        "hydra/sweeper=basic",
        *TINY,
        "optimizer.learning_rate=0.01,0.1",
        "study=basic",
    ]
    status_, said, _ = command(*arguments)
    assert status_ == 0
    assert len(run_folders(tmp_path / "results" / "runs" / "basic")) == 2
    assert command(*arguments)[0] == 0  # finished already: the same results, to the last digit
    assert returned[:2] == returned[2:]
    assert all(isinstance(value, float) for value in returned)
    table = bs.results.load(tmp_path / "results" / "basic").table  # gathered by the callback
    assert set(table["learning_rate"]) == {0.01, 0.1}
    assert f"census: {len(table)} rows of 2 finished runs\n" in said
    with pytest.raises(SystemExit, match="0"):
        status.main([str(tmp_path / "results" / "basic")])
    assert "2 finished runs" in capsys.readouterr().out


def test_what_another_sweeper_logs_is_shown_wherever_its_runs_are_done(command, monkeypatch):
    """Such as Optuna's best parameters. Hydra sets up its logging in the process that does a run."""

    def sweep(arguments):
        logging.getLogger("hydra_plugins.search").info("Best value: 2.5")

    sweeper = SimpleNamespace(sweep=sweep)
    monkeypatch.setattr(Plugins, "instantiate_sweeper", lambda *_, **__: sweeper)
    monkeypatch.setattr(logging.root, "handlers", [])
    assert " Best value: 2.5\n" in "".join(command("-m", "hydra/sweeper=basic", *TINY)[1:])


def test_a_wrong_setting_under_the_basic_sweeper_is_no_traceback(command):
    status, _, errors = command(
        "-m", "hydra/sweeper=basic", *TINY, "truncation=0", "strategy=fixed"
    )
    assert status == 2 and "Traceback" not in errors
    assert (
        "`strategy.window` must be a whole number of at least 1; got 0." in errors.splitlines()[-1]
    )


@pytest.mark.slow
def test_a_search_that_was_stopped_is_told_by_status(command, tmp_path, capsys):
    """A wrong setting ends it without tables. Its command is noted when it starts, and so is not lost."""
    search = ["-m", "hydra/sweeper=basic", *TINY, "strategy=fixed", "study=mine"]
    mine = tmp_path / "results" / "mine"
    assert command(*search, "truncation=2,0")[0] == 2

    def says() -> str:
        with pytest.raises(SystemExit, match="1"):
            status.main([str(mine)])
        return capsys.readouterr().out

    said = says()
    assert "mine: searched by another sweeper: " in said
    assert f"bptt-study {' '.join(search)} truncation=2,0\n" in said
    assert "\n  1 run of another sweeper, or started one by one: " in said
    assert "mine: tables: they were not gathered; bptt-study-status --gather makes them" in said
    failed = run_folder.run_paths(tmp_path / "results", "mine", "c" * 12)
    failed.failure.write_text("OvertimeError: it trained longer\n")  # as Optuna may pass over it
    status_, said, _ = command(*search, "truncation=2")
    assert status_ == 0
    line = f"  failed   {failed.run}: OvertimeError: it trained longer\n"
    assert f"mine: 1 unfinished run beside the last sweep's:\n{line}" in said
    assert line in says()
    page.write(mine)
    states = (mine / page.PAGE).read_text().partition("Runs that are not finished")[2]
    assert f"<td>{failed.run}</td><td>failed</td><td>OvertimeError: it trained longer<" in states


def test_a_failed_run_under_the_basic_sweeper_is_no_traceback(command, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("bptt_study.runner.run.perform", fail)
    status, _, errors = command("-m", "hydra/sweeper=basic", *TINY)
    assert status == 1 and "Traceback" not in errors
    assert "failed: copy elman full: RuntimeError: no memory left" in errors


@pytest.mark.slow
def test_the_basic_sweeper_makes_the_tables_of_a_shipped_experiment(command, tmp_path):
    small = ["size=smoke", "hidden=4", "budget.updates=4", "strategy=full,fixed", "truncation=2"]
    status_, said, errors = command(
        "-m", "hydra/sweeper=basic", "experiment=copy_curriculum", *small
    )
    assert status_ == 0, errors
    assert "left out: the runs that this study adds to a grid" in said
    folder = tmp_path / "results" / "copy_curriculum"
    assert figures.experiment_of(folder) == "copy_curriculum"
    content = page.study(folder)
    assert content["question"].startswith("How long a string")
    assert content["commands"] == [run_folder.noted(folder).typed] != [""]
    status_, said, errors = command(
        "-m", "hydra/sweeper=basic", "experiment=copy_curriculum", *small, "study=other"
    )
    assert status_ == 0, errors
    with pytest.raises(SystemExit, match="0"):
        status.main([str(folder.with_name("other")), "--gather"])
    assert (folder.with_name("other") / "reached.csv").is_file()
    figures.main([str(folder.with_name("other"))])
    assert (folder.with_name("other") / "reached.png").is_file()


@pytest.mark.slow
def test_an_added_run_is_without_the_settings_that_its_options_lack(command, tmp_path):
    small = ["size=smoke", "hidden=4", "budget.updates=2", "strategy=fixed", "strategy.window=2"]
    status, _, errors = command("-m", "experiment=copy_curriculum", *small)
    assert status == 0, errors
    table = bs.results.load(tmp_path / "results" / "copy_curriculum").runs
    assert table["window"].dropna().tolist() == [2] and set(table["strategy"]) == {"fixed", "ok"}


@pytest.mark.parametrize(
    ("choice", "extra"),
    [("sweeper=optuna", "optuna"), ("launcher=joblib", "joblib"), ("launcher=ray_aws", "ray")],
)
def test_a_plugin_that_is_missing_is_named_with_its_extra(choice, extra, command):
    if find_spec(extra):
        pytest.skip("it is installed here")
    status, _, errors = command("-m", f"hydra/{choice}")
    assert status == 2
    assert errors.endswith(f". pip install -e '.[{extra}]' brings it.\n")
    assert errors.count("\n") == 1


def test_a_file_that_is_not_in_utf_8_is_one_line(command, tmp_path):
    (tmp_path / "own" / "task").mkdir(parents=True)
    (tmp_path / "own" / "task" / "bad.yaml").write_bytes(b"task: copy # \xe9\n")
    status, _, errors = command("--config-dir", "own", "task=bad", "size=smoke")
    assert status == 2 and "Traceback" not in errors
    assert errors.startswith("bptt-study: own/task/bad.yaml is not in UTF-8: ")


def test_a_file_that_is_no_yaml_is_one_line(command, tmp_path):
    (tmp_path / "own" / "task").mkdir(parents=True)
    (tmp_path / "own" / "task" / "bad.yaml").write_text("task: {a: [1\n")
    status, _, errors = command("--config-dir", "own", "task=bad", "size=smoke")
    assert status == 2 and errors.count("\n") == 1
    assert "bad.yaml" in errors and "line 2" in errors


OWN = {
    "lion": "_target_: bptt_study.optimizers.clipped\ntransform: {_target_: optax.lion, _partial_: true}\n"
    "learning_rate: 0.01\nclip_norm: 1.0\n",
    "plain": "_target_: optax.adamw\nweight_decay: 0.1\nlearning_rate: 0.01\n",
    "whole": "defaults: [schedule: cosine, _self_]\n_target_: optax.rmsprop\ndecay: 0.9\n"
    "learning_rate: 0.01\nclip_norm: 1.0\n",
    "noclip": "_target_: bptt_study.optimizers.clipped\n"
    "transform: {_target_: optax.adamw, _partial_: true, weight_decay: 0.1}\nlearning_rate: 0.01\n",
}


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_of_ones_own_needs_no_schedule(name, command, tmp_path):
    file = tmp_path / "own" / "optimizer" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(OWN[name])
    status, _, errors = command("--config-dir", "own", *TINY, f"optimizer={name}")
    assert status == 0, errors
    (folder,) = run_folders(tmp_path / "results" / "runs" / "scratch")
    rows = pd.read_csv(folder / "rows.csv")
    assert set(rows["optimizer"]) == {name}
    assert rows["schedule"].isna().all() == (name != "whole")
    if name == "plain":
        assert set(rows["optimizer.transform.weight_decay"]) == {0.1}
    last = rows[rows["update"] == rows["update"].max()]
    first = rows[rows["update"] == 0]
    assert (last["validation_loss"].to_numpy() != first["validation_loss"].to_numpy()).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["strategy=[fixed,full]"], "`strategy` must be one option; got several. A sweep takes several"),
        (["-m", "truncation=interval(2,6)"], "`truncation` must be values separated by commas; got interval(2"),
        (["strategy=pes", "probe=lag_mass", "snapshots=1"], "declares no lag weights"),
        (
            ["hidden=2", "probe=[all_estimators]", "snapshots=1"],
            "`probes.all_estimators.lengths.sketched.rank` must be a whole number from 0 to 2",
        ),
        (
            ["hidden=1", "probe=[alignment]", "snapshots=1"],
            "`probes.alignment.estimators.sketched.rank` must be a whole number from 0 to 1",
        ),
        (
            ["probe=perturbation_variance", "probes.perturbation_variance.unrolls=[7]", "snapshots=1"],
            "`probes.perturbation_variance.unrolls` must be a divisor of the batch's",
        ),
        (["cell=influence"], "`cell` must be a cell that fits the task"),
        (["cell=stacked", "strategy=snap"], "`cell` must be one with an affine form"),
        (["budget=copy_smoke"], "got copy_smoke. size=smoke chooses that of its size"),
        (["-m", "budget=char_lm_smoke,copy_smoke"], "`budget` must be task, or the name of a study's budget"),
        (["-m", "budget=book_verdict_char_lm,task"], "`budget.steps` must be the length of this task's"),
    ],
)  # fmt: skip
def test_errors_name_what_the_user_set(arguments, said, command, tmp_path):
    multirun = [part for part in arguments if part == "-m"]
    status, _, errors = command(
        *multirun, "task=copy", "size=smoke", *(a for a in arguments if a != "-m")
    )
    assert status == 2
    assert said in errors
    assert "Traceback" not in errors
    assert not Path(tmp_path / "results" / "runs").exists()


def test_an_error_while_jax_traces_has_no_note_of_jax(command):
    status, _, errors = command("task=copy", "size=smoke", "strategy=pp_prop", "cell=lru")
    assert status == 2
    assert errors.endswith("got one with parameters of other shapes. Use uoro with this cell.\n")


FIRST = """# @package _global_
task: { _target_: bptt_study.tasks.copy, lag: 3, length: 2, symbols: 3 }
"""


@pytest.mark.parametrize(
    ("brought", "expected"),
    [
        ("", (4, 8)),  # the defaults of this size
        ("budgets: { smoke: { updates: 3 } }", (4, 3)),
        ("budgets: { quick: { updates: 3 } }", (4, 8)),  # another size's
        ("budgets: { smoke: { updates: 3 } }\nbudget: { batch_size: 2 }", (2, 3)),
    ],
)
def test_an_own_task_brings_its_budgets_or_has_defaults(brought, expected, tmp_path, monkeypatch):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "first.yaml").write_text(FIRST + brought)
    path = f"hydra.searchpath=[file://{tmp_path}]"
    cfg = bs.compose(path, "task=first", "size=smoke")
    assert (cfg.budget.batch_size, cfg.budget.updates) == expected
    own = bs.compose(path, "task=first", "size=smoke", "budget.updates=5")
    assert (own.budget.batch_size, own.budget.updates) == (expected[0], 5)


def test_a_budget_with_a_typo(tmp_path, command):
    (tmp_path / "own" / "task").mkdir(parents=True)
    wrong = f"{FIRST}budgets: {{ smoke: {{ update: 3 }} }}"
    (tmp_path / "own" / "task" / "first.yaml").write_text(wrong)
    status, _, errors = command("--config-dir", "own", "task=first", "size=smoke")
    assert status == 2
    assert "`budgets.smoke.update` must be left out; got 3. A size decides steps," in errors


@pytest.mark.parametrize("name", ["divergence_bound", "truncation", "snapshots"])
def test_a_size_decides_nothing_that_it_has_no_effect_on(name, command):
    status, _, errors = command("task=copy", "size=smoke", f"+budgets.smoke.{name}=5")
    assert status == 2
    assert f"`budgets.smoke.{name}` must be left out; got 5. A size decides steps," in errors


@pytest.mark.parametrize(("optimizer", "each"), [("adam", 4), ("sgd", 2), ("sgd momentum", 3)])
def test_memory_counts_gradient_and_optimizer(optimizer, each, monkeypatch):
    """Of the parameters: themselves, their gradient, and the optimizer's numbers of them."""
    counted = {}
    monkeypatch.setattr(run_module, "fits", lambda name, value, n: counted.update({name: n}))
    name, *momentum = optimizer.split()
    own = [f"optimizer.transform.{m}=0.9" for m in momentum]
    cfg = bs.compose("task=copy", "size=smoke", "seeds=3", f"optimizer={name}", *own)
    run = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    parameters = configure(run, cfg.hydra.runtime.choices).settings["parameters"]
    hidden = 2 * 8 * 4  # states of 4 sequences, old and new
    assert counted["seeds"] / 3 - each * parameters - hidden == pytest.approx(40, abs=5)


def test_memory_counts_the_state_of_a_strategy(monkeypatch):
    counted = []
    monkeypatch.setattr(run_module, "fits", lambda *all_of_it: counted.append(all_of_it))
    for strategy in ("full", "rtrl"):
        cfg = bs.compose("task=copy", "size=smoke", "seeds=1", f"strategy={strategy}")
        run = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        config = configure(run, cfg.hydra.runtime.choices)
    full, rtrl = (numbers for name, _, numbers in counted if name == "seeds")
    assert rtrl - full == 2 * 4 * config.strategy.claim.numbers  # of 4 sequences, old and new


def test_a_size_decides_seeds_and_units():
    cfg = bs.compose("task=copy", "size=smoke", "+budgets.smoke.seeds=3", "+budgets.smoke.hidden=5")
    assert (cfg.seeds, cfg.hidden) == (3, 5)
    assert bs.compose("task=copy", "size=smoke", "+budgets.smoke.seeds=3", "seeds=4").seeds == 4


@pytest.mark.parametrize(
    ("grid", "refused", "named"),
    [
        (["strategy=full,fixed,uoro", "snapshots=2"], "adjoint_norms; snapshots", "strategy=uoro"),
        (
            ["strategy=fixed,randomized", "truncation=4,0"],
            "`strategy.window` must be a whole number of at least 1; got 0",
            "strategy=fixed truncation=0",
        ),
        (["cell=elman,mlp", "cell.spectral_radius=0.5"], "Could not override", "cell=mlp"),
        (["cell=elman,gru", "cell.hidden=${nothing}"], "'nothing' not found", "cell=elman"),
        (["strategy=uoro", "snapshots=2"], "adjoint_norms; snapshots", ""),
    ],
)
def test_a_refusal_in_a_sweep_names_the_first_run_that_it_meets(grid, refused, named, command):
    status, _, errors = command("-m", *TINY, *grid, "study=mine")
    assert status == 2 and refused in errors and errors.count("\n") == 1
    assert errors.endswith(f" The first such run has {named}.\n") == bool(named)
    assert ("The first such run" in errors) == bool(named)


def test_a_size_of_ones_own_needs_a_budget(tmp_path, command):
    (tmp_path / "own" / "size").mkdir(parents=True)
    tiny = "# @package _global_\nsize: tiny\nseeds: 1\nhidden: 4\n"
    (tmp_path / "own" / "size" / "tiny.yaml").write_text(tiny)
    status, _, errors = command("--config-dir", "own", "task=copy", "size=tiny")
    assert status == 2
    assert "`size` must be one of smoke, quick, paper; got tiny. `budgets.tiny`" in errors


def test_the_version_is_ours(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bptt-study", "--version"])
    monkeypatch.setattr(shell, "_start", lambda: None)
    shell.main()
    assert capsys.readouterr().out == f"bptt-study {bs.__version__}\n"


def test_the_public_names_are_listed():
    assert {"results", "strategies", "scan", "Problem"} <= set(dir(bs))
    assert all(getattr(bs, name) is not None for name in dir(bs))


def test_a_run_composed_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = bs.compose(*TINY, "study=mine")
    run = bs.run(cfg)
    assert run.folder == Path("results/runs/mine") / run.identity
    assert run.table["validation_loss"].notna().all()
    written = run.folder.stat().st_mtime_ns
    assert bs.run(cfg).folder.stat().st_mtime_ns == written  # finished already
    assert run.params(run.seeds[0])["cell"]["W_hh"].ndim == 2


@pytest.mark.slow
def test_a_path_in_a_notebook_is_its_text(tmp_path, monkeypatch):
    """OmegaConf takes a Path, and `char_lm` too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    cfg = bs.compose("task=char_lm", "size=smoke", "budget.updates=1")
    found = []
    for path in ("t.txt", Path("t.txt")):
        cfg.task.path = path
        found.append(bs.run(cfg).identity)
    assert found[0] == found[1]
    cfg.task.path = b"t.txt"
    with pytest.raises(SettingError, match=r"`task\.path` must be .* got b't\.txt'"):
        bs.run(cfg)


def test_an_edited_configuration_keeps_to_the_options_that_name_it():
    cfg = bs.compose(*TINY, "strategy=fixed", "truncation=4")
    cfg.strategy = bs.compose(*TINY, "strategy=randomized", "truncation=4").strategy
    with pytest.raises(SettingError, match=r"`strategy._target_` must be .*fixed; got .*constant"):
        bs.run(cfg)


def test_an_edited_schedule_keeps_to_the_option_that_names_it():
    """Rows of a cosine said constant."""
    cfg = bs.compose(*TINY)
    cfg.optimizer.schedule = bs.compose(*TINY, "optimizer/schedule=cosine").optimizer.schedule
    with pytest.raises(SettingError, match=r"`optimizer.schedule._target_` must be optax.constant"):
        bs.run(cfg)


def test_a_notebook_is_told_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without = OmegaConf.masked_copy(bs.compose(*TINY), ["study"])
    with pytest.raises(SettingError, match="return_hydra_config=True"):
        bs.run(without)
    with pytest.raises(SettingError, match=r"`strategy.window` must be .* at least 1; got 0"):
        bs.run(bs.compose(*TINY, "strategy=fixed", "strategy.window=0"))
    monkeypatch.setattr(run_module, "make_train", lambda *_: 1 / 0)
    with pytest.raises(cli.RunError, match="ZeroDivisionError") as failed:
        bs.run(bs.compose(*TINY))
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert not list((tmp_path / "results" / "runs" / "scratch").glob("*/rows.csv"))


@pytest.mark.parametrize(
    ("settings", "sqlalchemy", "said"),
    [
        ({"direction": ["minimize", "minimize"]}, "1.4.54", r"direction` must be one of minimize, max"),
        ({"direction": "best"}, "1.4.54", r"direction` must be one of minimize, maximize; got best"),
        ({"storage": "sqlite:///o.db"}, "2.1.9", r"opens; got sqlite.*: pip install 'sqlalchemy<2'\."),
        ({"storage": "no url"}, "1.4.54", r"opens; got no url\. Reason: ValueError: not a URL\."),
    ],
)  # fmt: skip
def test_a_search_that_optuna_could_not_do_is_refused(settings, sqlalchemy, said, monkeypatch):
    """A traceback, or all runs were done and then failed."""

    def get_storage(url):
        assert sqlalchemy < "2"  # as in Optuna, without a word
        if url and ":" not in url:
            raise ValueError("not a URL")

    found = SimpleNamespace(storages=SimpleNamespace(get_storage=get_storage))
    monkeypatch.setitem(sys.modules, "optuna", found)
    monkeypatch.setattr(callbacks, "version", lambda package: sqlalchemy)
    sweeper = {"_target_": "optuna_sweeper.OptunaSweeper", "direction": "minimize", "storage": None}
    callbacks.check_search(OmegaConf.create(sweeper | {"direction": ["maximize"]}))
    with pytest.raises(SettingError, match=said):
        callbacks.check_search(OmegaConf.create(sweeper | settings))


WITH_OPTUNA = pytest.mark.skipif(
    find_spec("optuna") is None, reason="needs optuna; make test-launchers has it"
)


def search(folder, *arguments):
    """`bptt-study -m` with Optuna in that folder, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "bptt_study", "-m", *TINY, "hydra/sweeper=optuna", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.launchers
@WITH_OPTUNA
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("direction=[minimize,minimize]", "must be one of minimize, maximize; got ['minimize', 'minimize']."),
        ("storage=sqlite:////nowhere/o.db", "must be one that Optuna opens; got sqlite:////nowhere/o.db."),
    ],
)  # fmt: skip
def test_optuna_is_told_before_the_first_run(setting, said, tmp_path):
    done = search(tmp_path, f"hydra.sweeper.{setting}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert said in done.stderr and not (tmp_path / "results").exists()


@pytest.mark.launchers
@WITH_OPTUNA
def test_a_stored_search_goes_on(tmp_path):
    stored = ["hydra.sweeper.storage=sqlite:///o.db", "hydra.sweeper.study_name=mine", "study=mine"]
    stored += ["optimizer.learning_rate=interval(0.001,0.1)", "budget.updates=2"]
    for n in (2, 4):
        done = search(
            tmp_path, *stored, "hydra.sweeper.n_trials=2", f"hydra.sweeper.sampler.seed={n}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        study = bs.results.load(tmp_path / "results" / "mine")
        assert len(study.runs) == n
        best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
        assert best["best_value"] == study.summary()["validation_loss"].min()


@pytest.mark.launchers
@WITH_OPTUNA
def test_optuna_finds_a_learning_rate_and_the_study_has_its_tables(tmp_path):
    rate = ["optimizer.learning_rate=interval(0.001,0.1)", "study=tuned", "budget.updates=4"]
    done = search(tmp_path, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", *rate)
    assert done.returncode == 0, done.stdout + done.stderr
    study = bs.results.load(tmp_path / "results" / "tuned")
    assert study.table["learning_rate"].nunique() == len(study.runs) == 4
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_value"] == study.summary()["validation_loss"].min()


@pytest.mark.parametrize("task", ["char_lm", "copy", "add"])
def test_at_size_smoke_the_default_truncation_cuts_something(task):
    cfg = bs.compose(f"task={task}", "size=smoke")
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    steps = configure(own, cfg.hydra.runtime.choices).budget.steps
    assert cfg.truncation < steps
