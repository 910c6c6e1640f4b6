"""The benchmark's contenders compute the same gradient, or its times would compare nothing."""

import json
import math
import subprocess
import sys
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

import before
import bench
import contenders
import estimators
import jax
import layout
import numpy as np
import others
import pandas as pd
import phases
import point as points
import pytest
from contenders import find
from point import Point
from support import in_a_process_with, without_metrics

from bptt_study import strategies
from bptt_study.backprop.schedules import call
from bptt_study.instruments import measure
from bptt_study.report import figure_layout
from bptt_study.report.csv_tables import read_table, write_table
from bptt_study.testing import examples

RESULTS = Path(__file__).parents[2] / "results" / "bench"


def apart(a, b):
    with pytest.raises(AssertionError):
        examples.close(a, b, 1e-4)


@pytest.mark.parametrize("name", ["textbook", "textbook_indexed"])
@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
@pytest.mark.parametrize("window", [None, 4])
def test_ours_is_the_textbooks(name, cell, window):
    point = Point(cell, hidden=4, batch_size=2, steps=12, window=window)
    textbook = find(name)
    (loss, grads, state), ((expected, last), by_jax) = (
        contender(point)[0]() for contender in (find("ours"), textbook)
    )
    examples.close((loss, grads, state), (expected, by_jax, last))
    apart(grads["cell"], textbook(point._replace(window=6))[0]()[1]["cell"])


NETWORKS = [
    *(("ours", who, cell) for who in ("as_in_readme", "step_only") for cell in ("elman", "lstm")),
    ("ours", "textbook", "stacked"),
    ("ours", "scan_chunks", "stacked"),
    ("scan_full", "lax_scan", "stacked"),
    ("scan_full", "lax_scan", "lstm"),
]


@pytest.mark.parametrize(("one", "other", "cell"), NETWORKS)
def test_contenders_for_any_network_compute_the_same(one, other, cell):
    point = Point(cell, hidden=4, batch_size=2, steps=12, window=4)
    numbers = {}
    for name in (one, other):
        found = jax.device_get(find(name)(point)[0]())
        loss, *rest = found if len(found) == 3 else (found[0][0], found[1], found[0][1])
        numbers[name] = jax.tree.leaves((loss, rest))
    examples.close(numbers[one], numbers[other])
    apart(
        numbers[one], jax.tree.leaves(find(one)(point._replace(steps=8))[0]())[: len(numbers[one])]
    )


LIBRARIES = [(name, cell) for name in ("flax", "torch") for cell in ("elman", "gru", "lstm")]


@pytest.mark.parametrize(("name", "cell"), [*LIBRARIES, ("torch", "stacked")])
@pytest.mark.parametrize("window", [None, 4])
def test_other_libraries_compute_the_same(name, cell, window):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[bench]'")
    point = Point(cell, hidden=4, batch_size=2, steps=12, window=window)
    loss, grads, _ = find("ours")(point)[0]()
    theirs, found, *_ = find(name)(point)[0]()
    named = getattr(others, f"{name}_weights")(point, grads)
    found = jax.tree.map(np.asarray, {key: found[key] for key in named})
    np.testing.assert_allclose(float(theirs), float(loss), rtol=1e-5)
    examples.close(found, named, 1e-5)
    longer = find("ours")(point._replace(window=6))[0]()[1]
    apart(found, getattr(others, f"{name}_weights")(point, longer))


def test_the_sliding_window_is_one_pass_a_loss():
    point = Point("elman", hidden=4, batch_size=2, steps=12, window=3)
    (loss, grads, _), (expected, by_jax) = (
        contender(point)[0]() for contender in (find("sliding"), find("one_pass_a_loss"))
    )
    examples.close((loss, grads), (expected, by_jax))


def test_the_lag_table_is_one_pass_a_loss():
    point = Point("gru", hidden=4, batch_size=2, steps=12, window=5)
    table = find("lag_table")(point)[0]()
    copies, about = find("lags_one_pass_a_loss")(point)
    examples.close(table["cell"], copies()["cell"])
    assert about["scaled_by"] == 1


def test_one_pass_a_loss_and_lag_is_measured_on_some_losses_and_scaled():
    point = Point("elman", hidden=4, batch_size=2, steps=4, window=4)
    each, about = find("lags_one_pass_a_loss_and_lag")(point)
    assert about["scaled_by"] == 1
    examples.close(find("lag_table")(point)[0]()["cell"], each()["cell"])
    assert find("lags_one_pass_a_loss_and_lag")(point._replace(steps=12))[1]["scaled_by"] == 3


@pytest.mark.parametrize("name", ["full", "chunks", "random_cuts", "checkpointed"])
@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_predicted_bytes_are_near_the_compilers(name, cell):
    point = Point(cell, hidden=64, batch_size=8, steps=4096, window=64)
    about = find(name)(point)[1]
    assert 0.4 < about["temporary_bytes"] / about["predicted_bytes"] < 2.5
    fits = 64  # the window; 32 steps fit
    reach = math.ceil(math.log(0.01 / (4096 * 8)) / math.log(15 / 16))  # of 16 on average
    held = {"full": 4096, "chunks": fits, "random_cuts": max(fits, reach), "checkpointed": 2 * 64}
    assert about["states"] == held[name]


def test_what_the_limit_counts():
    """Three products of T·B·G·H² multiply-adds, and the textbook's operations are more."""
    point = Point("gru", hidden=8, batch_size=4, steps=16, window=None)
    once, about = find("products")(point)
    shapes = [a.shape for a in jax.tree.leaves(once())]
    assert shapes == [(64, 24), (64, 8), (8, 24)]
    assert about["operations"] == 2 * 3 * 64 * 3 * 8 * 8
    assert find("textbook")(point)[1]["operations"] > about["operations"]


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_the_phases_one_after_the_other_are_the_estimate(cell, monkeypatch):
    monkeypatch.setattr(call, "LONGEST", 4)  # three segments
    point = Point(cell, hidden=4, batch_size=2, steps=12)
    assert phases.segmented(point).parts == min(2, jax.device_count())
    loss, grads, _ = find("full")(point)[0]()
    found_by = dict(zip(contenders.PHASES, find("apart")(point)[0](), strict=True))
    (found, readout), _ = found_by["head"]
    assert jax.tree.leaves(found_by["backward"])[0].shape == (3, 4, 2, 4)
    examples.close(
        (found, found_by["contraction"], readout), (loss, grads["cell"], grads["readout"])
    )
    longer = find("full")(point._replace(steps=8))[0]()[1]
    apart(found_by["contraction"], longer["cell"])


def test_the_products_of_the_phases_are_all_that_the_limit_counts():
    """The recurrent weights' three, and the readout's three."""
    point = Point("gru", hidden=8, batch_size=4, steps=16)

    def operations(name):
        return find(name)(point)[1]["operations"]

    recurrent = ("forward_products", "backward_products", "contraction_products")
    limit = find("products")(point)[1]["operations"]
    # what is summed over steps and segments beside
    assert limit <= sum(map(operations, recurrent)) < 1.2 * limit
    outputs = 2 * 3 * 64 * 8 * points.SYMBOLS
    assert outputs <= operations("head_products") < 1.2 * outputs


@pytest.mark.slow
def test_the_phases_on_two_devices():
    """The two tests above in a process that has them."""
    said = in_a_process_with(2, __file__, "(are_the_estimate and lstm) or products_of_the_phases")
    assert "2 passed" in said, said


def test_every_place_of_the_grid_is_named_once():
    for grid in (bench.size(small=False).grid, bench.size(small=True).grid):
        assert len({str(place) for place in grid}) == len(grid)
        assert {p.cell for p in grid} == {"elman", "gru", "lstm"}
        assert {p.window is None for p in grid} == {True, False}
        assert all(p.steps % (p.window or 1) == 0 for p in grid), "flax needs whole chunks"


class Here:
    """A process that is none."""

    def submit(self, f, *arguments):
        future = Future()
        future.set_result(f(*arguments))
        return future


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The tables of a grid whose contenders take given times, in a folder."""
    slow = {
        "textbook": 3.0,
        "textbook_indexed": 1.5,
        ("textbook_indexed", 4096): 0.9,
        "torch": 6.0,
        "products": 0.5,
        "one_pass_a_loss": 9.0,
        "chunks": 0.5,
        "embedding": 0.05,
        "scan_full": 0.4,
        "as_in_readme": 0.6,
        "snap(1)": 2.5,
        "nres(1)": 0.6,
        "numpy_rtrl": 6.0,
        "braintrace_snap": 3.0,
        **dict.fromkeys(contenders.PHASES[1:], 0.2),
        **dict.fromkeys(contenders.PRODUCTS, 0.1),
    }
    calls = []

    def seconds(name, point):
        calls.append(name)
        noise = 1 + 0.5 * (len(calls) % 2)
        return point.steps * slow.get((name, point.steps), slow.get(name, 1.0)) * noise

    def prepare(name, point):
        about = {"compile_seconds": 1.0, "temporary_bytes": 1e6, "predicted_bytes": 2e6}
        about |= {"states": point.steps**0.5, "scaled_by": 4.0 if "and_lag" in name else 1.0}
        about |= {"operations": 1e6 * slow.get(name, 1.0)} if name in estimators.ESTIMATORS else {}
        return about | {"warm": seconds(name, point)}

    monkeypatch.setattr(contenders, "run", lambda *run: (seconds(*run), 7))
    monkeypatch.setattr(contenders, "prepare", prepare)
    plan = bench.size(small=False)._replace(seconds=1e6)
    parts = {
        "grid": [(point, [n for n in bench.GRID if n != "flax"]) for point in plan.grid],
        "windows": plan.windows,
        "memory": plan.lengths,
        "phases": plan.phases,
        "networks": plan.networks,
        "estimators": plan.estimators,
        "peers": plan.peers,
    }
    for name, places in parts.items():
        rows = [
            row
            for point, who in places
            for row in bench.compared(point, who, dict.fromkeys(who, Here()), plan)
        ]
        write_table(bench._finished(pd.DataFrame(rows)), tmp_path / f"{name}.csv")
    held = [
        point._asdict() | {"contender": name, "temporary_bytes": 2.0 * point.steps}
        for point, who in plan.online
        for name in who
    ]
    write_table(pd.DataFrame(held), tmp_path / "online_memory.csv")
    machine = {table: {"processor": "none", "cores": 2, "jax": "0"} for table in bench.TABLES}
    (tmp_path / "machine.json").write_text(json.dumps(machine), encoding="utf-8")
    return tmp_path


def test_ratios_are_of_neighbours_in_time(tables):
    grid = read_table(tables / "grid.csv")
    first = grid[grid["contender"] == "ours"]
    assert (first[["ratio", "ratio_min", "ratio_max"]] == 1).all(axis=None)
    ratios = grid.loc[grid["contender"] == "torch", "ratio_max"]
    assert ratios.between(3.9, 9.1).all()
    assert (grid.loc[grid["contender"] == "products", "share_of_limit"] == 1).all()
    assert grid.loc[grid["contender"] == "torch", "share_of_limit"].between(0.05, 0.13).all()
    windows = read_table(tables / "windows.csv")
    scaled = windows[windows["contender"] == "lags_one_pass_a_loss_and_lag"]
    assert (scaled["seconds"] >= 4 * scaled["steps"]).all()
    assert (grid["page_faults"] == 7).all()


def test_a_phases_limit_is_its_own_products(tables):
    table = read_table(tables / "phases.csv")
    shares = table.groupby("contender")["share_of_limit"]
    assert shares.get_group("embedding").isna().all()
    for phase in contenders.PHASES[1:]:
        assert shares.get_group(phase).between(0.3, 0.8).all()
        assert (shares.get_group(f"{phase}_products") == 1).all()
    assert shares.get_group("full").between(0.25, 0.65).all(), "all four"


def test_estimators_are_beside_full_of_their_place(tables):
    table = read_table(tables / "estimators.csv").set_index(["cell", "contender"])
    assert (table.xs("full()", level=1)["operations_ratio"] == 1).all()
    assert table.loc[("gru", "snap(1)"), "operations_ratio"] == 2.5
    judged = bench.targets(tables).set_index("target")
    assert judged.loc["SnAp-1 ÷ full", ["judged", "reached"]].tolist() == ["worst", "no"]
    assert judged.loc["an ES pair ÷ full", "reached"] == "yes"
    assert judged.loc["numpy_rtrl ÷ rtrl(64)", "reached"] == "yes"
    assert judged.loc["braintrace_snap ÷ snap(1)", "reached"] == "no"
    assert judged.loc["bytes of online estimators ÷ those at T 1024", "worst"] == 2**6


@pytest.mark.slow
def test_operations_are_counted_again_as_the_mean_over_calls(tmp_path, monkeypatch):
    """By keys of random horizons; times stay. They are those that a measurement has."""
    monkeypatch.setattr(estimators, "DRAWS", 3)
    point = Point("elman", hidden=4, batch_size=2, steps=64)
    names = ["full()", "telescope(16)", "rtrl(64)"]
    held = pd.DataFrame([point._asdict() | {"contender": name, "seconds": 7.0} for name in names])
    write_table(held.assign(operations=1.0, operations_ratio=9.0), tmp_path / "estimators.csv")
    bench.count(tmp_path)
    found = read_table(tmp_path / "estimators.csv").set_index("contender")
    assert (found["seconds"] == 7).all() and found.loc["full()", "operations_ratio"] == 1
    strategy, (params, state, batch, key) = estimators._ready("telescope(16)", point)
    counts = [
        measure.arithmetic(without_metrics(strategy), params, state, batch, own)
        for own in jax.random.split(key, estimators.DRAWS)
    ]
    assert found.loc["telescope(16)", "operations"] == pytest.approx(np.mean(counts), rel=1e-6)
    assert counts[0] != pytest.approx(np.mean(counts), rel=0.01)
    for name in names:
        told = find(name)(point)[1]["operations"]
        assert told == pytest.approx(found.loc[name, "operations"], rel=1e-6)  # seven digits


def test_estimators_that_take_long_run_some_steps_and_are_scaled():
    """They run from the second call on: what is exact has the gradient of both."""
    point = Point("elman", hidden=4, batch_size=2, steps=12)
    (full, _), (whole, _) = (find(name)(point._replace(steps=4)) for name in ("full()", "rtrl(64)"))
    of_rank_n, about = find("sketched(4)")(point)
    examples.close(of_rank_n()[0].loss, full()[0].loss)
    examples.close(of_rank_n()[0].grads, whole()[0].grads, 1e-4)
    apart(of_rank_n()[0].grads, full()[0].grads)
    assert about["scaled_by"] == 3
    assert about["numbers"] == 4 * 33 + 4 * (4 + 4 * 33)


def rows(grads):
    """W_xh, W_hh and b_h one below the other, and the readout."""
    cell = grads["cell"]
    return {"W": np.vstack([cell["W_xh"], cell["W_hh"], cell["b_h"]])}, grads["readout"]


def second_call(name, point):
    once, _ = find(name)(point)
    once()
    return once()


def test_rtrl_in_numpy_is_ours():
    """In the second of two calls: the influence is carried."""
    point = Point("elman", hidden=4, batch_size=1, steps=6)
    ours, _ = find("rtrl(64)")(point)[0]()
    loss, theirs = second_call("numpy_rtrl", point)
    np.testing.assert_allclose(loss, ours.loss, rtol=1e-5)
    cell, readout = rows(ours.grads)
    examples.close(theirs, cell | readout, 1e-5)
    apart(find("numpy_rtrl")(point)[0]()[1]["W"], cell["W"])  # the first call


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (who[1], who[0])
        for who, *_ in bench.PEERS
        if who[1] not in ("numpy_rtrl", "braintrace_pp_prop")
    ],
)
@pytest.mark.filterwarnings("ignore:The SnAp-n position analysis")  # all links with all: RTRL
def test_braintrace_computes_the_same(theirs, ours):
    pytest.importorskip("braintrace", reason="pip install -e '.[bench]'")
    point = Point("elman", hidden=4, batch_size=2, steps=6)
    loss, found = second_call(theirs, point)
    own, _ = find(ours)(point)[0]()
    np.testing.assert_allclose(loss, own.loss, rtol=1e-5)
    examples.close(found["W"], rows(own.grads)[0]["W"], 1e-5)


def test_braintrace_pp_prop_is_its_definition():
    """Slopes that take no recurrent weight, divided by 1 - αᵗ; the bias has no trace of its feature."""
    pytest.importorskip("braintrace", reason="pip install -e '.[bench]'")
    point, decay = Point("elman", hidden=4, batch_size=2, steps=6), 0.9
    _, params, _, batch = points.setting(point)
    (W, readout), eye = rows(params), np.eye(points.SYMBOLS)
    h, x, f, t = np.zeros((2, 4)), np.zeros((2, 32)), np.zeros((2, 4)), 0
    for _ in range(2):
        expected = np.zeros_like(W["W"], float)
        for now, target in zip(batch.inputs, batch.targets, strict=True):
            seen = np.hstack([eye[now], h])
            h, t = np.tanh(np.hstack([seen, np.ones((2, 1))]) @ W["W"]), t + 1
            x, f = decay * x + seen, (1 - decay) * (1 - h**2)
            delta = jax.nn.softmax(h @ readout["W_hq"] + readout["b_q"]) - eye[target]
            e = delta @ readout["W_hq"].T / batch.mask.size
            features = np.hstack([x, np.ones((2, 1))])
            expected += features.T @ np.asarray(e * f) / (1 - decay**t)
    found = second_call("braintrace_pp_prop", point)[1]["W"]
    examples.close(found, expected, 1e-5)


def test_every_strategy_is_timed_or_another_name_of_one():
    timed = {called.strategy for called in estimators.ESTIMATORS.values()}
    assert timed >= {*estimators_of_the_package()} - {"discounted", "full_es"}
    held = [contenders.plan("snap(1)", Point("elman", 4, 2, T)) for T in (256, 1024)]
    assert held[0]["temporary_bytes"] == held[1]["temporary_bytes"] > 0


def estimators_of_the_package():
    """Not the laws, nor what the command line calls otherwise."""
    named = {"randomized": "randomized_constant", "telescope": "telescope_constant"}
    laws = {"Law", "constant", "power_law", "randomized_power_law"}
    return {named.get(name, name) for name in strategies.__all__ if name not in laws}


def test_targets_are_judged_by_the_median_or_the_worst_place(tables):
    judged = bench.targets(tables).set_index("target")
    assert judged.loc["textbook JAX ÷ ours at H ≤ 128", "reached"] == "yes"
    assert judged.loc["chunks ÷ full", "median"] < 1
    assert judged.loc["one pass a loss ÷ sliding window", "reached"] == "no"
    worst = judged.loc["fastest other ÷ ours"]
    assert (worst["judged"], worst["reached"]) == (
        "worst",
        "no",
    )
    assert worst["worst"] == pytest.approx(0.9)
    assert judged.loc["PyTorch ÷ two layers at H ≤ 128", "reached"] == "yes"
    assert judged.loc["bs.scan ÷ lax.scan", "worst"] < 1
    assert judged.loc["chunks by bs.scan ÷ full by bs.scan", "reached"] == "no"
    assert judged.loc["README's block ÷ split by hand", "reached"] == "yes"
    assert "60 processes ÷ a sweep without cache" not in judged.index
    sweep = [("a sweep again", np.nan, 1), ("a process for each run, no cache", 7.0, 60)]
    columns = ["way", "ratio", "compiled"]
    write_table(pd.DataFrame(sweep, columns=columns), tables / "sweep.csv")
    judged = bench.targets(tables).set_index("target")
    assert judged.loc["60 processes ÷ a sweep without cache", "reached"] == "yes"
    assert judged.loc["programs compiled by a second start", "reached"] == "no"


@pytest.mark.slow
def test_two_checkouts_in_turn(tmp_path):
    checkout = Path(__file__).parents[2]
    command = [
        sys.executable,
        before.__file__,
        checkout,
        tmp_path / "table.csv",
        "--small",
        "--cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["strategy"]) == ["full", "chunks"]
    holds = table["ratio"].median() >= before.MEDIAN and table["ratio"].min() >= before.WORST
    assert done.returncode == (0 if holds else 1), done.stderr


@pytest.mark.slow
def test_the_figures_can_be_read(tables, monkeypatch):
    drawn, save = [], figure_layout.save

    def keep(figure, folder, name):
        drawn.append(figure)
        return save(figure, folder, name)

    monkeypatch.setattr(figure_layout, "save", keep)
    files = bench.draw(tables)
    assert [f.name for f in files] == [
        f"{name}.png" for name in ("ratios", "length", "phases", "estimators")
    ]
    for figure in drawn:
        layout.check(figure)


def test_the_committed_files_are_described_and_judged_as_their_tables_say(tmp_path):
    if not (RESULTS / "grid.csv").is_file():
        pytest.skip("not measured yet: make bench")
    readme = (RESULTS / "README.md").read_text(encoding="utf-8")
    for file in RESULTS.iterdir():
        assert f"`{file.stem}." in readme or file.stem.startswith("README"), file.name
    judged = bench.targets(RESULTS)
    pd.testing.assert_frame_equal(judged, read_table(RESULTS / "targets.csv"), check_dtype=False)
