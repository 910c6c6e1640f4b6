"""The results of a study in Python: its tables, and each trained run ready for the instruments.

run = bs.results.load("results/mine").run("3f2a")
table = bs.lags.gradients(run.problem, run.params(0), run.batch, lags=16)
profile = bs.lags.mass(table)
"""

import json
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd
import yaml

from bptt_study import files
from bptt_study.report import columns, csv_tables, tables
from bptt_study.runner import array_files, census, configure, environment, own_code, run_folder
from bptt_study.training.resets import opening
from bptt_study.training.train import run_keys
from bptt_study.types import Batch, Params, Problem, Strategy, Task
from bptt_study.validation import SettingError

INTEGERS = (
    "window", "stride", "draws", "hidden", "steps", "batch_size", "updates", "logs", "split", "reset_every",
    "seeds", "first_seed", "snapshots", "sample_length", "parameters", "lag", "task.length", "symbols", "t1",
    "t2", "states", "positive", "burn_in", "horizon", "diverged_at",
)  # fmt: skip
NODE = {"_target_": str}
CONFIG = {  # the shape of config.yaml, see `files.has_shape`
    **dict.fromkeys(("task", "cell", "strategy"), NODE),
    "budget": {"steps": int, "batch_size": int, "reset_every?": (int, None)},
    "first_seed": int,
    "seeds": int,
}
FLAGS = ("compensate", "exact", "unbiased", "diverged")


@dataclass(frozen=True)
class Run:
    """A finished run of a study."""

    identity: str
    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "_made", files.sealed_at(self.folder))

    def _file(self, name: str) -> Path:
        """Return the path of a file, if the folder is still that of the run that this object was made of."""
        if files.sealed_at(self.folder) != getattr(self, "_made"):  # noqa: B009
            why = "it has been made anew or removed since; `bs.results.load` gives the new one"
            raise array_files.UnusableError(f"run {self.identity}: {why}")
        return self.folder / name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as in `config.yaml`."""
        try:
            found = yaml.safe_load(self._file("config.yaml").read_text(encoding="utf-8"))
            good = files.has_shape(found, CONFIG) and bool(json.dumps(found))
        except (yaml.YAMLError, UnicodeError, TypeError, RecursionError):
            good = False
        if not good:
            why = "config.yaml is not the configuration of a run"
            raise array_files.UnusableError(f"run {self.identity}: {why}")
        return dict(found)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows of the run: one per seed and log point. UnusableError: see `params`."""
        return typed(csv_tables.read_table(self._file("rows.csv")))

    @property
    def task(self) -> Task:
        """The task; a text is read again, and must be the text of the run."""
        return self._subject[0]

    @property
    def problem(self) -> Problem:
        """The cell, the readout and the loss."""
        return self._subject[1]

    @property
    def strategy(self) -> Strategy:
        """The strategy that the run was trained with."""
        return self._subject[2]

    @property
    def batch(self) -> Batch:
        """The first part of the validation data: the steps and sequences of one update, cut at its resets."""
        numbers = map(self.config["budget"].get, ("steps", "batch_size", "reset_every"))
        return opening(self.task.validation, *numbers)

    @property
    def seeds(self) -> range:
        """The seeds of the run."""
        first = self.config["first_seed"]
        return range(first, first + self.config["seeds"])

    def params(self, seed: int) -> Params:
        """Read the trained parameters of a seed.

        Args:
          seed: A number in `seeds`.

        Returns:
          The parameters, in the precision that JAX is set to.

        Raises:
          SettingError: For a seed that the run does not have.
          UnusableError: If the file is damaged, the code, the corpus or JAX's random numbers have changed since
            the run, or the run has been made anew since this object was made.
        """
        place = self._place(seed)
        leaves, _ = array_files.read(self._file("params.npz"))
        shapes = jax.eval_shape(self.problem.init, jax.random.key(0))

        def of_seed(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            leaf = leaves.get(name)
            if leaf is None or leaf.shape != (len(self.seeds), *like.shape):
                found = "missing" if leaf is None else f"{list(leaf.shape)}"
                expected = [len(self.seeds), *like.shape]
                raise array_files.UnusableError(f"{name} is {found}; expected {expected}")
            return jnp.asarray(leaf[place], like.dtype)

        return jax.tree_util.tree_map_with_path(of_seed, shapes)

    def start(self, seed: int) -> Params:
        """Make the parameters from which a seed started, those of update 0; see `params`.

        They are drawn anew, so JAX must have the precision of the run.
        """
        seed = self.seeds[self._place(seed)]
        self._check_settings("enable_x64")
        return self.problem.init(run_keys(jax.random.key(seed))[0])

    def _place(self, seed: int) -> int:
        if seed not in self.seeds:
            raise SettingError("seed", seed, f"in {self.seeds.start} … {self.seeds.stop - 1}")
        return self.seeds.index(seed)

    @cached_property
    def _subject(self) -> tuple[Task, Problem, Strategy]:
        self._check_settings(*environment.DRAWS)
        ran = run_folder.about(run_folder.RunPaths(self.folder.parent, self.identity))
        code = own_code.code([self.config[group] for group in ("task", "cell", "strategy")])
        modules = {name: found for name, found in code.items() if not name.startswith("file ")}
        self._check_same(ran, ran.get("corpus_sha256"), modules)  # before any of it is called
        parts = configure.subject(self.config)
        self._check_same(ran, parts[0].facts.get("corpus_sha256"), code)
        return parts

    def _check_same(self, ran: dict[str, Any], corpus: str | None, code: dict[str, str]) -> None:
        """Raise UnusableError if the corpus, or code of these names, is not that of the run."""
        then = {name: found for name, found in ran.get("code", {}).items() if name in code}
        if changed := run_folder.changes(ran | {"code": then}, corpus, code):
            raise array_files.UnusableError(f"run {self.identity}: {'; '.join(changed)}")

    def _check_settings(self, *names: str) -> None:
        """Raise UnusableError if a setting of JAX, on which a draw depends, is not that of the run."""
        now, file = environment.environment(), self._file("machine.json")
        try:
            made = {**files.read_json(file)}
        except (ValueError, TypeError) as error:
            why = f"run {self.identity}: machine.json is not that of a run"
            raise array_files.UnusableError(why) from error
        for name in names:
            if (was := made.get(name, environment.DEFAULTS[name])) != now[name]:
                why = (
                    f"it was made with jax_{name}={was}, now it is {now[name]}; a draw would differ"
                )
                raise array_files.UnusableError(f"run {self.identity}: {why}")


@dataclass(frozen=True)
class Study:
    """The tables and the runs of a study."""

    folder: Path
    table: pd.DataFrame  # one row per run, seed and log point

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The settings of each run, indexed by its identity; those that tell the runs apart come first."""
        first = [c for c in tables.varying(self.table) if c != "run"]
        rest = [c for c in self.table if columns.kind(str(c)) == "setting" and c not in first]
        return self.table.drop_duplicates("run").set_index("run")[[*first, *rest]]

    def summary(self) -> pd.DataFrame:
        """Summarise the runs.

        Returns:
          The last scores of each run with intervals over seeds, indexed by its identity.
        """
        return tables.summary(self.table).set_index("run")

    def run(self, identity: str) -> Run:
        """Find a finished run.

        Args:
          identity: Its identity, or the beginning of it.

        Returns:
          The run.

        Raises:
          SettingError: If no identity or several begin so, or if the folder of the run is missing or damaged.
        """
        found = [run for run in self.runs.index if run.startswith(str(identity))]
        if len(found) != 1:
            known = ", ".join(self.runs.index)
            raise SettingError("identity", identity, f"the beginning of one of {known}")
        paths = run_folder.run_paths(self.folder.parent, self.folder.name, found[0])
        folder = paths.folder
        wrong = run_folder.faults(paths) if folder.exists() else [f"{folder} is missing"]
        if wrong:
            way_out = f"Reason: {'; '.join(wrong)}. The same command makes it again."
            raise SettingError(
                "identity", identity, "that of a run whose folder is intact", way_out
            )
        return Run(found[0], folder)


def load(folder: Path | str) -> Study:
    """Load a study.

    Args:
      folder: Its folder of tables, such as `results/mine`. Without a table, the rows come from its runs.

    Returns:
      The study.

    Raises:
      SettingError: If there is neither a table nor a finished run, or if the table is damaged.
    """
    folder = Path(folder).expanduser().resolve()
    if (folder / csv_tables.TABLE).is_file():
        census.say_faults(folder)
        table = csv_tables.read_rows(folder)
    else:
        ended = run_folder.others(run_folder.Sweep(folder.parent, folder.name, None, {}))
        census.say_ended(folder.name, ended)
        table = csv_tables.gather((p.folder for p in ended.finished.values()), "rows.csv")
        if len(table):  # the types of a table of all runs: numbers beside texts are texts
            table = csv_tables.read_table(BytesIO(csv_tables.packed(table, "rows.csv")))
    if table.empty:
        allowed = "the folder of a study, with a table or with finished runs"
        raise SettingError("folder", folder, allowed, "`bptt-study-status RESULTS_DIR` lists them.")
    return Study(folder, typed(table))


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of a table their types.

    Args:
      table: A table as `read_table` reads it.

    Returns:
      The table with whole numbers and flags as such even if some are missing, and other settings as floats.
    """
    found = {name: "Int64" for name in INTEGERS if name in table and _whole(table[name])}
    found |= {str(name): "boolean" for name, column in table.items() if _flags(column)}
    numbers = [c for c in map(str, table.select_dtypes("int")) if columns.kind(c) == "setting"]
    return table.astype(dict.fromkeys(numbers, "float64") | found)


def _flags(column: pd.Series) -> bool:
    """Return True if all values are flags. A column of FLAGS may lack them all, or have them as 0 and 1."""
    if column.name in FLAGS:
        return bool(column.dropna().isin([True, False]).all())
    return pd.api.types.infer_dtype(column, skipna=True) == "boolean"


def _whole(column: pd.Series) -> bool:
    values = pd.to_numeric(column, errors="coerce")
    return bool(((values % 1 == 0) | column.isna()).all())
