"""The command `bptt-study`: Hydra composes a configuration, `configure` validates it, `run` does the run."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bptt_study import files, validation
from bptt_study.paths import shipped
from bptt_study.runner import callbacks, configure, unused
from bptt_study.runner.locks import holder, lock, locked
from bptt_study.runner.time_limit import end_with_parent
from bptt_study.signals import Preempted, end_at_signals
from bptt_study.validation import SettingError, counted, one_line

if TYPE_CHECKING:
    import pandas as pd

    from bptt_study.runner.run import RunConfig
    from bptt_study.runner.run_folder import RunPaths

log = logging.getLogger(__name__)

ELSEWHERE = "elsewhere"  # replaces the result if another process is doing the run


def main() -> None:
    """Run `bptt-study` with the arguments of this process; see `__main__`."""
    conf = str(shipped("conf", "config.yaml"))
    with one_line_errors():
        _check_budget(sys.argv[1:])
        _check_options(sys.argv[1:], Path(conf))
        os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors, in several lines
        hydra.main(version_base="1.3", config_path=conf, config_name="config")(one_run)()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line: status 2 for a wrong setting, status 1 for a failed run."""
    with validation.one_line_errors("bptt-study", OmegaConfBaseException, HydraException):
        try:
            yield
        except (HydraException, yaml.YAMLError) as error:
            shown = CompactHydraException(_in_one_line(str(error)))
            for note in getattr(error, "__notes__", []):
                shown.add_note(note)
            raise shown from error
        except UnicodeDecodeError as error:
            found = _file_of(error.object) or "a file"
            raise CompactHydraException(f"{found} is not in UTF-8: {error}") from error
        except RunError as error:
            print(f"failed: {error}", file=sys.stderr)
            sys.exit(1)
        except OSError:
            raise
        except Exception as error:  # Hydra does not validate its own settings; it fails anyhow
            if not _raised_by_hydra(error):
                raise
            said = f"Hydra failed with these settings: {type(error).__name__}: {error}"
            raise HydraException(_in_one_line(said)) from error


def _raised_by_hydra(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("hydra.")


def _file_of(content: bytes) -> Path | None:
    """Find the yaml of `--config-dir` that holds these bytes."""
    if not (folder := get_args_parser().parse_known_args()[0].config_dir):
        return None
    files = (file for file in sorted(Path(folder).rglob("*.yaml")) if file.is_file())
    return next((file for file in files if content in file.read_bytes()), None)


def _in_one_line(said: str) -> str:
    """Shorten Hydra's message to one line, and say how a plugin that is missing is installed.

    The search path does not help the user, nor does the advice to add a setting, which we would refuse.
    """
    said = said.partition("Config search path")[0]
    extra = re.search(r"Could not find 'hydra/\w+/(joblib|submitit|ray|optuna)", said)
    said = f"{said.strip()}. pip install -e '.[{extra[1]}]' brings it." if extra else said
    said, advice, _ = said.partition("To append to your config")
    said += "There is no such setting; `bptt-study --cfg job` shows them." * bool(advice)
    return " ".join(said.split())


def _check_budget(arguments: list[str]) -> None:
    """Refuse the budgets of version 0.1, which were one option for each task and size."""
    for argument in arguments:
        if old := re.fullmatch(r"\+?budget=(\w+_(smoke|quick|paper)\b.*)", argument):
            allowed = "task, or the name of a study's budget"
            way_out = f"size={old[2]} chooses that of its size."
            raise SettingError("budget", old[1], allowed, way_out)


def _check_options(arguments: list[str], conf: Path) -> None:
    """Check that options of groups are names: Hydra ends in a traceback at a number, a boolean or null."""
    groups = {folder.name for folder in conf.iterdir() if folder.is_dir()}
    parser = OverridesParser.create()
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("+")
        if name not in groups and "/" not in name:
            continue
        try:
            value = parser.parse_override(argument).value()
        except HydraException:
            continue  # Hydra says what is wrong with it
        for one in value.list if isinstance(value, ChoiceSweep) else [value]:
            if one is None or isinstance(one, bool | int | float):
                said = "null" if one is None else one
                way_out = f"An option of this name is written {name}='\"{said}\"'."
                raise SettingError(name, said, "the name of an option", way_out)


class RunError(RuntimeError):
    """A run failed. The message gives the reason and the place of the traceback."""


def one_run(cfg: DictConfig) -> float | str:
    """Do one run, unless it is finished; Hydra calls this for a single run and for each run of a sweep.

    A wrong setting or a failure ends the program if the run is alone, or one of another sweeper's. Our sweeper
    validates all runs beforehand; there an error fails this run alone.

    Args:
      cfg: The composed configuration.

    Returns:
      The median over seeds of the last validation loss, with inf for a diverged seed, as Hydra's sweepers
      expect it; or ELSEWHERE.
    """
    hydra_cfg = HydraConfig.get()
    alone = hydra_cfg.mode is RunMode.RUN
    # our sweeper does other runs meanwhile, and another sweeper needs a number
    wait = alone or callbacks.OWN not in hydra_cfg.sweeper._target_
    end_with_parent()
    with one_line_errors() if alone else _of_a_sweep(wait):
        # a launcher may start its worker in another folder, but relative paths count from this one
        os.chdir(hydra_cfg.runtime.cwd)
        typed = hydra_cfg if alone else None
        return run_once(cfg, hydra_cfg.runtime.choices, alone, wait, typed)[0]


@contextmanager
def _of_a_sweep(wait: bool) -> Iterator[None]:
    """End a run of a sweep at a signal to its worker, and raise every error of it as a `RunError`.

    The sweep may be another process, and what your code raises cannot always be read there.
    """
    with end_at_signals():
        try:
            yield
        except BaseException as stop:  # your code may raise anything; the line keeps the reason
            error = _failure(stop)
            # the command line prints its own line for these two kinds of error
            if isinstance(error, RunError) or (wait and isinstance(error, OSError | SettingError)):
                raise
            raise RunError(one_line(error)) from error


def run_once(
    cfg: DictConfig,
    choices: Mapping[str, str],
    alone: bool,
    wait: bool = True,
    hydra_cfg: Any = None,
) -> tuple[float | str, "RunPaths"]:
    """Validate, take the run's lock, and do the run if it is not finished.

    Args:
      cfg: The composed configuration.
      choices: The chosen option of each configuration group.
      alone: Whether the run is not part of a sweep. Then it shows a progress bar.
      wait: Whether to wait for another process that is doing the run, instead of returning ELSEWHERE, and to
        raise `RunError` if the run fails, instead of its error.
      hydra_cfg: Hydra's own part, to say which settings the run does not use. None: a sweep says it.

    Returns:
      The run's result as `one_run` returns it, and its files.
    """
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    config = configure.configure(own, choices)
    if hydra_cfg is not None:
        unused.say_unused(hydra_cfg.overrides.task, [unused.Composed(own, choices, config)])
        unused.say_one_run(hydra_cfg)
    results_dir = configure.results_folder(cfg)
    configure.check_writable(results_dir)
    from bptt_study.report import csv_tables
    from bptt_study.runner import run_folder

    paths = run_folder.run_paths(results_dir, config.study, config.identity)
    rows = paths.folder / "rows.csv"
    if wait and locked(paths.lock):
        line = (
            "another process is doing this run; waiting for it (Ctrl-C stops waiting): %s; lock: %s"
        )
        log.info(line, holder(paths.lock), paths.lock)
    with lock(paths.lock, wait=wait) as held:
        if not held:
            return ELSEWHERE, paths
        if cfg.overwrite:
            paths.checkpoint.unlink(missing_ok=True)
        elif paths.folder.exists():
            wrong = run_folder.damage(paths, config.corpus, config.code)
            if not wrong:
                log.info("finished already: %s (overwrite=true repeats the run)", paths.folder)
                return _objective(csv_tables.read_table(rows)), paths
            aside = files.set_aside(paths.folder)
            log.warning(
                "%s is damaged (%s); it is kept as %s, and the run is repeated",
                paths.folder,
                "; ".join(wrong),
                aside.name,
            )
        paths.failure.unlink(missing_ok=True)
        _train(config, paths, cfg, choices, alone, wait)
        # as for a finished run, to the last digit
        return _objective(csv_tables.read_table(rows)), paths


def _train(
    config: "RunConfig",
    paths: "RunPaths",
    cfg: DictConfig,
    choices: Mapping[str, str],
    alone: bool,
    wait: bool,
) -> None:
    """Train the run and report its result; write a failure's traceback beside the run's folder."""
    from bptt_study.runner import run
    from bptt_study.training import devices

    devices.keep_to(cfg.cores)
    launcher = str(choices["hydra/launcher"])
    try:
        rows = run.perform(config, paths, launcher, cfg.checkpoint_seconds, alone, cfg.run_timeout)
    except BaseException as stop:  # your code may raise anything; the line keeps the reason
        error = _failure(stop)
        why = _write_failure(error, paths)
        # the command line prints its own line for these two kinds of error
        if not wait or isinstance(error, OSError | SettingError):
            raise error from stop.__cause__
        raise RunError(f"{config.title}: {why}\n  traceback: {paths.failure}") from error
    finally:
        devices.let_go_of_programs()
    log.info("%s: %s -> %s", config.title, _result(rows), paths.folder)


def _failure(stop: BaseException) -> Exception:
    """Turn what ended a run into a failure; `sys.exit` and the like would end the sweep, perhaps with status 0.

    Ctrl-C does end the sweep, and is raised again.
    """
    if isinstance(stop, Exception):
        return stop
    if isinstance(stop, KeyboardInterrupt) and not isinstance(stop, Preempted):
        raise stop
    said = str(stop) if isinstance(stop, Preempted) else one_line(stop)
    called = isinstance(stop, SystemExit) and f"the run called sys.exit({stop.code!r})"
    error = RuntimeError(called or said)
    return error.with_traceback(stop.__traceback__)


def _write_failure(error: Exception, paths: "RunPaths") -> str:
    """Write the traceback of a failed run, and return the reason in one line."""
    if isinstance(error, OSError) and error.filename is None and error.errno is not None:
        error.filename = str(paths.runs)  # every message then names the disk
    why = one_line(error)
    try:
        paths.runs.mkdir(parents=True, exist_ok=True)
        found = "".join(traceback.format_exception(error))
        # a text may hold half a character, for example from a file name that is not UTF-8
        files.write(paths.failure, f"{why}\n\n{found}".encode("utf-8", "backslashreplace"))
    except OSError as other:
        log.error("the traceback could not be written: %s", other)
        raise error from None
    return why


def _objective(rows: "pd.DataFrame") -> float:
    """Compute the median over seeds of the last validation loss; a diverged seed is the worst."""
    from bptt_study.report import tables

    return float(tables.aggregate(tables.final(rows), ["run"], "validation_loss")["median"].iloc[0])


def _result(rows: "pd.DataFrame") -> str:
    """Describe the last validation loss of a run and the number of seeds that diverged."""
    from bptt_study.report import tables

    last = tables.final(rows)
    at = last["diverged_at"].dropna()
    score = f"{tables.short(_objective(rows), 4)} {tables.unit(rows)}".rstrip()
    said = f"validation {score} (median of {counted(len(last), 'seed')})"
    if len(at):
        said += f"; {len(at)} of them diverged, the first at update {tables.text(at.min())}"
    if lost := last["diverged"].sum() - len(at):
        said += f"; the validation loss of {lost} of them is not finite"
    return said
