"""From a composed configuration to a run: this file validates every setting once, then builds the run's parts.

Nothing here imports jax before the device is set.
"""

import errno
import fcntl
import inspect
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bptt_study.runner import environment, factories, own_code
from bptt_study.runner.progress import said_if_slow
from bptt_study.validation import MOST, QUOTED, SettingError, fits, flag, number

if TYPE_CHECKING:
    from bptt_study.runner.run import RunConfig
    from bptt_study.types import Problem, Strategy, Task

GROUPS = ("task", "cell", "strategy", "optimizer", "budget")
RUN_SETTINGS = ("study", "seeds", "first_seed", "snapshots", "sample_length")
# These settings say where and how a run is done. They are not part of its identity
PROCESS_SETTINGS = (
    "results_dir",
    "device",
    "cores",
    "overwrite",
    "checkpoint_seconds",
    "run_timeout",
    "loggers",
    "story",
)
SHORTHANDS = ("hidden", "truncation", "spectral_radius")  # settings of the groups refer to them
SIZES = ("size", "budgets")  # the settings of the budget refer to them
# a size's `budgets` decides these; settings of the task may refer to more of its names
BY_SIZE = ("steps", "batch_size", "updates", "logs", "reset_every", "seeds", "hidden")
SETTINGS = (*GROUPS, "probes", *RUN_SETTINGS, *PROCESS_SETTINGS, *SHORTHANDS, *SIZES)


def configure(cfg: DictConfig, choices: Mapping[str, str]) -> "RunConfig":
    """Validate a composed configuration and build the run.

    Args:
      cfg: The configuration without Hydra's own part.
      choices: The chosen option of each configuration group.

    Returns:
      The run.

    Raises:
      SettingError: For the first setting that is wrong.
    """
    config = _resolved(cfg)
    choices = _one_of_each(choices, config["size"])

    from bptt_study.training.devices import use

    use(config["device"], config["cores"])
    _forget_another_environment()
    from bptt_study import losses
    from bptt_study.report import columns, tables
    from bptt_study.runner.run import RunConfig

    built, parameters = _built_parts(config, choices)
    task, strategy = built["task"], built["strategy"]
    own = {name: config[name] for name in (*GROUPS, "probes", *RUN_SETTINGS) if name != "study"}
    if not own["snapshots"]:
        own["probes"] = {}  # without snapshots, no probe is called
    decides = {"choices": {g: choices[g] for g in GROUPS[:4]}, **own}
    differs = environment.uncommon()
    if differs:
        decides["environment"] = differs
    identity = columns.identity(decides)
    groups = {group: own[group] for group in (*GROUPS, "probes")}
    named = columns.settings(choices, groups) | {n: own[n] for n in RUN_SETTINGS if n in own}
    length = _truncation_length(named)
    title = [*(choices[g] for g in GROUPS[:3]), *([] if length is None else [tables.text(length)])]
    settings = {
        **_with_facts(named, task),
        "study": config["study"],
        "run": identity,
        "schedule": choices.get("optimizer/schedule"),
        "parameters": parameters,
        "loss_unit": losses.unit(task.loss),
        "truncation_length": length,
        "exact": strategy.claim.exact,
        "unbiased": strategy.claim.unbiased,
        **({"environment": json.dumps(differs)} if differs else {}),
    }
    for name, value in settings.items():
        columns.check_cell(name, value)
    return RunConfig(
        identity=identity,
        title=" ".join(title),
        settings=settings,
        config_yaml=lambda: OmegaConf.to_yaml(OmegaConf.create({**own, "study": config["study"]})),
        **built,
        code=own_code.code(own),
        **{name: config[name] for name in RUN_SETTINGS},
    )


def _check_held(
    problem: "Problem", strategy: "Strategy", option: str, node: Mapping[str, Any]
) -> None:
    """Raise SettingError, with the strategy's settings, if an estimate of one token exceeds the memory."""
    from bptt_study.runner.run import held

    named = [f"{name}={value}" for name, value in node.items() if not name.startswith("_")]
    fits("strategy", ", ".join([option, *named]), held(problem, strategy))


def _one_of_each(choices: Mapping[str, str], size: str) -> dict[str, str]:
    """Check that each group has one option, and name the budget's by its owner and size."""
    for group in GROUPS:
        if not isinstance(choices.get(group), str):  # Hydra merges the options of a list
            way_out = f"A sweep takes several: bptt-study -m {group}=A,B."
            raise SettingError(group, "several", "one option", way_out)
    owner = choices["task"] if choices["budget"] == "task" else choices["budget"]
    return {**choices, "budget": f"{owner}_{size}"}


def _truncation_length(named: Mapping[str, Any]) -> float | None:
    """Return the window or mean length of a strategy; None without one, or if a strategy of one's own means
    something else by the word, such as a text or a flag."""
    found = (named.get(name) for name in ("window", "mean_length"))
    return next((v for v in found if isinstance(v, int | float) and not isinstance(v, bool)), None)


_environment: dict[str, Any] = {}  # of the last configuration in this process


def _forget_another_environment() -> None:
    """Drop what was made under other settings of JAX: data, and programs that have drawn with other keys."""
    import jax

    now = environment.environment()
    if _environment and _environment != now:
        for made in (_built, _instantiated, _problem):
            made.cache_clear()
        jax.clear_caches()
    _environment.update(now)


def _with_facts(named: dict[str, Any], task: "Task") -> dict[str, Any]:
    """Add the columns that a task brings to those of the settings."""
    from bptt_study.report import columns

    row = named | columns.brought("task.facts", task.facts, named)
    references = {f"{name}_loss": value for name, value in task.references.items()}
    losses = columns.brought("task.references", references, row)
    for name, value in zip(task.references, losses.values(), strict=True):
        number(f"task.references.{name}", value)
    row |= losses
    chance = columns.brought("task", {"chance_accuracy": task.chance_accuracy}, row)
    if task.chance_accuracy is not None:
        (value,) = chance.values()
        if not 0 <= number("task.chance_accuracy", value) <= 1:
            raise SettingError("task.chance_accuracy", value, "a share from 0 to 1")
    return row | chance


def _built_parts(config: dict[str, Any], choices: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """Build the objects of a run by their names in `RunConfig`, and count the parameters.

    This function gives the settings of the task that change nothing one value, which makes equal runs one, and
    sets `budget.steps` of the configuration if it is null.
    """
    task = build("task", config["task"])
    config["task"] = {name: task.unused.get(name, v) for name, v in config["task"].items()}
    if task.cell not in (None, choices["cell"]):
        raise SettingError("cell", choices["cell"], task.cell, "The task allows no other cell.")
    if task.cell is not None:
        _check_shared(config["task"], config["cell"])
    problem, parameters = _problem_of(task, config["cell"])
    strategy = build("strategy", config["strategy"], problem)
    _check_held(problem, strategy, choices["strategy"], config["strategy"])
    optimizer = build("optimizer", config["optimizer"])
    steps = task.steps if config["budget"]["steps"] is None else config["budget"]["steps"]
    config["budget"] = {**config["budget"], "steps": steps}
    budget = build("budget", {"_target_": "bptt_study.training.budget.Budget", **config["budget"]})
    probes = {name: build(f"probes.{name}", node) for name, node in config["probes"].items()}
    loggers = {name: build(f"loggers.{name}", node) for name, node in config["loggers"].items()}
    built = {"task": task, "problem": problem, "strategy": strategy, "optimizer": optimizer}
    return built | {"budget": budget, "probes": probes, "loggers": loggers}, parameters


def _check_shared(task: Mapping[str, Any], cell: Mapping[str, Any]) -> None:
    """Check that the cell of a task agrees with it in every setting that both have, such as `states`."""
    for name in sorted((task.keys() & cell.keys()) - {"_target_"}):
        if task[name] != cell[name]:
            allowed = f"that of the task, {task[name]}"
            raise SettingError(f"cell.{name}", cell[name], allowed, f"`task.{name}` sets both.")


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain values, and check that every setting is known, set and of its kind."""
    for key in cfg:
        if key not in SETTINGS:
            way_out = f"The settings are {', '.join(SETTINGS)}."
            raise SettingError(str(key), cfg[key], "left out", way_out)
    for key in SETTINGS:
        if key not in cfg:
            raise SettingError(key, "nothing", "set", "Do not delete it with ~.")
    for key in (*GROUPS, "probes", "loggers", "budgets"):
        _check_mapping(key, cfg[key])
    for key in ("probes", "loggers", "budgets"):
        for name, node in cfg[key].items():
            _check_mapping(f"{key}.{name}", node)
    if cfg.size not in cfg.budgets:
        way_out = f"`budgets.{cfg.size}` in the task's yaml or in that of the size brings another."
        raise SettingError("size", cfg.size, f"one of {', '.join(cfg.budgets)}", way_out)
    for name, value in cfg.budgets[cfg.size].items():
        if name not in (*BY_SIZE, *cfg.task):  # nothing would refer to it
            way_out = f"A size decides {', '.join(BY_SIZE)}."
            raise SettingError(f"budgets.{cfg.size}.{name}", value, "left out", way_out)
    config = _plain("", OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    assert isinstance(config, dict)
    study_name(config["study"])
    flag("overwrite", config["overwrite"])
    if config["checkpoint_seconds"] is not None:
        number("checkpoint_seconds", config["checkpoint_seconds"], least=0)
    if config["run_timeout"] is not None:
        number("run_timeout", config["run_timeout"], above=0)
    config["optimizer"] = _clipped(config["optimizer"])
    return {str(key): value for key, value in config.items()}


def _check_mapping(name: str, node: Any) -> None:
    if not OmegaConf.is_dict(node):
        raise SettingError(name, "null" if node is None else node, "a mapping of settings")


def _text(name: str, value: Any) -> str:
    """Check that a setting is a text. YAML loses that of a number: 007 and 7 are one."""
    if not isinstance(value, str):
        raise SettingError(name, "null" if value is None else value, "a text", QUOTED)
    return value


def study_name(value: Any) -> str:
    """Check the setting `study`, and return it; it is the name of a folder."""
    _text("study", value)
    if not re.fullmatch(r"\w[\w.-]*", value) or value == "runs":
        allowed = "a name of letters, digits, underscores, hyphens and dots, other than runs"
        raise SettingError("study", value, allowed)
    return value


def _plain(name: str, value: Any) -> Any:
    """Return a value of OmegaConf as JSON has it: a path becomes its text, and bytes are refused."""
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}".lstrip("."), one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(f"{name}.{n}", one) for n, one in enumerate(value)]
    if isinstance(value, bytes):
        raise SettingError(name, value, "a number, a text, a flag, a list, a mapping or null")
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _clipped(node: dict[str, Any]) -> dict[str, Any]:
    """Make an optax factory that an optimizer names the transform of `optimizers.clipped`."""
    if not str(node.get("_target_")).startswith("optax."):
        return node
    around = {n: node[n] for n in ("learning_rate", "clip_norm", "schedule") if n in node}
    own = {name: value for name, value in node.items() if name not in around}
    clipped = {"_target_": "bptt_study.optimizers.clipped", "transform": {**own, "_partial_": True}}
    return clipped | around


def subject(config: Mapping[str, Any]) -> "tuple[Task, Problem, Strategy]":
    """Build the task, the problem and the strategy of a resolved configuration.

    Args:
      config: The configuration, such as a run's config.yaml.

    Returns:
      The three objects.
    """
    task = build("task", config["task"])
    problem, _ = _problem_of(task, config["cell"])
    return task, problem, build("strategy", config["strategy"], problem)


def build(group: str, node: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call the factory named by `_target_` with the settings of the node.

    Equal calls return the identical object, unless code or a file that they name has changed. So all runs of a
    sweep share its compiled programs, and a text is read once.

    Args:
      group: The configuration group, for messages.
      node: `_target_` and the settings; their names are validated.
      *args: Positional arguments of the factory, before its settings.
      **kwargs: Named arguments of the factory, beside its settings.

    Returns:
      The object that the factory made.

    Raises:
      SettingError: For a factory that cannot be imported, a setting that is unknown or missing, and a setting
        that the factory refuses.
    """
    target = str(node.get("_target_"))
    factory = factories.resolve(group, target)
    named = tuple(kwargs.items())
    with said_if_slow(f"makes the {group}, {target}"):
        made = _built(group, factory, json.dumps(dict(node)), own_code.made_from(node), args, named)
    return factories.check_made(group, target, made)


@lru_cache(maxsize=256)
def _built(
    group: str,
    factory: Callable[..., Any],
    node: str,
    made_from: tuple[Any, ...],
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
    nested = {k: _instantiated(f"{group}.{k}", json.dumps(v), made_from) for k, v in given.items()}
    try:
        inspect.signature(factory).bind(*args, **kwargs, **nested)
    except TypeError as error:
        expected = f"given all of {', '.join(allowed)}"
        raise SettingError(group, ", ".join(given), expected, f"Reason: {error}.") from error
    try:
        return factory(*args, **kwargs, **nested)
    except SettingError as error:
        found = _as_written(error, given)
        # a strategy that does not fit the cell names the cell, which is a setting of its own
        raise (found if found.name in factories.KINDS else found.within(group)) from error
    except SystemExit as stop:
        what = f"{factory.__qualname__}, which called sys.exit({stop.code!r})"
        raise SettingError(f"{group}._target_", what, "a factory that returns") from stop
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # JAX's
            raise
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        fits = "given settings that fit into memory"
        raise SettingError(group, shown, fits, f"Reason: {reason}.") from error


def _as_written(error: SettingError, given: Mapping[str, Any]) -> SettingError:
    """The error with the value as the command line has it, not with what was made of it."""
    value = given.get(error.name, "")
    if not isinstance(value, dict | list | bool | None):
        return error
    shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return SettingError(error.name, shown.splitlines()[0], error.allowed, error.way_out)


@lru_cache(maxsize=256)
def _instantiated(name: str, node: str, made_from: tuple[Any, ...]) -> Any:
    """Return a setting's value; Hydra instantiates a nested node, such as an optax transform or a schedule."""
    value = json.loads(node)
    factories.check_parts(name, value if isinstance(value, dict) else None)
    try:
        return instantiate(value) if isinstance(value, dict) else value
    except InstantiationException as error:
        if isinstance(error.__cause__, SettingError):
            raise error.__cause__.within(name) from error
        reason = " ".join(str(error).split())
        allowed = "given settings that it accepts"
        raise SettingError(name, value.get("_target_"), allowed, f"Reason: {reason}.") from error


def _problem_of(task: "Task", cell_node: Mapping[str, Any]) -> "tuple[Problem, int]":
    """Make the problem of a cell on a task, and count its parameters."""
    target = str(cell_node.get("_target_"))
    try:
        cell = build("cell", cell_node, inputs=task.inputs)
    except SettingError as error:
        if error.name != "cell.inputs":
            raise
        way_out = f"The inputs of this cell must be {error.allowed}; the task's are {task.inputs}."
        raise SettingError("cell", target, "a cell that fits the task", way_out) from error
    inputs = task.validation.inputs
    seen = (inputs.shape[2:], str(inputs.dtype))
    return _problem(cell, target, *seen, task.outputs, task.readout, task.loss)


@lru_cache(maxsize=256)
def _problem(
    cell: Any,
    target: str,
    features: tuple[int, ...],
    dtype: str,
    outputs: int,
    readout: Any,
    loss: Callable[..., Any],
) -> tuple[Any, int]:
    """Make a problem, and count its parameters. Equal calls return the identical problem."""
    from bptt_study import readouts
    from bptt_study.backprop.repeats import check_draws_of, check_init
    from bptt_study.known import is_shipped
    from bptt_study.types import Problem

    hidden = _checked_cell(cell, target, features, dtype)
    problem = Problem(cell, readout or readouts.linear(hidden, outputs), loss)
    count = sum(leaf.size for leaf in _checked_names(problem).values())
    if count > MOST:  # XLA may abort the process
        raise SettingError("cell", f"one of {count}", f"a cell of at most {MOST} parameters")
    check_draws_of(cell)
    if not is_shipped(problem.readout.init):
        check_init("task.readout.init", problem.readout.init)
    return problem, count


def _checked_names(problem: Any) -> dict[str, Any]:
    """Return the shapes of the parameters by name, and check that the names differ."""
    import jax

    from bptt_study.runner import array_files

    try:
        return array_files.named(jax.eval_shape(problem.init, jax.random.key(0)))
    except SettingError as error:
        allowed = "parameters whose paths differ as text, none the beginning of another's"
        raise SettingError("cell.init", error.value, allowed) from error


def _checked_cell(cell: Any, target: str, features: tuple[int, ...], dtype: str) -> int:
    """Check a cell from outside, and return H, the size of its output.

    The checks run a step on random numbers; `testing.check_cell` has more checks.
    """
    import jax
    import jax.numpy as jnp

    from bptt_study.backprop.promises import check_promises
    from bptt_study.types import Cell

    if not isinstance(cell, Cell):
        made = f"{target}, which returns a {type(cell).__name__}"
        raise SettingError("cell._target_", made, "a factory of a bptt_study.Cell")
    x = jax.ShapeDtypeStruct((1, 2, *features), dtype)
    try:
        params = jax.eval_shape(cell.init, jax.random.key(0))
        state = jax.eval_shape(lambda: cell.zeros(2))
        read = jax.eval_shape(cell.read, state)
        check_promises(cell, params, state, x)
    except SettingError:
        raise
    except Exception as error:  # the cell's functions may raise anything
        reason = f"Reason: {type(error).__name__}: {' '.join(str(error).split())}"
        allowed = f"a cell for inputs {x.dtype}{list(x.shape[1:])}"
        raise SettingError("cell", target, allowed, reason) from error
    if read.ndim != 2 or not jnp.issubdtype(read.dtype, jnp.floating):
        shown = f"one that returns {read.dtype}{list(read.shape)}"
        raise SettingError("cell.read", shown, "a function that returns floats [B, H]")
    return int(read.shape[-1])


def results_folder(cfg: DictConfig) -> Path:
    """Read the setting `results_dir`, and replace ~ by the home folder.

    Args:
      cfg: The configuration.

    Returns:
      The folder.

    Raises:
      SettingError: If the setting is not a path.
    """
    given = cfg.results_dir
    name = os.fspath(given) if isinstance(given, os.PathLike) else _text("results_dir", given)
    if "\0" in name:
        raise SettingError("results_dir", repr(name), "a path, which has no null character")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        allowed = "a path whose ~ is known"
        raise SettingError("results_dir", name, allowed, f"Reason: {error}.") from error


def check_writable(results_dir: Path) -> None:
    """Create the folder of results.

    Args:
      results_dir: The folder.

    Raises:
      SettingError: If no file can be written to it, or its disk grants no locks.
    """
    allowed = "a folder that can be written to"
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results_dir) as file:
            allowed = "a folder on a disk that grants locks"
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.ENOSYS:  # of flock; `locks` does without
            return
        raise SettingError("results_dir", results_dir, allowed, f"Reason: {error}.") from error
