"""The checkpoint of a run: it is written while the run trains, and read when the run continues after a kill."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bptt_study import files
from bptt_study.runner import array_files
from bptt_study.training.train import Progress, Trained

log = logging.getLogger(__name__)


class RunCheckpoint:
    """The functions `pause` and `restore` that `train` calls, for one run.

    Args:
      file: The file of the checkpoint.
      about: Facts that a checkpoint must share with this run. Otherwise it is not used.
      seconds: The time between two checkpoints. None: no checkpoint is written, but an existing one is used.
      probed: The tables of the probes so far. The run appends to them, and `restore` refills them.
    """

    def __init__(
        self,
        file: Path,
        about: Mapping[str, Any],
        seconds: float | None,
        probed: dict[str, list[pd.DataFrame]],
    ) -> None:
        self.file, self.about, self.seconds, self.probed = file, dict(about), seconds, probed
        self.last: tuple[Trained, dict[str, list[pd.DataFrame]]] | None = None
        self.saved = time.monotonic()

    def pause(self, trained: Trained) -> None:
        """Keep this state, and write it if `seconds` have passed since the last checkpoint."""
        self.last = trained, {name: list(tables) for name, tables in self.probed.items()}
        if self.seconds is not None and time.monotonic() - self.saved >= self.seconds:
            self.save()

    def save(self) -> None:
        """Write the last state, unless checkpoints are off. On a full disk the run continues without one."""
        if self.last is None or self.seconds is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            array_files.save(self.file, _tree(*self.last), self.about)
        except OSError as error:
            log.warning("no checkpoint was written: %s; the run continues", error)
        self.saved = time.monotonic()

    def restore(self, progress: Progress) -> Trained:
        """Return the state in the run's checkpoint, or the initial state `progress` if there is none.

        Raises:
          SettingError: If no file can hold such a state. Nothing is trained yet.
        """
        array_files.named(progress)
        files.remove_temporary(self.file)
        if not self.file.exists():
            return Trained(progress, [])
        try:
            leaves, about = array_files.read(self.file)
            for name, value in self.about.items():
                if about.get(name) != value:
                    differs = f"its {name} is {about.get(name)}, and that of this run is {value}"
                    raise array_files.UnusableError(differs)
            trained = self._restored(leaves, progress)
        except array_files.UnusableError as error:
            aside = files.set_aside(self.file)
            line = "%s cannot be used: %s; it is kept as %s, and the run starts from the beginning"
            log.warning(line, self.file, error, aside.name)
            return Trained(progress, [])
        log.info("continues from update %d (%s)", trained.progress.update.max(), self.file.name)
        return trained

    def _restored(self, leaves: Mapping[str, np.ndarray], progress: Progress) -> Trained:
        parts: dict[str, dict[str, np.ndarray]] = {"progress": {}, "records": {}, "seen": {}}
        for name, leaf in leaves.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = leaf
        state = array_files.restore(parts["progress"], progress)
        logged = parts["records"]
        count = len(logged["update"]) if logged else 0
        records = [{name: values[i] for name, values in logged.items()} for i in range(count)]
        for name, text in parts["seen"].items():
            self.probed[name] = [_table(str(text))]
        return Trained(state, records, float(leaves["seconds"]))


def _tree(trained: Trained, probed: Mapping[str, list[pd.DataFrame]]) -> dict[str, Any]:
    """Write everything that a run needs to continue as arrays; the inverse of `_restored`."""
    names = trained.records[0] if trained.records else {}
    return {
        "progress": trained.progress,
        "records": {name: np.stack([r[name] for r in trained.records]) for name in names},
        "seen": {name: np.array(_text(pd.concat(t))) for name, t in probed.items() if t},
        "seconds": np.array(trained.seconds),
    }


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the values and types that a checkpoint can hold, as it would be read from one.

    Numbers, flags and texts stay as they are. Arrays and scalars of NumPy and JAX in a column of objects become
    lists and numbers, and other objects become texts.

    Args:
      table: A table.

    Returns:
      The table.

    Raises:
      TypeError, ValueError: For columns that have one name, and for values that cannot be held.
    """
    if not table.columns.is_unique:
        raise ValueError("two columns have one name")
    return _table(_text(table))


def _text(table: pd.DataFrame) -> str:
    """Write a table as text that keeps every value and type exactly."""
    columns = {c: [str(table[c].dtype), table[c].tolist()] for c in table}
    return json.dumps(columns, default=_value)


def _value(value: Any) -> Any:
    """Return an object as something that JSON can hold."""
    if value is pd.NA:
        return None
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _table(text: str) -> pd.DataFrame:
    """Read the table from a text; the inverse of `_text`."""
    columns = json.loads(text)
    return pd.DataFrame({c: pd.Series(values, dtype=kind) for c, (kind, values) in columns.items()})
