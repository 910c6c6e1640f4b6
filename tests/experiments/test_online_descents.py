"""Descents of all estimators: which of them run, where they lead, and what the table and figure say of it."""

import layout
import optax
import pandas as pd
import pytest
from support import STRATEGY_FILES, configured

import bptt_study as bs
from bptt_study.runner import stories
from bptt_study.tasks import influence_balancing
from bptt_study.training.budget import Budget
from bptt_study.training.train import make_train
from bptt_study.validation import SettingError

study = stories.experiment_module("online_descents")


def test_every_estimator_descends_or_refuses_the_cell():
    """Those that are not run are executors of full, have thresholds, or refuse a cell of one parameter."""
    run = {name for name, *_ in study.ESTIMATORS}
    same = {"checkpointed", "forward_errors", "frozen"}  # full, full, and full of one step
    truncations = {"fixed", "sliding", "randomized_power_law_uncompensated"}
    task = influence_balancing(23, 10)
    problem = bs.Problem(bs.cells.influence(1, 23, 10), task.readout, task.loss)
    for file in STRATEGY_FILES:
        if file.stem in run | same | truncations:
            continue
        with pytest.raises(SettingError, match=r"whose parameters end in gates × units"):
            configured(file)(problem)


@pytest.mark.parametrize(
    ("strategy", "updates", "bounds"),
    [("rtrl", 3000, (0, 1e-16)), ("full", 3000, (200, 230)), ("nres", 3000, (0, 1e-16))],
)
def test_the_published_descent(strategy, updates, bounds, key):
    """The exact gradient of the stream to rounding, an update at every step; its own steps alone lead away."""
    task = influence_balancing(23, 10)
    problem = bs.Problem(bs.cells.influence(1, 23, 10, theta=0.5), task.readout, task.loss)
    budget = Budget(1, 1, updates, logs=1, divergence_bound=None)
    optimizer = bs.optimizers.clipped(optax.sgd, 1e-4)
    train = make_train(problem, getattr(bs.strategies, strategy)(problem), optimizer, budget, task)
    records = train(key).records
    assert records[0]["validation_loss"][0] == pytest.approx(8)  # θ = ½
    assert bounds[0] <= records[-1]["validation_loss"][0] < bounds[1]


def test_estimators_by_hand():
    """Two seeds each: to θ*, away, and one seed between."""
    rows = []
    for name, K, burn_in, losses in (
        ("rtrl", 1, 0, [1e-9, 1e-8]),
        ("full", 1, 0, [20.0, 20.0]),
        ("full", 100, 0, [60.0, 70.0]),
        ("full", 100, 99, [1e-9, 1e-9]),
        ("uoro", 1, 0, [0.01, 9.0]),
    ):
        common = {"run": f"{name}{burn_in}{K}", "strategy": name, "steps": K, "burn_in": burn_in}
        common |= study.PUBLISHED | {"learning_rate": 1e-4, "stride": None}
        common |= {
            "truncation_length": None,
            "window": None,
            "nothing_loss": 0.5,
            "diverged": False,
        }
        for seed, loss in enumerate(losses):
            for update, value in ((0, 8.0), (9, loss)):
                rows.append({**common, "seed": seed, "update": update, "validation_loss": value})
    rows = pd.DataFrame(rows)
    found = study.estimators(rows)
    assert found["leads"].tolist() == ["to θ*", "away", "away", "to θ*", "neither"]
    assert found["published"].fillna("").tolist() == ["to θ*", "away", "", "away", ""]
    assert found["counted"].tolist() == [1, 1, 100, 1, 1]
    assert found["loss"].tolist() == pytest.approx([5.5e-9, 20, 65, 1e-9, 4.505])
    assert found["loss_to_tbptt"].tolist()[1:3] == pytest.approx([1, 65 / 20])
    assert found["loss_to_rtrl"].tolist()[0] == 1
    assert (found["start_loss"] == 8).all() and (found["n"] == 2).all()
    elsewhere = study.estimators(rows.assign(states=9, positive=3))
    assert elsewhere["published"].isna().all(), "it was said of another system"
    assert elsewhere["leads"].tolist() == found["leads"].tolist()
    for settings, wide in ((None, "float32"), ('{"enable_x64": true}', "float64")):
        figure = study.draw(found, rows.assign(environment=settings))
        assert f"10 of them +1; {wide}." in layout.words(figure)
