"""Loggers change no result, and one that fails ends no run. The real packages: `make test-launchers`."""

import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from support import TINY

import bptt_study as bs
from bptt_study.report import csv_tables
from bptt_study.runner import loggers
from bptt_study.validation import SettingError

RUN = loggers.LoggedRun("mine", "0123", "copy elman full", {"hidden": 4})
RECORD = {
    "update": np.array([8, 8]),
    "validation_loss": np.array([1.0, 3.0]),
    "diverged": np.array([False, False]),
    "diverged_at": np.array([np.nan, np.nan]),
    "seconds": np.array([0.1, 0.1]),  # a cost, which is no score
}


def recorder(found, fails_at=None):
    @contextmanager
    def opened(run):
        found.append(run)

        def send(update, scores):
            if update == fails_at:
                raise OSError("the server is gone")
            found.append((update, dict(scores)))

        yield send
        found.append("closed")

    return loggers.Logger(opened)


def test_a_log_point_has_the_median_and_each_seed():
    found = []
    with loggers.open_all({"own": recorder(found)}, RUN, range(5, 7)) as log_point:
        log_point(RECORD)
    scores = {"validation_loss": 2.0, "validation_loss/seed_5": 1.0, "validation_loss/seed_6": 3.0}
    assert found == [RUN._replace(update=8), (8, {"diverged": 0.0} | scores), "closed"]


@pytest.mark.parametrize(("lost", "loss", "accuracy"), [(1, 2.0, 0.2), (2, np.inf, -np.inf)])
def test_a_diverged_seed_is_the_worst_and_its_curve_ends(lost, loss, accuracy):
    """Its finite scores are those of an earlier update."""
    found = []
    record = {
        "update": np.full(3, 8),
        "validation_loss": np.array([1.0, 1.5, 2.0]),
        "accuracy": np.array([0.3, 0.25, 0.2]),
        "diverged": np.arange(3) < lost,
        "diverged_at": np.where(np.arange(3) < lost, 3, np.nan),
    }
    with loggers.open_all({"own": recorder(found)}, RUN, range(3)) as log_point:
        log_point(record)
    sent = found[1][1]
    assert (sent["validation_loss"], sent["accuracy"], sent["diverged"]) == (loss, accuracy, lost)
    seeds = {name for name in sent if name.startswith("accuracy/")}
    assert seeds == {f"accuracy/seed_{s}" for s in range(lost, 3)}


def test_a_logger_that_fails_is_named_once_and_the_others_go_on(caplog):
    found, other = [], []
    both = {"bad": recorder(found, fails_at=8), "good": recorder(other)}
    with loggers.open_all(both, RUN, range(2)) as log_point:
        log_point(RECORD)
        log_point(RECORD)
    assert [m for m in caplog.messages if "logger bad stopped" in m and "server is gone" in m]
    assert len(caplog.messages) == 1
    assert len(other) == 4


def test_a_logger_gets_dicts_of_its_own_which_it_may_change():
    """Its edits stood in rows.csv, and the next logger got the scores that it had changed."""
    found, settings = [], {"hidden": 4}

    @contextmanager
    def edits(run):
        run.settings["hidden"] = 5
        yield lambda update, scores: scores.clear()

    both = {"edits": loggers.Logger(edits), "own": recorder(found)}
    run = RUN._replace(settings=settings)
    with loggers.open_all(both, run, range(2)) as log_point:
        log_point(RECORD)
    assert settings == {"hidden": 4}
    assert found[0].settings == settings
    assert found[1][1]["validation_loss"] == 2.0


def test_a_logger_gets_the_error_that_stops_the_run():
    found = []

    @contextmanager
    def opened(run):
        try:
            yield lambda update, scores: None
        except KeyboardInterrupt as stop:
            found.append(stop)
            raise

    def stopped():
        with loggers.open_all({"own": loggers.Logger(opened)}, RUN, range(2)) as log_point:
            log_point(RECORD)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(found) == 1


def test_what_is_not_known_yet_is_not_sent():
    found = []
    with loggers.open_all({"own": recorder(found)}, RUN, range(2)) as log_point:
        log_point(RECORD | {"train_loss": np.full(2, np.nan)})
    assert not [name for name in found[1][1] if name.startswith("train_loss")]


def test_tensorboard_gets_finite_numbers(monkeypatch, tmp_path):
    """Of another it draws nothing, and prints "NaN or Inf found in input tensor."."""
    writer = MagicMock()
    package = MagicMock(SummaryWriter=MagicMock(return_value=writer))
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    with loggers.open_all({"own": loggers.tensorboard(str(tmp_path))}, RUN, range(2)) as log_point:
        log_point(RECORD | {"diverged": np.array([False, True])})
    sent = writer.__enter__().add_scalar.call_args_list
    assert [call.args[:2] for call in sent] == [("diverged", 1.0), ("validation_loss/seed_0", 1.0)]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SettingError, match=r"pip install -e '.\[tensorboard\]'"):
        loggers.tensorboard("x")


@pytest.mark.launchers
@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_the_real_packages_offline(name, package, tmp_path, monkeypatch):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-launchers has it")
    monkeypatch.chdir(tmp_path)
    with_logger = bs.run(bs.compose(*TINY, f"logger=[{name}]", "study=logged"))
    without = bs.run(bs.compose(*TINY, "study=plain"))
    tables = [csv_tables.read_table(run.folder / "rows.csv") for run in (with_logger, without)]
    same = [table.drop(columns="study").to_csv() for table in tables]
    assert same[0] == same[1]
    last = float(tables[0].groupby("update")["validation_loss"].median().iloc[-1])
    assert READ[name](with_logger) == pytest.approx(last)


@pytest.mark.launchers
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_one_run_until_it_is_made_anew(tmp_path):
    """A stopped run was FINISHED, and going on made another run."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    own = {"mlflow": loggers.mlflow(uri)}

    def runs():
        client = mlflow.MlflowClient(uri)
        (experiment,) = client.search_experiments(filter_string="name = 'mine'")
        return client.search_runs([experiment.experiment_id])

    def go(update, stop=None):
        with loggers.open_all(own, RUN, range(2)) as log_point:
            log_point(RECORD | {"update": np.full(2, update)})
            if stop:
                raise stop

    with pytest.raises(KeyboardInterrupt):
        go(0, KeyboardInterrupt())
    assert [run.info.status for run in runs()] == ["FAILED"]
    go(8)
    assert [run.info.status for run in runs()] == ["FINISHED"]
    go(0)
    assert len(runs()) == 2


@pytest.mark.launchers
def test_tensorboard_hides_the_curve_of_a_run_that_is_made_anew(tmp_path):
    pytest.importorskip("tensorboardX")
    with loggers.open_all({"own": loggers.tensorboard(str(tmp_path))}, RUN, range(2)) as log_point:
        log_point(RECORD)
    (file,) = (tmp_path / "mine" / "0123").iterdir()
    starts = [event.step for event in _events(file) if event.HasField("session_log")]
    assert starts == [8]


def _events(file):
    """The events in a file; its records are protobufs with a length and two checksums each."""
    from tensorboardX.proto.event_pb2 import Event

    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def _tensorboard(run):
    """The last value in the event file."""
    (file,) = Path("results/tensorboard/logged", run.identity).iterdir()
    values = [v for event in _events(file) for v in event.summary.value]
    return [v.simple_value for v in values if v.tag == "validation_loss"][-1]


def _wandb(run):
    """The last value in the file that `wandb sync` would send: LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = Path("results/wandb").glob(f"offline-run-*-{run.identity}/*.wandb")
    content, at, data, values = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is filled with zeros
            at += 2**15 - at % 2**15
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(data).history.item
            values += [i.value_json for i in items if "validation_loss" in (i.key, *i.nested_key)]
            data = b""
    return float(values[-1])


def _mlflow(run):
    import mlflow

    client = mlflow.MlflowClient("sqlite:///results/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'logged'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.tags["identity"] == run.identity
    return found.data.metrics["validation_loss"]


READ = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
