"""The story of a sweep, its `Study`: question, tables and figures. No file in a results folder chooses it.

A shipped experiment has it in experiments/<experiment>.py. A yaml of one's own names it, `story: MODULE.NAME`,
and the commands that start from a results folder take it by their option --story. A note in that folder has
the name as well, but only to show it: a name there could make Python run any file.
"""

import importlib.util
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from bptt_study import paths
from bptt_study.report.study import Study, check_names
from bptt_study.validation import SettingError, one_line

PLAIN = r"\w[\w-]*"  # the name of an experiment that may have a file


def find(name: str | None, experiment: str | None) -> Study | None:
    """Find the study of a sweep.

    Args:
      name: The setting `story`; None for the shipped experiment's.
      experiment: The experiment.

    Returns:
      The study; None if there is none.

    Raises:
      SettingError: If the name is not that of a `Study`, or those of its tables and figures are no names.
    """
    study = shipped(experiment) if name is None else imported(name)
    return None if study is None else check_names(study)


def imported(name: str) -> Study:
    """Import a study by its full name, `MODULE.NAME`.

    Args:
      name: The name, from the configuration or the command line.

    Returns:
      The study.

    Raises:
      SettingError: If the name is not that of a `Study`.
    """
    module, _, attribute = str(name).rpartition(".")
    allowed = "the name of a bptt_study.Study that Python can import, such as mine.STUDY"
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # the module may be anyone's
        raise SettingError("story", name, allowed, f"Reason: {one_line(error)}.") from error
    if not isinstance(found, Study):
        raise SettingError("story", f"{name}, a {type(found).__name__}", allowed)
    return found


def shipped(experiment: str | None) -> Study | None:
    """Return the study of a shipped experiment; None for any other experiment."""
    module = experiment_module(experiment)
    return None if module is None else module.STUDY


def experiment_module(experiment: str | None) -> ModuleType | None:
    """Import `experiments/<experiment>.py`; None if there is no such file."""
    # a path could name any file, which would then be run
    return _loaded(str(experiment)) if re.fullmatch(PLAIN, str(experiment)) else None


@cache
def _loaded(experiment: str) -> ModuleType | None:
    try:
        file: Path = paths.shipped("experiments", f"{experiment}.py") / f"{experiment}.py"
    except FileNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location(f"experiments.{experiment}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
