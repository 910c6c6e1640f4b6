"""A Hydra callback: it makes the study's tables after another sweeper, such as `hydra/sweeper=optuna`."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

OWN = "bptt_study_sweeper"  # the module of our sweeper, which makes the tables itself


class Gather(Callback):
    """Gather all finished runs of the study when a multirun ends."""

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
