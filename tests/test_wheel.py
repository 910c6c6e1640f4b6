"""The installed wheel, away from the checkout: conf/ and experiments/ are inside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel's contents, built and unpacked by pip as for a user."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *offline, "-w", folder, CHECKOUT], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(site, cwd, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_wheel_runs_a_study_from_anywhere(site, tmp_path):
    where = run(site, tmp_path, "-c", "import bptt_study; print(bptt_study.__file__)")
    assert where.stdout.startswith(str(site)), where.stderr
    # two runs of the headline instead of all: what counts is that conf/ and the figures are found
    done = run(
        site, tmp_path, "-m", "bptt_study", "-m", "experiment=compare_strategies", "size=smoke",
        "task=char_lm,digits", "strategy=full,fixed,randomized", "truncation=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "results" / "compare_strategies"
    assert (folder / "table.csv.gz").is_file()
    assert {f.suffix for f in folder.iterdir()} >= {".png", ".gz", ".csv", ".json"}
    assert f"figure: {Path('results') / 'compare_strategies'}" in done.stdout


@pytest.mark.slow
def test_the_package_carries_its_types_and_no_tests(site):
    assert (site / "bptt_study" / "py.typed").is_file()
    assert (site / "bptt_study" / "conf" / "config.yaml").is_file()
    assert not (site / "tests").exists()
    assert not (site / "conf").exists()
