"""The scores on the training part, beside those on the validation part."""

import jax
import numpy as np
import pandas as pd

from bptt_study.backprop.forward import evaluate
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.types import Task
from bptt_study.validation import SettingError


def generalisation() -> Probe:
    """Evaluate the training part in the same way as the validation part, from the zero state.

    Of each part, the probe takes as many steps of each stream as the shorter part has. So both have equally
    many first characters, which are harder to predict because no text precedes them.

    Returns:
      A probe with the columns part ("training" or "validation"), loss and accuracy.
    """
    scores_of = jax.jit(evaluate, static_argnums=0)

    def check(task: Task) -> None:
        if task.training is None:
            allowed = "a probe that fits the task"
            way_out = "Only a task with a fixed training part has a generalisation gap."
            raise SettingError("probe", "generalisation", allowed, way_out)

    def look(snapshot: Snapshot) -> pd.DataFrame:
        parts = {"training": snapshot.task.training, "validation": snapshot.task.validation}
        steps = min(len(batch.mask) for batch in parts.values() if batch is not None)
        found = []
        for name, batch in parts.items():
            shorter = jax.tree.map(lambda a: a[:steps], batch)
            scores = scores_of(snapshot.problem, snapshot.params, shorter)
            loss, accuracy = float(scores["validation_loss"]), scores.get("accuracy", np.nan)
            found.append({"part": name, "loss": loss, "accuracy": float(accuracy)})
        return pd.DataFrame(found)

    return Probe(look, check=check)
