"""One run: this file trains all seeds of a validated configuration, and writes its tables and texts."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Int, Key
from tqdm import tqdm

import bptt_study
from bptt_study import files
from bptt_study.backprop.forward import generate
from bptt_study.instruments.draws import sign_shapes
from bptt_study.known import is_shipped, kept
from bptt_study.optimizers import Optimizer, check_state
from bptt_study.probes import Probe, Snapshot
from bptt_study.report import columns, csv_tables, tables
from bptt_study.report.columns import NORM_KEYS
from bptt_study.runner import array_files, environment, own_code, run_folder
from bptt_study.runner.loggers import LoggedRun, Logger, open_all
from bptt_study.runner.run_checkpoint import RunCheckpoint, plain
from bptt_study.runner.run_folder import RunPaths
from bptt_study.runner.time_limit import OvertimeError, TimeLimit
from bptt_study.training.budget import Budget
from bptt_study.training.check_data import check_axes, check_data, check_draws, check_level
from bptt_study.training.check_estimate import check_estimate
from bptt_study.training.devices import let_go_of_programs, processor, threads
from bptt_study.training.parallel import devices_for
from bptt_study.training.resets import fold, folded_size, make_sampler, opening
from bptt_study.training.train import Progress, Trained, make_train, run_keys
from bptt_study.types import Batch, Params, Problem, Strategy, Task
from bptt_study.validation import SettingError, fits, one_line, printable, whole

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10  # if there is no terminal for a progress bar


@dataclass(frozen=True)
class RunConfig:
    """A validated run and everything that it needs. It never changes."""

    study: str
    identity: str
    title: str  # for the progress bar
    settings: dict[str, Any]  # the columns that are the same in all rows
    config_yaml: Callable[[], str]  # called once, when the results are written
    seeds: int
    first_seed: int
    # the number of calls of the probes: 0 never, 1 at the start, 2 at start and end, …
    snapshots: int
    sample_length: int  # characters
    problem: Problem
    strategy: Strategy
    optimizer: Optimizer
    budget: Budget
    task: Task
    probes: dict[str, Probe]
    loggers: dict[str, Logger] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)  # see `own_code.code`

    def __post_init__(self) -> None:
        whole("seeds", self.seeds)
        whole("first_seed", self.first_seed, least=0)
        if self.first_seed + self.seeds > 2**31:
            raise SettingError("first_seed", self.first_seed, "such that every seed is below 2**31")
        whole("snapshots", self.snapshots, least=0)
        whole("sample_length", self.sample_length, least=0)
        budget, scores = self.budget, 20  # a row has about so many
        tokens, drawn = budget.steps * budget.batch_size, self.strategy.claim.per_token
        fits("budget.batch_size", budget.batch_size, (3 + drawn) * tokens)
        # the parameters, their gradient and the optimizer's state
        each = 2 * self.settings["parameters"] + _kept(self.problem, self.optimizer.transform)
        each += 2 * _carried(self.problem, self.strategy, folded_size(budget))  # old and new
        fits("seeds", self.seeds, self.seeds * (each + 2 * scores))
        if self.task.text is not None:  # keys while they are split, and the symbols of all seeds
            fits("sample_length", self.sample_length, self.sample_length * (7 + self.seeds))
        fits("budget.logs", budget.logs, scores * self.seeds * min(budget.logs, budget.updates))
        self._check_data()
        devices_for(self.seeds, self.budget.split)  # raises if there are too few devices
        for name, probe in self.probes.items() if self.snapshots else ():
            csv_tables.check_name("probes", name)
            if missing := sorted(probe.metrics - self.metrics):
                way_out = (
                    f"The strategy does not report {', '.join(missing)}; snapshots=0 takes none."
                )
                raise SettingError("probe", name, "a probe that fits the strategy", way_out)
            if probe.lag_weights and self.strategy.claim.lag_weights is None:
                way_out = "The strategy declares no lag weights; snapshots=0 takes none."
                raise SettingError("probe", name, "a probe that fits the strategy", way_out)
            probe.check(self.task)
            try:
                probe.fits(self.problem, len(self.opening.mask))
            except SettingError as error:
                raise error.within(f"probes.{name}") from None

    def _check_data(self) -> None:
        """Check the validation part, the training part and, of parts from outside, a batch and its estimate."""
        try:
            sampler = make_sampler(self.task, self.budget)
            scores = dict.fromkeys(check_level(sampler.level), np.nan)
            # to draw a batch takes a program; the package's tests draw those of its own tasks
            if not is_shipped(self.task.sampler):
                check_axes(self.task, self.budget.steps, self.budget.batch_size)
            shipped = is_shipped(self.task.sampler) and is_shipped(self.strategy.estimate)
            two = np.arange(min(2, self.budget.updates), dtype=np.int32)
            drawn = None if shipped else self._drawn(jax.random.key(0), two, sampler.level.start())
        except SettingError:
            raise
        except Exception as error:  # the task's functions may raise anything
            allowed, reason = "a function that makes batches", f"Reason: {one_line(error)}."
            raise SettingError("task.sampler", "one that fails", allowed, reason) from error
        columns.brought("task.sampler.level.scores", scores, self.settings)
        for name in ("validation", "training"):
            if (part := getattr(self.task, name)) is not None:
                check_data(f"task.{name}", part, self.task, steps=self.task.steps)
        if drawn is not None:
            let_go_of_programs()
            # a batch that continues the one before it may wait for the first token that counts
            first, fresh = Batch(*(a[0] for a in drawn[0])), drawn[1]
            _check_fresh(fresh, sampler.continues)
            check_data("task.sampler", first, self.task, may_be_empty=sampler.continues)
            if not is_shipped(self.task.sampler):
                others = self._drawn(jax.random.key(1), two, sampler.level.start())[0]
                check_draws(self.task, sampler, drawn[0], others)
            if not is_shipped(self.strategy.estimate):
                check_estimate(self.problem, self.strategy, first)

    @cached_property
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that the strategy's estimate reports."""
        key = jax.random.key(0)
        report = partial(_metrics, self.problem, self.strategy)
        return frozenset(jax.eval_shape(report, self.opening, key, key))

    @cached_property
    def opening(self) -> Batch:
        """The batch of the probes: the first sequences of the validation part, cut as those of training."""
        budget = self.budget
        return opening(self.task.validation, budget.steps, budget.batch_size, budget.reset_every)

    @cached_property
    def batches(self) -> Callable[[Key[Array, ""], tuple[Any, ...], int], Batch]:
        """The function (data key, level, N) -> N batches, spread over the run, leaves [N, T, B, …]."""

        def sample(key: Key[Array, ""], level: tuple[Any, ...], count: int) -> Batch:
            updates = np.arange(count, dtype=np.int32) * max(1, self.budget.updates // count)
            return self._drawn(key, updates, level)[0]

        return sample

    def _drawn(
        self, key: Key[Array, ""], updates: Int[np.ndarray, "N"], level: tuple[Any, ...]
    ) -> tuple[Batch, Array]:
        """Draw the batches of some updates, leaves [N, T, B, …], and whether they are fresh, [N]."""
        sampler = make_sampler(self.task, self.budget)
        return _batches(sampler.sample, sampler.data, key, updates, level)

    @cached_property
    def probed_updates(self) -> frozenset[int]:
        """The updates after which the probes are called: log points, evenly spread from start to end."""
        points = self.budget.log_points
        count = min(self.snapshots, len(points))
        chosen = np.linspace(0, len(points) - 1, count).round().astype(int)
        return frozenset(points[i] for i in chosen)

    @property
    def corpus(self) -> str | None:
        """The checksum of the corpus, because its name alone does not fix its content."""
        return self.settings.get("corpus_sha256")

    @property
    def rows(self) -> int:
        """The number of rows of the finished run."""
        return self.seeds * len(self.budget.log_points)


def perform(
    config: RunConfig,
    paths: RunPaths,
    launcher: str = "basic",
    checkpoint_seconds: float | None = None,
    bar: bool = True,
    timeout: float | None = None,
) -> pd.DataFrame:
    """Train all seeds and write the run's folder.

    If there is a checkpoint, the run continues from it, and its result is the same bit for bit.

    Args:
      config: The run.
      paths: The files of the run.
      launcher: The name of Hydra's launcher, for the table of costs.
      checkpoint_seconds: The time between two checkpoints; Ctrl-C writes one more. None: no checkpoints.
      bar: Whether a terminal shows a progress bar.
      timeout: The seconds of training after which the run is given up; None: never.

    Returns:
      The rows of the run: one per seed and log point.

    Raises:
      OvertimeError: If it trained longer. The checkpoint then stays, as at Ctrl-C.
    """
    seeds = np.arange(config.first_seed, config.first_seed + config.seeds)
    train = make_train(
        config.problem, config.strategy, config.optimizer, config.budget, config.task
    )
    about = _about(config)
    probed: dict[str, list[pd.DataFrame]] = {name: [] for name in config.probes}
    told = LoggedRun(config.study, config.identity, config.title, config.settings)
    with (
        _progress_bar(config, bar) as show,
        open_all(config.loggers, told, range(config.first_seed, seeds[-1] + 1)) as log_point,
    ):

        def watch(record: dict[str, np.ndarray], progress: Progress) -> None:
            show(record)
            log_point(record)
            update = int(record["update"][0])
            if update in config.probed_updates:
                snapshots = snapshots_of_seeds(config, progress)
                lost = ~np.isnan(record["diverged_at"])  # its parameters are older, or not finite
                for seed, own, snapshot in zip(seeds, lost, snapshots, strict=True):
                    stopped = {"stopped": True} if own else {}
                    for name, probe in config.probes.items():
                        table = _looked(name, probe, snapshot)
                        probed[name].append(table.assign(seed=seed, update=update, **stopped))

        checkpoint = RunCheckpoint(paths.checkpoint, about, checkpoint_seconds, probed)
        limit = TimeLimit(timeout)

        def pause(trained: Trained) -> None:
            checkpoint.pause(trained)
            if len(trained.records) < len(config.budget.log_points):  # else it is done
                limit.check()

        with _kept_at_a_stop(checkpoint):
            trained = train(_keys(seeds), watch, pause, checkpoint.restore)

    rows, contents = _results(config, trained, probed, launcher)
    contents["params.npz"] = array_files.dump(trained.progress.params, about)
    files.remove_temporary(paths.folder)
    files.write_folder(paths.folder, contents)
    paths.checkpoint.unlink(missing_ok=True)
    return rows


@contextmanager
def _kept_at_a_stop(checkpoint: RunCheckpoint) -> Iterator[None]:
    """Write the checkpoint if the run is stopped in this block; if its time is up, say whether there is one."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoint.save()
        raise
    except OvertimeError as error:
        checkpoint.save()
        none = "it has no checkpoint, so the next start begins anew"
        kept = "its checkpoint stays" if checkpoint.file.exists() else none
        raise OvertimeError(f"{error}; {kept}") from None


def _looked(name: str, probe: Probe, snapshot: Snapshot) -> pd.DataFrame:
    """Call a probe, and check at once that its table can be kept and has no column of the run's own."""
    # with dicts of its own, as a probe may put other arrays into them
    found = probe.look(snapshot._replace(params=jax.tree.map(lambda a: a, snapshot.params)))
    allowed = "a probe that returns a table"
    if not isinstance(found, pd.DataFrame):
        raise SettingError(f"probes.{name}", f"one that returns a {type(found).__name__}", allowed)
    found = csv_tables.flat(f"probes.{name}", found)
    try:
        table = plain(found)
    except (TypeError, ValueError) as error:
        allowed += " of numbers, flags and texts"
        raise SettingError(f"probes.{name}", "another", allowed, f"Reason: {error}.") from error
    if taken := sorted({*table} & {"seed", "update", "stopped", *NORM_KEYS}):
        allowed += " without these columns, which every table gets"
        raise SettingError(f"probes.{name}", f"one with {', '.join(taken)}", allowed)
    return table


def _about(config: RunConfig) -> dict[str, Any]:
    """Collect the facts that a checkpoint must share with the run that continues from it."""
    return {
        "run": config.identity,
        "version": bptt_study.__version__,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "corpus_sha256": config.corpus,
        "code": config.code | {"bptt_study": own_code.fingerprint("bptt_study")},
    }


@contextmanager
def _progress_bar(
    config: RunConfig, bar: bool
) -> Iterator[Callable[[dict[str, np.ndarray]], None]]:
    """Yield a function that shows a log point: in a bar on a terminal, else in a line of the log."""
    updates = config.budget.updates
    total = updates * config.budget.steps * config.budget.batch_size * config.seeds
    last = time.monotonic()
    with tqdm(
        total=total,
        desc=config.title,
        unit="token",
        unit_scale=True,
        disable=not (bar and sys.stderr.isatty()),
        leave=False,
    ) as shown:

        def show(record: dict[str, np.ndarray]) -> None:
            nonlocal last
            update = int(record["update"][0])
            loss = tables.median("validation_loss", record["validation_loss"], record["diverged"])
            shown.update(total * update // updates - shown.n)
            shown.set_postfix(validation=tables.short(loss))
            if shown.disable and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                line = "%s  update %d/%d  validation %s  %.1f s/seed"
                found = f"{tables.short(loss, 4)} {config.settings['loss_unit']}".rstrip()
                log.info(line, config.title, update, updates, found, record["seconds"][0])

        yield show


def _results(
    config: RunConfig, trained: Trained, probed: dict[str, list[pd.DataFrame]], launcher: str
) -> tuple[pd.DataFrame, dict[str, bytes]]:
    """Make the rows of a trained run, and the content of each of its files except the parameters."""
    machine = _machine(launcher)
    devices = config.budget.split * devices_for(config.seeds, config.budget.split)
    constants = config.settings | {"compile_seconds": trained.compile_seconds, **machine}
    constants |= {"devices": devices}
    rows, costs = columns.split(_rows(config, trained.records, constants))
    tables = {"rows.csv": rows, "costs.csv": costs}
    keys = {name: constants.get(name) for name in NORM_KEYS}
    for name, found in probed.items():
        if found:
            table = pd.concat(found, ignore_index=True).assign(**keys)
            first = ["seed", "update"]
            tables[f"{name}.csv.gz"] = table[first + [c for c in table if c not in first]]
    about = {
        "format": run_folder.FORMAT,
        "run": config.identity,
        "rows": len(rows),
        "diverged": int(trained.records[-1]["diverged"].sum()),
        "corpus_sha256": config.corpus,
        "code": config.code,
    }
    texts = {
        "config.yaml": config.config_yaml(),
        "machine.json": json.dumps(machine | environment.environment(), indent=1),
        run_folder.ABOUT: json.dumps(about, indent=1),
    }
    if config.task.text is not None:
        if "cuts" in config.metrics:
            tables["cuts.csv"] = _cuts(config).assign(**keys)
        texts["sample.txt"] = _samples(config, trained.progress)
    contents = {name: csv_tables.packed(table, name) for name, table in tables.items()}
    return rows, contents | {name: text.encode() for name, text in texts.items()}


def _rows(
    config: RunConfig, history: list[dict[str, np.ndarray]], constants: dict[str, Any]
) -> pd.DataFrame:
    """Make the table with one row per seed and log point, seed by seed."""
    measured = {name: np.stack([r[name] for r in history], axis=1).ravel() for name in history[0]}
    loss = measured["validation_loss"].astype(float)
    measured |= {
        "seed": np.repeat(np.arange(config.seeds) + config.first_seed, len(history)),
        "tokens": measured["update"] * config.budget.steps * config.budget.batch_size,
    }
    if constants["loss_unit"] == "nats":
        with np.errstate(over="ignore"):  # the perplexity of a diverged seed is infinite
            measured["perplexity"] = np.exp(loss)
        if config.task.text is not None:
            measured["bits_per_character"] = loss / np.log(2)
    return columns.frame(constants, measured)


def snapshots_of_seeds(config: RunConfig, progress: Progress) -> Iterator[Snapshot]:
    """Yield the arguments of the probes for each seed.

    Every seed and update has its own draws, so that intervals over seeds cover the noise of the strategy.
    """
    keys = jax.vmap(jax.random.fold_in)(progress.draw_key, progress.update)
    params, levels = jax.device_get((progress.params, progress.level))
    for seed, key in enumerate(keys):
        own, level = jax.tree.map(lambda a, seed=seed: jnp.asarray(a[seed]), (params, levels))
        batches = partial(config.batches, progress.data_key[seed], level)
        yield Snapshot(
            config.problem, config.strategy, config.task, own, config.opening, key, batches
        )


def _cuts(config: RunConfig) -> pd.DataFrame:
    """Make a table of the first characters of the text, and the links that the first update cuts there.

    A reset of the state within the update is a cut.
    """
    text, budget = config.task.text, config.budget
    assert text is not None
    opening = text.opening[: budget.steps]
    # the draw depends on the number of steps and sequences, so both are as in training
    ids = np.zeros((budget.steps, budget.batch_size), np.int32)
    ids[: len(opening)] = [[text.alphabet.index(c)] for c in opening]
    parts = fold(jnp.asarray(ids), min(budget.reset_every or budget.steps, budget.steps))

    batch = Batch(parts, parts, jnp.ones(parts.shape))
    init_key, _, draw_key = run_keys(jax.random.key(config.first_seed))
    draw = jax.random.fold_in(draw_key, 0)
    metrics = _metrics(config.problem, config.strategy, batch, init_key, draw)
    cuts = np.array(metrics["cuts"])[:, :: budget.batch_size]  # of the parts of the first sequence
    cuts[0, 1:] = True

    return pd.DataFrame(
        {
            "position": np.arange(len(opening)),
            "character": list(opening),
            "cut": cuts.T.ravel()[: len(opening)],
        }
    )


def _samples(config: RunConfig, progress: Progress) -> str:
    """Write the prefix and its continuation by the model of each seed; further lines of it are indented."""
    text = config.task.text
    assert text is not None
    prefix = np.array([text.alphabet.index(c) for c in text.prefix], np.int32)

    written = np.asarray(
        _generate(
            config.problem,
            progress.params,
            jnp.asarray(prefix),
            config.sample_length,
            progress.draw_key,
        )
    )
    samples = (text.prefix + "".join(text.alphabet[s] for s in symbols) for symbols in written)
    return "".join(
        f"seed {seed}: {_indented(sample)}\n"
        for seed, sample in enumerate(samples, start=config.first_seed)
    )


def _indented(text: str) -> str:
    for ends_a_line in "\r\u2028\u2029":
        text = text.replace(ends_a_line, repr(ends_a_line)[1:-1])
    return printable(text).replace("\n", "\n  ")


def _check_fresh(fresh: Array, continues: bool) -> None:
    """Check whether some batches are fresh, [N]: a state carried from unrelated sequences shows nowhere."""
    if fresh.ndim != 1:
        found = f"one of {fresh.dtype}{list(fresh.shape[1:])}"
        raise SettingError("task.sampler", found, "one that returns a batch and one flag fresh")
    if not (continues or fresh.all()):
        update = int(np.argmin(np.asarray(fresh)))
        allowed = "one with fresh=True in every update, as continues=False says"
        raise SettingError("task.sampler", f"one with fresh=False in update {update}", allowed)


@kept(256)
def _kept(problem: Problem, transform: Any) -> int:
    """Count the numbers of an optimizer's state, and check it and that it can make an update."""
    params = jax.eval_shape(problem.init, jax.random.key(0))
    state = jax.eval_shape(transform.init, params)
    check_state(state)
    try:
        update, _ = jax.eval_shape(transform.update, params, state, params)
    except Exception as error:  # the transform may raise anything
        allowed = "one whose update needs gradients, state and parameters alone"
        reason = f"Reason: {one_line(error)}. {getattr(transform, 'way_out', '')}".rstrip()
        raise SettingError("optimizer", "one whose update fails", allowed, reason) from error
    # optax adds an update of other shapes to the parameters as far as NumPy's rules allow
    if jax.tree.map(jnp.shape, update) != jax.tree.map(jnp.shape, params):
        allowed = "one whose update has the shapes of the parameters"
        raise SettingError("optimizer", "one whose update has others", allowed)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def held(problem: Problem, strategy: Strategy) -> int:
    """Count the numbers that an estimate of one token holds at least, by the strategy's claim."""
    claim, params = strategy.claim, jax.eval_shape(problem.init, jax.random.key(0))
    # a function from outside may raise anything
    drawn = (
        jax.tree.leaves(sign_shapes(claim, 1, 1, params)) if is_shipped(strategy.estimate) else []
    )
    return claim.per_token + (claim.numbers or 0) + sum(a.size for a in drawn)


@kept(256)
def _carried(problem: Problem, strategy: Strategy, size: int) -> int:
    """Count the numbers of a strategy's state for so many sequences."""
    state = jax.eval_shape(lambda key: strategy.init(problem.init(key), size), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(state))


# These functions are at module level, so that runs that differ in numbers alone share the compiled programs.

_keys = jax.jit(jax.vmap(jax.random.key))


@partial(jax.jit, static_argnums=(0, 1))
def _metrics(
    problem: Problem,
    strategy: Strategy,
    batch: Batch,
    init_key: Key[Array, ""],
    draw_key: Key[Array, ""],
) -> dict[str, Array]:
    """Compute the metrics of one estimate, with initial parameters."""
    params = problem.init(init_key)
    state = strategy.init(params, batch.mask.shape[1])
    return strategy.estimate(params, state, batch, draw_key)[0].metrics


@partial(jax.jit, static_argnums=0)
def _batches(
    sample: Callable[..., tuple[Batch, Array]],
    data: Any,
    key: Key[Array, ""],
    updates: Int[Array, "N"],
    level: tuple[Any, ...],
) -> tuple[Batch, Array]:
    return jax.vmap(lambda update: sample(data, key, update, *level))(updates)


@partial(jax.jit, static_argnums=(0, 3))
def _generate(
    problem: Problem,
    params: Params,
    prefix: Int[Array, "P"],
    length: int,
    keys: Key[Array, "S"],
) -> Int[Array, "S N"]:
    """Let the model of each seed continue the prefix."""

    def one(seed: tuple[Params, Key[Array, ""]]) -> Int[Array, "N"]:
        return generate(problem, seed[0], prefix, length, seed[1])

    return jax.lax.map(one, (params, keys))


def _machine(launcher: str) -> dict[str, Any]:
    """Read the hardware and software of the run."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "threads": threads(),
        "launcher": launcher,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "optax": version("optax"),
        "version": bptt_study.__version__,
        "commit": _commit(),
    }


@cache
def _commit() -> str | None:
    """Read the commit of the checkout, with a + if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # a repository may lie around an installed package
        tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, capture_output=True, check=True)
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
