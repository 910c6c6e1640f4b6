"""The command line: Hydra composes, the door checks, one job runs. No jax before the door."""

import inspect
import json
import logging
import os
import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bptt_study import validation
from bptt_study.paths import shipped
from bptt_study.validation import SettingError, counted, flag, number

if TYPE_CHECKING:
    from bptt_study.runner.run import Job
    from bptt_study.runner.run_folder import Place

log = logging.getLogger(__name__)

GROUPS = ("task", "cell", "strategy", "optimizer", "budget")
PLAIN = ("study", "seeds", "first_seed", "snapshots", "sample_length")
PLACES = ("results_dir", "device", "cores", "overwrite", "checkpoint_seconds")
# what became of a job; elsewhere: another process has its run
DONE, ELSEWHERE = "done", "elsewhere"
SHORTHANDS = ("hidden", "truncation", "spectral_radius")  # other settings point at them

one_line_errors = partial(validation.one_line_errors, "bptt-study", OmegaConfBaseException)


def main() -> None:
    """`bptt-study` with the arguments of this process; see `__main__`."""
    conf = str(shipped("conf", "config.yaml"))
    hydra.main(version_base="1.3", config_path=conf, config_name="config")(one_run)()


def one_run(cfg: DictConfig) -> str:
    """One job of Hydra's: check, train, write, unless it is done already; returns what became of it.

    Alone, a wrong setting ends with one line and status 2, a failure with its reason and status 1; in a
    sweep, whose runs have all passed the door, it is one failed job among others.
    """
    hydra_cfg = HydraConfig.get()
    alone = hydra_cfg.mode is RunMode.RUN
    # a worker may start elsewhere; files are named as seen from there
    os.chdir(hydra_cfg.runtime.cwd)
    with one_line_errors() if alone else nullcontext():
        return _checked_run(cfg, hydra_cfg, alone)


def _checked_run(cfg: DictConfig, hydra_cfg: HydraConf, alone: bool) -> str:
    job = door(cfg, hydra_cfg.runtime.choices)
    writable(Path(str(cfg.results_dir)))
    from bptt_study import files
    from bptt_study.runner import run_folder

    place = run_folder.place(Path(str(cfg.results_dir)), job.study, job.identity)
    if alone and run_folder.claimed(place):
        log.info("another process is doing this run: waiting for it (Ctrl-C leaves it to that one)")
    with run_folder.claim(place, wait=alone) as mine:
        if not mine:
            return ELSEWHERE
        if cfg.overwrite:
            place.checkpoint.unlink(missing_ok=True)
        elif place.folder.exists():
            wrong = run_folder.damage(place, job.corpus)
            if not wrong:
                log.info("finished already: %s (overwrite=true does it again)", place.folder)
                return DONE
            aside = files.set_aside(place.folder)
            log.warning(
                "%s: %s; set aside as %s, and done again",
                place.folder,
                "; ".join(wrong),
                aside.name,
            )
        place.failure.unlink(missing_ok=True)
        _perform(job, place, cfg, hydra_cfg)
    return DONE


def _perform(job: "Job", place: "Place", cfg: DictConfig, hydra_cfg: HydraConf) -> None:
    """Train; what goes wrong is left beside the run's place."""
    from bptt_study import files
    from bptt_study.runner import run as jobs
    from bptt_study.runner import run_folder
    from bptt_study.training import devices

    devices.keep_to(cfg.cores)

    alone = hydra_cfg.mode is RunMode.RUN
    launcher = str(hydra_cfg.runtime.choices["hydra/launcher"])
    try:
        rows = jobs.perform(job, place, launcher, cfg.checkpoint_seconds, bar=alone)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(place.runs)  # which disk it is, wherever the error is told
        why = run_folder.in_a_line(error)
        try:
            place.runs.mkdir(parents=True, exist_ok=True)
            files.write(place.failure, f"{why}\n\n{traceback.format_exc()}")
        except OSError as other:
            log.error("the traceback could not be written: %s", other)
            raise error from None
        # these two end in a line of their own
        if not alone or isinstance(error, OSError | SettingError):
            raise
        print(f"failed: {job.title}: {why}\n  traceback: {place.failure}", file=sys.stderr)
        sys.exit(1)
    last = rows[rows["update"] == rows["update"].max()]
    lost = last["diverged"].sum()
    stopped = f"; {lost} of them diverged, the first at update {last['diverged_at'].min():g}"
    log.info(
        "%s: validation %.4f nats (median of %s)%s -> %s",
        job.title,
        last["validation_loss"].median(),
        counted(len(last), "seed"),
        stopped * bool(lost),
        place.folder,
    )


def door(cfg: DictConfig, choices: Mapping[str, str]) -> "Job":
    """The checked job of a composed configuration; SettingError for the first thing wrong with it."""
    known = (*GROUPS, "probes", *PLAIN, *PLACES, *SHORTHANDS)
    for key in cfg:
        if key not in known:
            raise SettingError(
                str(key), cfg[key], "left out", f"The settings are {', '.join(known)}."
            )
    for key in known:
        if key not in cfg:
            raise SettingError(key, "nothing", "set", "Do not delete it with ~.")
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    for key in (*GROUPS, "probes", "study", "results_dir"):
        if config[key] is None:
            raise SettingError(key, "null", "set")
    config["study"] = str(config["study"])
    flag("overwrite", config["overwrite"])
    if config["checkpoint_seconds"] is not None:
        number("checkpoint_seconds", config["checkpoint_seconds"], least=0)

    from bptt_study.training.devices import use

    use(config["device"], config["cores"])
    from bptt_study.report import columns
    from bptt_study.runner.run import Job

    task = build("task", config["task"])
    if task.cell not in (None, choices["cell"]):
        raise SettingError("cell", choices["cell"], task.cell, "The task has a cell of its own.")
    problem, parameters = _problem(json.dumps(config["task"]), json.dumps(config["cell"]))
    strategy = build("strategy", config["strategy"], problem)
    optimizer = build("optimizer", config["optimizer"])
    steps = task.steps if config["budget"]["steps"] is None else config["budget"]["steps"]
    config["budget"] = {**config["budget"], "steps": steps}
    budget = build("budget", {"_target_": "bptt_study.training.train.Budget", **config["budget"]})

    probes = {name: build(f"probes.{name}", node) for name, node in config["probes"].items()}

    part = {name: config[name] for name in (*GROUPS, "probes", *PLAIN) if name != "study"}
    if not part["snapshots"]:
        part["probes"] = {}  # nothing is looked at
    identity = columns.identity({"choices": {g: choices[g] for g in GROUPS[:4]}, **part})
    named = columns.settings(choices, {group: config[group] for group in GROUPS})
    length = named.get("window", named.get("mean_length", budget.steps))
    settings = {
        **named,
        **task.facts,
        **{f"{name}_loss": value for name, value in task.references.items()},
        "chance_accuracy": task.chance_accuracy,
        "study": config["study"],
        "run": identity,
        "schedule": choices["optimizer/schedule"],
        "parameters": parameters,
        "truncation_length": length,
        "exact": strategy.claim.exact,
        "unbiased": strategy.claim.unbiased,
    }
    return Job(
        identity=identity,
        title=f"{choices['task']} {choices['cell']} {choices['strategy']} {length:g}",
        settings=settings,
        config_yaml=lambda: OmegaConf.to_yaml(OmegaConf.create({**part, "study": config["study"]})),
        problem=problem,
        strategy=strategy,
        optimizer=optimizer,
        budget=budget,
        task=task,
        probes=probes,
        **{name: config[name] for name in PLAIN},
    )


def build(group: str, node: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call the factory that `_target_` names with the node's settings, whose names it checks.

    Equal calls return the identical object: what jax has compiled for it then serves all jobs of a sweep,
    and texts are read once.
    """
    target = str(node.get("_target_"))
    try:
        factory: Callable[..., Any] = pkgutil.resolve_name(":".join(target.rsplit(".", 1)))
        inspect.signature(factory)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        allowed = "the name of an importable factory"
        raise SettingError(f"{group}._target_", target, allowed, f"Reason: {error}.") from error
    return _built(group, factory, json.dumps(dict(node)), args, tuple(kwargs.items()))


@lru_cache(maxsize=256)
def _built(
    group: str,
    factory: Callable[..., Any],
    node: str,
    args: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
) -> Any:
    given, kwargs = json.loads(node), dict(named)
    del given["_target_"]
    allowed = [p for p in inspect.signature(factory).parameters if p not in kwargs][len(args) :]
    for name, value in given.items():
        if name not in allowed:
            way_out = f"The settings of `{group}` are {', '.join(allowed) or 'none'}."
            raise SettingError(f"{group}.{name}", value, "left out", way_out)
    nested = {k: _instantiated(f"{group}.{k}", json.dumps(v)) for k, v in given.items()}
    try:
        inspect.signature(factory).bind(*args, **kwargs, **nested)
    except TypeError as error:
        expected = f"given all of {', '.join(allowed)}"
        raise SettingError(group, ", ".join(given), expected, f"Reason: {error}.") from error
    try:
        return factory(*args, **kwargs, **nested)
    except SettingError as error:
        raise error.within(group) from error


@lru_cache(maxsize=256)
def _instantiated(name: str, node: str) -> Any:
    """Hydra makes what is nested, such as an optax transform or a schedule."""
    value = json.loads(node)
    try:
        return instantiate(value) if isinstance(value, dict) else value
    except InstantiationException as error:
        if isinstance(error.__cause__, SettingError):
            raise error.__cause__.within(name) from error
        reason = " ".join(str(error).split())
        allowed = "given settings that it accepts"
        raise SettingError(name, value.get("_target_"), allowed, f"Reason: {reason}.") from error


@lru_cache(maxsize=256)
def _problem(task_node: str, cell_node: str) -> tuple[Any, int]:
    """A cell on a task, and how many parameters they have."""
    import jax

    from bptt_study import readouts
    from bptt_study.types import Problem

    task = build("task", json.loads(task_node))
    cell = build("cell", json.loads(cell_node), inputs=task.inputs)
    hidden = jax.eval_shape(lambda: cell.read(cell.zeros(1))).shape[-1]
    readout = task.readout or readouts.linear(hidden, task.outputs)
    problem = Problem(cell, readout, task.loss)
    shapes = jax.tree.leaves(jax.eval_shape(problem.init, jax.random.key(0)))
    return problem, sum(leaf.size for leaf in shapes)


def writable(results_dir: Path) -> None:
    """Make the folder; SettingError if it cannot be written to."""
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results_dir):
            pass
    except OSError as error:
        allowed = "a folder that can be written to"
        raise SettingError("results_dir", results_dir, allowed, f"Reason: {error}.") from error
