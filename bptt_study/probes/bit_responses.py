"""The response of the model's probabilities to one bit of the past."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array

from bptt_study.backprop.forward import states
from bptt_study.instruments import lags
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.types import Params, Problem, Task
from bptt_study.validation import SettingError, whole


def bit_responses(count: int = 24) -> Probe:
    """Measure how far a bit k steps ago changes the model's probabilities: this shows what it learned of lag k.

    The probe is for tasks with two symbols and two classes.

    Args:
      count: The number of lags, k = 0 … count - 1.

    Returns:
      A probe with three columns. lag is k. response is the change of P(class 1) at step t when x_{t-k} goes
      from 0 to 1, averaged over the sequences of the validation part. kept is the share w_k of that lag's
      gradient that the strategy keeps (`lags.window`), NaN if it declares none.
    """
    whole("count", count)

    def check(task: Task) -> None:
        if (task.inputs, task.outputs) != (2, 2) or task.validation.inputs.ndim != 2:
            allowed = "a probe that fits the task"
            way_out = "It needs a task with two symbols and two classes, such as add."
            raise SettingError("probe", "bit_responses", allowed, way_out)
        if (farthest := task.facts.get("t2", 0)) >= count:
            raise SettingError("count", count, f"greater than the task's lag t2 ({farthest})")
        steps = len(task.validation.inputs)
        if count > steps:
            raise SettingError(
                "count", count, f"between 1 and the steps of the validation part ({steps})"
            )

    @partial(jax.jit, static_argnames="problem")
    def responses(problem: Problem, params: Params, inputs: Array) -> Array:
        def odds(bit: int) -> Array:
            known = inputs.at[-count].set(bit)  # noqa: PD008 (JAX's) one bit, after as long a past as there is
            after = states(problem.cell, params["cell"], problem.cell.zeros(inputs.shape[1]), known)
            seen = problem.cell.read(jax.tree.map(lambda h: h[-count:], after))
            return jax.nn.softmax(problem.readout.apply(params["readout"], seen))[..., 1]

        return jnp.mean(odds(1) - odds(0), axis=1)

    def look(snapshot: Snapshot) -> pd.DataFrame:
        strategy = snapshot.strategy
        declared = strategy.claim.lag_weights
        return pd.DataFrame(
            {
                "lag": np.arange(count),
                "response": responses(
                    snapshot.problem, snapshot.params, snapshot.task.validation.inputs
                ),
                "kept": np.nan if declared is None else np.asarray(lags.window(strategy, count)),
            }
        )

    return Probe(look, check=check)
