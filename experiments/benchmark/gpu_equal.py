"""Are gradients on this device those of the definition, `bs.scan` in float64 on the CPU?

A row is one cell in one precision: `float64`, `float32` with products at `highest` precision, or `default`,
JAX's default float32 on the device. Its columns are the largest errors over all leaves of the gradients and all
seeds, divided by the leaf's largest number. There is one column for each schedule, and one for each strategy,
which is compared with the same strategy on the CPU with the same key. The CPU computes every reference.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import bptt_study as bs
from bptt_study import cells
from bptt_study import strategies as s
from bptt_study.backprop.backpropagate import Memory, Truncation, backpropagate
from bptt_study.validation import SettingError

INPUTS, OUTPUTS, SEEDS = 3, 2, 3
BOUNDS = {"float64": 1e-10, "float32": 1e-4, "default": None}
CELLS: dict[str, Callable[[int], bs.Cell]] = {
    **{name: partial(getattr(cells, name), INPUTS) for name in ("elman", "gru", "lstm")},
    **{name: partial(getattr(cells, name), INPUTS) for name in ("leaky", "lru", "min_gru")},
    "stacked": lambda H: cells.stack([cells.lstm(INPUTS, H), cells.gru(H, H)]),
    "step_only": lambda H: cells.gru(INPUTS, H)._replace(affine=None),
}
LAW = s.constant(4)
STRATEGIES: dict[str, Callable[[bs.Problem], bs.Strategy]] = {
    "full": s.full,
    "checkpointed": partial(s.checkpointed, states=9),
    "chunks": partial(s.fixed, window=5),
    "sliding": partial(s.fixed, window=4, stride=1),
    "randomized": partial(s.randomized, law=LAW),
    "power_law": partial(s.randomized, law=s.power_law(4)),
    "draws": partial(s.randomized, law=LAW, draws=3),
    "discounted": partial(s.discounted, mean_length=4),
    "telescope": partial(s.telescope, law=LAW),
    "adaptive": partial(s.adaptive, delta=0.5, every=1, windows=(2, 4, 8)),
    "dni": partial(s.dni, block=5),
    "bp_lambda": partial(s.bp_lambda, block=5, lam=0.5),
    "rtrl": partial(s.rtrl, block=5),
    "snap": partial(s.snap, block=5),
    "eprop": partial(s.eprop, block=5),
    "rflo": s.rflo,
    "uoro": partial(s.uoro, block=5),
    "kf_rtrl": s.kf_rtrl,
    "reverse_kf": s.reverse_kf,
    "ok": partial(s.ok, rank=2),
    "sketched": partial(s.sketched, rank=2),
    "pp_prop": s.pp_prop,
    "frozen": s.frozen,
    "forward_errors": lambda problem: _early(s.forward_errors(problem), 7),
    "forward_gradient": s.forward_gradient,
    "pes": partial(s.pes, hold=5),
    "nres": s.nres,
    "truncated_es": partial(s.truncated_es, hold=5),
    "full_es": partial(s.full_es, sigma=0.1),
}
# schedule -> (settings of `backpropagate`, memory, settings of the definition); True: the drawn link weights
SCHEDULES: dict[str, tuple[dict[str, Any], Memory, dict[str, Any]]] = {
    "stored": ({}, Memory(segment=7), {}),
    "recomputed": ({}, Memory(states=9), {}),
    "chunks": ({"window": 5}, Memory(segment=10), {"window": 5}),
    "windowed": ({"window": 7, "stride": 3}, Memory(segment=9), {"window": 7, "stride": 3}),
    "sliding": ({"window": 4, "stride": 1}, Memory(segment=8), {"window": 4, "stride": 1}),
    "weighted": ({"link_weights": True}, Memory(segment=7), {"link_weights": True}),
    "per_segment": ({"link_weights": True, "reach": 4}, Memory(segment=1), {"link_weights": True}),
}


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of all cells; tracing and compiling take most of the time, so each has its process."""
    names = ("elman",) if small else tuple(CELLS)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share the GPU's memory
    workers = min(len(names), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
        running = [pool.submit(_of_cell, name, small) for name in names]
        for done in as_completed(running):
            yield from done.result()


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, which may be killed at its time limit."""
    parent = parent_process()
    Thread(target=lambda: parent and (parent.join(), os._exit(1)), daemon=True).start()


def judged(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the number of comparisons, and the largest error in each precision with its place."""
    compared = (
        table.loc[table["precision"] == "float64"].filter(like="_strategy_error").count().sum()
    )
    yield {"what": "pairs of strategy and cell compared", "value": compared}
    for precision, bound in BOUNDS.items():
        own = table[table["precision"] == precision].set_index("cell").filter(like="_error")
        if own.empty:
            continue
        cell, column = own.T.unstack().idxmax()
        value = own.loc[cell, column]
        what = f"largest error in {precision}: {cell}, {column.removesuffix('_error')}"
        holds = None if bound is None else value <= bound
        yield {"what": what, "value": value, "bound": bound, "holds": holds}


def _of_cell(name: str, small: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(sorted(CELLS).index(name))
    steps, size, hidden = (int(rng.integers(*ends)) for ends in ((33, 48), (2, 6), (4, 17)))
    cell = CELLS[name](hidden)
    problem = bs.Problem(cell, bs.readouts.linear(hidden, OUTPUTS), bs.losses.squared_error)
    chosen = dict(list(STRATEGIES.items())[: 2 if small else None])
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.enable_x64(True):
        with jax.default_device(cpu):
            given = [_example(problem, steps, size, seed) for seed in range(1 if small else SEEDS)]
            defined = _each(jax.jit(partial(_definition, problem)), given, cpu)
            drawn = _each(jax.jit(partial(_strategies, problem, chosen=chosen)), given, cpu)
        found = {"cell": name, "hidden": hidden, "batch_size": size, "steps": steps}
        rows = []
        for precision in BOUNDS:
            if small and precision == "default":
                continue
            row = found | {"precision": precision, "device": device.device_kind}
            rows.append(row | _errors(problem, chosen, given, (defined, drawn), precision, device))
    return rows


def _errors(
    problem: bs.Problem, chosen: Any, given: Any, expected: Any, precision: str, device: Any
) -> dict[str, float]:
    """Compute the errors of all schedules and strategies in one precision."""
    products = "default" if precision == "default" else "highest"
    wide = precision == "float64"
    given = given if wide else [jax.tree.map(_narrow, one) for one in given]
    errors: dict[str, float] = {}
    with jax.enable_x64(wide), jax.default_matmul_precision(products), jax.default_device(device):
        for run, reference in zip(
            (_schedules, partial(_strategies, chosen=chosen)), expected, strict=True
        ):
            if run is not _schedules and not wide:
                continue  # in float32 a strategy draws other numbers
            found = _each(jax.jit(partial(run, problem)), given, device)
            for one, other in zip(found, reference, strict=True):
                for name in one:
                    column = f"{name}{'_strategy' * (run is not _schedules)}_error"
                    errors[column] = max(errors.get(column, 0), _apart(one[name], other[name]))
    return errors


def _each(program: Any, given: list[Any], device: Any) -> list[Any]:
    return [jax.device_get(program(*jax.device_put(one, device))) for one in given]


def _narrow(a: Any) -> Any:
    return np.asarray(a, np.float32) if a.dtype == np.float64 else a


def _early(strategy: bs.Strategy, steps: int) -> bs.Strategy:
    """Let a strategy see the first steps of a batch alone: in more, rounding errors of its inverse J grow."""

    def estimate(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return strategy.estimate(params, state, jax.tree.map(lambda a: a[:steps], batch), key)

    return strategy._replace(estimate=estimate)


def _apart(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    errors = [np.abs(a - e).max() / (np.abs(e).max() or 1) for a, e in pairs]
    return float(np.nan_to_num(errors, nan=np.inf).max())


def _example(problem: bs.Problem, steps: int, size: int, seed: int) -> Any:
    """Make parameters, h_0, batch, link weights that cut every fourth link or more often, and key data."""
    rng = np.random.default_rng(seed)
    params = problem.init(jax.random.key(seed))
    state = jax.tree.map(lambda h: rng.standard_normal(h.shape) * 0.3, problem.cell.zeros(size))
    inputs, targets = (rng.standard_normal((steps, size, n)) for n in (INPUTS, OUTPUTS))
    batch = bs.Batch(inputs, targets, (rng.random((steps, size)) < 0.8).astype(float))
    weights = rng.uniform(0.5, 1.5, (steps, size)) * (rng.random((steps, size)) < 0.8)
    weights[::3] = 0
    return jax.tree.map(np.asarray, (params, state, batch, weights, np.uint32([0, seed])))


def _schedules(problem: Any, params: Any, state: Any, batch: Any, weights: Any, key: Any) -> Any:
    """Compute loss and gradient by every schedule."""

    def by(asked: dict[str, Any], memory: Memory) -> Any:
        asked = asked | ({"link_weights": weights} if "link_weights" in asked else {})
        estimate, last = backpropagate(problem, params, state, batch, Truncation(**asked), memory)
        return estimate.loss, estimate.grads, last

    return {name: by(asked, memory) for name, (asked, memory, _) in SCHEDULES.items()}


def _definition(problem: Any, params: Any, state: Any, batch: Any, weights: Any, key: Any) -> Any:
    """Compute the same losses and gradients by `bs.scan`."""

    def loss(params: Any, settings: Any) -> Any:
        def f(h: Any, x: Any) -> Any:
            h = problem.cell.step(params["cell"], h, x)
            return h, problem.readout.apply(params["readout"], problem.cell.read(h))

        last, outputs = bs.scan(f, jax.lax.stop_gradient(state), batch.inputs, **settings)
        tokens = problem.loss(outputs, batch.targets) * batch.mask
        return jnp.sum(tokens) / jnp.sum(batch.mask), last

    def by(settings: dict[str, Any]) -> Any:
        settings = settings | ({"link_weights": weights} if "link_weights" in settings else {})
        (value, last), grads = jax.value_and_grad(loss, has_aux=True)(params, settings)
        return value, grads, last

    return {name: by(settings) for name, (_, _, settings) in SCHEDULES.items()}


def _strategies(
    problem: Any, params: Any, state: Any, batch: Any, weights: Any, key: Any, chosen: Any
) -> Any:
    """Compute loss and gradient by every strategy, from its zero state."""
    found = {}
    for name, make in chosen.items():
        drawn = jax.random.wrap_key_data(key)
        try:
            strategy = make(problem)
            start = strategy.init(params, batch.mask.shape[1])
            estimate, _ = strategy.estimate(params, start, batch, drawn)
        except SettingError:  # not defined for this cell
            continue
        found[name] = estimate.loss, estimate.grads
    return found
