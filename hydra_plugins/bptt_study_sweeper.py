"""Hydra sweeper of bptt_study; Hydra finds it by its place in `hydra_plugins`.

Hydra's own grid, but every job passes the door before the first one starts, jobs that resolve to
the same run are done once, a failed job does not take the others with it, and the sweep ends
with one table whose census is checked. With `tune`, a setting is first chosen for every run on seeds of
their own.
"""

import copy
import importlib
import json
import re
import sys
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from bptt_study.runner.cli import ELSEWHERE, PLACES, PLAIN, SHORTHANDS, one_line_errors
from bptt_study.runner.progress import Follower, follow, say
from bptt_study.runner.run_folder import Sweep, in_a_line, wait_for
from bptt_study.validation import counted

SETTINGS = {*PLAIN, *PLACES, *SHORTHANDS}  # at the top level, where groups are too


class Runs(NamedTuple):
    """Runs of one study that have passed the door; each dict is keyed by their identities."""

    results_dir: Path
    study: str
    asked: list[str]  # the identity of each line asked for, which may be there twice
    lines: dict[str, list[str]]  # overrides
    jobs: dict[str, Any]
    configs: dict[str, DictConfig]
    choices: dict[str, dict[str, str]]  # of the groups


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
    from bptt_study.validation import SettingError, number, whole

    name = "hydra.sweeper.tune"
    node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if node is None:
        return None
    if not isinstance(node, dict) or set(node) != set(Tuning._fields):
        raise SettingError(name, node, f"null or a mapping of {', '.join(Tuning._fields)}")
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

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """A launcher whose package is missing ends with one line; others may start what they need."""
        from bptt_study.runner import cli
        from bptt_study.validation import SettingError

        self.task_function = task_function
        with cli.one_line_errors():
            try:
                importlib.import_module(str(config.hydra.launcher._target_).rpartition(".")[0])
                super().setup(
                    hydra_context=hydra_context, task_function=task_function, config=config
                )
            except ModuleNotFoundError as error:
                extra = re.search(r"hydra_(\w+)_launcher", str(error.name))
                if not extra:
                    raise
                name = config.hydra.runtime.choices["hydra/launcher"]
                way_out = f"For {name}: pip install -e '.[{extra[1]}]'."
                raise SettingError("hydra/launcher", name, "installed", way_out) from error

    def sweep(self, arguments: list[str]) -> Any:
        from bptt_study.runner import cli
        from bptt_study.runner import gather as study

        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (grid,) = self.split_arguments(overrides, None)
        experiment = self.config.hydra.runtime.choices.get("experiment")

        with cli.one_line_errors():
            runs = self._checked([list(line) for line in grid])
            more = [
                [*runs.lines[run], *line]
                for run, config in runs.configs.items()
                for line in study.more_runs(experiment, config)
            ]
            if more:
                runs = self._checked([*runs.lines.values(), *more])
            tune = tuning(self.tune)
            candidates = tune and self._candidates(runs, tune)
            cli.writable(runs.results_dir)
        self.launcher = self._launcher(runs)
        same = len(grid) + len(more) - len(runs.lines)
        say(f"{counted(len(runs.lines), 'run')} ({same} repeated in the grid)")
        sweep = self._sweep_of(runs)
        failed: list[str] = []
        try:
            if tune and candidates:
                failed, runs = self._tuned(runs, tune, *candidates)
                sweep = self._sweep_of(runs)
            failed += self._launch(sweep)
            with cli.one_line_errors():
                if not failed:
                    print(study.finish(sweep))
        except KeyboardInterrupt:
            print(f"stopped: {_to_go_on(sweep)}", file=sys.stderr)
            sys.exit(130)
        if failed:
            print("\n".join(["failed:", *failed, _to_go_on(sweep)]), file=sys.stderr)
            sys.exit(1)
        return []

    def _sweep_of(self, runs: Runs) -> Sweep:
        """These runs as they are written down."""
        assert self.config is not None
        entries = {
            run: {
                "overrides": line,
                "rows": runs.jobs[run].rows,
                "corpus_sha256": runs.jobs[run].corpus,
                "config": OmegaConf.to_container(runs.configs[run], resolve=True),
                "choices": runs.choices[run],
            }
            for run, line in runs.lines.items()
        }
        experiment = self.config.hydra.runtime.choices.get("experiment")
        return Sweep(runs.results_dir, runs.study, experiment, entries)

    def _checked(self, lines: Iterable[list[str]]) -> Runs:
        """Every configuration passes the door; those that resolve to the same run are one."""
        from bptt_study.runner import cli
        from bptt_study.validation import SettingError

        asked: list[str] = []
        runs: dict[str, tuple[list[str], Any, DictConfig, dict[str, str]]] = {}
        places: set[tuple[str, str]] = set()
        composed = cache(self._composed)  # for this call, so that edits of conf/ reach the next
        for line in lines:
            settings = [o for o in map(_parsed, line) if _plain(o)]
            choices, base = composed(tuple(o for o in line if not _plain(_parsed(o))))
            own = copy.deepcopy(base)
            ConfigLoaderImpl._apply_overrides_to_config(settings, own)
            job = cli.door(own, choices)
            runs.setdefault(job.identity, (line, job, own, choices))
            asked.append(job.identity)
            places.add((str(own.results_dir), job.study))
        if len(places) > 1:
            raise SettingError(
                "results_dir, study", sorted(places), "the same for all runs of a sweep"
            )
        ((results_dir, study),) = places
        parts = zip(*runs.values(), strict=True)
        kept = (dict(zip(runs, part, strict=True)) for part in parts)
        return Runs(Path(results_dir), study, asked, *kept)

    def _composed(self, line: tuple[str, ...]) -> tuple[dict[str, str], DictConfig]:
        """The choices of groups, and the configuration without Hydra's part, closed to new settings."""
        assert self.config is not None and self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(line))
        own = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
        OmegaConf.set_struct(own, True)
        return dict(config.hydra.runtime.choices), own

    def _candidates(self, runs: Runs, tune: Tuning) -> tuple[Runs, list[tuple[str, str, float]]]:
        """The runs that tune, and of each its identity, what it is a candidate for, with which value."""
        from bptt_study.report import columns
        from bptt_study.validation import SettingError

        setting, values, seeds, first = tune
        column = columns.column(setting)
        lines, rivals = [], []
        for run, line in runs.lines.items():
            job = runs.jobs[run]
            if first < job.first_seed + job.seeds and job.first_seed < first + seeds:
                taken = f"{job.first_seed} … {job.first_seed + job.seeds - 1}"
                allowed = f"such that no seed is among the study's own ({taken})"
                raise SettingError("hydra.sweeper.tune.first_seed", first, allowed)
            if column not in job.settings:
                way_out = f"There is none with {' '.join(line)}."
                name = "hydra.sweeper.tune.setting"
                raise SettingError(name, setting, "a number that every run has", way_out)
            if any(part.lstrip("+").startswith(f"{setting}=") for part in line):
                way_out = "It is tuned; hydra.sweeper.tune=null tunes nothing."
                raise SettingError(setting, "several", "given one value", way_out)
            for value in values:
                own = [f"{setting}={value}", f"seeds={seeds}", f"first_seed={first}"]
                lines.append([*line, *own, "snapshots=0", f"study={runs.study}_tuning"])
                rivals.append((run, value))
        tried = self._checked(lines)
        return tried, [(name, *rival) for name, rival in zip(tried.asked, rivals, strict=True)]

    def _tuned(
        self, runs: Runs, tune: Tuning, tried: Runs, rivals: list[tuple[str, str, float]]
    ) -> tuple[list[str], Runs]:
        """Run the candidates, write down the grid and the choice, and put each choice into its run."""
        from bptt_study.runner import cli
        from bptt_study.runner import gather as study

        sweep = self._sweep_of(tried)
        failed = self._launch(sweep)
        if failed:
            return failed, runs
        with cli.one_line_errors():
            chosen = study.choose(sweep, runs.study, tune.setting, rivals)
        for run, (value, at_edge) in chosen.items():
            if at_edge:
                say(f"at the edge of the grid: {tune.setting}={value} for {run}")
        lines = [[*line, f"{tune.setting}={chosen[run][0]}"] for run, line in runs.lines.items()]
        return failed, self._checked(lines)

    def _launcher(self, runs: Runs) -> Launcher:
        """Hydra's launcher, whose settings may point at the sweep's results_dir and study."""
        assert self.config is not None and self.hydra_context is not None
        config = self.config.copy()
        config.results_dir, config.study = str(runs.results_dir.absolute()), runs.study
        return Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=config
        )

    def _launch(self, sweep: Sweep) -> list[str]:
        """Run what is missing, together with other processes that do the same; a line per run that failed."""
        assert self.hydra_context is not None
        states = sweep.states()
        for run, state in states.items():
            if state.kind == "damaged":
                say(f"damaged: {sweep.said(run)}: {state.why}; it is set aside and done again")
        finished = [run for run, state in states.items() if state.kind == "finished"]
        redone = {run for run, entry in sweep.runs.items() if entry["config"]["overwrite"]}
        todo = [run for run in states if run in redone or run not in finished]
        # last those that were begun: one that memory does not suffice for then keeps no other from its turn
        todo.sort(key=lambda run: sweep.place(run).claim.exists())
        say(
            f"{sweep.study}: {len(finished)} of {counted(len(states), 'run')} finished already, "
            f"{len(todo)} to do" + ", all again (overwrite=true)" * bool(redone)
        )
        # edits of conf/ from now on do not reach this sweep
        loader = copy.copy(self.hydra_context.config_loader)
        with one_line_errors():
            noted = sweep.note()
        loader.load_sweep_config = partial(_as_noted, noted)  # type: ignore[method-assign]
        launcher: Any = self.launcher
        launcher.hydra_context = HydraContext(loader, self.hydra_context.callbacks)
        for run in todo:
            sweep.place(run).failure.unlink(missing_ok=True)
        follower = Follower(sweep, states, tuple(todo))
        with follow(follower):
            while todo:
                todo = self._round(sweep, todo, follower)
        say(follower.line())
        return [
            f"  {sweep.said(run)}: {why}" + f"\n    traceback: {left}" * left.is_file()
            for run, why in follower.failed.items()
            for left in [sweep.place(run).failure]
        ]

    def _round(self, sweep: Sweep, todo: list[str], follower: Follower) -> list[str]:
        """Launch these runs; which are left, because other processes had them and did not finish them."""
        assert self.launcher is not None
        lines = [list(sweep.runs[run]["overrides"]) for run in todo]
        try:
            returns = self.launcher.launch(lines, initial_job_idx=0)
        except Exception as error:  # whatever a launcher raises whose worker was killed
            say(f"the launcher stopped: {in_a_line(error)}")
            follower.look()
            left = [r for r in todo if r not in follower.failed and r not in follower.done]
            if len(left) < len(todo):
                return left
            if len(left) == 1:
                follower.fail(
                    left[0], "its process ended without a word (killed, for lack of memory?)"
                )
                return []
            half = len(left) // 2  # so that the one that is killed takes no other with it
            return [
                *self._round(sweep, left[:half], follower),
                *self._round(sweep, left[half:], follower),
            ]
        for run, done in zip(todo, returns, strict=True):
            if done.status == JobStatus.FAILED:
                follower.fail(run, in_a_line(done._return_value))
        away = [
            run for run, done in zip(todo, returns, strict=True) if done._return_value == ELSEWHERE
        ]
        follower.look()
        if left := [run for run in away if run not in follower.done]:
            say(f"waiting for other processes, which do {counted(len(left), 'run')}")
            wait_for(map(sweep.place, left))
            follower.look()
        return [run for run in left if run not in follower.done]


def _to_go_on(sweep: Sweep) -> str:
    """What is kept, and what to do."""
    kept = sum(sweep.finished(run) for run in sweep.runs)
    where = sweep.results_dir / sweep.study
    again = "the same command again does the others"
    if any(entry["config"]["overwrite"] for entry in sweep.runs.values()):
        again = "the same command does all again, without overwrite=true what is missing"
    table = where / "table.csv"
    earlier = f"; {table} is still that of an earlier sweep" if table.is_file() else ""
    return (
        f"{kept} of {counted(len(sweep.runs), 'run')} finished and kept; {again}, "
        f"`bptt-study-status {where}` shows them, and with --gather makes the tables of what is there{earlier}"
    )


def _as_noted(file: Path, master: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of a sweep's job as it was when the sweep started."""
    found = _noted(file)[tuple(overrides)]
    config = copy.deepcopy(master)
    with open_dict(config), read_write(config):
        for name, value in found["config"].items():
            config[name] = value
        config.hydra.runtime.choices = found["choices"]
        config.hydra.overrides.task = list(overrides)
    return config


@cache
def _noted(file: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    entries = json.loads(file.read_text(encoding="utf-8"))["runs"].values()
    return {tuple(entry["overrides"]): entry for entry in entries}


_parsed = cache(OverridesParser.create().parse_override)


def _plain(override: Override) -> bool:
    """Whether it sets a value and chooses no group, so that the rest is composed once: that takes 0.1 s."""
    name = override.key_or_group
    return (name.count(".") > 0 and not name.startswith("hydra.")) or name in SETTINGS
