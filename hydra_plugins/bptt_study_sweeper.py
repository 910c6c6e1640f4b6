"""The sweeper that Hydra finds by its place in `hydra_plugins`; its logic is `bptt_study.runner.sweep`."""

from itertools import islice
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(BasicSweeper):
    """The sweep over the grid of all comma-separated values, as Hydra's basic sweeper forms it.

    Args:
      params: Overrides of the grid that come from the configuration.
      tune: None, or `setting` (such as optimizer.learning_rate), its `values`, and `seeds` and `first_seed` of
        the runs that choose among them.
      only_latest: Whether the tables leave out the study's finished runs from before.
      most_runs: The size beyond which a grid is refused.
    """

    def __init__(
        self,
        params: dict[str, str] | None = None,
        tune: dict[str, Any] | None = None,
        only_latest: bool = False,
        most_runs: int = 10_000,
    ) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.tune, self.only_latest, self.most_runs = tune, only_latest, most_runs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the function that does a run, and set up the launcher."""
        from bptt_study.runner.callbacks import launcher_errors

        self.task_function = task_function
        with launcher_errors(config):  # some import their package here
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Do the sweep that these command-line arguments ask for."""
        from bptt_study.runner.cli import one_line_errors
        from bptt_study.runner.sweep import StudySweep
        from bptt_study.validation import SettingError

        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        with one_line_errors():
            for override in overrides:
                if override.is_sweep_override() and not override.is_discrete_sweep():
                    way_out = "An interval is for other sweepers, such as hydra/sweeper=optuna."
                    name, value = override.get_key_element(), override.get_value_string()
                    raise SettingError(name, value, "values separated by commas", way_out)
            self._check_size(overrides)
        (grid,) = self.split_arguments(overrides, None)
        sweep = StudySweep(
            self.hydra_context, self.task_function, self.config, self.tune, self.only_latest
        )
        sweep.run([list(line) for line in grid])
        return []

    def _check_size(self, overrides: list[Override]) -> None:
        """Raise SettingError for a grid of more than `most_runs` runs, before it is formed."""
        from bptt_study.validation import SettingError, whole

        most = whole("hydra.sweeper.most_runs", self.most_runs)
        runs = 1
        for override in (o for o in overrides if o.is_sweep_override()):
            runs *= sum(1 for _ in islice(override.sweep_string_iterator(), most + 1))
            if runs > most:
                allowed = "at least the number of runs of the sweep"
                way_out = f"This grid has more; hydra.sweeper.most_runs={10 * most} allows it."
                raise SettingError("hydra.sweeper.most_runs", most, allowed, way_out)
