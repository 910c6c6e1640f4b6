"""How often a program runs what it chooses: the branches of its conditions, the turns of its while loops."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, DropVar, Literal, jaxpr_as_fun
from jax.extend.core.primitives import closed_call_p
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

# Their inner program runs once, where it stands; any other one is opaque, and so are its choices.
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"}
CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vmap_call"}
Count = Int[Array, "P"]  # the visits of each place


def needed(jaxpr: Any, all_inputs: bool = False) -> tuple[Any, list[bool]]:
    """Leave out of a program, at every depth, what no result needs and what never runs.

    A pullback also returns the value that it differentiates; the compiler drops what nobody reads.

    Args:
      jaxpr: A program.
      all_inputs: Keep inputs that no result needs, too.

    Returns:
      The program, and True for each input that it keeps.
    """
    jaxpr = jaxpr.replace(eqns=[_simplified(equation) for equation in jaxpr.eqns])
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), all_inputs)


def inner(equation: Any) -> list[Any]:
    """List the programs inside an equation."""
    leaves = jax.tree.leaves(equation.params, is_leaf=_program)
    return [getattr(sub, "jaxpr", sub) for sub in leaves if _program(sub)]


def choices(jaxpr: Any) -> Iterator[Any]:
    """Yield the programs that run as often as values decide, wherever `visits` can follow them.

    These are the branches of conditions, and the two parts of while loops.
    """
    for equation in filter(entered, jaxpr.eqns):
        for sub in inner(equation):
            yield from [sub] * (equation.primitive.name in ("cond", "while"))
            yield from choices(sub)


def entered(equation: Any) -> bool:
    """Return True if `choices` looks inside. A while loop under vmap turns for the slowest, and is closed."""
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return not params["cond_jaxpr"].out_avals[0].shape
    return name in CALLS or name in ("scan", "cond", "shard_map")


def visits(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], chosen: Sequence[Any]
) -> tuple[Callable[[Sequence[Any]], list[int]], bool]:
    """Make the function that counts how often each of the `chosen` programs runs.

    Nothing is computed that no choice depends on.

    Args:
      jaxpr: The whole program.
      consts: The values of its constants.
      inputs: Its arguments, or their shapes.
      chosen: Some of its `choices`.

    Returns:
      arguments -> the number of visits of each; those that no choice depends on may be shapes. True if a choice
      depends on some argument.
    """
    places = {id(sub): n for n, sub in enumerate(chosen)}
    count = jnp.zeros(len(places), jnp.int32)
    told = jax.make_jaxpr(lambda *xs: _run(jaxpr, consts, xs, count, places)[1])(*inputs)
    kept, used = needed(told.jaxpr)
    run = jax.jit(_function(kept, told.consts))

    def counts(inputs: Sequence[Any]) -> list[int]:
        (found,) = run(*(x for x, u in zip(inputs, used, strict=True) if u))
        return [int(n) for n in found]

    return counts, any(used)


def _program(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")


def _simplified(equation: Any) -> Any:
    """Leave out what is not `needed` inside an equation. Of a linear solver only the solution runs."""
    params = equation.params
    if equation.primitive.name == "custom_linear_solve":
        lengths = params["const_lengths"]
        last = sum(lengths[:3])
        asked = equation.invars[last - lengths.solve : last] + equation.invars[sum(lengths) :]
        run = {"call_jaxpr": params["jaxprs"].solve}
        return _simplified(equation.replace(primitive=closed_call_p, invars=asked, params=run))

    def simplify(value: Any) -> Any:
        if hasattr(value, "jaxpr"):
            return value.replace(jaxpr=simplify(value.jaxpr))
        return needed(value, all_inputs=True)[0] if hasattr(value, "eqns") else value

    return equation.replace(params=jax.tree.map(simplify, params, is_leaf=_program))


def _function(jaxpr: Any, consts: Sequence[Any] = ()) -> Callable[..., list[Any]]:
    """Make the function that runs a program."""
    unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    run: Callable[..., list[Any]] = jaxpr_as_fun(
        ClosedJaxpr(jaxpr.replace(debug_info=unnamed), consts)
    )
    return run


def _run(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], count: Count, places: dict[int, int]
) -> tuple[list[Any], Count]:
    """Run a program, and add the visits of the places in it to `count`."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else values[var]

    for equation in jaxpr.eqns:
        if any(id(sub) in places for sub in choices(jaxpr.replace(eqns=[equation]))):
            found, count = _enter(equation, [read(v) for v in equation.invars], count, places)
            values.update(zip(equation.outvars, found, strict=True))
        else:
            asked = [v for v in equation.invars if not isinstance(v, Literal)]
            outvars = [v for v in equation.outvars if type(v) is not DropVar]
            alone = jaxpr.replace(eqns=[equation], constvars=[], invars=asked, outvars=outvars)
            values.update(zip(outvars, _function(alone)(*map(read, asked)), strict=True))
    return [read(var) for var in jaxpr.outvars], count


def _enter(
    equation: Any, given: list[Any], count: Count, places: dict[int, int]
) -> tuple[Sequence[Any], Count]:
    """Run an equation that has places inside."""
    name, params = equation.primitive.name, equation.params

    def visit(program: Any, inputs: Sequence[Any], count: Count) -> tuple[list[Any], Count]:
        inside, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
        if id(inside) in places:
            count = count.at[places[id(inside)]].add(1)
        return _run(inside, consts, inputs, count, places)

    if name == "cond":
        branches = [lambda c, *xs, b=b: visit(b, xs, c) for b in params["branches"]]
        found: tuple[Sequence[Any], Count] = lax.switch(given[0], branches, count, *given[1:])
        return found
    if name == "while":
        return _while(params, given, count, visit)
    if name == "scan":
        return _scan(params, given, count, visit)
    if name == "shard_map":
        return _split(params, given, count, visit)
    (program,) = filter(_program, params.values())
    return visit(program, given, count)


def _while(
    params: dict[str, Any], given: list[Any], count: Count, visit: Callable[..., Any]
) -> tuple[list[Any], Count]:
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]

    def ask(state: list[Any], count: Count) -> tuple[list[Any], Count, Any]:
        (goes_on,), count = visit(params["cond_jaxpr"], [*given[:first], *state], count)
        return state, count, goes_on

    def turn(carry: Any) -> Any:
        return ask(*visit(params["body_jaxpr"], [*given[first:last], *carry[0]], carry[1]))

    state, count, _ = lax.while_loop(lambda carry: carry[2], turn, ask(given[last:], count))
    return state, count


def _scan(
    params: dict[str, Any], given: list[Any], count: Count, visit: Callable[..., Any]
) -> tuple[list[Any], Count]:
    first, carried = params["num_consts"], params["num_carry"]

    def body(carry: Any, xs: Any) -> Any:
        found, count = visit(params["jaxpr"], [*given[:first], *carry[0], *xs], carry[1])
        return (found[:carried], count), found[carried:]

    start, xs = (given[first : first + carried], count), given[first + carried :]
    (state, count), ys = lax.scan(body, start, xs, params["length"], params["reverse"])
    return [*state, *ys], count


def _split(
    params: dict[str, Any], given: list[Any], count: Count, visit: Callable[..., Any]
) -> tuple[list[Any], Count]:
    axes = params["newly_manual_axes"]

    def part(*inputs: Any) -> Any:
        found, own = visit(params["jaxpr"], inputs, jnp.zeros_like(count))
        return found, lax.psum(own, tuple(axes))

    split = jax.shard_map(
        part,
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=([*params["out_specs"]], PartitionSpec()),
        axis_names=axes,
        check_vma=False,
    )
    found, of_all = split(*given)
    return found, count + of_all
