"""Training part against validation part."""

import jax
import numpy as np
import pandas as pd

from bptt_study.backprop.forward import evaluate
from bptt_study.probes.probe import Probe, Scene
from bptt_study.validation import SettingError


def generalisation() -> Probe:
    """The training part evaluated as the validation part is: part, loss, accuracy.

    Of both as many steps of each stream as the shorter has, state from zero, so that neither has
    more of the first characters, which nothing comes before.
    """
    scores_of = jax.jit(evaluate, static_argnums=0)

    def look(scene: Scene) -> pd.DataFrame:
        parts = {"training": scene.task.training, "validation": scene.task.validation}
        if scene.task.training is None:
            allowed = "a probe that fits the task"
            way_out = "Only a task with a training part of its own has a generalisation gap."
            raise SettingError("probe", "generalisation", allowed, way_out)
        steps = min(len(batch.mask) for batch in parts.values() if batch is not None)
        found = []
        for name, batch in parts.items():
            shorter = jax.tree.map(lambda a: a[:steps], batch)
            scores = scores_of(scene.problem, scene.params, shorter)
            loss, accuracy = float(scores["validation_loss"]), scores.get("accuracy", np.nan)
            found.append({"part": name, "loss": loss, "accuracy": float(accuracy)})
        return pd.DataFrame(found)

    return Probe(look)
