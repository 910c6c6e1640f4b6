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
            "sample_length=3",
            "sample_length is not used with task=copy, which writes no text",
        ),
    ],
)
def test_a_setting_of_one_run_that_changes_nothing(given, said, caplog):
    small = [name for name in TINY if name != "cell.hidden=4"]
    composed(*small, "hidden=4", *given.split())
    assert warned(caplog) == [said] * bool(said)


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
        # their blank lines become one, and the characters are taken as they are
        (["task.path=mine.txt"], ONCE.replace("\n\n", "\n\n\n"), ""),
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


def test_a_sweep_says_it_once(command, caplog):
    command("-m", *TINY, "cell=elman,gru", "spectral_radius=0.5,0.9", "study=mine")
    (said,) = warned(caplog)
    assert said.startswith("spectral_radius is not used with cell=gru: no setting refers to it")


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


@pytest.mark.parametrize("name", ["gradient_norms", "online_series"])
def test_an_experiment_is_silent(name, command, monkeypatch, caplog):
    """Its yaml sets radii that gated cells do not have, and probes of runs beside it."""
    from bptt_study.runner.sweep import StudySweep

    monkeypatch.setattr(StudySweep, "_launch", lambda sweep, runs: ["none"])
    command("-m", f"experiment={name}", "size=smoke")
    assert "is not used with" not in caplog.text


def test_one_run_of_a_study_says_what_it_leaves_out(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    bs.run(bs.compose("experiment=book_verdict", "size=smoke", "task=digits", "budget.updates=1"))
    said = "one run, without the grid over task, strategy, truncation and the tuning of "
    assert warned(caplog) == [said + "optimizer.learning_rate: a sweep does them, `bptt-study -m`"]
