"""Hydra sweeper of bptt_study; Hydra finds it by its place in `hydra_plugins`.

Hydra's own grid, but every job passes the door before the first one starts, jobs that resolve to
the same run are done once, a failed job does not take the others with it, and the sweep ends
with one table whose census is checked. With `tune`, a setting is first chosen for every run on seeds of
their own.
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


class Runs(NamedTuple):
    """Runs of one study that have passed the door; each dict is keyed by their identities."""

    results_dir: Path
    study: str
    asked: list[str]  # the identity of each line asked for, which may be there twice
    lines: dict[str, list[str]]  # overrides
    jobs: dict[str, Any]
    configs: dict[str, DictConfig]


class Tuning(NamedTuple):
    """What is chosen for every run before it starts: a setting's best value, on seeds of their own."""

    setting: str
    values: list[float]
    seeds: int
    first_seed: int


def tuning(node: Any) -> Tuning | None:
    """`hydra.sweeper.tune`, checked; None where nothing is tuned.

    Raises SettingError for missing and unknown names, and for values that are no choice.
    """
    from bptt_study.checks import SettingError, number, whole

    name = "hydra.sweeper.tune"
    node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if node is None:
        return None
    if not isinstance(node, dict) or set(node) != set(Tuning._fields):
        raise SettingError(name, node, f"null, or just {', '.join(Tuning._fields)}")
    values = node["values"]
    if not isinstance(values, list) or len(set(map(str, values))) < max(2, len(values)):
        raise SettingError(f"{name}.values", values, "a list of two or more different numbers")
    for value in values:
        number(f"{name}.values", value)
    return Tuning(
        str(node["setting"]),
        values,
        whole(f"{name}.seeds", node["seeds"]),
        whole(f"{name}.first_seed", node["first_seed"], least=0),
    )


class StudySweeper(BasicSweeper):
    """The grid of all comma-separated values, as Hydra's basic sweeper forms it.

    tune: null, or `setting` (as optimizer.learning_rate), its `values`, and `seeds` and `first_seed`
    of the runs that choose among them.
    """

    def __init__(
        self, params: dict[str, str] | None = None, tune: dict[str, Any] | None = None
    ) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.tune = tune

    def sweep(self, arguments: list[str]) -> Any:
        from bptt_study import app, study

        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (grid,) = self.split_arguments(overrides, None)
        experiment = self.config.hydra.runtime.choices.get("experiment")

        with app.one_line_errors():
            runs = self._checked([list(line) for line in grid])
            more = [
                [*runs.lines[run], *line]
                for run, config in runs.configs.items()
                for line in study.more_runs(experiment, config)
            ]
            runs = self._checked([*runs.lines.values(), *more])
            tune = tuning(self.tune)
            candidates = tune and self._candidates(runs, tune)
            app.writable(runs.results_dir)
        same = len(grid) + len(more) - len(runs.lines)
        log.info("%d runs (%d of the grid are the same)", len(runs.lines), same)
        failed = 0
        if tune and candidates:
            failed, runs = self._tuned(runs, tune, *candidates)
        failed += self._launch(runs)
        with app.one_line_errors():
            print(study.finish(runs.results_dir, runs.study, experiment))
        if failed:
            sys.exit(1)
        return []

    def _checked(self, lines: Iterable[list[str]]) -> Runs:
        """Every configuration passes the door; those that resolve to the same run are one."""
        from bptt_study import app
        from bptt_study.checks import SettingError

        assert self.config is not None and self.hydra_context is not None
        asked: list[str] = []
        runs: list[tuple[str, list[str], Any, DictConfig]] = []
        places: set[tuple[str, str]] = set()
        for line in lines:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, line)
            choices = config.hydra.runtime.choices
            own = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
            job = app.door(own, choices)
            if job.identity not in asked:
                runs.append((job.identity, line, job, own))
            asked.append(job.identity)
            places.add((str(own.results_dir), job.study))
        if len(places) > 1:
            raise SettingError(
                "results_dir, study", sorted(places), "one of each for all runs of a sweep"
            )
        ((results_dir, study),) = places
        names, *parts = zip(*runs, strict=True)
        kept = (dict(zip(names, part, strict=True)) for part in parts)
        return Runs(Path(results_dir), study, asked, *kept)

    def _candidates(self, runs: Runs, tune: Tuning) -> tuple[Runs, list[tuple[str, str, float]]]:
        """The runs that tune, and of each its identity, what it is a candidate for, with which value."""
        from bptt_study import records
        from bptt_study.checks import SettingError

        setting, values, seeds, first = tune
        column = records.column(setting)
        lines, rivals = [], []
        for run, line in runs.lines.items():
            job = runs.jobs[run]
            if first < job.first_seed + job.seeds and job.first_seed < first + seeds:
                taken = f"{job.first_seed} … {job.first_seed + job.seeds - 1}"
                allowed = f"seeds other than {taken}, the study's own"
                raise SettingError("hydra.sweeper.tune.first_seed", first, allowed)
            if column not in job.settings:
                allowed = f"a number that every run has; there is none with {' '.join(line)}"
                raise SettingError("hydra.sweeper.tune.setting", setting, allowed)
            if any(part.lstrip("+").startswith(f"{setting}=") for part in line):
                raise SettingError(setting, "swept", "one value, or hydra.sweeper.tune=null")
            for value in values:
                own = [f"{setting}={value}", f"seeds={seeds}", f"first_seed={first}"]
                lines.append([*line, *own, "snapshots=0", f"study={runs.study}_tuning"])
                rivals.append((run, value))
        tried = self._checked(lines)
        return tried, [(name, *rival) for name, rival in zip(tried.asked, rivals, strict=True)]

    def _tuned(
        self, runs: Runs, tune: Tuning, tried: Runs, rivals: list[tuple[str, str, float]]
    ) -> tuple[int, Runs]:
        """Run the candidates, write down the grid and the choice, and put each choice into its run."""
        from bptt_study import app, study

        failed = self._launch(tried)
        with app.one_line_errors():
            chosen = study.choose(tried.results_dir, tried.study, runs.study, tune.setting, rivals)
        for run, (value, at_edge) in chosen.items():
            if at_edge:
                log.warning("at the edge of the grid: %s=%s for %s", tune.setting, value, run)
        lines = [[*line, f"{tune.setting}={chosen[run][0]}"] for run, line in runs.lines.items()]
        return failed, self._checked(lines)

    def _launch(self, runs: Runs) -> int:
        """Run them all; how many failed."""
        from bptt_study import study

        assert self.launcher is not None
        expected = {
            run: {"overrides": line, "rows": runs.jobs[run].rows}
            for run, line in runs.lines.items()
        }
        study.begin(runs.results_dir, runs.study, expected)
        lines = list(runs.lines.values())
        returns = self.launcher.launch(lines, initial_job_idx=0)
        failed = [r.status == JobStatus.FAILED for r in returns]
        for done, line, bad in zip(returns, lines, failed, strict=True):
            if bad:
                log.error("failed: %s: %r", " ".join(line), done._return_value)
        return sum(failed)
