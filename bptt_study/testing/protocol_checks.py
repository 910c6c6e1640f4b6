"""Checks of the properties that every strategy must have, whatever it claims about its gradient.

Each check takes a `Subject`, and raises CheckError if the property does not hold. The first line of its
docstring is what `check_strategy` prints.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bptt_study as bs
from bptt_study.backprop.forward import per_token
from bptt_study.testing.errors import close, require, vector
from bptt_study.testing.examples import (
    SHORT,
    narrow,
    problem_of,
    reference_norms,
)
from bptt_study.testing.guarded import guarded
from bptt_study.testing.loops import looped_loss
from bptt_study.testing.subject import Subject
from bptt_study.types import Batch

LONG = 2**14  # steps at which memory is measured: with so many, memory held for each token shows
SIZE = 32  # sequences
UNITS = 32  # hidden units: their states outweigh what a claim's `per_token` allows
# Bytes per step of loops that number their steps. One float64 of each sequence takes four times as many.
STEP_BYTES = 64
# The factor by which the states held at once grow with n times as many steps, by `Claim.memory`
GROWTH: dict[str, Callable[[float], float]] = {
    "T": lambda n: n,
    "√T": np.sqrt,
    "window": lambda n: 1,
    "segment": lambda n: 1,
    "m": lambda n: 1,
    "1": lambda n: 1,
}


def check_shapes(subject: Subject) -> None:
    """Gradients look like the parameters and are finite; the loss is a scalar."""
    (loss, grads, _), _ = subject.first
    params = subject.example.params
    same = str(jax.tree.structure(grads)) == str(jax.tree.structure(params))
    require(same, f"the gradient is {jax.tree.structure(grads)}, not {jax.tree.structure(params)}")
    require(_shapes(grads) == _shapes(params), f"the gradient is {_shapes(grads)[0]}")
    found = f"{loss.dtype}{list(loss.shape)}"
    require(found == "float64[]", f"the loss is {found}, not float64[]")
    largest = np.abs(vector(grads)).max()
    require(np.isfinite(largest), "the gradient is not finite")
    require(largest > 1e-6, f"no gradient at all: its largest number is {largest:.2g}")


def check_metrics(subject: Subject) -> None:
    """`adjoint_norms` [T, B] are norms, exact ones if the claim is; `cuts` are flags, never before step 1."""
    metrics, shape = subject.first[0].metrics, subject.example.batch.mask.shape
    require(isinstance(metrics, dict), f"metrics are a {type(metrics).__name__}, not a dict")
    for name, metric in metrics.items():
        require(isinstance(metric, jax.Array), f"{name} is a {type(metric).__name__}, not an array")
    if (norms := metrics.get("adjoint_norms")) is not None:
        require(norms.shape == shape, f"adjoint_norms have the shape {norms.shape}, not {shape}")
        numbers = np.asarray(norms)
        bad = int(np.sum(~np.isfinite(numbers) | ~(numbers >= 0)))
        require(bad == 0, f"{bad} of {norms.size} adjoint_norms are not finite or below 0")
        if subject.claim.exact and subject.claim.reach == "call":
            expected = reference_norms(subject.cell, **subject.size)
            off = np.abs(numbers - expected).max() / expected.max()
            require(off <= 1e-9, f"adjoint_norms are off by {off:.3g} of the largest; allowed 1e-9")
    if (cuts := metrics.get("cuts")) is not None:
        require(cuts.shape == shape, f"cuts have the shape {cuts.shape}, not {shape}")
        require(cuts.dtype == bool, f"cuts have the dtype {cuts.dtype}, not bool")
        require(not np.asarray(cuts)[0].any(), "cuts before the first step: there is no link")
        marked = int(np.asarray(cuts).sum())
        require(not (subject.claim.exact and marked), f"exact, with {marked} links cut")


def check_state_closed(subject: Subject) -> None:
    """The state that comes out can go in again, from the first call on."""
    estimate, params = subject.strategy.estimate, subject.example.params
    state = subject.zero
    shapes = _shapes(state)
    for batch in (subject.example.earlier, subject.example.batch):
        _, state = jax.eval_shape(estimate, params, state, batch, subject.keys[0])
        require(_shapes(state) == shapes, f"the state is {_shapes(state)} after {shapes}")
    if subject.strategy.renew is not None:
        renewed = _shapes(jax.eval_shape(subject.strategy.renew, params, state))
        require(renewed == shapes, f"renew makes {renewed} of {shapes}")
        ex, fresh = subject.example, subject.strategy.renew(params, subject.start)
        loss = subject.again(fresh, ex.batch)[0].loss
        zeros = ex.problem.cell.zeros(subject.sequences)
        off = abs(loss / looped_loss(ex.problem, params, zeros, ex.batch)[0] - 1)
        require(
            off <= 1e-12, f"after renew the loss is off by {off:.3g} of that of fresh sequences"
        )


def check_traced_once(subject: Subject) -> None:
    """Calls with new numbers, the returned state among them, run the same program."""
    count, params = [], subject.example.params

    @jax.jit
    def counted(params: Any, state: Any, batch: Batch, key: Any) -> Any:
        count.append(1)
        return subject.strategy.estimate(params, state, batch, key)

    # .trace goes through jit's cache of traces like a call, and compiles nothing
    counted.trace(params, subject.zero, subject.example.earlier, subject.keys[0])
    _, state = counted.trace(params, subject.start, subject.example.batch, subject.keys[1]).out_info
    counted.trace(params, state, subject.example.batch, subject.keys[2])
    require(len(count) == 1, f"traced {len(count)} times in 3 calls; allowed 1")


def check_jit(subject: Subject) -> None:
    """The compiled estimate is the one without jit."""
    arguments = subject.example.params, subject.start, subject.example.batch, subject.keys[0]
    close(subject.strategy.estimate(*arguments), subject.first, name="without jit")


def check_loss(subject: Subject) -> None:
    """The loss is the plain forward loss from the carried state, for every key, whatever masked targets are.

    Without a token that counts, the loss and the gradient are 0, and the next loss is what it would be.
    """
    off = np.abs(np.asarray(subject.draws[0].loss) / subject.reference[0] - 1).max()
    require(off <= 1e-12, f"the loss is off by {off:.3g} of itself; allowed 1e-12")
    batch = subject.example.batch
    nothing = jnp.nan if jnp.issubdtype(batch.targets.dtype, jnp.inexact) else -1
    targets = jnp.where(per_token(batch.mask == 0, batch.targets), nothing, batch.targets)
    found = subject.again(subject.start, batch._replace(targets=targets))
    plain, after = subject.again(subject.start, batch)
    close(found[0], plain, name="with others where the mask is 0")
    empty, masked = subject.again(subject.start, batch._replace(mask=jnp.zeros_like(batch.mask)))
    first, second = (subject.again(state, batch)[0].loss for state in (masked, after))
    close(first, second, name="the loss after a call with an empty mask")
    require(empty.loss == 0, f"the loss of an empty mask is {empty.loss}, not 0")
    largest = np.abs(vector(empty.grads)).max()
    require(largest == 0, f"the gradient of an empty mask is {largest:.3g}, not 0")


def check_float32(subject: Subject) -> None:
    """Without x64, every float64 of the result becomes float32."""
    kinds = SHORT | {np.dtype("int64"): np.int32}
    params, batch, size = subject.example.params, subject.example.batch, subject.sequences
    wide = jax.eval_shape(subject.strategy.estimate, params, subject.zero, batch, subject.keys[0])
    with jax.enable_x64(False):
        arguments = narrow((params, subject.zero, batch), kinds)
        actual = jax.eval_shape(subject.strategy.estimate, *arguments, subject.keys[0])
        zero = jax.eval_shape(lambda p: subject.strategy.init(p, size), arguments[0])
    expected = _shapes(narrow(wide, kinds))
    require(_shapes(actual) == expected, f"{_shapes(actual)[0]}, not {expected[0]}")
    require(_shapes(zero) == _shapes(arguments[1]), f"init makes {_shapes(zero)[0]}")


def check_memory(subject: Subject) -> None:
    """With four times the steps, temporary memory grows no more than the claim says."""
    claim = subject.claim
    known = ", ".join(GROWTH)
    require(claim.memory in GROWTH, f"claim.memory must be one of {known}; got {claim.memory}")
    few, many = (held(subject, steps) for steps in (LONG, 4 * LONG))
    allowed = 1.1 * (1 if claim.online else GROWTH[claim.memory](4))
    numbers = (STEP_BYTES + 8 * claim.per_token * SIZE) * 3 * LONG
    ratio = (many - numbers) / max(1, few)
    require(
        ratio <= allowed,
        f"more memory than claimed: {ratio:.3g} times as much for 4 times the steps; "
        f"allowed {allowed:.3g}",
    )


def held(subject: Subject, steps: int) -> int:
    """Read the temporary memory of an estimate from the compiler's plan, without metrics, as in training.

    Args:
      subject: The strategy and its example.
      steps: T.

    Returns:
      Bytes.
    """
    problem = problem_of(subject.cell, hidden=UNITS)
    strategy, key = subject.make_strategy(problem), subject.keys[0]
    params = jax.eval_shape(problem.init, key)
    start = jax.eval_shape(lambda p: strategy.init(p, SIZE), params)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((steps, SIZE, *a.shape[2:]), a.dtype), subject.example.batch
    )

    def trained(*arguments: Any) -> Any:
        estimate, state = strategy.estimate(*arguments)
        return estimate.loss, estimate.grads, state

    return bs.measure.temporary_bytes(trained, params, start, batch, key)


def check_numbers(subject: Subject) -> None:
    """Beside the hidden state, the state of one sequence holds as many floats as the claim says."""

    def floats(make: Callable[[], Any]) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(make))
        return sum(a.size for a in leaves if jnp.issubdtype(a.dtype, jnp.inexact))

    params, claimed = subject.example.params, subject.claim.numbers or 0
    found = floats(lambda: subject.strategy.init(params, 1))
    found -= floats(lambda: subject.example.problem.cell.zeros(1))
    require(found == claimed, f"{found} numbers per sequence are kept; claimed {claimed}")


def check_passes(subject: Subject) -> None:
    """The cell is differentiated as the claim says: by jvp alone, or not at all."""
    ex = subject.example
    problem = ex.problem._replace(cell=guarded(ex.problem.cell, subject.claim.passes))
    strategy = subject.make_strategy(problem)
    arguments = ex.params, strategy.init(ex.params, subject.sequences), ex.batch, subject.keys[0]
    jax.eval_shape(strategy.estimate, *arguments)


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [(a.shape, a.dtype) for a in leaves], structure
