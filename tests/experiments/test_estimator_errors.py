"""The study of all estimators makes medians, frontiers and figures of its probe's table."""

import layout
import numpy as np
import pytest
import studies

import bptt_study as bs
from bptt_study.report import csv_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("estimator_errors")
    rows = studies.run("a", studies.TEXT | studies.FULL | {"hidden": 32}, [[3.0, 2.0]] * 3)
    csv_tables.write_table(rows, place / "table.csv.gz")
    csv_tables.write_table(studies.quality("char_lm", "a"), place / "all_estimators.csv.gz")
    assert [file.name for file in studies.make_tables("estimator_errors", place)] == [
        "estimators.csv",
        "frontiers.csv",
    ]
    return place


def test_an_estimator_has_the_name_of_its_setting(folder):
    table = csv_tables.read_table(folder / "estimators.csv").fillna({"setting": ""})
    found = table.groupby(["estimator", "setting"])["length"].unique().map(sorted).to_dict()
    known = {("full", ""), ("fixed", "window"), ("uoro", "block"), ("rtrl", "block")}
    assert set(found) == known and found["uoro", "block"] == [1, 4]


def test_the_frontiers_have_what_no_other_beats(folder):
    """Against all pairs: an estimator is beaten if another costs no more, errs no more and is not its equal."""
    table = csv_tables.read_table(folder / "frontiers.csv")
    assert set(table["moment"]) == {"start", "middle", "end"}
    for n, cost in enumerate(("arithmetic", "numbers")):
        points = {
            (name, length): (v[n], v[2] + v[3]) for (name, _, length), v in studies.QUALITY.items()
        }
        best = {
            key
            for key, (price, error) in points.items()
            if not any(
                p <= price and e <= error and (p, e) != (price, error) for p, e in points.values()
            )
        }
        found = table[(table["cost"] == cost) & (table["moment"] == "end")]
        shown = set(zip(found["estimator"], found["length"].fillna(0), strict=True))
        assert shown == {(name, 0 if np.isnan(length) else length) for name, length in best}
    assert ("fixed", 8) not in shown
    assert len(shown) == 4


def test_figures_of_all_estimators_can_be_read(folder, kept):
    studies.draw("estimator_errors", folder)
    moments = ("end", "middle", "start")
    assert sorted(kept) == [f"{n}_{m}" for n in ("estimators", "frontiers") for m in moments]
    for figure in kept.values():
        layout.check(figure)
        said = layout.words(figure)
        assert "n = 3 seeds; diverged: none" in said
        assert "32 units" in said
    labels = [t.get_text() for t in kept["estimators_end"].axes[0].get_yticklabels()]
    assert {"UORO, block 4", "RTRL, block 4", "Fixed (chunks), window 2"} <= set(labels)


@pytest.mark.parametrize("size", ["smoke", "quick", "paper"])
@pytest.mark.parametrize("task", ["char_lm", "copy"])
def test_the_networks_are_half_of_those_of_bias_variance(task, size):
    cfg, whole = (
        bs.compose(f"experiment={name}", f"task={task}", f"size={size}")
        for name in ("estimator_errors", "bias_variance")
    )
    assert 2 * cfg.hidden == whole.hidden
    assert cfg.seeds == min(whole.seeds, 4)
    own, theirs = cfg.budget, whole.budget
    assert own.steps == (theirs.steps and theirs.steps // 2)
    assert own.batch_size == min(theirs.batch_size, 16)
    assert (own.updates, own.logs) == (theirs.updates, theirs.logs)
