"""The checks of arguments that all strategies of the package share."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, cast

from jaxtyping import Array, Key

from bptt_study.backprop.arguments import arguments, arrays, check_state
from bptt_study.backprop.shapes import check_params
from bptt_study.types import Batch, Params, Problem, Strategy
from bptt_study.validation import instance, whole

Settings = ParamSpec("Settings")
Make = Callable[Concatenate[Problem, Settings], Strategy]


def validated(make: Make[Settings]) -> Make[Settings]:
    """Let a strategy, and the function that makes it, validate their arguments.

    Args:
      make: (problem, settings) -> strategy.

    Returns:
      The same function. The strategy that it makes raises SettingError for parameters, a batch or a state that
      are not those of its problem and of its `init`. Only shapes and types are checked.
    """

    @wraps(make)
    def checked(problem: Problem, *args: Settings.args, **kwargs: Settings.kwargs) -> Strategy:
        made = make(instance("problem", problem, Problem), *args, **kwargs)

        def init(params: Params, batch_size: int) -> Any:
            params = arrays("params", params)
            check_params(problem, params)
            return made.init(params, whole("batch_size", batch_size))

        def taking(run: Callable[..., Any]) -> Callable[..., Any]:
            def estimate(params: Params, state: Any, batch: Batch, key: Key[Array, ""]) -> Any:
                params, batch = arguments(problem, params, batch)
                state = arrays("state", state)
                check_state(made.init, params, state, batch.mask.shape[1])
                return run(params, state, batch, key)

            return estimate

        given = made.given and taking(made.given)
        return made._replace(init=init, estimate=taking(made.estimate), given=given)

    return cast(Make[Settings], checked)
