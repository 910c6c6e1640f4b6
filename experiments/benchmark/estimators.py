"""The times of every estimator in the benchmark: one loss and gradient, all of them on one device.

JAX is imported only where one is made, so that the names can be read without it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from point import Contender, Point, program, setting


class Called(NamedTuple):
    """A strategy with its settings."""

    strategy: str
    settings: Mapping[str, Any] = MappingProxyType({})
    steps: int | None = None  # that are run, where time is scaled to all; None: all of them


# Time is in proportion to the steps, where each of them costs the same.
ESTIMATORS = {
    "full()": Called("full"),
    "checkpointed()": Called("checkpointed"),
    "fixed(32)": Called("fixed", {"window": 32}),
    "randomized(16)": Called("randomized_constant", {"mean_length": 16}),
    "frozen()": Called("frozen"),
    "telescope(16)": Called("telescope_constant", {"mean_length": 16}),
    "adaptive(0.9)": Called("adaptive", {"delta": 0.9, "windows": (8, 32)}),  # compiled each
    "dni(32)": Called("dni", {"block": 32}),
    "bp_lambda(32)": Called("bp_lambda", {"block": 32}),
    "rtrl(64)": Called("rtrl", {"block": 64}, 64),
    "snap(1)": Called("snap"),
    "eprop()": Called("eprop"),
    "rflo()": Called("rflo"),
    "pp_prop()": Called("pp_prop"),
    "uoro(16)": Called("uoro", {"block": 16}),
    "kf_rtrl()": Called("kf_rtrl", {}, 64),
    "reverse_kf()": Called("reverse_kf", {}, 64),
    "ok(4)": Called("ok", {"rank": 4}, 16),
    "sketched(4)": Called("sketched", {"rank": 4}, 4),
    "forward_errors()": Called("forward_errors", {}, 64),
    "forward_gradient(1)": Called("forward_gradient"),
    "truncated_es(64)": Called("truncated_es", {"hold": 64}),
    "pes(16)": Called("pes", {"hold": 16}),
    "nres(1)": Called("nres"),
}
DRAWS = 32  # the least number of calls over which operations that depend on values are averaged
# α of `leaky` is the trace's of `rflo`, and keeps J from being nearly singular
ON_LEAKY = ("full()", "rflo()", "forward_errors()")
ON_ALL = tuple(name for name in ESTIMATORS if name == "full()" or name not in ON_LEAKY)
# they hold nothing that grows with T; a tuple of one sort each
ONLINE = ("rtrl(64)", "snap(1)", "pp_prop()", "uoro(16)", "kf_rtrl()", "reverse_kf()", "ok(4)")
ONLINE += ("sketched(4)", "pes(16)", "nres(1)")


def timed(name: str, point: Point) -> Contender:
    """The estimate as a training loop has it from the second call on, compiled for one device."""
    import jax

    strategy, (params, start, *rest) = _ready(name, point)
    run, about = program(strategy.estimate, params, start, *rest, operations=counted(name, point))
    _, state = run(params, start, *rest)  # `adaptive` measures in its first call alone

    def once() -> Any:
        return jax.block_until_ready(run(params, state, *rest))

    about |= {"scaled_by": point.steps / _steps(name, point)}
    return once, about | {"numbers": strategy.claim.numbers or 0}


def counted(name: str, point: Point) -> float:
    """Count the operations of an estimate, as the mean over calls, scaled as the time is."""
    import bptt_study as bs

    strategy, (params, _, batch, key) = _ready(name, point)
    mean = bs.measure.arithmetic_of_calls(strategy, params, batch, DRAWS)
    return mean(params, batch, key) * point.steps / _steps(name, point)


def planned(name: str, point: Point) -> dict[str, Any]:
    """Return the bytes that the compiled estimate holds, by its compiler; nothing is run."""
    import bptt_study as bs

    strategy, arguments = _ready(name, point, point.steps)
    return {"temporary_bytes": bs.measure.temporary_bytes(strategy.estimate, *arguments)}


def _steps(name: str, point: Point) -> int:
    """The time steps that are run."""
    return min(ESTIMATORS[name].steps or point.steps, point.steps)


def _ready(name: str, point: Point, steps: int | None = None) -> tuple[Any, tuple[Any, ...]]:
    """The strategy, and the arguments of its first call, by default of the steps that are run."""
    import jax

    import bptt_study as bs

    bs.devices.use("auto", cores=1)
    problem, params, _, batch = setting(point._replace(steps=steps or _steps(name, point)))
    called = ESTIMATORS[name]
    strategy = getattr(bs.strategies, called.strategy)(problem, **called.settings)
    start = strategy.init(params, point.batch_size)
    return strategy, (params, start, batch, jax.random.key(1))
