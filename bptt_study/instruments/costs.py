"""The cost of a function: operations and temporary memory."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from bptt_study.instruments.visits import choices, entered, inner, needed, visits
from bptt_study.types import Batch, Params, Strategy
from bptt_study.validation import SettingError, whole

# These functions count one operation per number of the result, as in XLA's own count.
POINTWISE = """
    add add_any sub mul div neg abs sign max min pow integer_pow square sqrt rsqrt exp exp2 expm1
    log log1p tanh logistic sin cos erf erf_inv floor ceil round
    tan asin acos atan atan2 sinh cosh asinh acosh atanh cbrt erfc lgamma digamma rem clamp
    polygamma zeta igamma igammac bessel_i0e bessel_i1e regularized_incomplete_beta
"""
# These count nothing: they move numbers, draw bits, allocate memory, factorise, or solve what is factorised.
FREE = """
    broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice dynamic_update_slice
    gather concatenate stack split pad tile rev select_n sort top_k copy iota real imag
    complex conj convert_element_type bitcast_convert_type reduce_precision stop_gradient
    optimization_barrier device_put sharding_constraint reshard name pvary psum psum_invariant
    random_gamma rng_uniform rng_bit_generator empty empty2 empty_ref
    lu lu_pivots_to_permutation eigh eig svd cholesky cholesky_update qr geqrf householder_product
    triangular_solve tridiagonal tridiagonal_solve schur hessenberg
"""

ADDED = ("scatter-add", "scatter-sub")  # these count one in all
# Their inner program runs for many numbers at once, and has no count here.
MANY_TIMES = ("reduce", "reduce_window", "select_and_scatter")


def arithmetic(fn: Callable[..., Any], *args: Any) -> int:
    """Count the floating-point operations of fn(*args) from its jaxpr, with the lengths of its loops.

    A matrix product [M, N] × [N, K] counts 2MNK. A convolution counts 2 for each product of a number of the
    argument and one of the kernel; zeros beyond the edges and between the numbers count nothing. Pointwise
    functions, transcendental ones too, count one per number of the result; sums and maxima count one per
    number of the argument; a function of a table's numbers, as in `.at[i].multiply`, counts for each that it
    changes. Moving numbers, comparisons, integers, random bits, factorisations and the linear systems that
    these solve count nothing; numbers that are added to a table's, as in the gradient of a lookup, count one
    in all. What no result needs counts nothing, unless a while loop carries it. A condition counts as the
    branch that runs, a while loop counts all its turns, and a batch split over devices counts what all of them
    do. If vmap gives each element its own condition, all branches run. (XLA's own `cost_analysis()` counts a
    loop's body once, whatever its length.)

    Args:
      fn: A function that JAX can trace.
      *args: Its arguments. From them, all that conditions and while loops depend on is computed. Those that no
        choice depends on may be shapes.

    Returns:
      The number of operations.

    Raises:
      SettingError: For a while loop whose turns differ by element under vmap, for arithmetic of complex
        numbers, and for an operation that is none of these, such as a Fourier transform.
    """
    return _count(fn, *args).of(*args)


def arithmetic_of_calls(
    strategy: Strategy, params: Params, batch: Batch, draws: int
) -> Callable[[Params, Batch, Key[Array, ""]], float]:
    """Make the function that counts the operations of an estimate, the mean of `arithmetic` over calls.

    The operations are those of the loss, the gradient and the next state; metrics are left out. Calls follow
    each other, at the same parameters and on the same batch. Each has a key of its own and fresh sequences, and
    what the strategy has learned goes from call to call (`Strategy.renew`). There are `draws` calls, or as many
    more as fill the last period of the claim. If the count cannot depend on values, one call is counted.

    Args:
      strategy: The strategy.
      params: Parameters of the shapes that will be measured.
      batch: A batch of the shapes that will be measured.
      draws: The least number of calls.

    Returns:
      (params, batch, key) -> the mean number of operations.

    Raises:
      SettingError: As `arithmetic`, and for draws or a period below 1.
    """
    whole("draws", draws)
    period = whole("claim.period", strategy.claim.period)
    size, renew = batch.mask.shape[1], strategy.renew
    start = strategy.init(params, size)

    def work(*args: Any) -> Any:
        estimate, state = strategy.estimate(*args)
        return estimate.loss, estimate.grads, state

    count = _count(work, params, start, batch, jax.random.key(0))
    calls = 1 if count.fixed else -(-draws // period) * period

    @jax.jit
    def learn(params: Params, state: Any, batch: Batch, key: Key[Array, ""]) -> Any:
        return renew(params, strategy.estimate(params, state, batch, key)[1]) if renew else state

    def mean(params: Params, batch: Batch, key: Key[Array, ""]) -> float:
        state, total = strategy.init(params, size), 0
        for own in jax.random.split(key, calls):
            total += count.of(params, state, batch, own)
            state = learn(params, state, batch, own) if calls > 1 else state
        return total / calls

    return mean


class _Count(NamedTuple):
    """The operations of a function, for arguments of the shapes that it was traced with."""

    of: Callable[..., int]
    fixed: bool  # whether they are the same for all values


def _count(fn: Callable[..., Any], *args: Any) -> _Count:
    closed = jax.make_jaxpr(fn)(*args)
    jaxpr, used = needed(closed.jaxpr)

    def inputs(args: Any) -> list[Any]:
        return [a for a, u in zip(jax.tree.leaves(args), used, strict=True) if u]

    chosen = list({id(sub): sub for sub in choices(jaxpr)}.values())
    apart = frozenset(map(id, chosen))
    each = [_operations(sub, apart) for sub in chosen]
    once = _operations(jaxpr, apart)
    if not any(each):
        return _Count(lambda *args: once, fixed=True)
    times, depends = visits(jaxpr, closed.consts, inputs(args), chosen)

    def of(*args: Any) -> int:
        return once + sum(n * cost for n, cost in zip(times(inputs(args)), each, strict=True))

    return _Count(of, fixed=not depends)


def temporary_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Read from the compiler's plan how much memory fn(*args) takes beside its arguments and results.

    If fn splits a batch over devices, this is the memory of each device.

    Args:
      fn: A function that JAX can compile. It is not run.
      *args: Its arguments, arrays or their shapes.

    Returns:
      Bytes per device.

    Raises:
      SettingError: For a device whose compiler does not report its memory.
    """
    memory = jax.jit(fn).lower(*args).compile().memory_analysis()
    if memory is None:
        raise SettingError(
            "device", jax.default_backend(), "a device whose compiler reports its memory"
        )
    return int(memory.temp_size_in_bytes)


def _operations(jaxpr: Any, apart: frozenset[int]) -> int:
    """Count the operations of a program without those of the programs `apart`, by their id."""
    return sum(_of_equation(equation, apart) for equation in jaxpr.eqns)


def _of_equation(equation: Any, apart: frozenset[int]) -> int:
    name, params = equation.primitive.name, equation.params
    if name in FREE.split():
        return 0
    inside = apart if entered(equation) else frozenset()
    programs = inner(equation)
    counts = [0 if id(sub) in inside else _operations(sub, inside) for sub in programs]
    if name == "while":
        if any(counts):
            allowed = "free of while loops under vmap"
            raise SettingError("fn", "one", allowed, "Use loops of known length (lax.scan).")
        return 0
    if name.startswith("scatter") and name not in ADDED:
        return sum(counts) * prod(equation.invars[2].aval.shape)
    if programs and name not in MANY_TIMES:
        # all equations of jit, custom rules and the like run, and one branch of a condition
        once = max(counts) if name == "cond" else sum(counts)
        return once * _runs(name, params)
    out = equation.outvars[0].aval if equation.outvars else None
    if out is None or not jnp.issubdtype(out.dtype, jnp.inexact):
        return 0
    result = out.shape
    argument = equation.invars[0].aval.shape if equation.invars else ()
    summed = name.startswith(("reduce_", "cum")) and not name.startswith("reduce_window")
    known = summed or name in ("dot_general", "conv_general_dilated", *POINTWISE.split())
    if not known or jnp.issubdtype(out.dtype, jnp.complexfloating):
        found = f"one with `{name}` of {out.dtype}"
        raise SettingError("fn", found, "free of operations that have no count here")
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        return 2 * prod(result) * prod(argument[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return 2 * _products(params, result, argument, equation.invars[1].aval.shape)
    if summed:
        return prod(argument)
    return prod(result)


def _runs(name: str, params: dict[str, Any]) -> int:
    """Count how often the program in an equation runs, in turns and on devices."""
    if name == "shard_map":
        return prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return params["length"] if name == "scan" else 1


def _products(params: dict[str, Any], result: Any, argument: Any, kernel: Any) -> int:
    """Count the products of a convolution, Σ over outputs and the kernel's numbers that meet a number."""
    of_argument, of_kernel, of_result = params["dimension_numbers"]
    each = prod(result[axis] for axis in of_result[:2]) * kernel[of_kernel[1]]
    for d, (before, _) in enumerate(params["padding"]):
        size, out, taps = (
            shape[spec[2 + d]]
            for shape, spec in ((argument, of_argument), (result, of_result), (kernel, of_kernel))
        )
        at = np.arange(out)[:, None] * params["window_strides"][d] - before
        at = at + np.arange(taps) * params["rhs_dilation"][d]
        apart = params["lhs_dilation"][d]
        each *= int(np.sum((at >= 0) & (at % apart == 0) & (at // apart < size)))
    return each
