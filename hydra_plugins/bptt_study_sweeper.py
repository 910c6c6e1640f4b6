"""Hydra sweeper of bptt_study; Hydra finds it by its place in `hydra_plugins`.

Hydra's own grid, but every job passes the door before the first one starts, jobs that resolve to
the same run are done once, a failed job does not take the others with it, and the sweep ends
with one table whose census is checked.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

log = logging.getLogger(__name__)


class StudySweeper(BasicSweeper):
    """The grid of all comma-separated values, as Hydra's basic sweeper forms it."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def sweep(self, arguments: list[str]) -> Any:
        from bptt_study import app, study
        from bptt_study.checks import SettingError

        assert (
            self.config is not None and self.hydra_context is not None and self.launcher is not None
        )
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (grid,) = self.split_arguments(overrides, None)

        jobs: dict[str, list[str]] = {}
        expected: dict[str, Any] = {}
        places: set[tuple[str, str]] = set()
        with app.one_line_errors():
            for line in grid:
                cfg = loader.load_sweep_config(self.config, list(line))
                choices = cfg.hydra.runtime.choices
                job = app.door(
                    OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"]), choices
                )
                jobs.setdefault(job.identity, line)
                expected.setdefault(job.identity, {"overrides": line, "rows": job.rows})
                places.add((str(cfg.results_dir), job.study))
            if len(places) > 1:
                raise SettingError(
                    "results_dir, study", sorted(places), "one of each for all runs of a sweep"
                )
            results_dir, name = Path(places.pop()[0]), job.study
            app.writable(results_dir)
        log.info("%d runs (%d of the grid are the same)", len(jobs), len(grid) - len(jobs))

        study.begin(results_dir, name, expected)
        returns = self.launcher.launch(list(jobs.values()), initial_job_idx=0)
        for done, line in zip(returns, jobs.values(), strict=True):
            if done.status == JobStatus.FAILED:
                log.error("failed: %s: %r", " ".join(line), done._return_value)
        experiment = self.config.hydra.runtime.choices.get("experiment")
        with app.one_line_errors():
            print(study.finish(results_dir, name, experiment))
        if any(done.status == JobStatus.FAILED for done in returns):
            sys.exit(1)
        return [returns]
