"""A Hydra callback: it makes the study's tables after another sweeper, such as `hydra/sweeper=optuna`."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from bptt_study.paths import shipped
from bptt_study.validation import SettingError, one_line, one_of

if TYPE_CHECKING:
    from bptt_study.runner.run_folder import Sweep

ONE = ("study", "results_dir")  # settings of a whole sweep
OWN = "bptt_study_sweeper"  # the module of our sweeper, which makes the tables itself


class Gather(Callback):
    """Gather all finished runs of the study when a multirun ends."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse files of one's own that Hydra would pass over."""
        _say_own_files(config)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse the same, a launcher that is not installed, and what another sweeper would find too late."""
        _say_own_files(config)
        with launcher_errors(config):
            module = importlib.import_module(str(config.hydra.launcher._target_).rpartition(".")[0])
            importlib.import_module(getattr(module, "PACKAGE", module.__name__))
        if OWN in str(config.hydra.sweeper._target_):
            return
        from bptt_study.report.study import question
        from bptt_study.runner import configure, environment, run_folder, stories
        from bptt_study.runner.cli import one_line_errors

        with one_line_errors():
            if "optuna" in str(config.hydra.sweeper._target_):
                check_search(config.hydra.sweeper)
            for override in OverridesParser.create().parse_overrides(config.hydra.overrides.task):
                key = override.get_key_element()
                if key in ONE and override.is_sweep_override():
                    value = override.get_value_string()
                    raise SettingError(key, value, "the same for all runs of a sweep")
            results_dir = configure.results_folder(config)
            configure.check_writable(results_dir)
            experiment = config.hydra.runtime.choices.get("experiment")
            self.story = stories.find(config.story, experiment)
            said = {"story": config.story, "question": question(self.story)}
            said["typed"] = environment.command()
            study = configure.study_name(config.study)
            self.search = run_folder.Sweep(results_dir, study, experiment, {}, **said)
            # already now, as it may be stopped; if it were the latest, status would forget a sweep's runs
            self.search.save(latest=not _last(self.search).runs)
        # Hydra does so where the runs are done, and the sweeper logs here
        configure_log(config.hydra.job_logging)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Make the tables, figures and the printed summary, unless the sweeper has made them."""
        if OWN in str(config.hydra.sweeper._target_):
            return
        from bptt_study.report.study import Study
        from bptt_study.runner import gather, run_folder, status
        from bptt_study.runner.cli import one_line_errors

        with one_line_errors():
            sweep, story = self.search._replace(runs=_last(self.search).runs), self.story
            print(gather.gather_finished(sweep, story))
            status.show_started(sweep, run_folder.started(sweep))
            if story and story.more_runs != Study("").more_runs:
                print(
                    "left out: the runs that this study adds to a grid of bptt-study's own sweeper"
                )


def _last(search: "Sweep") -> "Sweep":
    """Read the last sweep of the study, an empty one if there is none; the search if its record is damaged."""
    from bptt_study.runner import run_folder

    with suppress(SettingError):
        return run_folder.noted(search.results_dir / search.study)
    return search


def _say_own_files(config: DictConfig) -> None:
    from bptt_study.runner.cli import one_line_errors

    with one_line_errors():
        check_own_files(config)


@contextmanager
def launcher_errors(config: DictConfig) -> Iterator[None]:
    """End the program with one line if the package of the launcher is missing."""
    from bptt_study.runner.cli import one_line_errors

    with one_line_errors():
        try:
            yield
        except ModuleNotFoundError as error:
            extra = re.search(r"hydra_(\w+)_launcher", str(error.name))
            if not extra:
                raise
            name = config.hydra.runtime.choices["hydra/launcher"]
            way_out = f"For {name}: pip install -e '.[{extra[1]}]'."
            raise SettingError("hydra/launcher", name, "installed", way_out) from error


def check_search(sweeper: Any) -> None:
    """Check what Optuna would find only after the runs, or say in a traceback: its direction and its storage.

    Args:
      sweeper: The settings of Optuna's sweeper.

    Raises:
      SettingError: For several directions, as a run returns one number, and for a storage that does not open.
    """
    direction = sweeper.direction
    if OmegaConf.is_list(direction) and len(direction) == 1:
        direction = direction[0]
    name = direction.name if isinstance(direction, Enum) else direction
    one_of("hydra.sweeper.direction", name, ("minimize", "maximize"))
    try:
        if isinstance(sweeper.storage, str):
            importlib.import_module("optuna").storages.get_storage(sweeper.storage)
    except Exception as error:  # Optuna, SQLAlchemy and each database have errors of their own
        way_out = f"Reason: {one_line(error)}."
        if version("sqlalchemy") >= "2":
            way_out = "Optuna 2 needs an older SQLAlchemy: pip install 'sqlalchemy<2'."
        allowed = "one that Optuna opens"
        raise SettingError("hydra.sweeper.storage", sweeper.storage, allowed, way_out) from error


def check_own_files(config: DictConfig) -> None:
    """Check that no file of --config-dir has the name of a shipped one, which Hydra would take instead.

    Args:
      config: The configuration, with Hydra's own part.

    Raises:
      SettingError: For such a file.
    """
    conf = shipped("conf", "config.yaml")
    for source in config.hydra.runtime.config_sources:
        folder = Path(str(source.path))
        if source.schema != "file" or folder == conf or not folder.is_dir():
            continue
        for file in sorted(folder.rglob("*.yaml")):
            if (conf / (name := file.relative_to(folder))).exists():
                way_out = f"Hydra would take the shipped {name}. Rename yours."
                allowed = "a folder whose files have other names than the shipped ones"
                raise SettingError("config-dir", file, allowed, way_out)
