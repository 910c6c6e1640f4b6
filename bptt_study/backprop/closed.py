"""A step function whose constants are arguments, so that a derivative can be written for all of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jaxtyping import Array

from bptt_study.validation import SettingError

REPEATABLE = "threefry2x32"  # gives each key its numbers, under `jax.vmap` and without


def closed(f: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], tuple[Array, ...]]:
    """Make all arrays that a function closes over its last arguments: floats, integers and keys.

    Args:
      f: The function.
      arguments: Arguments of the shapes and dtypes that it will be called with.

    Returns:
      The function (*arguments, *constants), and the constants.

    Raises:
      SettingError: For random keys whose numbers change if the function runs again beside others.
    """
    jaxpr, result = jax.make_jaxpr(f, return_shape=True)(*arguments)
    check_keys("f", jaxpr.jaxpr)
    structure = jax.tree.structure(result)
    constants = tuple(jnp.asarray(a) for a in jaxpr.consts)

    def run(*arguments: Any) -> Any:
        own = len(arguments) - len(constants)
        program = ClosedJaxpr(jaxpr.jaxpr, arguments[own:])
        found = jaxpr_as_fun(program)(*jax.tree.leaves(arguments[:own]))
        return jax.tree.unflatten(structure, found)

    return run, constants


def check_keys(name: str, program: Jaxpr) -> None:
    """Check that a program's random keys give the same numbers when it runs again beside others.

    Args:
      name: The setting that the error names.
      program: The program.

    Raises:
      SettingError: For keys whose numbers are others under `jax.vmap`, as those of rbg.
    """
    if kinds := sorted(set(generators(program)) - {REPEATABLE}):
        way_out = "Make them with `jax.random.key(seed, impl='threefry2x32')`."
        said = f"one with random keys of the kind {kinds[0]}"
        allowed = f"one whose keys are {REPEATABLE}: others give other numbers when steps run again"
        raise SettingError(name, said, allowed, way_out)


def check_constants(name: str, constants: Iterable[Any], trained: Iterable[Any] = ()) -> None:
    """Check that a function whose derivative is taken closes over no array that may depend on the parameters.

    Args:
      name: The setting that the error names.
      constants: The arrays that the function closes over.
      trained: The parameters, whose own arrays are known even where JAX does not trace them.

    Raises:
      SettingError: For an array that JAX traces, or that is a parameter.
    """
    own = {id(leaf) for leaf in trained}
    for const in constants:
        if isinstance(const, jax.core.Tracer):
            raise closes_over(name, "a traced value")
        if id(const) in own:
            raise closes_over(name, f"a parameter, {const.dtype}{list(const.shape)}")


def closes_over(name: str, found: str) -> SettingError:
    """Make the error for a function that closes over what the gradient would have to see."""
    allowed = "a function of its arguments alone, as the gradient leaves out all else"
    return SettingError(name, f"one that closes over {found}", allowed)


def makes_keys(jaxpr: Jaxpr) -> bool:
    """Return True if a program makes random keys of numbers, as `jax.random.PRNGKey` has them."""
    return any(equation.primitive.name == "random_wrap" for equation in equations(jaxpr))


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yield the equations of a program, and of the programs within."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def generators(jaxpr: Jaxpr) -> Iterator[str]:
    """Yield the kind of each random key in a program, and of each generator that takes raw numbers."""
    for equation in equations(jaxpr):
        if equation.primitive.name == "rng_bit_generator":
            yield "rbg"
        for variable in (*equation.invars, *equation.outvars):
            dtype = getattr(variable.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
                yield dtype._impl.name


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
