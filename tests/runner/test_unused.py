"""A setting that changes nothing is named once; those of a shipped experiment stay silent."""

import logging

import pytest
from omegaconf import OmegaConf
from support import TINY

import bptt_study as bs
from bptt_study.runner import configure, unused


@pytest.fixture(autouse=True)
def anew():
    unused._say.cache_clear()


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "cell=gru spectral_radius=0.3",
            "spectral_radius is not used with cell=gru: no setting refers to it; "
            "cell.spectral_radius sets it there",
        ),
        ("cell=gru cell.spectral_radius=0.3", ""),
        ("spectral_radius=0.3", ""),
        (
            "cell=mlp spectral_radius=0.3",
            "spectral_radius is not used with cell=mlp: no setting refers to it",
        ),
        (
            "strategy=full truncation=2",
            "truncation is not used with strategy=full: no setting refers to it",
        ),
        ("strategy=fixed truncation=2", ""),
        ("strategy=fixed strategy.window=${truncation} truncation=2", ""),
        ("probe=[lag_mass] strategy=fixed", "probe is not used with snapshots=0"),
        (
            "probes.gradient_norms.draws=3",
            "probes.gradient_norms.draws is not used with snapshots=0",
        ),
        ("probes.gradient_norms.draws=3 snapshots=1", ""),
        ("budgets.quick.batch_size=3", "budgets.quick.batch_size is not used with size=smoke"),
        ("budgets.smoke.batch_size=3", ""),
        (
            "budgets.smoke.updates=3 budget.updates=4",
            "budgets.smoke.updates is not used with budget.updates=4",
        ),
        ("+budgets.smoke.seeds=3 seeds=2", "budgets.smoke.seeds is not used with seeds=2"),
        ("+budgets.smoke.lag=3", "budgets.smoke.lag is not used with task.lag=3"),
        ("+budgets.smoke.lag=3 task.lag=${budgets.smoke.lag}", ""),
    ],
)
def test_a_setting_of_one_run_that_changes_nothing(given, said, caplog):
    small = [name for name in TINY if name != "cell.hidden=4"]
    composed(*small, "hidden=4", *given.split())
    assert warned(caplog) == [said] * bool(said)


def test_a_number_of_the_size_passes_through_the_setting_that_it_decides(caplog):
    composed(*TINY, "+budgets.smoke.hidden=3")
    said = "budgets.smoke.hidden is not used with cell=elman: no setting refers to it; "
    assert warned(caplog) == [said + "cell.hidden sets it there"]


def composed(*given):
    """Validate a run, and say what it does not use."""
    cfg = bs.compose(*given)
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    choices = cfg.hydra.runtime.choices
    run = configure.configure(own, choices)
    unused.say_unused(cfg.hydra.overrides.task, [unused.Composed(own, choices, run)])
    return run


ONCE = "to be\n\nor not\n\n" + "and so it goes on " * 20


@pytest.mark.parametrize(
    ("given", "text", "said"),
    [
        ([], "", "stdlib_docs"),
        (["task.corpus=random_letters", "task.alphabet=all"], "", "random_letters"),
        (["task.corpus=one_letter"], "", "one_letter"),
        (["task.path=mine.txt"], ONCE, "mine.txt"),
        (["task.path=mine.txt"], f"{ONCE}\n\nto be", ""),
        (["task.path=mine.txt"], ONCE.replace("\n\n", "\n\n\n"), "mine.txt"),
        (["task.path=mine.txt", "task.alphabet=letters"], ONCE.replace("\n", "\n\n"), "mine.txt"),
    ],
)
def test_a_text_that_repeats_no_paragraph_gives_one_run(
    given, text, said, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(text)
    plain, once = (
        composed(
            "task=char_lm", "size=smoke", "budget.steps=2", *given, f"task.distinct={distinct}"
        )
        for distinct in ("false", "true")
    )
    assert (plain.identity == once.identity) == bool(said)
    assert (plain.settings["distinct"], once.settings["distinct"]) == (False, not said)
    assert ("distinct: false" in once.config_yaml()) == bool(said)
    assert warned(caplog) == [f"task.distinct is not used with corpus={said}"] * bool(said)


@pytest.mark.slow
def test_a_sweep_does_such_a_run_once(command, caplog):
    small = ["task=char_lm", "size=smoke", "budget.updates=2", "seeds=1", "sample_length=0"]
    both = ["task.corpus=one_letter", "task.distinct=true,false", "study=mine"]
    status, out, errors = command("-m", *small, *both)
    assert status == 0 and "1 run (1 repeated in the grid)" in out + errors
    assert warned(caplog) == ["task.distinct is not used with corpus=one_letter"]


def test_bs_run_says_it(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    bs.run(bs.compose(*TINY, "cell=gru", "spectral_radius=0.3"))
    (said,) = warned(caplog)
    assert said.startswith("spectral_radius is not used with cell=gru")


@pytest.mark.slow
def test_a_sweep_says_it_once(command, caplog):
    command("-m", *TINY, "cell=elman,gru", "spectral_radius=0.5,0.9", "study=mine")
    (said,) = warned(caplog)
    assert said.startswith("spectral_radius is not used with cell=gru: no setting refers to it")


@pytest.mark.slow
@pytest.mark.parametrize(("strategies", "lines"), [("full,fixed", 0), ("full,rtrl", 2)])
def test_a_sweep_is_silent_of_what_one_of_its_runs_uses(strategies, lines, command, caplog):
    command("-m", *TINY, f"strategy={strategies}", "truncation=2,3", "study=mine")
    assert len(warned(caplog)) == lines


def test_the_command_line_of_one_run_says_it(command):
    tune = "hydra.sweeper.tune={setting: seeds}"
    _, out, errors = command(*TINY, "strategy=full", "truncation=3", tune)
    said = out + errors
    assert "truncation is not used with strategy=full: no setting refers to it" in said
    assert "one run, without the tuning of seeds: a sweep does it, `bptt-study -m`" in said


def test_one_run_says_which_settings_only_a_sweep_has(command):
    own = ["hydra.sweeper.only_latest=true", "hydra/launcher=processes", "hydra.launcher.n_jobs=2"]
    _, out, errors = command(*TINY, *own, "+hydra.sweeper.params.seeds='1,2'")
    lines = [line for line in (out + errors).splitlines() if "is not used" in line]
    assert [line.split(" ", 1)[1] for line in lines] == [
        f"{setting.partition('=')[0]} is not used with one run: a sweep uses it, `bptt-study -m`"
        for setting in own
    ]
    assert "one run, without the grid over seeds" in out + errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient_norms", "online_series"])
def test_an_experiment_is_silent(name, command, monkeypatch, caplog):
    """Its yaml sets radii that gated cells do not have, and probes of runs beside it."""
    from bptt_study.runner.sweep import StudySweep

    monkeypatch.setattr(StudySweep, "_launch", lambda sweep, runs: ["none"])
    command("-m", f"experiment={name}", "size=smoke")
    assert "is not used" not in caplog.text


def test_a_size_of_ones_own_says_which_of_its_numbers_others_replace(tmp_path, command, caplog):
    """Its yaml has its own seeds, and the task's lag refers to nothing."""
    (tmp_path / "own" / "size").mkdir(parents=True)
    numbers = (
        "{seeds: 7, lag: 5, steps: null, batch_size: 2, updates: 2, logs: 1, reset_every: null}"
    )
    tiny = f"# @package _global_\nsize: tiny\nseeds: 2\nhidden: 4\nbudgets: {{ tiny: {numbers} }}\n"
    (tmp_path / "own" / "size" / "tiny.yaml").write_text(tiny)
    assert command("--config-dir", "own", "-m", "task=copy", "size=tiny", "study=mine")[0] == 0
    assert warned(caplog) == [
        "budgets.tiny.seeds=7 is not used: seeds is 2",
        "budgets.tiny.lag=5 is not used: task.lag is 20",
    ]


def test_a_setting_typed_over_that_of_its_size_is_no_news(caplog):
    composed("experiment=online_series", "size=smoke", "seeds=3", "hidden=5", "budget.updates=3")
    assert warned(caplog) == []


@pytest.mark.slow
def test_one_run_of_a_study_says_what_it_leaves_out(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    bs.run(bs.compose("experiment=book_verdict", "size=smoke", "task=digits", "budget.updates=1"))
    said = "one run, without the grid over task, strategy, truncation and the tuning of "
    assert warned(caplog) == [said + "optimizer.learning_rate: a sweep does them, `bptt-study -m`"]
