"""The library on a GPU in one short run: are gradients equal, how fast are they, does the study come out?

    PYTHONPATH=. python experiments/benchmark/gpu.py FOLDER [--only equal,bench,study] [--small]

Each part runs in a process of its own within a time limit, and writes `FOLDER/gpu/PART.csv` row by row. So a
part that is stopped leaves its results, and a part that fails does not stop the others. Then the script makes a
figure, `summary.csv` and `machine.json`, and prints a short table. It needs neither Hydra nor a network.
`--small` takes a minute on a quiet CPU. The status is 0 if all parts ended and all judgements hold.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bptt_study import files
from bptt_study.report import figure_layout, plots
from bptt_study.report.csv_tables import read_table, write_table
from bptt_study.training import devices

# seconds after which a part begins no new row; GRACE seconds later it is killed
LIMITS = {"equal": 95, "bench": 120, "study": 80}
SMALL = dict.fromkeys(LIMITS, 400)  # a busy CPU needs longer than a minute
GRACE = 20


def run_part(part: str, folder: Path, small: bool) -> None:
    """Write the rows of one part as they come; `started` calls this in a process of its own."""
    end = time.monotonic() + (SMALL if small else LIMITS)[part]
    rows: list[dict[str, Any]] = []
    found: Iterable[dict[str, Any]] = import_module(f"gpu_{part}").rows(small)
    for row in found:
        rows.append(row)
        write_table(pd.DataFrame(rows), folder / f"{part}.csv")
        if time.monotonic() > end:
            sys.exit("stopped at its time limit")
    print("complete")


def started(part: str, folder: Path, small: bool) -> str:
    """Run a part in a process of its own, and describe in words how it ended."""
    (folder / f"{part}.csv").unlink(missing_ok=True)
    limit = (SMALL if small else LIMITS)[part] + GRACE
    command = [sys.executable, __file__, str(folder), "--part", part, *["--small"] * small]
    environment = ({"XLA_FLAGS": devices.COMPILER} if small else {}) | os.environ
    try:
        done = subprocess.run(
            command, timeout=limit, env=environment, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"killed after {limit} s"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return said[-1] if said else f"failed with status {done.returncode}"


def summary(folder: Path, ended: dict[str, str]) -> pd.DataFrame:
    """Make one line for each judgement: part, value, bound, and whether it holds; blank without a judgement."""
    lines: list[dict[str, Any]] = []
    for part, how in ended.items():
        table = folder / f"{part}.csv"
        rows = read_table(table) if table.is_file() else pd.DataFrame()
        about = {"part": part, "what": f"{len(rows)} rows; {how}"}
        lines.append(about | {"holds": how == "complete"})
        if len(rows):
            judged = import_module(f"gpu_{part}").judged(rows)
            lines += [{"part": part, **line} for line in judged]
    return pd.DataFrame(lines, columns=["part", "what", "value", "bound", "holds"])


def draw(folder: Path) -> Iterator[Path]:
    """Draw the speed relative to textbook JAX and to PyTorch by hidden units; nothing without a table."""
    if not (folder / "bench.csv").is_file():
        return
    table = read_table(folder / "bench.csv")
    if "ratio" not in table:
        return
    table = table.dropna(subset=["ratio"])
    rivals = sorted(set(table["rival"]))
    machine = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    with figure_layout.style():
        figure, axes = figure_layout.figure(
            1,
            len(rivals),
            (1 + 5 * len(rivals), 5),
            "One loss and gradient on this device: how many times as fast as others",
            "Each marker is a place of the grid, medians of repeated runs. Above the dotted line bptt_study is "
            f"faster. {machine['device']}, JAX {machine['jax']}.",
        )
        for rival, ax in zip(rivals, axes[0], strict=True):
            own = table[table["rival"] == rival]
            for cell, color in zip(sorted(set(table["cell"])), plots.COLORS, strict=False):
                rows = own[own["cell"] == cell]
                ax.plot(rows["hidden"], rows["ratio"], "o", color=color, label=cell)
            ax.axhline(1, **plots.REFERENCE)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xlabel("hidden units H")
            ax.set_ylabel(f"seconds of {rival} ÷ seconds of bptt_study")
            ax.legend()
        yield from figure_layout.save(figure, folder, "speed")


def machine() -> dict[str, Any]:
    """Read the device, its driver and the versions in a process of its own."""
    code = (
        "import jax; d = jax.devices()[0]; print(d.device_kind, d.client.platform_version, sep='|')"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    device, _, platform_version = asked.stdout.strip().partition("|")
    found = {"device": device or "none found", "platform": platform_version.partition("\n")[0]}
    with suppress(FileNotFoundError):
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    for name in ("jax", "jaxlib", "torch", "numpy", "optax"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"python": platform.python_version()}


def main(folder: Path, parts: list[str], small: bool) -> int:
    """Run the parts one after the other, print the table, and return the exit status."""
    folder = folder / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    about, begun = machine(), time.monotonic()
    ended = {}
    for part in parts:
        ended[part] = started(part, folder, small)
        about["seconds"] = round(time.monotonic() - begun, 1)
        files.write(folder / "machine.json", json.dumps(about, indent=1) + "\n")
    lines = summary(folder, ended)
    write_table(lines, folder / "summary.csv")
    print(lines.to_string(index=False, na_rep="", float_format="{:.2g}".format), flush=True)
    drawn = [file.name for file in draw(folder)]
    print(f"{about['device']}; {about['seconds']} s; {folder}", *drawn)
    return int(not np.all(lines["holds"].dropna().astype(bool)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the results")
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, separated by commas")
    parser.add_argument("--small", action="store_true", help="a minute on a CPU")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - set(LIMITS):
        parser.error(f"--only must be some of {','.join(LIMITS)}; got {','.join(sorted(unknown))}")
    if given.part:
        run_part(given.part, given.folder, given.small)
    else:
        sys.exit(main(given.folder, given.only.split(","), given.small))
