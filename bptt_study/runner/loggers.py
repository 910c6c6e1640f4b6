"""Loggers: they show a run's scores in TensorBoard, Weights & Biases or MLflow while it trains.

A logger changes no result: tables and figures come from the run's own files. Each needs an extra of its name,
such as `pip install -e '.[tensorboard]'`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from bptt_study.report import columns, tables
from bptt_study.validation import SettingError, one_of

log = logging.getLogger(__name__)

Scores = Mapping[str, float]
Send = Callable[[int, Scores], None]  # (update, scores)


class LoggedRun(NamedTuple):
    """The facts about a run that a logger gets."""

    study: str
    identity: str
    title: str  # such as char_lm elman fixed 16
    settings: Mapping[str, Any]  # by the columns' names; the logger's own copy
    update: int = 0  # of the first scores that it sends: more if the run goes on from a checkpoint


class Logger(NamedTuple):
    """A logger: `open(run)` is a context that yields the function which sends the scores of an update.

    A run that is made anew begins at update 0 once more; what a logger had of it before is of another run.
    """

    open: Callable[[LoggedRun], AbstractContextManager[Send]]


def tensorboard(folder: str) -> Logger:
    """Write TensorBoard's files to `folder`/<study>/<identity>, by tensorboardX."""
    package = _package("tensorboard", "tensorboardX")

    @contextmanager
    def opened(run: LoggedRun) -> Iterator[Send]:
        where = Path(folder).expanduser() / run.study / run.identity
        # TensorBoard then hides what earlier files have of these updates
        with package.SummaryWriter(str(where), purge_step=run.update) as writer:
            told = "\n".join(f"    {name}: {value}" for name, value in run.settings.items())
            writer.add_text("settings", f"{run.title}\n\n{told}")

            def send(update: int, scores: Scores) -> None:
                for name, value in scores.items():
                    if np.isfinite(value):  # it draws no other, and prints a line for each
                        writer.add_scalar(name, value, update)
                writer.flush()

            yield send

    return Logger(opened)


def wandb(folder: str, project: str, mode: str) -> Logger:
    """Log to a project of Weights & Biases; a study is a group, and a run keeps its identity.

    Args:
      folder: The folder for its files.
      project: The project.
      mode: offline, which `wandb sync` sends later, or online.
    """
    package = _package("wandb", "wandb")
    one_of("mode", mode, ("offline", "online"))

    @contextmanager
    def opened(run: LoggedRun) -> Iterator[Send]:
        where = Path(folder).expanduser()
        where.mkdir(parents=True, exist_ok=True)
        with package.init(
            project=project,
            group=run.study,
            name=run.title,
            id=run.identity,
            config=dict(run.settings),
            dir=where,
            mode=mode,
            resume="allow" if run.update else None,  # None: anew
            settings=package.Settings(silent=True),
        ) as sink:
            yield lambda update, scores: sink.log(dict(scores), step=update)

    return Logger(opened)


def mlflow(uri: str) -> Logger:
    """Log to a tracking server of MLflow; a study is an experiment.

    Args:
      uri: The server, such as http://localhost:5000 or sqlite:///FILE.
    """
    package = _package("mlflow", "mlflow")

    @contextmanager
    def opened(run: LoggedRun) -> Iterator[Send]:
        alone: AbstractContextManager[Any] = nullcontext()
        if uri.startswith("sqlite:///"):
            file = Path(uri.removeprefix("sqlite:///"))
            file.parent.mkdir(parents=True, exist_ok=True)
            alone = FileLock(f"{file}.lock")  # two processes cannot make its tables at once
        with alone:
            package.set_tracking_uri(uri)
            study = package.set_experiment(run.study).experiment_id
        query = {"filter_string": f"tags.identity = '{run.identity}'", "output_format": "list"}
        begun = package.search_runs([study], **query) if run.update else []  # the last one first
        which = {"run_id": begun[0].info.run_id} if begun else {"run_name": run.title}
        with package.start_run(**which, tags={"identity": run.identity}):
            package.log_params({name: str(value)[:500] for name, value in run.settings.items()})
            yield lambda update, scores: package.log_metrics(dict(scores), step=update)

    return Logger(opened)


def _package(extra: str, name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        way_out = f"pip install -e '.[{extra}]' brings {error.name}."
        raise SettingError(
            "_target_", extra, "a logger whose package is installed", way_out
        ) from error


@contextmanager
def open_all(
    loggers: Mapping[str, Logger], run: LoggedRun, seeds: Sequence[int]
) -> Iterator[Callable[[Mapping[str, np.ndarray]], None]]:
    """A function that sends a log point to all loggers: each score's median over seeds, and that of each seed.

    A seed that has diverged is the worst of the median, and has no score of its own any more.
    The loggers are opened at the first log point, and each gets dicts of its own, which it may change.
    A logger that fails is named once and left out from then on. The run goes on. If the run ends with an error,
    the loggers get it.
    """
    with ExitStack() as stack:
        sends: dict[str, Send] = {}
        unopened = dict(loggers)

        def open_one(name: str, update: int) -> None:
            own = run._replace(settings=dict(run.settings), update=update)
            context = unopened.pop(name).open(own)
            sends[name] = context.__enter__()
            stack.push(partial(_close, name, context))

        def log_point(record: Mapping[str, np.ndarray]) -> None:
            update, scores = int(record["update"][0]), _scores(record, seeds)
            for name in [*unopened]:
                with _failing(name, sends):
                    open_one(name, update)
            for name, send in [*sends.items()]:
                with _failing(name, sends):
                    send(update, dict(scores))

        yield log_point


def _close(name: str, context: AbstractContextManager[Send], *stopped: Any) -> None:
    with _failing(name, {}):
        context.__exit__(*stopped)


@contextmanager
def _failing(name: str, sends: dict[str, Send]) -> Iterator[None]:
    """If the logger fails in this context, say so and leave it out."""
    try:
        yield
    except Exception as error:  # of any kind: a server that is gone must not end a run
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("logger %s stopped, and the run goes on: %s", name, reason)
        sends.pop(name, None)


def _scores(record: Mapping[str, np.ndarray], seeds: Sequence[int]) -> dict[str, float]:
    lost = record["diverged"]
    found = {"diverged": float(lost.sum())}
    for name, values in record.items():
        if columns.kind(name) == "result" and name not in ("diverged", "diverged_at"):
            of_seeds = zip(seeds, values, lost, strict=True)
            found[name] = tables.median(name, values, lost)
            found |= {f"{name}/seed_{s}": float(v) for s, v, gone in of_seeds if not gone}
    # before the first update there is no loss of training yet
    return {name: value for name, value in found.items() if not np.isnan(value)}
