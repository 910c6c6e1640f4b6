"""Two functions that must agree at the same arguments, in their results and in their VJPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.backprop.closed import equations
from bptt_study.backprop.compare import drawn, equal, has_nan
from bptt_study.backprop.pytrees import as_types_of, floats, with_floats

# primitives with a derivative of their own; without them, functions with equal numbers have equal derivatives
SETS = ("custom_", "stop_gradient", "bitcast_")


class Both(NamedTuple):
    """Two functions that must agree, at the same arguments."""

    results: tuple[Any, Any]
    # what their VJPs make of the same random cotangents: trees like the floats of the arguments
    sent: tuple[Any, Any]


def twice(f: Callable[..., Any], g: Callable[..., Any], *arguments: Any) -> Both:
    """Compute two functions, and their VJPs if one of them sets a derivative itself.

    A function without a VJP sends nothing. A number that is not finite in one VJP counts as 0 in both: the
    derivative of 1/(1 + exp(-x)) is nan at -1000, that of the sigmoid is 0.
    """
    program = jax.make_jaxpr(lambda *given: (f(*given), g(*given)))(*arguments).jaxpr
    plain = Both((f(*arguments), g(*arguments)), ((), ()))
    if not any(equation.primitive.name.startswith(SETS) for equation in equations(program)):
        return plain

    def pulled_back(f: Callable[..., Any]) -> Any:
        run = lambda own: floats(f(*with_floats(arguments, own)))  # noqa: E731
        after, vjp = jax.vjp(run, floats(arguments))
        return vjp(as_types_of(after, drawn(np.random.default_rng(0), after)))[0]

    try:
        sent = pulled_back(f), pulled_back(g)
    except Exception:  # loops without a bound and callbacks have no VJP; an estimate shows why
        return plain
    finite = lambda a, b: jnp.where(jnp.isfinite(a) & jnp.isfinite(b), a, 0)  # noqa: E731
    return Both(plain.results, (jax.tree.map(finite, *sent), jax.tree.map(finite, *sent[::-1])))


def agree(
    name: str,
    both: Both,
    must: str,
    what: str = "a function whose numbers differ",
    way_out: str = "",
    whose: str = "a function whose derivative differs",
    *,
    size: float,
    allowed: float,
) -> None:
    """Check that two functions agree: their results, and where these are no nan, their derivatives.

    Args:
      name: The setting that the error names.
      both: The functions.
      must: As in `equal`.
      what: As in `equal`.
      way_out: As in `equal`.
      whose: The same as `what` for a derivative.
      size: That of the arguments.
      allowed: The largest difference of the results. A steep function's derivative moves with the rounding of a
        large argument as much as its result does.

    Raises:
      SettingError: If they differ.
    """
    f, g = both.results
    equal(name, floats(f), floats(g), must, what, way_out, size / 10, allowed=allowed)
    if not has_nan(both.results):
        equal(name, *both.sent, must, whose, way_out, 1, allowed=allowed * max(1, size / 10))
