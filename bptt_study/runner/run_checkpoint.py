"""A run's checkpoint: written now and then while it trains, and where it goes on after it was killed."""

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


class Halfway:
    """`pause` and `restore` of `train`, for one run.

    file: of the checkpoint. about: what a checkpoint must agree with to be gone on from. seconds: between
    two of them; None: none is written (one that is there is gone on from). seen: the probes' tables so
    far, which grow while the run goes on and are restored with it.
    """

    def __init__(
        self,
        file: Path,
        about: Mapping[str, Any],
        seconds: float | None,
        seen: dict[str, list[pd.DataFrame]],
    ) -> None:
        self.file, self.about, self.seconds, self.seen = file, dict(about), seconds, seen
        self.last: tuple[Trained, dict[str, list[pd.DataFrame]]] | None = None
        self.saved = time.monotonic()

    def pause(self, trained: Trained) -> None:
        """Remember this state, and write it if the time has come."""
        self.last = trained, {name: list(tables) for name, tables in self.seen.items()}
        if self.seconds is not None and time.monotonic() - self.saved >= self.seconds:
            self.save()

    def save(self) -> None:
        """Write the last state, unless checkpoints are off; a full disk costs the checkpoint, not the run."""
        if self.last is None or self.seconds is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            array_files.save(self.file, _tree(*self.last), self.about)
        except OSError as error:
            log.warning("no checkpoint: %s; the run goes on", error)
        self.saved = time.monotonic()

    def restore(self, progress: Progress) -> Trained:
        """What the checkpoint holds, if there is one that fits; else the start, `progress`."""
        files.sweep_up(self.file)
        if not self.file.exists():
            return Trained(progress, [])
        try:
            leaves, about = array_files.read(self.file)
            for name, value in self.about.items():
                if about.get(name) != value:
                    raise array_files.UnusableError(
                        f"its {name} is {about.get(name)}, and now {value}"
                    )
            trained = self._restored(leaves, progress)
        except array_files.UnusableError as error:
            aside = files.set_aside(self.file)
            log.warning("%s cannot be gone on from: %s; set aside as %s, the run starts from zero",
                        self.file, error, aside.name)  # fmt: skip
            return Trained(progress, [])
        log.info(
            "goes on from update %d, of %s", int(trained.progress.update.max()), self.file.name
        )
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
            self.seen[name] = [_table(str(text))]
        return Trained(state, records, float(leaves["seconds"]))


def _tree(trained: Trained, seen: Mapping[str, list[pd.DataFrame]]) -> dict[str, Any]:
    """All that a run needs to go on, as arrays; the inverse of `_restored`."""
    names = trained.records[0] if trained.records else {}
    return {
        "progress": trained.progress,
        "records": {name: np.stack([r[name] for r in trained.records]) for name in names},
        "seen": {name: np.array(_text(pd.concat(t))) for name, t in seen.items() if t},
        "seconds": np.array(trained.seconds),
    }


def _text(table: pd.DataFrame) -> str:
    """A table with its types, exactly."""
    return json.dumps({str(c): [str(table[c].dtype), table[c].tolist()] for c in table})


def _table(text: str) -> pd.DataFrame:
    columns = json.loads(text)
    return pd.DataFrame({c: pd.Series(values, dtype=kind) for c, (kind, values) in columns.items()})
