"""A Hydra callback: it makes the study's tables after another sweeper, such as `hydra/sweeper=optuna`."""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bptt_study.validation import SettingError

ONE = ("study", "results_dir")  # settings of a whole sweep
OWN = "bptt_study_sweeper"  # the module of our sweeper, which makes the tables itself


class Gather(Callback):
    """Gather all finished runs of the study when a multirun ends."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a sweep over studies: the tables of one are made at its end. Our own sweeper checks itself."""
        if OWN in str(config.hydra.sweeper._target_):
            return
        from bptt_study.runner.cli import one_line_errors

        with one_line_errors():
            for override in OverridesParser.create().parse_overrides(config.hydra.overrides.task):
                key = override.get_key_element()
                if key in ONE and override.is_sweep_override():
                    value = override.get_value_string()
                    raise SettingError(key, value, "the same for all runs of a sweep")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Make the tables, figures and the printed summary, unless the sweeper has made them."""
        if OWN in str(config.hydra.sweeper._target_):
            return
        from bptt_study.runner import configure, gather, run_folder, stories
        from bptt_study.runner.cli import one_line_errors

        with one_line_errors():
            results_dir = configure.results_folder(config)
            sweep = run_folder.Sweep(results_dir, str(config.study), None, {})
            print(gather.gather_finished(sweep, stories.find(config.story, None)))
