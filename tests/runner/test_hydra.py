"""What Hydra users expect: other sweepers, optimizers of one's own, errors that name the setting."""

from pathlib import Path

import pandas as pd
import pytest
import studies
from support import TINY, run_folders

import bptt_study as bs
from bptt_study import __main__ as shell
from bptt_study.runner import cli, status

INF = float("inf")


@pytest.mark.parametrize(
    ("ends", "result"),
    [([1.0, 3.0, 2.0], 2.0), ([1.0, INF, 2.0], 2.0), ([1.0, INF, INF], INF), ([1.0, 2.0], 1.5)],
)
def test_a_run_returns_its_last_validation_loss(ends, result):
    rows = studies.run("a", studies.TEXT | studies.FULL, [[0.0, end] for end in ends])
    assert cli._objective(rows) == result
    assert isinstance(cli._objective(rows), float)


def test_the_basic_sweeper_lands_in_the_study(command, tmp_path, capsys, monkeypatch):
    returned = []
    run_once = cli._run_once
    monkeypatch.setattr(
        cli, "_run_once", lambda *given: returned.append(run_once(*given)) or returned[-1]
    )
    arguments = [
        "-m",
        "hydra/sweeper=basic",
        *TINY,
        "optimizer.learning_rate=0.01,0.1",
        "study=basic",
    ]
    assert command(*arguments)[0] == 0
    assert len(run_folders(tmp_path / "results" / "runs" / "basic")) == 2
    assert command(*arguments)[0] == 0  # finished already: the same results
    assert returned[:2] == pytest.approx(returned[2:], rel=1e-6)
    assert all(isinstance(value, float) for value in returned)
    with pytest.raises(SystemExit, match="0"):
        status.main([str(tmp_path / "results" / "basic"), "--gather"])
    assert "0.01" in capsys.readouterr().out


OWN = {
    "lion": "_target_: bptt_study.optimizers.clipped\ntransform: {_target_: optax.lion, _partial_: true}\n"
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
    assert rows["schedule"].isna().all()
    last = rows[rows["update"] == rows["update"].max()]
    first = rows[rows["update"] == 0]
    assert (last["validation_loss"].to_numpy() != first["validation_loss"].to_numpy()).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["strategy=[fixed,full]"], "`strategy` must be one option; got several. A sweep takes several"),
        (["-m", "truncation=interval(2,6)"], "`truncation` must be values separated by commas; got interval(2"),
        (["strategy=pes", "probe=lag_mass", "snapshots=1"], "declares no lag weights"),
        (["cell=influence"], "`cell` must be a cell that fits the task"),
        (["-m", "budget=char_lm_smoke,copy_smoke"], "`budget.steps` must be"),
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


def test_the_version_is_ours(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bptt-study", "--version"])
    monkeypatch.setattr(shell, "_start", lambda: None)
    shell.main()
    assert capsys.readouterr().out == f"bptt-study {bs.__version__}\n"


def test_the_public_names_are_listed():
    assert {"results", "strategies", "scan", "Problem"} <= set(dir(bs))
    assert all(getattr(bs, name) is not None for name in dir(bs))
