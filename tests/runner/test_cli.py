"""The command line as its users meet it: runs, sweeps, bad input, and what is left on disk."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support import TINY, run_folders

import bptt_study as bs
from bptt_study.paths import shipped
from bptt_study.report import csv_tables, tables
from bptt_study.report.columns import COLUMNS, kind
from bptt_study.runner import status as status_command
from bptt_study.runner.configure import configure
from bptt_study.runner.run import snapshots_of_seeds
from bptt_study.training.train import Progress, run_keys

GROUPS = ["task", "cell", "strategy", "optimizer", "optimizer/schedule"]
SMOKE = ["size=smoke", "cell.hidden=4", "budget.updates=4"]


def files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.mark.slow
def test_one_run_leaves_rows_configuration_and_versions(command, tmp_path):
    status, out, _ = command(*SMOKE, "strategy=fixed", "truncation=3", "snapshots=2")
    assert status == 0
    (folder,) = run_folders(tmp_path / "results" / "runs" / "scratch")
    assert files(folder) == [
        "SHA256SUMS",
        "config.yaml",
        "costs.csv",
        "cuts.csv",
        "gradient_norms.csv.gz",
        "machine.json",
        "params.npz",
        "rows.csv",
        "run.json",
        "sample.txt",
    ]
    assert str(folder.relative_to(tmp_path)) in out

    rows = csv_tables.read_table(folder / "rows.csv")
    assert list(rows["update"]) == [0, 2, 4] * 2
    assert list(rows["seed"]) == [0] * 3 + [1] * 3
    assert (rows["window"] == 3).all()
    assert (rows["stride"] == 3).all()
    assert (rows["tokens"] == rows["update"] * 16 * 4).all()
    assert rows["bits_per_character"].round(4).equals((rows["validation_loss"] / 0.693147).round(4))
    assert set(json.loads((folder / "machine.json").read_text())) >= {
        "python",
        "jax",
        "device",
        "processor",
        "threads",
        "commit",
    }
    assert "window: 3" in (folder / "config.yaml").read_text()

    norms = csv_tables.read_table(folder / "gradient_norms.csv.gz")
    assert norms.groupby(["seed", "update", "axis"]).size().to_dict() == {
        (s, u, a): 16 for s in (0, 1) for u in (0, 4) for a in ("time", "lag")
    }
    # chunks of 3 in 16 steps: the last loss stands alone in its chunk, and reaches lag 0 only
    reach = norms[(norms["axis"] == "lag") & (norms["gradient_norm"] > 0)]["step"]
    assert set(reach) == {0}

    cuts = csv_tables.read_table(folder / "cuts.csv")
    assert list(cuts[cuts["cut"]]["position"]) == list(range(3, len(cuts), 3))
    sample = (folder / "sample.txt").read_text().splitlines()
    assert [len(line) for line in sample] == [len("seed 0: time traveller") + 200] * 2


@pytest.mark.slow
def test_the_cuts_of_an_update_with_resets_are_those_that_training_makes(command, tmp_path):
    """A part between two resets is a sequence of its own, for which the strategy draws."""
    assert command(*SMOKE, "task=char_lm", "strategy=randomized", "truncation=2", "budget.reset_every=4",
                   "budget.updates=1")[0] == 0  # fmt: skip
    (file,) = tmp_path.rglob("cuts.csv")
    run = bs.results.Run(file.parent.name, file.parent)
    size = run.config["budget"]["batch_size"]
    _, _, key = run_keys(jax.random.key(0))
    ids = jnp.zeros((4, 4 * size), jnp.int32)
    params = run.params(0)
    draw = run.strategy.estimate(
        params, run.strategy.init(params, 4 * size), bs.Batch(ids, ids, jnp.ones(ids.shape)),
        jax.random.fold_in(key, 0),
    )[0].metrics["cuts"]  # fmt: skip
    wanted = np.concatenate([np.asarray(draw)[:, part * size] for part in range(4)])
    wanted[[4, 8, 12]] = True
    assert csv_tables.read_table(file)["cut"].tolist() == wanted.tolist()


@pytest.mark.slow
def test_every_column_is_documented(command, tmp_path):
    for task in ("char_lm", "digits", "copy", "add"):
        command(*SMOKE, f"task={task}", "strategy=randomized_power_law", f"results_dir={task}")
        for name in ("rows.csv", "costs.csv"):
            (table,) = (tmp_path / task).rglob(name)
            columns = pd.read_csv(table).columns
            nested = [c for c in columns if c not in COLUMNS]  # settings under their full names
            assert all(c.count(".") > 0 for c in nested)
            assert list(columns) == [*(c for c in COLUMNS if c in columns), *nested]
            of_cost = {kind(c) == "cost" for c in columns[4:]}
            assert of_cost == {name == "costs.csv"}


@pytest.mark.slow
def test_a_run_is_repeatable_and_its_identity_is_its_configuration(command, tmp_path):
    def rows(*arguments):
        assert command(*TINY, *arguments)[0] == 0
        (table,) = (tmp_path / arguments[-1].split("=")[1]).rglob("rows.csv")
        return table.parent.name, table.read_bytes()

    name, first = rows("strategy=randomized", "truncation=3", "results_dir=a")
    again, second = rows("truncation=3", "strategy=randomized", "results_dir=b")
    assert name == again
    assert first == second, "byte for byte: nothing of clock and machine is in it"
    elsewhere, _ = rows("truncation=3", "strategy=randomized", "study=other", "results_dir=e")
    assert elsewhere == name, "nor is the study part of the identity"
    direct, _ = rows("strategy=randomized", "strategy.mean_length=3", "results_dir=c")
    assert direct == name, "a shorthand is not part of the identity, what it sets is"
    other, _ = rows("strategy=randomized", "truncation=4", "results_dir=d")
    assert other != name


@pytest.mark.slow
def test_a_sweep_ends_in_one_table(command, tmp_path):
    status, out, _ = command(
        "-m", *TINY, "strategy=full,fixed", "truncation=2,4", "study=mine", "results_dir=out"
    )
    assert status == 0
    table = csv_tables.read_table(tmp_path / "out" / "mine" / "table.csv.gz")
    # full has no truncation to sweep over: two jobs of the grid are one run
    runs = table.fillna({"truncation_length": 0})[["strategy", "truncation_length"]]
    runs = runs.drop_duplicates().itertuples(index=False)
    assert sorted(map(tuple, runs)) == [("fixed", 2), ("fixed", 4), ("full", 0)]
    assert len(table) == 3 * 2 * 3
    assert "18 rows of 3 runs" in out
    assert "#" not in out, "of Hydra's numbers of jobs the first would be missing"
    assert str(Path("out") / "mine" / "table.csv.gz") in out
    starts = table[table["update"] == 0].groupby("seed")["validation_loss"].nunique()
    assert (starts == 1).all(), "all strategies start from the same weights"


@pytest.fixture
def strategy_file(tmp_path, monkeypatch):
    """Write a strategy of one's own outside the package: module and yaml; its settings by --config-dir."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, change):
        (tmp_path / f"{name}.py").write_text(
            "from bptt_study.strategies import full\n"
            f"def {name}(problem):\n"
            "    honest = full(problem)\n"
            "    def estimate(*args):\n"
            f"        {change}\n"
            "    return honest._replace(estimate=estimate)\n"
        )
        folder = tmp_path / "conf" / "strategy"
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(f"_target_: {name}.{name}\n")
        return ["--config-dir", "conf"]

    return write


@pytest.mark.slow
def test_a_failed_job_leaves_the_others_and_is_named(command, strategy_file, tmp_path):
    own = strategy_file("breaks", "raise RuntimeError('broken on purpose')")
    status, out, err = command("-m", *own, *SMOKE, "strategy=breaks,full", "study=mine")
    assert status == 1
    assert "failed:" in err and "strategy=breaks" in err
    assert "1 of 2 runs finished and kept. The same command does the others." in err
    assert "RuntimeError: broken on purpose" in out
    assert not (tmp_path / "results" / "mine").exists(), "no table of a part"
    runs = tmp_path / "results" / "runs" / "mine"
    assert len(list(runs.glob("*/rows.csv"))) == 1
    (failure,) = runs.glob("*.failed.txt")
    assert "broken on purpose" in failure.read_text()


def test_a_strategy_may_report_nothing(command, strategy_file, tmp_path):
    own = strategy_file("silent", "e, s = honest.estimate(*args); return e._replace(metrics={}), s")
    status, _, err = command(*own, *SMOKE, "strategy=silent")
    assert status == 0, err
    (folder,) = run_folders(tmp_path / "results" / "runs" / "scratch")
    assert "cuts.csv" not in files(folder)
    status, _, err = command(*own, *SMOKE, "strategy=silent", "snapshots=2")
    assert status == 2
    assert "; got gradient_norms. The strategy does not report adjoint_norms" in err


SCALED = "e, s = honest.estimate(*args); return e._replace({}), s"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("cut", "grads=__import__('jax').tree.map(lambda g: g[..., :1], e.grads)", "a gradient"),
        ("scaled", "loss=20 * e.loss", "the mean loss of a token that counts"),
        ("wrapped", "loss=20 * e.loss", "the mean loss of a token that counts"),
    ],
)
def test_an_estimate_of_ones_own_is_checked_before_it_trains(
    command, strategy_file, tmp_path, name, change, said
):
    own = strategy_file(name, SCALED.format(change))
    if name == "wrapped":  # its __module__ is then the package's
        wraps = "    @__import__('functools').wraps(honest.estimate)\n    def est"
        file = tmp_path / f"{name}.py"
        file.write_text(file.read_text().replace("    def est", wraps))
    status, _, err = command("-m", *own, *SMOKE, f"strategy=full,{name}")
    assert status == 2
    assert f"`strategy` must be one whose estimate has {said}" in err
    assert not (tmp_path / "results").exists()


HYDRAS = ("There is no such setting", "Available options")  # its own words
BAD = {
    "stratgy=full": "There is no such setting",
    "strategy=ful": "Available options",
    "+typo=1": "typo=1",
    "+experimnt=paper": "experimnt=paper",
    "+strategy.k=3": "strategy.k=3",
    "+budget.foo=1": "budget.foo=1",
    "~seeds": "seeds",
    "strategy=fixed strategy.window=0": "strategy.window=0",
    "strategy=fixed strategy.window=-3": "strategy.window=-3",
    "strategy=fixed strategy.window=2.5": "strategy.window=2.5",
    "strategy=fixed strategy.stride=0": "strategy.stride=0",
    "strategy=fixed strategy.window=4 strategy.stride=8": "strategy.stride=8",
    "strategy=randomized strategy.mean_length=0.5": "strategy.mean_length=0.5",
    "strategy=randomized_power_law strategy.alpha=2": "strategy.alpha=2",
    "task.corpus=foo": "task.corpus=foo",
    "task.path=nowhere.txt": "task.path=nowhere.txt",
    "task.path=empty.txt": "task.path=empty.txt",
    "task.path=binary.txt": "task.path=binary.txt",
    "task.path=short.txt": "task.path=short.txt",
    "task.prefix=a1": "task.prefix=a1",
    "cell.hidden=0": "cell.hidden=0",
    "cell.hidden=many": "cell.hidden=many",
    "cell.spectral_radius=-1": "cell.spectral_radius=-1",
    "cell.activation=sine": "cell.activation=sine",
    "optimizer.learning_rate=-1": "optimizer.learning_rate=-1",
    "optimizer.clip_norm=0": "optimizer.clip_norm=0",
    "optimizer/schedule=warmup_cosine optimizer.schedule.warmup=2": "optimizer.schedule.warmup=2",
    "seeds=0": "seeds=0",
    "strategy._target_=nowhere.f": "No module named 'nowhere'",
    "strategy._target_=math.nothing": "'nothing' is importable",
    "strategy._target_=math.pi": "strategy._target_=math.pi",
    "~strategy._target_": "strategy._target_=None",
    "first_seed=99999999999": "first_seed=99999999999",
    "strategy=randomized strategy.compensate=maybe": "strategy.compensate=maybe",
    "+optimizer.transform.foo=1": "optimizer.transform={_target_: optax.adam, _partial_: true",
    "optimizer.transform=null": "optimizer.transform=null. Reason",
    "study=../elsewhere": "study=../elsewhere",
    "study=runs": "study=runs",
    "study=null": "study=null",
    "results_dir=null": "results_dir=null",
    "budget.steps=0": "budget.steps=0",
    "budget.batch_size=1000000": "With batch_size=1000000",
    "task=digits budget.steps=32": "budget.steps=32",
    "device=tpu": "device=tpu",
    "results_dir=empty.txt": "results_dir=empty.txt",
    "results_dir=/proc/nowhere": "results_dir=/proc/nowhere",
    "results_dir=1e3": "results_dir=1000.0",
    "results_dir=2024_01_15": "results_dir=20240115",
    "results_dir=[a]": "results_dir=['a']",
    "probes=1": "probes=1",
    "probes=null": "probes=null",
    "+probes.x=1": "probes.x=1",
    "probes.gradient_norms=null": "probes.gradient_norms=null",
    "loggers=1": "loggers=1",
    "+loggers.x=1": "loggers.x=1",
    "budgets=null": "budgets=null",
    "budgets.smoke=3": "budgets.smoke=3",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(command, tmp_path, arguments):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = files(tmp_path)
    status, _, err = command("size=smoke", *arguments.split())
    assert status == 2 and err.startswith("bptt-study: ") and err.count("\n") == 1
    said = BAD[arguments]
    if re.match(r"[\w.]+=", said):
        setting, value = said.split("=")
        assert f"`{setting}` must be " in err and f"; got {value}" in err
    else:
        assert said in err
        assert " must be " in err or said in HYDRAS
    assert files(tmp_path) == before


def test_one_bad_run_stops_a_sweep_before_it_starts(command, tmp_path):
    status, _, err = command("-m", *SMOKE, "strategy=fixed", "truncation=4,0")
    assert status == 2
    assert "`strategy.window` must be a whole number of at least 1; got 0." in err
    assert files(tmp_path) == []


@pytest.mark.parametrize("sweep", ["study=a,b", "results_dir=a,b"])
def test_a_sweep_ends_in_one_place(command, tmp_path, sweep):
    status, _, err = command("-m", *SMOKE, sweep)
    assert status == 2
    assert "`results_dir, study` must be the same for all runs of a sweep" in err
    assert files(tmp_path) == []


TUNE = "hydra.sweeper.tune={setting: %s, values: %s, seeds: 2, first_seed: %s}"


@pytest.mark.slow
def test_a_setting_is_tuned_for_every_run_on_seeds_of_its_own(command, tmp_path):
    """Of the rates 1e-9, 0.02 and 1e9 the middle one."""
    tune = TUNE % ("optimizer.learning_rate", "[1e-9, 0.02, 1e9]", 1000)
    line = ["strategy=fixed", "truncation=4", "study=mine", "snapshots=1"]
    status, out, err = command("-m", *SMOKE, *line, tune)
    assert status == 0, out + err
    assert "edge" not in out
    grid = csv_tables.read_table(tmp_path / "results" / "mine" / "tuning.csv")
    assert grid["learning_rate"].tolist() == [1e-9, 0.02, 1e9]
    assert set(grid["first_seed"]) == {1000} and set(grid["n"]) == {2}
    assert grid["chosen"].tolist() == [False, True, False]
    assert not grid["at_edge"].any()

    rows = csv_tables.read_table(tmp_path / "results" / "mine" / "table.csv.gz")
    assert set(rows["learning_rate"]) == {0.02} and set(rows["seed"]) == {0, 1}
    assert set(grid["candidate_for"]) == set(rows["run"]), "it is the run that got the value"
    tried = tmp_path / "results" / "runs" / "mine_tuning"
    last = tables.final(pd.concat(map(csv_tables.read_table, tried.glob("*/rows.csv"))))
    assert set(last["seed"]) == {1000, 1001} and set(last["updates"]) == {4}, "an equal budget"
    last = last.assign(loss=last["validation_loss"].where(~last["diverged"], np.inf))
    medians = last.groupby("learning_rate")["loss"].median()
    np.testing.assert_allclose(grid["median"], medians, rtol=1e-6)
    assert not list(tried.glob("*/gradient_norms*")), "nothing is probed for the choice"
    with pytest.raises(SystemExit, match="0"):
        status_command.main([str(tmp_path / "results")])  # the runs of the choice have no tables


@pytest.mark.slow
def test_runs_with_the_same_candidates_share_them(command, tmp_path):
    """Runs of two and of three seeds are tuned by the same runs."""
    tune = TUNE % ("optimizer.learning_rate", "[0.01, 0.02]", 1000)
    status, out, err = command("-m", *SMOKE, "seeds=1,2", "study=mine", tune)
    assert status == 0, out + err
    grid = csv_tables.read_table(tmp_path / "results" / "mine" / "tuning.csv")
    assert grid["run"].nunique() == 2
    rows = csv_tables.read_table(tmp_path / "results" / "mine" / "table.csv.gz")
    assert sorted(grid["candidate_for"].unique()) == sorted(rows["run"].unique())
    assert grid.groupby("candidate_for")["chosen"].sum().tolist() == [1, 1]
    assert grid["at_edge"].equals(grid["chosen"])
    assert out.count("at the edge of the grid: optimizer.learning_rate=0.0") == 2


BAD_TUNE = {
    "hydra.sweeper.tune=3": "`hydra.sweeper.tune` must be null or a mapping of setting, values",
    "hydra.sweeper.tune={values: [1, 2]}": "null or a mapping of setting, values, seeds, first_seed",
    "hydra.sweeper.tune={setting: a, values: [1, 2], seeds: 1, first_seed: 9, x: 1}": "or a mapping of setting",
    TUNE % ("optimizer.learning_rate", "0.1", 1000): "tune.values` must be a list",
    TUNE % ("optimizer.learning_rate", "[0.1]", 1000): "two or more different numbers",
    TUNE % ("optimizer.learning_rate", "[0.1, 0.1]", 1000): "two or more different numbers",
    TUNE
    % (
        "optimizer.learning_rate",
        "[0.1, fast]",
        1000,
    ): "tune.values` must be a finite number; got fast",
    TUNE
    % (
        "optimizer.learning_rate",
        "[0.1, -1]",
        1000,
    ): "`optimizer.learning_rate` must be a finite number of at least 0; got -1",
    TUNE
    % (
        "optimizer.learning_rate",
        "[0.1, 0.2]",
        1,
    ): "tune.first_seed` must be such that no seed is among",
    TUNE
    % (
        "optimizer.learning_rate",
        "[0.1, 0.2]",
        -1,
    ): "tune.first_seed` must be a whole number of at least 0; got -1",
    TUNE
    % (
        "optimizer.rate",
        "[0.1, 0.2]",
        1000,
    ): "tune.setting` must be a number that every run has; got opt",
    TUNE % ("strategy.window", "[2, 4]", 1000): "budget.updates=4 strategy=full",
    TUNE.replace("seeds: 2", "seeds: 0")
    % ("optimizer.learning_rate", "[1, 2]", 9): "tune.seeds` must be",
}


@pytest.mark.parametrize("tune", BAD_TUNE)
def test_bad_tuning_is_one_message_before_anything_runs(command, tmp_path, tune):
    status, out, err = command("-m", *SMOKE, "strategy=full,fixed", tune)
    assert status == 2, out + err
    assert BAD_TUNE[tune] in err
    assert len(err.strip().splitlines()) == 1
    assert files(tmp_path) == []


def test_what_is_tuned_cannot_be_given(command, tmp_path):
    tune = TUNE % ("optimizer.learning_rate", "[0.1, 0.2]", 1000)
    for given in ("0.1,0.2", "0.1"):
        status, _, err = command("-m", *SMOKE, f"optimizer.learning_rate={given}", tune)
        assert status == 2
        assert "`optimizer.learning_rate` must be left out; got '0.1'. It is tuned;" in err
    assert files(tmp_path) == []


def test_every_seed_has_draws_of_its_own_for_its_norms(command):
    """Else intervals over seeds would leave the strategy's noise out."""
    with initialize_config_dir(version_base="1.3", config_dir=str(shipped("conf", "config.yaml"))):
        cfg = compose(
            "config", [*SMOKE, "strategy=randomized", "truncation=3"], return_hydra_config=True
        )
    choices = cfg.hydra.runtime.choices
    run = configure(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), choices)
    params = jax.tree.map(lambda p: jnp.stack([p] * 3), run.problem.init(jax.random.key(0)))
    draws = jax.vmap(jax.random.key)(jnp.array([0, 1, 0]))
    progress = Progress(params, None, None, jnp.zeros(3, int), None, draws, draws)

    def norms(progress):
        look = run.probes["gradient_norms"].look
        return [
            look(snapshot)["gradient_norm"].to_numpy()
            for snapshot in snapshots_of_seeds(run, progress)
        ]

    first = norms(progress)
    assert (first[0] == first[2]).all()
    assert (first[0] != first[1]).any()
    later = norms(progress._replace(update=jnp.ones(3, int)))
    assert (first[0] != later[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reset_every", "steps"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (None, 8)]
)
def test_probes_measure_no_lag_that_resets_keep_from_training(
    command, tmp_path, reset_every, steps
):
    """The batch of the probes and of the loaded run is cut where training cuts its own."""
    every = "null" if reset_every is None else reset_every
    budget = ["budget.steps=8", "budget.batch_size=2", f"budget.reset_every={every}"]
    probes = ["probe=[lag_mass,gradient_norms,cut_variance]", "snapshots=1"]
    assert command(*SMOKE, "budget.updates=1", "strategy=full", *budget, *probes)[0] == 0
    (folder,) = run_folders(tmp_path / "results" / "runs" / "scratch")
    assert csv_tables.read_table(folder / "lag_mass.csv.gz")["lag"].max() == steps - 1
    assert csv_tables.read_table(folder / "gradient_norms.csv.gz")["step"].max() == steps
    assert csv_tables.read_table(folder / "cut_variance.csv.gz")["horizon"].max() == steps
    run = bs.results.Run(folder.name, folder)
    assert run.batch.mask.shape == (steps, 2 * 8 // steps)
    whole = np.asarray(run.task.validation.inputs)[:8, :2]
    parts = [whole[n : n + steps, b] for b in range(2) for n in range(0, 8, steps)]
    assert sorted(map(tuple, run.batch.inputs.T.tolist())) == sorted(map(tuple, parts))


def subprocess_run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
def test_a_gpu_that_is_not_there():
    done = subprocess_run("-m", "bptt_study", "size=smoke", "device=gpu", JAX_PLATFORMS="cpu")
    assert done.returncode == 2
    assert "`device` must be auto or cpu; got gpu" in done.stderr
    done = subprocess_run("-m", "bptt_study", "size=smoke", JAX_PLATFORMS="nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("bptt-study: `JAX_PLATFORMS` must be a platform that JAX finds")


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["-sc", "query=bash"]])
def test_help_and_completion_do_not_import_jax(arguments):
    program = (
        f"import sys; sys.argv = ['bptt-study', *{arguments!r}]\n"
        "from bptt_study.runner.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    done = subprocess_run("-c", program, COMP_LINE="bptt-study strategy=", COMP_POINT="20")
    assert done.returncode == 0, done.stderr
    if arguments == ["--help"]:
        copied = [line.split(":", 1)[1] for line in done.stdout.splitlines() if ":  " in line]
        assert sum("bptt-study" in line for line in copied) == 3
        for group in ("task", "cell", "strategy", "optimizer", "budget", "size", "experiment"):
            assert f"\n  {group} " in done.stdout


def test_the_commands_of_the_help_compose(command):
    """Each command that --help gives to copy is accepted (composed, not run)."""
    status, out, _ = command("--help")
    lines = [line.split("bptt-study", 1)[1].split() for line in out.splitlines() if ":  " in line]
    assert len(lines) == 3
    for arguments in lines:
        plain = [a.split(",")[0] for a in arguments if a != "-m"]
        status, _, err = command(*plain, "--cfg", "job", "--resolve")
        assert status == 0, err


@pytest.mark.slow
def test_devices_share_the_seeds_and_change_nothing(tmp_path):
    tables = []
    for devices in ("1", "2"):
        done = subprocess_run(
            "-m",
            "bptt_study",
            *TINY,
            "strategy=randomized",
            "seeds=3",  # the second device has one again
            f"results_dir={tmp_path / devices}",
            JAX_NUM_CPU_DEVICES=devices,
            XLA_FLAGS="",
        )
        assert done.returncode == 0, done.stderr
        (rows,) = (tmp_path / devices).rglob("rows.csv")
        costs = csv_tables.read_table(rows.with_name("costs.csv"))
        assert (costs["devices"] == int(devices)).all()
        tables.append(rows.read_bytes())
    assert tables[0] == tables[1]


def options(group):
    return sorted(f.stem for f in (shipped("conf", "config.yaml") / group).glob("*.yaml"))


@pytest.mark.parametrize("group", [*GROUPS, "size", "experiment"])
def test_every_configuration_composes(command, group):
    assert options(group)
    for option in options(group):
        status, _, err = command(f"{group}={option}", "--cfg", "job", "--resolve")
        assert status == 0, err


@pytest.mark.parametrize("strategy", options("strategy"))
def test_every_strategy_file_trains(command, strategy):
    status, out, err = command(*TINY, f"strategy={strategy}", "truncation=3", "seeds=1")
    assert status == 0, err
    assert f"copy elman {strategy}" in out


@pytest.mark.parametrize("mode", [[], ["-m"], ["-m", "hydra/sweeper=basic"]])
def test_own_files_that_hydra_would_pass_over_are_refused(command, tmp_path, mode):
    """The package's folder comes before --config-dir, so a copy of fixed.yaml with changes would do nothing."""
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "fixed.yaml").write_text("_target_: mine.own\n")
    status, _, errors = command("--config-dir", "conf", *mode, *TINY, "strategy=fixed")
    assert status == 2
    assert "`config-dir` must be a folder whose files have other names" in errors
    assert "Hydra would take the shipped strategy/fixed.yaml. Rename yours." in errors
    assert not (tmp_path / "results").exists()


NO_NAMES = [
    "strategy=4",
    "strategy=True",
    "strategy=full,1e3",
    "task=-1",
    "task=null",
    "task=copy,null",
]
NO_NAMES += ["experiment=null", "probe=null", "optimizer/schedule=null", "hydra/launcher=7"]


@pytest.mark.parametrize("given", NO_NAMES)
def test_an_option_that_is_no_name_is_one_line(command, given):
    name = given.partition("=")[0]
    status, _, errors = command("-m", given, "size=smoke")
    assert status == 2 and errors.count("\n") == 1
    assert f"`{name}` must be the name of an option; got" in errors


@pytest.mark.parametrize("mode", [[], ["-m"], ["-m", "hydra/sweeper=basic"]])
@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("truncatoin=4", "Could not override 'truncatoin'. There is no such setting"),
        ("strategy=fulll", "Available options in 'strategy': adaptive bp_lambda checkpointed"),
        ("cell=[a", "no viable alternative at input '[a'"),
    ],
)
def test_an_error_of_hydra_is_one_line(command, mode, given, line):
    status, _, errors = command(*mode, *TINY, given)
    assert status == 2 and errors.count("\n") == 1
    assert line in errors and "search path" not in errors


@pytest.mark.filterwarnings("ignore:Callback Gather")  # Hydra asks it, too
@pytest.mark.parametrize(
    "setting", ["hydra.verbose=7", "hydra.sweeper=null", "hydra.launcher=null"]
)
def test_a_setting_that_hydra_fails_with_is_one_line(command, tmp_path, setting):
    """Hydra asserts what settings of its own are: they ended in tracebacks."""
    status, _, err = command("-m", "size=smoke", setting)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("bptt-study: Hydra failed with these settings: ")
    assert not [*tmp_path.iterdir()]
