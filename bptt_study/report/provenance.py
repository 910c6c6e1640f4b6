"""The file provenance.json of a study: all that differs from machine to machine and from run to run.

It has a line for each run: device, versions, commit, and the seconds at each logged update. No other file of
a study depends on clock or machine.
"""

import json
from pathlib import Path

import pandas as pd

from bptt_study import files
from bptt_study.report import csv_tables
from bptt_study.validation import one_line

FILE = "provenance.json"
# shapes, see `files.has_shape`
SERIES = [{"run": str, "update": list, "seconds": list}]
VALUES = [{str: (str, int, float, bool, None, [(int, float)])}]


def packed(costs: pd.DataFrame) -> str:
    """Turn the costs of runs into JSON, with a line for each run.

    Args:
      costs: The tables costs.csv of the runs, one below the other. All seeds of a run have the same costs.
    """
    found = []
    for run, part in costs.drop(columns=["study", "seed"]).groupby("run", sort=False):
        moments = part.drop_duplicates("update")
        same = moments.iloc[0].drop(["run", "update", "seconds"])
        series = moments[["update", "seconds"]].to_dict("list")
        found.append({"run": run, **json.loads(same.to_json()), **series})
    return "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in found) + "\n]\n"


def read(folder: Path) -> pd.DataFrame:
    """Read the costs of a study: one row per run and logged update.

    Raises:
      SettingError: If the file is damaged.
    """
    try:
        found = files.read_json(folder / FILE)
        if not all(files.has_shape(found, shape) for shape in (SERIES, VALUES)):
            raise TypeError("its lines are not those of runs")
        moments = pd.DataFrame(found).explode(["update", "seconds"], ignore_index=True)
        return moments.astype({"run": str, "update": int, "seconds": float})
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise csv_tables.damaged(folder / FILE, one_line(error)) from error
