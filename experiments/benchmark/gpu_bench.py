"""How fast is one loss and gradient on this device, beside textbook JAX and PyTorch's own kernels?

A row is a contender at a place: `seconds` (median of `n` separate runs), compile_seconds, temporary_bytes by
the compiler's plan, tokens_per_second of all seeds together, and `seeds`, the number of seeds side by side by
`vmap`. Rows of others also have `rival`, and `ratio`, their seconds ÷ those of bptt_study at the same place.
`full_associative` is the LRU whose states come from `lax.associative_scan` instead of a scan.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import others
import pandas as pd
from ours import split_estimate
from point import Contender, Point, compiled, setting

from bptt_study import strategies
from bptt_study.backprop.forward import mean_loss, project

WINDOW = 32
MAKE: dict[str, Callable[[Any], Any]] = {
    "full": strategies.full,
    "chunks": partial(strategies.fixed, window=WINDOW),
    "sliding": partial(strategies.fixed, window=WINDOW, stride=1),
    "random": partial(strategies.randomized, law=strategies.constant(WINDOW / 4)),
    "checkpointed": strategies.checkpointed,
}
SEEDS = (1, 8, 32)


def places(small: bool) -> Iterator[tuple[Point, tuple[str, ...], tuple[int, ...]]]:
    """Yield (point, our strategies, seeds side by side), the most telling first: a limit may stop the part."""
    if small:
        yield Point("elman", 8, 4, 32), ("full", "chunks"), (2,)
        yield Point("lru", 8, 4, 32), ("full", "full_associative"), ()
        return
    for hidden in (256, 1024, 64):
        for cell in ("lstm", "gru", "elman"):
            yield Point(cell, hidden, 128, 512), ("full", "chunks"), ()
    yield Point("lru", 256, 128, 512), ("full", "full_associative"), ()
    yield Point("lstm", 256, 32, 512), tuple(MAKE), ()
    yield Point("elman", 64, 32, 512), ("full",), SEEDS
    for cell in ("lstm", "lru"):
        also = ("full_associative",) * (cell == "lru")
        yield Point(cell, 256, 32, 4096), ("full", "chunks", *also), ()
    yield Point("gru", 512, 32, 512), ("full", "chunks"), ()
    yield Point("stacked", 256, 128, 512), ("full", "chunks"), ()


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Yield our rows at each place, then the others' rows beside them."""
    for point, names, seeds in places(small):
        own = {}
        for name in names:
            own[name] = _row(point, name, _ours(point, name))
            yield own[name]
        for count in seeds:
            yield _row(point, "full", _side_by_side(point, count), seeds=count)
        if point.cell == "lru":
            continue
        for ours, window in (("full", None), ("chunks", WINDOW)):
            if ours not in own or (window and point.steps % window):
                continue
            for rival, contender in _rivals(point._replace(window=window)):
                row = _row(point, rival, contender)
                ratio = row["seconds"] / own[ours]["seconds"]
                yield row | {"beside": ours, "rival": rival, "ratio": ratio}


def judged(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the median ratio to each rival, without a bound."""
    if "ratio" in table:
        for (rival, ours), rows in table.groupby(["rival", "beside"]):
            what = f"seconds of {rival} ÷ {ours}, median of {len(rows)} places"
            yield {"what": what, "value": rows["ratio"].median()}
    seeds = table[table["seeds"] > 1] if "seeds" in table else table[:0]
    for _, row in seeds.iterrows():
        what = f"tokens per second, {row['seeds']:g} seeds side by side"
        yield {"what": what, "value": row["tokens_per_second"]}


def _row(point: Point, name: str, make: Callable[[], Contender], seeds: int = 1) -> dict[str, Any]:
    """Compile, warm up and time one contender; if it fails, `error` says why, and it has no seconds."""
    row: dict[str, Any] = point._asdict() | {"contender": name, "seeds": seeds}
    row["device"] = jax.devices()[0].device_kind
    try:
        once, about = make()
        once()
        runs, end = [], time.perf_counter() + 0.3
        while len(runs) < 3 or (time.perf_counter() < end and len(runs) < 50):
            begun = time.perf_counter()
            once()
            runs.append(time.perf_counter() - begun)
    except Exception as error:  # too little memory or a missing kernel is a row, too
        return row | {"seconds": float("nan"), "error": str(error).partition("\n")[0][:120]}
    seconds = statistics.median(runs)
    tokens = seeds * point.steps * point.batch_size
    row |= {"seconds": seconds, "n": len(runs), "tokens_per_second": tokens / seconds}
    return row | {k: about[k] for k in ("compile_seconds", "temporary_bytes") if k in about}


def _ours(point: Point, name: str) -> Callable[[], Contender]:
    if name == "full_associative":
        return partial(associative, point)

    def make() -> Contender:
        problem, *arguments = setting(point)
        return split_estimate(MAKE[name](problem), 1, *arguments)

    return make


def _side_by_side(point: Point, seeds: int) -> Callable[[], Contender]:
    """Make the full gradient of several seeds' parameters in one program."""

    def make() -> Contender:
        problem, _, state, batch = setting(point)
        params = jax.vmap(problem.init)(jax.random.split(jax.random.key(0), seeds))

        def estimate(params: Any) -> Any:
            found, last = strategies.full(problem).estimate(params, state, batch, jax.random.key(1))
            return found.loss, found.grads, last

        return compiled(jax.vmap(estimate), params)

    return make


def _rivals(point: Point) -> Iterator[tuple[str, Callable[[], Contender]]]:
    yield "textbook", partial(others.textbook_indexed, point)
    if find_spec("torch"):
        device = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
        yield "torch", partial(others.torch, point, device)


def associative(point: Point) -> Contender:
    """Make the LRU's full gradient, with `lax.associative_scan` for h_t = λ h_{t-1} + b_t, h_0 = 0."""
    problem, params, state, batch = setting(point)
    affine = problem.cell.affine

    def loss(params: Any) -> Any:
        theta = params["cell"]
        b_re, b_im = project(affine, theta, batch.inputs)
        one = jnp.ones_like(state[0][:1]), jnp.zeros_like(state[0][:1])
        l_re, l_im = affine.recur(theta, one)  # λ · 1
        steps = jnp.broadcast_to(l_re, b_re.shape), jnp.broadcast_to(l_im, b_re.shape)
        _, after = jax.lax.associative_scan(_compose, (steps, (b_re, b_im)))
        tokens = jnp.sum(batch.mask)
        return mean_loss(problem, params["readout"], after, batch, tokens)

    return compiled(jax.value_and_grad(loss), params)


def _compose(first: Any, then: Any) -> Any:
    """Compose two maps: h -> λ' (λ h + b) + b', as (λ' λ, λ' b + b')."""
    (a, b), (c, d) = first, then
    scaled = _times(c, b)
    return _times(c, a), (scaled[0] + d[0], scaled[1] + d[1])


def _times(x: Any, y: Any) -> Any:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]
