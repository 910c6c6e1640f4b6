"""Tables tell runs apart: every setting is a column, and whatever varies, and nothing else, is named."""

import numpy as np
import pandas as pd
import pytest
import studies

import bptt_study as bs
from bptt_study import losses
from bptt_study.report import columns, plots, tables, untold

LOSSES = [[3.0, 2.0], [3.0, 2.1], [3.0, 2.2]]


def rows_of(*settings: dict, losses=LOSSES) -> pd.DataFrame:
    runs = (studies.run(f"r{i}", studies.TEXT | s, losses) for i, s in enumerate(settings))
    return pd.concat(runs, ignore_index=True)


def printed(rows: pd.DataFrame) -> list[list[str]]:
    """The words of the printed summary's table, without those of the scores."""
    lines = tables.as_text(tables.summary(rows), studies.costs(rows)).splitlines()[1:]
    return [line.split() for line in lines if not line.startswith(("Reference", "char_lm:"))]


def test_every_setting_is_a_column_and_nested_ones_keep_their_full_names():
    transform = {"_target_": "optax.adam", "_partial_": True, "b1": 0.9}
    groups = {
        "task": {"_target_": "mine.task", "steps": 7, "lag": 3},
        "optimizer": {"learning_rate": 0.1, "transform": transform, "schedule": {"updates": 8}},
        "budget": {"steps": 16, "updates": 8},
        "probes": {"mine": {"radii": [1, {"a": 2}]}},
    }
    assert columns.settings({"task": "own", "optimizer": "adam"}, groups) == {
        "task": "own",
        "task._target_": "mine.task",
        "task.steps": 7,  # `steps` alone is the budget's
        "lag": 3,
        "optimizer": "adam",
        "learning_rate": 0.1,
        "optimizer.transform._target_": "optax.adam",
        "optimizer.transform.b1": 0.9,
        "optimizer.schedule.updates": 8,
        "steps": 16,
        "updates": 8,
        "probes.mine.radii": '[1, {"a": 2}]',
    }
    assert columns.kind("optimizer.transform.b1") == "setting"
    assert columns.group("optimizer.transform.b1") == "optimizer" == columns.group("clip_norm")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([{"learning_rate": 0.001}, {"learning_rate": 0.01}], ["learning_rate"]),
        ([studies.FULL, studies.fixed(4)], ["strategy"]),
        ([studies.fixed(4), studies.fixed(8)], ["truncation_length"]),  # the stride follows
        ([studies.fixed(4), studies.fixed(4) | {"stride": 1}], ["stride"]),
        ([{"cell": "gru"}, {"hidden": 4}], ["cell"]),
        ([{"optimizer.transform.b1": 0.5}, {"optimizer.transform.b1": 0.9}], ["optimizer.transform.b1"]),
        ([{"alpha": np.nan}, {"alpha": 6.0}], ["alpha"]),
        ([{}, {}], ["run"]),
        ([{}], []),
    ],
)  # fmt: skip
def test_what_tells_runs_apart_is_named_and_no_more(settings, names):
    rows = rows_of(*(studies.FULL | s for s in settings))
    assert tables.varying(rows) == names
    shown = ["length" if n == "truncation_length" else n for n in names]
    assert printed(rows)[0] == [*shown, "validation_loss", "accuracy", "seconds", "seeds",
                                "diverged", "learned"]  # fmt: skip
    assert set(names) <= set(tables.summary(rows))


CLIPPED = {"optimizer._target_": "bptt_study.optimizers.clipped"}
RATES = [{"learning_rate": 0.03}, {"learning_rate": 0.003}]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([studies.FULL | RATES[0], studies.fixed(4) | RATES[1]], ["learning_rate"]),
        ([studies.FULL | {"clip_norm": 1.0}, studies.fixed(4)], ["clip_norm"]),
        ([studies.FULL | {"optimizer": "adam", "optimizer.transform.b1": 0.9},
          studies.fixed(4) | {"optimizer": "sgd"}], ["optimizer"]),  # b1 is adam's alone
        ([{"optimizer": "adam"} | RATES[0], {"optimizer": "sgd"} | RATES[1]], ["learning_rate"]),
        ([{"cell": "gru"}, {"hidden": 4}], ["hidden"]),
        ([{"hidden": 4, "corpus": "a", "corpus_sha256": "7"}, {"corpus_sha256": "9"}], ["hidden"]),
        ([{"hidden": 4, "corpus_sha256": "7"}, {"corpus_sha256": "9"}], ["corpus_sha256"]),
        ([studies.FULL, studies.fixed(4), studies.fixed(8)], []),  # the window is the length
        ([studies.fixed(4), studies.randomized(4) | {"compensate": True}], []),
        ([studies.FULL | {"snapshots": 1, "parameters": 9, "probes.x.draws": 1}, studies.fixed(4)], []),
        (RATES, []),
        # of one option, in some of its runs: it does not follow from the option
        ([{"activation": "tanh"}, studies.fixed(4) | {"activation": "relu"}, {"cell": "gru"},
          studies.fixed(4) | {"cell": "gru"}], ["activation"]),
        ([{"optimizer": "adam", "clip_norm": 1.0} | RATES[0],
          studies.fixed(4) | {"optimizer": "adam"} | RATES[1],
          {"optimizer": "sgd", "clip_norm": 1.0} | RATES[0],
          studies.fixed(4) | {"optimizer": "sgd"} | RATES[1]], ["clip_norm", "learning_rate"]),
        ([{"cell": "elman", "activation": "relu"} | studies.fixed(4), {"cell": "elman", "activation": "tanh"},
          {"cell": "gru"}], ["activation"]),
        ([{"strategy": "rflo", "feedback": "random", "hidden": 4},
          {"strategy": "rflo", "feedback": "exact", "hidden": 8}, {"hidden": 8}], ["feedback"]),
        ([{"optimizer": "adam", "clip_norm": 1.0, "hidden": 4}, {"optimizer": "adam", "hidden": 8},
          {"optimizer": "sgd"}], ["clip_norm"]),
        ([studies.fixed(8) | {"stride": 8.0, "hidden": 4}, studies.fixed(8) | {"stride": 2.0, "hidden": 8}],
         ["stride"]),
        ([studies.fixed(8) | {"stride": 8.0}, {"strategy": "sliding", "window": 8, "truncation_length": 8,
          "stride": 1.0}, studies.randomized(8)], []),
        # equal by chance, in two groups; a schedule's steps are those of the budget
        ([{"hidden": 8, "batch_size": 8}, {"hidden": 16, "batch_size": 16}], ["batch_size"]),
        ([{"updates": n, "optimizer.schedule.decay_steps": n} for n in (8, 16)], []),
        # a sliding window beside chunks, and a third strategy
        ([studies.FULL, studies.fixed(4), studies.fixed(8) | {"stride": 1}], ["stride"]),
        ([fixed | {"strategy._target_": "bptt_study.strategies.fixed"} for fixed in (
            studies.fixed(4), {"strategy": "sliding", "window": 4, "truncation_length": 4, "stride": 1})], []),
        # null in an option that has the setting; one that calls another function lacks it
        ([CLIPPED | {"optimizer": "adam", "clip_norm": 1.0}, CLIPPED | {"optimizer": "sgd"}], ["clip_norm"]),
        ([{"cell": "elman", "cell._target_": "elman", "spectral_radius": 1.0},
          {"cell": "gru", "cell._target_": "gru"}], []),
        ([CLIPPED | {"optimizer": "adam", "optimizer.transform._target_": "optax.adam",
          "optimizer.transform.b1": 0.9},
          CLIPPED | {"optimizer": "sgd", "optimizer.transform._target_": "optax.sgd"}], []),
    ],
)  # fmt: skip
def test_what_changes_together_with_a_shown_setting_is_told(settings, names):
    rows = rows_of(*(studies.FULL | s for s in settings))
    said = f"Also different: {', '.join(names)}." if names else ""
    assert untold.also_differ(rows, tables.varying(rows)) == said


def test_many_settings_are_counted():
    others = [{f"optimizer.{c}": ord(c) * i for c in "abcdefgh"} for i in (1, 2)]
    rows = rows_of(*(studies.FULL | {"hidden": i} | other for i, other in enumerate(others)))
    said = untold.also_differ(rows, tables.varying(rows))
    assert said.endswith("optimizer.f and 2 other settings.")


def test_settings_that_differ_in_several_panels_are_named_once():
    """Two texts: on one the rate differs between strategies, on the other the rate and the clipping."""
    one, other = {"corpus": "a.txt"}, {"corpus": "b.txt"}
    rows = rows_of(
        studies.FULL | one | RATES[0],
        studies.fixed(4) | one | RATES[1],
        studies.FULL | other | RATES[0] | {"clip_norm": 1.0},
        studies.fixed(4) | other | RATES[1] | {"clip_norm": 2.0},
    )
    said = plots.runs(rows)
    assert said.endswith(" sequences. Also different: learning_rate, clip_norm.")


def test_two_learning_rates_are_two_rows_and_two_panels():
    rows = rows_of(studies.FULL | {"learning_rate": 0.001}, studies.FULL | {"learning_rate": 0.01})
    assert [line[0] for line in printed(rows)[1:]] == ["0.001", "0.01"]
    also = tables.apart(rows)
    parts = tables.panels(tables.curves(rows, "validation_loss"), also)
    titles = [plots.panel_name(part.iloc[0], also) for part in parts]
    assert titles == ["text, elman, learning rate 0.001", "text, elman, learning rate 0.01"]


def test_a_strategy_without_a_length_has_none():
    rows = rows_of(studies.FULL, studies.fixed(16))
    assert rows["truncation_length"].tolist()[0] == 64, "as in the tables of older versions"
    table = tables.summary(rows)
    assert table["truncation_length"].isna().tolist() == [True, False]
    assert "64" not in tables.as_text(table, studies.costs(rows))


def test_units_are_those_of_the_loss():
    assert losses.unit(losses.cross_entropy) == "nats"
    assert losses.unit(losses.squared_error) == ""
    rows = rows_of(studies.FULL | {"loss_unit": np.nan, "nothing_loss": 0.5})
    assert "nats" not in tables.as_text(tables.summary(rows), studies.costs(rows))
    assert "no input 0.500" in tables.as_text(tables.summary(rows), studies.costs(rows))
    assert plots.loss_label(rows) == "validation loss"
    old = rows.drop(columns="loss_unit")
    assert "2-gram 2.300 nats" in tables.as_text(tables.summary(old), studies.costs(old))


@pytest.mark.parametrize(
    ("end", "floor", "learned"),
    [
        ([2.0, 2.1, 2.2], 2.3, True),
        ([2.0, 2.1, 2.2], 2.15, False),  # the interval reaches above
        ([2.0], 2.3, False),  # one seed has no interval
        ([2.3 * 0.976] * 3, 2.3, False),  # an answer without input may come so low
        ([2.3 * 0.97] * 3, 2.3, True),
        ([np.nan] * 3, 2.3, False),
        ([2.0] * 3, np.nan, False),
    ],
)
def test_learned_is_below_the_reference_by_the_whole_interval(end, floor, learned):
    rows = rows_of(studies.FULL | {"uniform_loss": floor, "unigram_loss": np.nan},
                   losses=[[3.0, loss] for loss in end])  # fmt: skip
    assert tables.summary(rows)["learned"].tolist() == [learned]


@pytest.mark.parametrize(
    "task",
    [bs.tasks.add(), bs.tasks.digits(), bs.tasks.series("mackey_glass", -39), bs.tasks.copy(3, 2)],
)
def test_no_constant_answer_has_learned(task):
    """The best one on the validation part itself, which lies below the expectation, by chance."""
    y, m = (np.asarray(a) for a in (task.validation.targets, task.validation.mask))
    if np.issubdtype(y.dtype, np.integer):
        shares = np.bincount(y[m > 0]) / (m > 0).sum()
        best = -(shares * np.log(np.where(shares > 0, shares, 1))).sum()
    else:
        best = y[m > 0].var() / 2
    found = {f"{name}_loss": value for name, value in task.references.items()}
    rows = rows_of(studies.FULL | {"unigram_loss": np.nan} | found, losses=[[3.0, best]] * 3)
    floor = min(found.get("nothing_loss", np.inf), found.get("uniform_loss", np.inf))
    assert best < floor, "the control: only the margin tells it"
    assert not tables.summary(rows)["learned"].any()


def test_a_small_score_is_not_shown_as_0():
    """Losses down to 1e-17, as in influence balancing."""
    rows = rows_of(studies.FULL, losses=[[1.0, 4.4e-17], [1.0, 5.5e-17], [1.0, 0.25]])
    text = tables.as_text(tables.summary(rows), studies.costs(rows))
    assert "5.5e-17 [4.4e-17, 0.250]" in text
    one = rows[rows["seed"] == 0]
    said = tables.as_text(tables.summary(one), studies.costs(one))
    assert "4.4e-17" in said and "[4.4e-17" not in said, "one seed has no interval"


@pytest.mark.parametrize(
    "values", [(0.001, 0.0010000001), (0.0012345671, 0.0012345679), (1 / 3, np.nextafter(1 / 3, 1))]
)
def test_different_settings_have_different_words(values):
    """The control: six digits do not tell them apart, and each has the fewest digits that are the number."""
    assert len({f"{value:g}" for value in values}) == 1
    words = [tables.text(value) for value in map(np.float64, values)]
    assert [float(word) for word in words] == [*values]
    assert words == [repr(float(value)) for value in values]
    _, *lines = printed(rows_of(*(studies.FULL | {"learning_rate": value} for value in values)))
    assert [line[0] for line in lines] == words


@pytest.mark.parametrize(
    ("value", "word"),
    [(0.1, "0.1"), (1e-7, "1e-07"), (0.333333, "0.333333"), (16.0, "16"), (1234567.0, "1234567"),
     (np.inf, "inf"), (np.nan, ""), (None, ""), (True, "True"), (3, "3"), ("a", "a")],
)  # fmt: skip
def test_few_digits_stay_few(value, word):
    assert tables.text(value) == word


@pytest.mark.parametrize("diverged", [True, False])
def test_a_sweep_without_a_single_finite_loss_has_a_summary(diverged):
    rows = rows_of(studies.FULL, losses=[[np.nan, np.nan]] * 2).assign(diverged=diverged)
    table = tables.summary(rows)
    assert table[["validation_loss", "validation_loss_high"]].to_numpy().tolist() == [[np.inf] * 2]
    assert not table["learned"].any()
    assert " diverged " in tables.as_text(table, studies.costs(rows)).splitlines()[2]
