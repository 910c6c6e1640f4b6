"""A sweep: this file validates all runs before the first one starts, launches them, and gathers the tables.

Overrides that resolve to the same run are done once. A failed run does not stop the others. With `tune`, a
setting is first chosen for every run, on separate seeds. `hydra_plugins/bptt_study_sweeper.py` has the class
that Hydra finds.
"""

import copy
import json
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from bptt_study.report.progress import SECONDS_BETWEEN_LINES
from bptt_study.runner import configure, environment
from bptt_study.runner.cli import ELSEWHERE, one_line_errors
from bptt_study.runner.locks import holder, wait_for_one
from bptt_study.runner.progress import SweepProgress, say, show_progress
from bptt_study.runner.run_folder import Sweep
from bptt_study.runner.unused import Composed, say_unused
from bptt_study.validation import SettingError, counted, number, one_line, whole

TOP_LEVEL = {*configure.RUN_SETTINGS, *configure.PROCESS_SETTINGS, *configure.SHORTHANDS}
KILLED = "its process ended without a message; it may have been killed for lack of memory"


class ValidatedRuns(NamedTuple):
    """The validated runs of one study; each dict is keyed by their identities."""

    results_dir: Path
    study: str
    requested: list[str]  # the identity for each requested line of overrides; it may repeat
    lines: dict[str, list[str]]  # overrides
    runs: dict[str, Any]  # each a `RunConfig`
    configs: dict[str, DictConfig]
    choices: dict[str, dict[str, str]]  # the chosen option of each group


class Tuning(NamedTuple):
    """The setting that is chosen for every run before it starts, and the runs that choose it."""

    setting: str  # such as optimizer.learning_rate
    values: list[float]
    seeds: int
    first_seed: int


def tuning(node: Any) -> Tuning | None:
    """Validate `hydra.sweeper.tune`.

    Args:
      node: The node of the configuration.

    Returns:
      The tuning; None if nothing is tuned.

    Raises:
      SettingError: For missing and unknown names, and for fewer than two values.
    """
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


class StudySweep:
    """One call of `bptt-study -m`.

    Args:
      context: Hydra's context, which composes configurations.
      task_function: The function that does one run.
      config: The configuration of the sweep, with Hydra's own part.
      tune: The node `hydra.sweeper.tune`.
      only_latest: Whether the tables leave out the study's other finished runs.
    """

    def __init__(
        self,
        context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
        tune: Any,
        only_latest: bool = False,
    ) -> None:
        self.context, self.task_function, self.config = context, task_function, config
        self.tune, self.only_latest = tune, only_latest
        self.experiment = config.hydra.runtime.choices.get("experiment")
        begun = datetime.now()  # what ${now:…} means for all its runs
        OmegaConf.register_new_resolver("now", begun.strftime, replace=True)

    def run(self, grid: list[list[str]]) -> None:
        """Do all runs of the grid of overrides, and make the tables; exit with status 1 if a run failed.

        Args:
          grid: The overrides of each run.
        """
        from bptt_study.report.study import question
        from bptt_study.runner import gather, stories

        with one_line_errors():
            story = stories.find(self.config.story, self.experiment)
            self.question = question(story)
            runs = self._validated(grid)
            made = [
                Composed(runs.configs[run], runs.choices[run], runs.runs[run]) for run in runs.runs
            ]
            say_unused(self.config.hydra.overrides.task, made)
            more = [
                self._beside(runs.lines[run], line)
                for run, config in runs.configs.items()
                for line in (story.more_runs(copy.deepcopy(config)) if story else ())
            ]
            if more:
                runs = self._validated([*runs.lines.values(), *more])
            tune = tuning(self.tune)
            candidates = tune and self._candidates(runs, tune)
            configure.check_writable(runs.results_dir)
        self.launcher: Any = self._launcher(runs)
        repeated = len(grid) + len(more) - len(runs.lines)
        say(f"{counted(len(runs.lines), 'run')} ({repeated} repeated in the grid)")
        sweep = self._sweep_of(runs)
        failed: list[str] = []
        try:
            if tune and candidates:
                failed, runs = self._tuned(runs, tune, *candidates)
                sweep = self._sweep_of(runs)
            failed += self._launch(sweep)
            with one_line_errors():
                if not failed:
                    print(gather.gather(sweep, story, self.only_latest, bool(tune)))
        except KeyboardInterrupt as stop:
            print(f"stopped: {_how_to_continue(sweep)}", file=sys.stderr)
            sys.exit(128 + getattr(stop, "number", signal.SIGINT))
        if failed:
            print("\n".join(["failed:", *failed, _how_to_continue(sweep)]), file=sys.stderr)
            sys.exit(1)

    def _beside(self, own: list[str], more: list[str]) -> list[str]:
        """Make the overrides of an added run: `own` without settings that its options lack, and `more`."""
        line = [*own, *more]
        groups = tuple(o for o in line if not _sets_a_value(_parsed(o)))
        anew = {_parsed(o).key_or_group for o in groups if o in more}
        names = {o: _parsed(o).key_or_group for o in own if _sets_a_value(_parsed(o))}
        # the settings of the group probe are those of probes
        asked = {o: n for o, n in names.items() if n.partition(".")[0].removesuffix("s") in anew}
        config = self._composed(groups)[1] if asked else OmegaConf.create()
        lacking = {
            o for o, name in asked.items() if OmegaConf.select(config, name, default=...) is ...
        }
        return [o for o in line if o not in lacking]

    def _sweep_of(self, runs: ValidatedRuns) -> Sweep:
        """Make the record of these runs."""
        entries = {
            run: {
                "overrides": line,
                "rows": runs.runs[run].rows,
                "corpus_sha256": runs.runs[run].corpus,
                "code": runs.runs[run].code,
                "config": OmegaConf.to_container(runs.configs[run], resolve=True),
                "choices": runs.choices[run],
            }
            for run, line in runs.lines.items()
        }
        said = {"story": self.config.story, "question": self.question}
        said["typed"] = environment.command()
        return Sweep(runs.results_dir, runs.study, self.experiment, entries, **said)

    def _validated(self, lines: Sequence[list[str]]) -> ValidatedRuns:
        """Validate the run of each line of overrides; lines with the same run give one run."""
        shared = set(lines[0]).intersection(*lines)
        requested: list[str] = []
        found: dict[str, tuple[list[str], Any, DictConfig, dict[str, str]]] = {}
        targets: set[tuple[str, str]] = set()
        composed = cache(
            self._composed
        )  # for this call alone, so that the next sees edits of conf/
        said = time.monotonic()
        for checked, line in enumerate(lines):
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                say(f"checked {counted(checked, 'run')}")
            settings = [o for o in map(_parsed, line) if _sets_a_value(o)]
            groups = tuple(o for o in line if not _sets_a_value(_parsed(o)))
            try:
                choices, base = composed(groups)
                config = copy.deepcopy(base)
                ConfigLoaderImpl._apply_overrides_to_config(settings, config)
                run = configure.configure(config, choices)
            except Exception as error:
                if own := [override for override in line if override not in shared]:
                    error.add_note(f"The first such run has {' '.join(own)}.")
                raise
            found.setdefault(run.identity, (line, run, config, choices))
            requested.append(run.identity)
            targets.add((str(configure.results_folder(config)), run.study))
        if len(targets) > 1:
            allowed = "the same for all runs of a sweep"
            raise SettingError("results_dir, study", sorted(targets), allowed)
        ((results_dir, study),) = targets
        fields = zip(*found.values(), strict=True)
        by_identity = (dict(zip(found, field, strict=True)) for field in fields)
        return ValidatedRuns(Path(results_dir), study, requested, *by_identity)

    def _composed(self, groups: tuple[str, ...]) -> tuple[dict[str, str], DictConfig]:
        """Compose the chosen options, and the configuration without Hydra's part, closed to new settings."""
        config = self.context.config_loader.load_sweep_config(self.config, list(groups))
        own = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
        OmegaConf.set_struct(own, True)
        return dict(config.hydra.runtime.choices), own

    def _candidates(
        self, runs: ValidatedRuns, tune: Tuning
    ) -> tuple[ValidatedRuns, list[tuple[str, str, float]]]:
        """Make the tuning runs; list for each its identity, the run that it belongs to, and its value."""
        from bptt_study.report import columns

        setting, values, seeds, first = tune
        column = columns.column(setting)
        lines, candidates = [], []
        for identity, line in runs.lines.items():
            run = runs.runs[identity]
            if first < run.first_seed + run.seeds and run.first_seed < first + seeds:
                theirs = f"{run.first_seed} … {run.first_seed + run.seeds - 1}"
                allowed = f"such that no seed is among the study's seeds ({theirs})"
                raise SettingError("hydra.sweeper.tune.first_seed", first, allowed)
            if column not in run.settings:
                way_out = f"There is none with {' '.join(line)}."
                name = "hydra.sweeper.tune.setting"
                raise SettingError(name, setting, "a number that every run has", way_out)
            own = [part.lstrip("+").partition("=") for part in line]
            if given := [given for name, _, given in own if name == setting]:
                way_out = "It is tuned; hydra.sweeper.tune=null tunes nothing."
                raise SettingError(setting, given[-1], "left out", way_out)
            for value in values:
                tuned = [f"{setting}={value}", f"seeds={seeds}", f"first_seed={first}"]
                lines.append([*line, *tuned, "snapshots=0", f"study={runs.study}_tuning"])
                candidates.append((identity, value))
        tried = self._validated(lines)
        return tried, [(t, *c) for t, c in zip(tried.requested, candidates, strict=True)]

    def _tuned(
        self,
        runs: ValidatedRuns,
        tune: Tuning,
        tried: ValidatedRuns,
        candidates: list[tuple[str, str, float]],
    ) -> tuple[list[str], ValidatedRuns]:
        """Do the tuning runs, write the comparison, and give each run its chosen value."""
        from bptt_study.runner import gather

        sweep = self._sweep_of(tried)
        failed = self._launch(sweep)
        if failed:
            return failed, runs
        with one_line_errors():
            table = gather.compare(sweep, tune.setting, candidates)
        best = table[table["chosen"]].set_index("candidate_for")["value"]
        chosen = self._validated(
            [[*line, f"{tune.setting}={best[run]}"] for run, line in runs.lines.items()]
        )
        named = dict(zip(runs.lines, chosen.requested, strict=True))  # with the chosen value
        with one_line_errors():
            table["candidate_for"] = table["candidate_for"].map(named)
            gather.write_choice(sweep, runs.study, tune.setting, table)
        return failed, chosen

    def _launcher(self, runs: ValidatedRuns) -> Launcher:
        """Make Hydra's launcher; its settings may refer to the sweep's results_dir and study."""
        config = self.config.copy()
        config.results_dir, config.study = str(runs.results_dir.absolute()), runs.study
        return Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=self.task_function, config=config
        )

    def _launch(self, sweep: Sweep) -> list[str]:
        """Do the runs that are not finished, and share them with other processes that do the same.

        Returns:
          A message for each failed run.
        """
        states = sweep.states()
        for run, state in states.items():
            if state.kind == "damaged":
                say(f"damaged: {sweep.label(run)}: {state.why}; it is kept aside, and repeated")
        finished = [run for run, state in states.items() if state.kind == "finished"]
        repeated = {run for run, entry in sweep.runs.items() if entry["config"]["overwrite"]}
        todo = [run for run in states if run in repeated or run not in finished]
        # If a run exhausts memory, the other runs go on. Runs that began but never finished, whose lock files
        # remain, are scheduled last on the next start.
        todo.sort(key=lambda run: sweep.paths(run).lock.exists())
        say(
            f"{sweep.study}: {len(finished)} of {counted(len(states), 'run')} finished already, "
            f"{len(todo)} to do" + ", all repeated (overwrite=true)" * bool(repeated)
        )
        with one_line_errors():
            record = sweep.save()
        # From here on, edits of conf/ do not change this sweep.
        loader = copy.copy(self.context.config_loader)
        loader.load_sweep_config = partial(_recorded_config, record)  # type: ignore[method-assign]
        self.launcher.hydra_context = HydraContext(loader, self.context.callbacks)
        for run in todo:
            sweep.paths(run).failure.unlink(missing_ok=True)
        progress = SweepProgress(sweep, states, tuple(todo))
        with show_progress(progress):
            while todo:
                todo = self._launch_once(sweep, todo, progress)
        say(progress.line())
        return [
            f"  {sweep.label(run)}: {why}" + f"\n    traceback: {file}" * file.is_file()
            for run, why in progress.failed.items()
            for file in [sweep.paths(run).failure]
        ]

    def _launch_once(self, sweep: Sweep, todo: list[str], progress: SweepProgress) -> list[str]:
        """Launch these runs once.

        Returns:
          The runs that are still to do: other processes held their locks and did not finish them.
        """
        lines = [list(sweep.runs[run]["overrides"]) for run in todo]
        try:
            returns = self.launcher.launch(lines, initial_job_idx=0)
        except Exception as error:  # a launcher raises errors of any kind when a worker is killed
            say(f"the launcher stopped: {one_line(error)}")
            progress.update()
            left = [r for r in todo if r not in progress.failed and r not in progress.done]
            if len(left) < len(todo):
                return left
            if len(left) == 1:
                progress.fail(left[0], KILLED)
                return []
            half = len(left) // 2  # halving isolates the run that kills its worker
            return [
                *self._launch_once(sweep, left[:half], progress),
                *self._launch_once(sweep, left[half:], progress),
            ]
        for run, done in zip(todo, returns, strict=True):
            if done.status == JobStatus.FAILED:
                progress.fail(run, str(done._return_value))
        elsewhere = [
            run for run, done in zip(todo, returns, strict=True) if done._return_value == ELSEWHERE
        ]
        progress.update()
        if left := [run for run in elsewhere if run not in progress.done]:
            say(f"waiting for other processes, which are doing {counted(len(left), 'run')}")
            for run in left:
                found = holder(sweep.paths(run).lock)
                say(f"  {sweep.label(run)}: {found}; lock: {sweep.paths(run).lock}")
            wait_for_one(sweep.paths(run).lock for run in left)
            progress.update()
        return [run for run in left if run not in progress.done]


def _how_to_continue(sweep: Sweep) -> str:
    """Write how many runs are kept, and which commands continue or show the sweep."""
    from bptt_study.report import csv_tables

    finished = sum(sweep.finished(run) for run in sweep.runs)
    folder = sweep.results_dir / sweep.study
    kept = f"{finished} of {counted(len(sweep.runs), 'run')} finished and kept."
    overwrite = any(entry["config"]["overwrite"] for entry in sweep.runs.values())
    if finished == len(sweep.runs) and not overwrite:
        made = f"`bptt-study-status {folder} --gather` makes tables and figures"
        return f"{kept} {made}, which may be missing, incomplete or those of an earlier sweep."
    again = "The same command does the others"
    if overwrite:
        again = "Without overwrite=true the same command does the missing runs; with it, all"
    table = folder / csv_tables.TABLE
    earlier = f" {table} is still that of an earlier sweep." if table.is_file() else ""
    return (
        f"{kept} {again}. `bptt-study-status {folder}` lists the runs, and with --gather makes tables of the "
        f"finished ones.{earlier}"
    )


def _recorded_config(file: Path, master: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration of a run as it was when the sweep started, instead of composing it anew."""
    found = _recorded(file)[tuple(overrides)]
    config = copy.deepcopy(master)
    with open_dict(config), read_write(config):
        for name, value in found["config"].items():
            config[name] = value
        config.hydra.runtime.choices = found["choices"]
        config.hydra.overrides.task = list(overrides)
    return config


@cache
def _recorded(file: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Read the entries of a sweep's record, by their overrides."""
    entries = json.loads(file.read_text(encoding="utf-8"))["runs"].values()
    return {tuple(entry["overrides"]): entry for entry in entries}


_parsed = cache(OverridesParser.create().parse_override)


def _sets_a_value(override: Override) -> bool:
    """Return True if an override sets a value, False if it chooses an option of a group.

    Composing the groups takes 0.1 s, so it is done once for all lines that differ in values only.
    """
    name = override.key_or_group
    return (name.count(".") > 0 and not name.startswith("hydra.")) or name in TOP_LEVEL
