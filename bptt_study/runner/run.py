"""One job: a checked configuration in, all its seeds trained, and its tables and texts out."""

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
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
from bptt_study.optimizers import Optimizer
from bptt_study.probes import Probe, Scene
from bptt_study.report import columns, csv_tables
from bptt_study.report.columns import NORM_KEYS
from bptt_study.runner import array_files, run_folder
from bptt_study.runner.run_checkpoint import Halfway
from bptt_study.runner.run_folder import Place
from bptt_study.training.train import (
    Budget,
    Progress,
    devices_for,
    make_sampler,
    make_train,
    run_keys,
)
from bptt_study.types import Batch, Params, Problem, Strategy, Task
from bptt_study.validation import SettingError, whole

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10  # where there is no terminal for a progress bar


@dataclass(frozen=True)
class Job:
    """Everything a run needs, built and checked; nothing here is written back to."""

    study: str
    identity: str
    title: str  # for the progress bar
    settings: dict[str, Any]  # columns that are the same in all rows
    config_yaml: Callable[[], str]  # called once, when the run is left
    seeds: int
    first_seed: int
    snapshots: int  # times that the probes look: 0 never, 1 at the start, 2 at start and end, …
    sample_length: int  # characters
    problem: Problem
    strategy: Strategy
    optimizer: Optimizer
    budget: Budget
    task: Task
    probes: dict[str, Probe]

    def __post_init__(self) -> None:
        whole("seeds", self.seeds)
        whole("first_seed", self.first_seed, least=0)
        if self.first_seed + self.seeds > 2**31:
            raise SettingError("first_seed", self.first_seed, "such that every seed is below 2**31")
        if not re.fullmatch(r"\w[\w.-]*", str(self.study)) or self.study == "runs":
            raise SettingError(
                "study",
                self.study,
                "a name of letters, digits, underscores, hyphens and dots, other than runs",
            )
        whole("snapshots", self.snapshots, least=0)
        whole("sample_length", self.sample_length, least=0)
        make_sampler(self.task, self.budget)  # does the data fit the budget?
        devices_for(self.seeds, self.budget.split)  # are there so many?
        for name, probe in self.probes.items() if self.snapshots else ():
            if missing := sorted(probe.metrics - self.metrics):
                way_out = (
                    f"The strategy does not report {', '.join(missing)}; snapshots=0 takes none."
                )
                raise SettingError("probe", name, "a probe that fits the strategy", way_out)
            probe.check(self.task)

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Names of what the strategy's estimate reports beside loss and gradient."""
        batch = jax.tree.map(lambda a: a[: self.budget.steps], self.task.validation)
        key = jax.random.key(0)
        report = partial(_metrics, self.problem, self.strategy)
        return frozenset(jax.eval_shape(report, batch, key, key))

    @cached_property
    def batches(self) -> Callable[[Key[Array, ""], int], Batch]:
        """(a seed's data key, N) -> N of its training batches, spread over the run: leaves [N, T, B, …]."""
        sampler = make_sampler(self.task, self.budget)

        def sample(key: Key[Array, ""], count: int) -> Batch:
            updates = np.arange(count, dtype=np.int32) * max(1, self.budget.updates // count)
            return _batches(sampler.sample, sampler.data, key, updates)

        return sample

    @property
    def corpus(self) -> str | None:
        """Checksum of the corpus, which its settings may name without telling its content."""
        return self.settings.get("corpus_sha256")

    @property
    def rows(self) -> int:
        """Rows that the finished run has."""
        return self.seeds * len(self.budget.log_points)


def perform(
    job: Job,
    place: Place,
    launcher: str = "basic",
    checkpoint_seconds: float | None = None,
    bar: bool = True,
) -> pd.DataFrame:
    """Train all seeds and leave the run's folder; returns its rows.

    Every `checkpoint_seconds`, and when Ctrl-C is pressed, what is needed to go on is written. A run that
    finds it goes on from there, with the same result bit for bit. bar: whether to show progress on a terminal.
    """
    seeds = np.arange(job.first_seed, job.first_seed + job.seeds)
    keys = _keys(seeds)
    train = make_train(job.problem, job.strategy, job.optimizer, job.budget, job.task)

    seen: dict[str, list[pd.DataFrame]] = {name: [] for name in job.probes}
    points = job.budget.log_points
    wanted = {points[i] for i in np.linspace(0, len(points) - 1, job.snapshots).round().astype(int)}

    about = {
        "run": job.identity,
        "version": bptt_study.__version__,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "corpus_sha256": job.corpus,
    }
    said = time.monotonic()
    total = job.budget.updates * job.budget.steps * job.budget.batch_size * job.seeds
    with tqdm(
        total=total,
        desc=job.title,
        unit="token",
        unit_scale=True,
        disable=not (bar and sys.stderr.isatty()),
        leave=False,
    ) as shown:

        def watch(record: dict[str, np.ndarray], progress: Progress) -> None:
            update = int(record["update"][0])
            shown.update(total * update // job.budget.updates - shown.n)
            shown.set_postfix(validation=f"{np.median(record['validation_loss']):.3f}")
            nonlocal said
            if shown.disable and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                log.info(
                    "%s  update %d/%d  validation %.4f nats  %.1f s/seed",
                    job.title,
                    update,
                    job.budget.updates,
                    np.median(record["validation_loss"]),
                    record["seconds"][0],
                )
            if update in wanted:
                for seed, scene in zip(seeds, scenes(job, progress), strict=True):
                    for name, probe in job.probes.items():
                        seen[name].append(probe.look(scene).assign(seed=seed, update=update))

        halfway = Halfway(place.checkpoint, about, checkpoint_seconds, seen)
        try:
            trained = train(keys, watch, halfway.pause, halfway.restore)
        except KeyboardInterrupt:
            halfway.save()
            raise

    constants = job.settings | {"compile_seconds": trained.compile_seconds, **_machine(launcher)}
    constants |= {"devices": job.budget.split * devices_for(job.seeds, job.budget.split)}
    rows, costs = columns.split(_rows(job, trained.records, seeds, constants))
    tables = {"rows.csv": rows, "costs.csv": costs}
    keys_of_row = {name: constants.get(name) for name in NORM_KEYS}
    for name, found in seen.items():
        if found:
            table = pd.concat(found, ignore_index=True).assign(**keys_of_row)
            first = ["seed", "update"]
            tables[f"{name}.csv.gz"] = table[first + [c for c in table if c not in first]]
    diverged = int(trained.records[-1]["diverged"].sum())
    said_of_run = {
        "run": job.identity,
        "rows": len(rows),
        "diverged": diverged,
        "corpus_sha256": job.corpus,
    }
    texts = {
        "config.yaml": job.config_yaml(),
        "machine.json": json.dumps(_machine(launcher), indent=1),
        run_folder.ABOUT: json.dumps(said_of_run, indent=1),
    }
    if job.task.text is not None:
        if "cuts" in job.metrics:
            tables["cuts.csv"] = _cuts(job).assign(**keys_of_row)
        texts["sample.txt"] = _samples(job, trained.progress)
    contents = {name: csv_tables.packed(table, name) for name, table in tables.items()}
    contents |= {name: text.encode() for name, text in texts.items()}
    contents["params.npz"] = array_files.dump(trained.progress.params, about)
    files.sweep_up(place.folder)
    files.write_folder(place.folder, contents)
    place.checkpoint.unlink(missing_ok=True)
    return rows


def _rows(
    job: Job, history: list[dict[str, np.ndarray]], seeds: np.ndarray, constants: dict[str, Any]
) -> pd.DataFrame:
    """One row per seed and log point, seed by seed."""
    measured = {name: np.stack([r[name] for r in history], axis=1).ravel() for name in history[0]}
    loss = measured["validation_loss"].astype(float)
    with np.errstate(over="ignore"):  # a diverged seed's perplexity is infinite
        perplexity = np.exp(loss)
    measured |= {
        "seed": np.repeat(seeds, len(history)),
        "tokens": measured["update"] * job.budget.steps * job.budget.batch_size,
        "perplexity": perplexity,
    }
    if job.task.text is not None:
        measured["bits_per_character"] = loss / np.log(2)
    return columns.frame(constants, measured)


def scenes(job: Job, progress: Progress) -> Iterator[Scene]:
    """What the probes see of each seed.

    Every seed and update has draws of its own, so that intervals over seeds cover them too.
    """
    size = min(job.budget.batch_size, job.task.validation.mask.shape[1])
    batch = Batch(*(a[: job.budget.steps, :size] for a in job.task.validation))
    keys = jax.vmap(jax.random.fold_in)(progress.draw_key, progress.update)
    params = jax.device_get(progress.params)
    for seed, key in enumerate(keys):
        own = jax.tree.map(lambda a, seed=seed: jnp.asarray(a[seed]), params)
        batches = partial(job.batches, progress.data_key[seed])
        yield Scene(job.problem, job.strategy, job.task, own, batch, key, batches)


def _cuts(job: Job) -> pd.DataFrame:
    """The text's first characters, and before which of them the first seed's first update cuts."""
    text = job.task.text
    assert text is not None
    opening = text.opening[: job.budget.steps]
    # as many steps and sequences as in training, for the draw to be the same
    ids = np.zeros((job.budget.steps, job.budget.batch_size), np.int32)
    ids[: len(opening)] = [[text.alphabet.index(c)] for c in opening]

    batch = Batch(jnp.asarray(ids), jnp.asarray(ids), jnp.ones(ids.shape))
    init_key, _, draw_key = run_keys(jax.random.key(job.first_seed))
    draw = jax.random.fold_in(draw_key, 0)
    metrics = _metrics(job.problem, job.strategy, batch, init_key, draw)

    return pd.DataFrame(
        {
            "position": np.arange(len(opening)),
            "character": list(opening),
            "cut": np.asarray(metrics["cuts"])[: len(opening), 0],
        }
    )


def _samples(job: Job, progress: Progress) -> str:
    """For each seed the prefix and what its model writes after it."""
    text = job.task.text
    assert text is not None
    prefix = np.array([text.alphabet.index(c) for c in text.prefix], np.int32)

    written = _generate(
        job.problem, progress.params, jnp.asarray(prefix), job.sample_length, progress.draw_key
    )
    lines = (
        f"seed {seed}: {text.prefix}{''.join(text.alphabet[s] for s in symbols)}\n"
        for seed, symbols in enumerate(np.asarray(written), start=job.first_seed)
    )
    return "".join(lines)


# At module level, for jobs that differ in numbers only to share what is compiled

_keys = jax.jit(jax.vmap(jax.random.key))


@partial(jax.jit, static_argnums=(0, 1))
def _metrics(
    problem: Problem,
    strategy: Strategy,
    batch: Batch,
    init_key: Key[Array, ""],
    draw_key: Key[Array, ""],
) -> dict[str, Array]:
    """Of an estimate with fresh parameters."""
    params = problem.init(init_key)
    state = strategy.init(params, batch.mask.shape[1])
    return strategy.estimate(params, state, batch, draw_key)[0].metrics


@partial(jax.jit, static_argnums=0)
def _batches(
    sample: Callable[..., tuple[Batch, Array]],
    data: Any,
    key: Key[Array, ""],
    updates: Int[Array, "N"],
) -> Batch:
    return jax.vmap(lambda update: sample(data, key, update)[0])(updates)


@partial(jax.jit, static_argnums=(0, 3))
def _generate(
    problem: Problem,
    params: Params,
    prefix: Int[Array, "P"],
    length: int,
    keys: Key[Array, "S"],
) -> Int[Array, "S N"]:
    """What every seed's model writes."""

    def one(seed: tuple[Params, Key[Array, ""]]) -> Int[Array, "N"]:
        return generate(problem, seed[0], prefix, length, seed[1])

    return jax.lax.map(one, (params, keys))


def _machine(launcher: str) -> dict[str, Any]:
    """Where and with what it ran."""
    return {
        "device": jax.devices()[0].device_kind,
        "launcher": launcher,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "version": bptt_study.__version__,
        "commit": _commit(),
    }


@cache
def _commit() -> str | None:
    """The checkout's commit, with + if files differ from it; None where there is no checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
