"""Functions from tables to tables: census, medians over seeds, intervals. No files, no axes, no jax."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from bptt_study.report.columns import group, kind, worst
from bptt_study.validation import SettingError

SCORES = ("validation_loss", "accuracy")
# the columns that a summary always has, before all others that tell runs apart
LABELS = ("task", "corpus", "cell", "strategy", "truncation_length")
# The share by which a score must lie below a reference. These are expectations, or of the training part: on
# the validation part, an answer without input lies as much as 2.4 % below them (task=series, horizon=-39).
CLEARLY = 0.025
REFERENCES = {
    "uniform_loss": "chance",
    "nothing_loss": "no input",
    "t2_loss": "t2 only",
    "t1_loss": "t1 only",
    "both_loss": "both lags",
    "unigram_loss": "1-gram",
    "bigram_loss": "2-gram",
    "trigram_loss": "3-gram",
    "fourgram_loss": "4-gram",
}
CHANCE = {"chance_accuracy": "chance"}
UNSCORED = ("sampling", "prefix")  # settings of a task that change no token of the validation part
DRAWN = {"task", "environment"}  # what decides the data that a seed draws: a group, and a setting
# the columns that distinguish the panels of a figure, and the lines of a panel; length: see `lengths`
PANEL = ("task", "corpus", "cell", "hidden", "spectral_radius")
LINE = ("strategy", "length", "run")
SPREAD = ["median", "low", "high"]  # the columns of an aggregated value
LARGEST = 2**23  # the largest number of values that are resampled at a time


def missing(rows: pd.DataFrame, expected: Mapping[str, int]) -> list[str]:
    """List the runs that do not have the expected number of rows."""
    found = rows["run"].value_counts().to_dict() if len(rows) else {}
    return [run for run, count in expected.items() if found.get(run, 0) != count]


def final(rows: pd.DataFrame, *scores: str) -> pd.DataFrame:
    """Select the last row of every run and seed; these scores are nan where the seed has diverged."""
    last = rows[rows["update"] == rows.groupby("run")["update"].transform("max")]
    return unless_stopped(last, *scores)


def at_end(probed: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of a probe's table after the last update of each run; none if only its start was seen."""
    return probed[probed["update"] == probed["run"].map(rows.groupby("run")["update"].max())]


def interval(
    values: pd.Series, resamples: int = 2000, rank: float = np.inf
) -> tuple[float, float, float]:
    """Compute the median over seeds and its 95 % bootstrap interval (percentile).

    The value of a diverged seed is not finite and ranks as `rank`, so it neither vanishes nor hides the
    others. The random numbers are fixed: the same values in the same order give the same interval. In another
    order its ends may differ a little, and the rows of a run are in the order of its seeds. The number of seeds
    is too small for a normal approximation.

    Args:
      values: The values of the seeds.
      resamples: The number of bootstrap samples.
      rank: That of a value that is not finite, inf or -inf. nan: either, as no end is the worst; the lower end
        of the interval is then that of -inf, and the upper end and the median are those of inf.

    Returns:
      The median, and the lower and upper end of the interval.
    """
    (found,) = _intervals([values.to_numpy(float)], resamples, rank)
    return found


def _intervals(
    samples: Sequence[Any], resamples: int = 2000, rank: float = np.inf
) -> list[tuple[float, float, float]]:
    """Compute the `interval` of many samples; samples of one size share their draws."""
    if np.isnan(rank):
        least, most = (_intervals(samples, resamples, end) for end in (-np.inf, np.inf))
        return [(m, low, high) for (_, low, _), (m, _, high) in zip(least, most, strict=True)]
    found: list[tuple[float, float, float]] = [(np.nan,) * 3] * len(samples)
    sizes = np.array([len(sample) for sample in samples])
    for size in np.unique(sizes):
        draws = np.random.default_rng(0).integers(size, size=(resamples, size))
        places = np.flatnonzero(sizes == size)
        for part in np.array_split(places, -(-len(places) * size * resamples // LARGEST)):
            sample = np.array([samples[i] for i in part], float)
            sample = np.where(np.isfinite(sample), sample, rank)
            # the nearest order statistic, because no value lies between a number and infinity
            low, high = np.quantile(
                _medians(sample[:, draws]), (0.025, 0.975), axis=1, method="nearest"
            )
            for i, *row in zip(part, _medians(sample), low, high, strict=True):
                found[i] = (float(row[0]), float(row[1]), float(row[2]))
    return found


def median(score: str, values: Any, diverged: Any) -> float:
    """Compute the median over seeds of a score, in which a diverged seed is the worst as in `aggregate`.

    Args:
      score: The column of the score.
      values: Its value for each seed; that of a diverged seed is of an earlier update.
      diverged: Whether each seed has diverged.

    Returns:
      The median.
    """
    return float(_medians(np.where(diverged, worst(score), values)))


def _medians(draws: np.ndarray) -> np.ndarray:
    """Compute the medians over the last axis, as the mean of the two middle values if n is even."""
    n = draws.shape[-1]
    middle = np.sort(draws, axis=-1)[..., [(n - 1) // 2, n // 2]]
    medians: np.ndarray = middle.mean(axis=-1)
    return medians


def aggregate(
    rows: pd.DataFrame, by: Sequence[str], value: str, rank: float | None = None
) -> pd.DataFrame:
    """Aggregate `value` over the seeds of each group: n, diverged, median, low, high.

    Groups come in the order of the rows; a missing key (NaN) is a key like any other. A seed counts as diverged
    and ranks as the worst if the columns `diverged` or `stopped` say so, whatever its value, or if its value is
    not finite. Where the column `diverged` says that none has, a score that no seed of a group has is missing;
    a validation loss is never missing. Rows of `scored` leave out the runs that never have a score, such as
    accuracy in regression.

    Args:
      rows: The rows, one per seed and group.
      by: The columns of the groups.
      value: The column of the value.
      rank: The rank of a diverged seed, as in `interval`. None: that of the column, `columns.worst`.

    Raises:
      SettingError: If a group has seeds of several runs, or several rows of a seed.
    """
    _check_seeds(rows, list(by), value)
    rows = unless_stopped(rows, value)
    had = rows[value].notna() | (_stopped(rows) if "diverged" in rows else True)
    lost = ~np.isfinite(rows[value].astype(float))
    rows = rows[list(dict.fromkeys([*by, "seed", value]))].assign(diverged=lost, had=had)
    groups = rows.groupby(list(by), sort=False, dropna=False)
    table = groups.agg(
        n=("seed", "nunique"),
        diverged=("diverged", "sum"),
        values=(value, list),
        had=("had", "sum"),
    ).reset_index()
    spread = _intervals(list(table.pop("values")), rank=worst(value) if rank is None else rank)
    columns = np.reshape(spread, (-1, 3)).T  # also without rows
    missing = (table.pop("had") == 0) & (value != SCORES[0])
    columns[:, missing] = np.nan
    table["diverged"] = table["diverged"].where(~missing, 0)
    return table.assign(**dict(zip(SPREAD, columns, strict=True)))


def _check_seeds(rows: pd.DataFrame, by: list[str], value: str) -> None:
    """Raise SettingError if a group of `aggregate` has seeds of several runs, or several rows of a seed."""
    groups = rows.groupby(by, dropna=False)
    of_runs = "run" in rows and groups["run"].nunique().max() > 1
    if of_runs or rows.duplicated([*by, "seed"]).any():
        told = {*by, value, "run", "seed"}
        names = [c for c in map(str, rows) if kind(c) != "result" and c not in told]
        apart = [c for c in names if groups[c].nunique(dropna=False).max() > 1]
        allowed = "columns that tell the runs apart" if of_runs else "columns with one row per seed"
        way_out = f"These rows differ in {', '.join(apart) or 'run'}."
        raise SettingError("by", ", ".join(by), allowed, way_out)


def unless_stopped(rows: pd.DataFrame, *values: str) -> pd.DataFrame:
    """Make values nan if their seed has diverged, or had in a probe's table: they are of an older update."""
    kept = ~_stopped(rows)
    return rows.assign(**{name: rows[name].where(kept) for name in values})


def _stopped(rows: pd.DataFrame) -> pd.Series:
    return rows.reindex(columns=["diverged", "stopped"]).eq(True).any(axis=1)


def named(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rename median, low and high to `name`, `name`_low and `name`_high."""
    return table.rename(columns=dict(zip(SPREAD, interval_of(name), strict=True)))


def interval_of(name: str) -> list[str]:
    """Return the columns that `named` makes: those of a median and of the ends of its interval."""
    return [name, f"{name}_low", f"{name}_high"]


def aggregate_all(
    rows: pd.DataFrame,
    by: Sequence[str],
    values: Sequence[str],
    ranks: Mapping[str, float] = MappingProxyType({}),
) -> pd.DataFrame:
    """Aggregate several values as `aggregate` does, each under its name; diverged is the largest of theirs."""
    parts = [named(aggregate(rows, by, name, ranks.get(name)), name) for name in values]
    lost = np.max([part["diverged"] for part in parts], axis=0)
    first, *others = parts
    found = [first.assign(diverged=lost), *(part.iloc[:, -3:] for part in others)]
    return pd.concat(found, axis=1)


def choose(rows: pd.DataFrame, candidates: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Compare the candidates of a tuning by the median of their last validation loss over seeds.

    Args:
      rows: The rows of the tuning runs.
      candidates: Columns run, candidate_for (the run whose setting is chosen), value.
      setting: The column of the tuned setting.

    Returns:
      One row per candidate and value: the settings that differ, n seeds from first_seed on, diverged, median,
      low, high. `chosen` marks the least median of a run's candidates. A diverged seed is the worst, and the
      first of equal medians is chosen. `at_edge` marks a choice at an end of its grid: the best value may lie
      outside.
    """
    last = final(rows).merge(candidates, on="run")
    last = last.assign(first_seed=last.groupby("run")["seed"].transform("min"), setting=setting)
    settings = [c for c in map(str, last) if kind(c) == "setting"]
    apart = [c for c in settings if len(last[c].unique()) > 1]
    names = ["candidate_for", "run", "setting", setting, "task", "strategy", *apart]
    keys = list(dict.fromkeys((*names, "value", "first_seed")))
    table = aggregate(last, keys, "validation_loss")
    grids = table.groupby("candidate_for", sort=False)
    best = table.index.isin(grids["median"].idxmin())
    ends = (table["value"] == grids["value"].transform("min")) | (
        table["value"] == grids["value"].transform("max")
    )
    return table.assign(chosen=best, at_edge=best & ends)


def lengths(rows: pd.DataFrame) -> pd.Series:
    """Return the truncation length of each row, time steps; NaN for a strategy without one, such as full."""
    truncated = rows.reindex(columns=["window", "mean_length"]).notna().any(axis=1)
    return rows["truncation_length"].where(truncated)


def distinct_lengths(rows: pd.DataFrame) -> list[float]:
    """Return the truncation lengths of the rows in order; [NaN] if no strategy has one."""
    return sorted(lengths(rows).dropna().unique()) or [float("nan")]


def of_length(table: pd.DataFrame, length: float) -> pd.DataFrame:
    """Select the rows of this length, and those of strategies without one, such as full."""
    return table[table["length"].isna() | (table["length"] == length)]


def varying(rows: pd.DataFrame) -> list[str]:
    """Find the columns of the settings that tell the runs of a table apart.

    A setting that follows from earlier ones is left out, such as the stride of chunks beside their window.
    If no setting tells two runs apart, the column `run`, their identity, is added.
    """
    return _telling(rows.assign(truncation_length=lengths(rows)).drop_duplicates("run"))


def data(rows: pd.DataFrame, numbers: bool = True) -> list[str]:
    """Find the settings that tell the data of the runs apart, such as task, corpus, alphabet and order.

    Scores on different data do not compare, and each has reference scores of its own. In another environment,
    such as in float64, a seed draws other weights and data, so seeds are not paired across environments.

    Args:
      rows: The rows of the runs.
      numbers: Whether a number counts, such as the lag of a task, along which scores may be drawn.

    Returns:
      The columns; none if all runs have the same data.
    """
    runs = rows.drop_duplicates("run")
    names = (c for c in map(str, runs) if kind(c) == "setting" and DRAWN & {c, group(c)})
    counted = (c for c in names if numbers or not _numeric(runs[c]))
    # a checksum tells texts apart, and a path does not
    left_out = (*UNSCORED, "path") if "corpus_sha256" in runs else UNSCORED
    found = _telling(runs[[c for c in counted if c not in left_out]])
    by_path = [{"corpus_sha256": "path"}.get(c, c) for c in found]  # it says more than a checksum
    known = set(by_path) <= set(runs)
    same = known and len(runs[by_path].drop_duplicates()) == len(runs[found].drop_duplicates())
    return by_path if same else found


def _numeric(values: pd.Series) -> bool:
    types = pd.api.types
    return bool(types.is_numeric_dtype(values) and not types.is_bool_dtype(values))


def same_data(
    rows: pd.DataFrame, by: Sequence[str] = ("task",), numbers: bool = False
) -> pd.DataFrame:
    """Check that runs have the same data, before a study aggregates over them or draws them together.

    Args:
      rows: The rows of the study.
      by: Columns; runs that differ in them stay apart.
      numbers: Whether numbers, such as the lag of a task, must be the same, too.

    Returns:
      The rows.

    Raises:
      SettingError: If runs have other texts, alphabets or orders.
    """
    for _, part in rows.groupby(list(by), dropna=False):
        for name in data(part, numbers):
            found = ", ".join(map(str, part[name].unique()))
            way_out = "Scores on different data do not compare; make a study of each."
            raise SettingError(name, found, f"the same in all runs of one {by[-1]}", way_out)
    return rows


def told_by(
    rows: pd.DataFrame,
    names: Sequence[str],
    by: Sequence[str] = ("task",),
    numbers: bool = False,
) -> pd.DataFrame:
    """Check that a study tells all its runs apart, before it draws two of them as one.

    Args:
      rows: The rows of the study.
      names: The settings that its panels, lines, axes and labels show; truncation_length as in `lengths`.
      by: As in `same_data`, which is checked, too.
      numbers: As in `same_data`.

    Returns:
      The rows.

    Raises:
      SettingError: If runs have other data, or two runs agree in all of `names`.
    """
    same_data(rows, by, numbers)
    runs = rows.assign(truncation_length=lengths(rows)).drop_duplicates("run")
    shown = [name for name in names if name in runs]
    for _, part in runs.groupby(shown, dropna=False):
        for name in varying(part):
            found = ", ".join(map(text, part[name].unique()))
            allowed = f"the same in all runs of one {', '.join(shown)}"
            way_out = "This study shows no other setting, so it would draw these runs as one."
            raise SettingError(name, found, allowed, way_out)
    return rows


def told_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """Check, as `told_by`, a study that shows strategy and length, with the panels of `panels` and `apart`."""
    panel = [c for c in dict.fromkeys((*PANEL, *apart(rows))) if c in rows]
    return told_by(rows, (*panel, "strategy", "truncation_length"), by=panel)


def _telling(runs: pd.DataFrame) -> list[str]:
    """Find the columns, in order, that each divide the runs further; `runs` has one row per run."""
    settings = [c for c in map(str, runs) if kind(c) == "setting" and c not in LABELS]
    # a path says more than a checksum, and a setting of the task more than the steps that follow from it
    settings.sort(key=lambda column: (column == "corpus_sha256", group(column) != "task"))
    found: list[str] = []
    groups = 1
    for column in [c for c in (*LABELS, *settings, "run") if c in runs]:
        divided = len(runs[[*found, column]].drop_duplicates())
        if divided > groups:
            found, groups = [*found, column], divided
    return found


def unit(rows: pd.DataFrame) -> str:
    """Return the unit that the losses of all rows have, if any; in tables of older versions it is nats."""
    found = rows["loss_unit"].unique() if "loss_unit" in rows else ["nats"]
    return str(found[0]) if len(found) == 1 and not pd.isna(found[0]) else ""


def with_settings(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of PANEL and `apart`, strategy and length to another table of the same runs."""
    settings = rows.assign(length=lengths(rows)).drop_duplicates("run")
    panel = dict.fromkeys((*PANEL, *apart(rows), "strategy", "length"))
    names = ["run", *(c for c in panel if c in settings)]
    return table.drop(columns=names[1:], errors="ignore").merge(settings[names], on="run")


def with_costs(rows: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Add the costs of each run and update (`provenance.read`) to the rows of its seeds: seconds, device, …."""
    return rows.merge(costs, "left", ["run", "update"], validate="m:1")


def curves(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Aggregate the score of each run at each log point over its seeds, with the tokens.

    Rows of `with_costs` also give the seconds.
    """
    also, rows = apart(rows), scored(rows, score)
    rows = rows.assign(length=lengths(rows))
    names = dict.fromkeys((*PANEL, *also, *LINE, "update", "tokens", "seconds"))
    return aggregate(rows, [c for c in names if c in rows], score)


def final_scores(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Aggregate the last score of each run over its seeds."""
    also, last = apart(rows), final(scored(rows, score))
    last = last.assign(length=lengths(last))
    return aggregate(last, [c for c in dict.fromkeys((*PANEL, *also, *LINE)) if c in last], score)


def less_full(rows: pd.DataFrame, by: Sequence[str], scores: Sequence[str]) -> pd.DataFrame:
    """Subtract the scores of full BPTT from those of the other strategies, seed by seed.

    A seed fixes initial weights and data for all strategies. Where full BPTT has diverged there is no
    difference, so the rows of its pairs count as diverged.

    Args:
      rows: The rows of runs on the same data; full BPTT is one of the strategies.
      by: The columns that both rows of a pair share: the seed, and the update if there are several.
      scores: The columns of the scores.

    Returns:
      The rows of the other strategies that have a partner.

    Raises:
      SettingError: If full BPTT has several rows of the same `by`, so that a pair is not determined.
    """
    keys, of_full = list(by), rows["strategy"] == "full"
    full = rows.loc[of_full, [*keys, "diverged", *scores]]
    if full.duplicated(keys).any():
        known = rows[of_full]
        apart = [
            c for c in ("update", *varying(known)) if c not in keys and len(known[c].unique()) > 1
        ]
        way_out = f"These also tell its rows apart: {', '.join(apart) or 'none'}."
        raise SettingError("by", ", ".join(keys), "columns with one row of full BPTT each", way_out)
    pairs = rows[~of_full].merge(full, on=keys, suffixes=("", "_of_full"))
    less = {name: pairs[name] - pairs[f"{name}_of_full"] for name in scores}
    return pairs.assign(**less, diverged=pairs["diverged"] | pairs["diverged_of_full"])


def norms(gradient_norms: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Aggregate the gradient norm of each run over its seeds, at each update and each step of each axis."""
    table = with_settings(gradient_norms, rows)
    names = dict.fromkeys((*PANEL, *apart(rows), *LINE, "update", "axis", "step"))
    return aggregate(table, [c for c in names if c in table], "gradient_norm")


def apart(rows: pd.DataFrame) -> list[str]:
    """Find the settings that tell panels apart, beside task, cell and radius: neither strategy nor length."""
    named = ("task", "cell", "spectral_radius", "run")
    also = dict.fromkeys((*data(rows, numbers=False), *varying(rows)))
    return [c for c in also if c not in named and "strategy" not in (c, group(c))]


def panels(table: pd.DataFrame, also: Sequence[str] = ()) -> list[pd.DataFrame]:
    """Divide a table into panels, in the order of `in_order`.

    Args:
      table: The rows.
      also: Further columns, beside PANEL, in which the panels differ; see `apart`.

    Returns:
      The rows of each panel.
    """
    keys = [c for c in dict.fromkeys((*PANEL, *also)) if c in table]
    return [part for _, part in in_order(table, keys).groupby(keys, sort=False, dropna=False)]


def in_order(
    table: pd.DataFrame, names: Sequence[str], rows: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Sort a table by these columns: numbers by size, texts by their first rows, missing values last.

    The first rows are those of `rows`, if given: tables of some of its runs then have one order.
    """
    first = table if rows is None else rows

    def rank(column: pd.Series) -> pd.Series:
        texts = pd.Index(first[column.name].dropna().unique())
        places = pd.Series(texts.get_indexer(column), column.index).where(column.notna())
        return column if _numeric(column) else places

    return table.sort_values(list(names), key=rank, kind="stable")


def references(rows: pd.DataFrame, score: str) -> dict[str, float]:
    """Return the scores that need no network, by name: chance, and for a text the n-gram models.

    A score that the runs do not share, because their data differ, is left out.
    """
    columns = {"validation_loss": REFERENCES, "accuracy": CHANCE}.get(score, {})
    shared = (c for c in columns if c in rows and len(rows[c].unique()) == 1)
    found = {columns[c]: float(rows[c].iloc[0]) for c in shared}
    return {name: value for name, value in found.items() if not np.isnan(value)}


def measured(rows: pd.DataFrame, score: str) -> bool:
    """Return True if any row has this score."""
    return score in rows and bool(rows[score].notna().any())


def scored(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Select the runs that have this score at some update and seed; every run has a validation loss.

    At its last update a run without the score looks like one whose seeds have all diverged.
    """
    having = rows.loc[rows[score].notna(), "run"].unique()
    return rows if score == SCORES[0] else rows[rows["run"].isin(having)]


def opening(cuts: pd.DataFrame, rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Select the cut text of the first panel, for the strategies in `names` that occur, in that order.

    The truncation length is the largest shared length up to 16, or else the smallest length.
    """
    table = panels(with_settings(cuts, rows), apart(rows))[0]
    table = table[table["strategy"].isin(names)]
    found = [set(part["length"].dropna()) for _, part in table.groupby("strategy")]
    shared = set.intersection(*(f for f in found if f)) if any(found) else set()
    best = max((n for n in shared if n <= 16), default=min(shared, default=np.nan))
    table = table[table["length"].isna() | (table["length"] == best)]
    table = table.drop_duplicates(["strategy", "position"])
    return table.sort_values("strategy", key=lambda c: c.map(list(names).index), kind="stable")


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise each run in one row: its last scores with intervals over seeds, and the reference scores.

    The columns of LABELS and all others that tell the runs or their data apart come first. `learned` is true if
    the whole interval of the validation loss lies, by the share CLEARLY, below every score that needs no input:
    chance, the unigram model and the task's `nothing_loss`. It is never true for a single seed, which has no
    interval.
    """
    last = final(rows).assign(truncation_length=lengths(final(rows)))
    labels = dict.fromkeys(["run", *LABELS, *varying(rows), *data(rows)])
    kept = [c for c in (*labels, "loss_unit", "tokens", "updates", *REFERENCES) if c in last]
    table = last.drop_duplicates("run")[list(dict.fromkeys(kept))].reset_index(drop=True)
    for score in [s for s in SCORES if s == "validation_loss" or measured(rows, s)]:
        spread = named(aggregate(final(scored(rows, score)), ["run"], score), score)
        new = [
            c for c in ("run", *interval_of(score), "n", "diverged") if c not in table or c == "run"
        ]
        table = table.merge(spread[new], "left", "run")
    floors = [c for c in ("uniform_loss", "unigram_loss", "nothing_loss") if c in table]
    floor = table[floors].astype(float).min(axis=1)
    below = table["validation_loss_high"] < floor - CLEARLY * floor.abs()
    return table.assign(learned=below & (table["n"] > 1))


def as_text(summary: pd.DataFrame, costs: pd.DataFrame) -> str:
    """Write the summary as text, for the end of a sweep: the settings that tell runs apart, and the scores.

    Args:
      summary: The table of `summary`.
      costs: The seconds of each run and update.
    """
    shown = summary[_telling(summary)].map(text).rename(columns={"truncation_length": "length"})
    for score in SCORES:
        if score in summary:
            shown[score] = [
                "" if np.isnan(m) else short(m) + f" [{short(low)}, {short(high)}]" * int(n > 1)
                for m, low, high, n in summary[[*interval_of(score), "n"]].to_numpy()
            ]
            shown.loc[np.isinf(summary[score]), score] = "diverged"
    seconds = final(costs).groupby("run")["seconds"].first()
    shown["seconds"] = [f"{seconds[run]:.3f}" for run in summary["run"]]
    shown["seeds"] = summary["n"]
    shown["diverged"] = summary["diverged"]
    shown["learned"] = summary["learned"]
    head = "Median over seeds [95 % bootstrap interval] after the last update; seconds of training per seed"
    lines = [head, shown.to_string(index=False)]
    if known := _known(summary):
        lines += ["Reference validation losses:", *known]
    return "\n".join(lines)


def short(score: float, decimals: int = 3) -> str:
    """Write a score to some decimals; a smaller one keeps two digits, and one of a million or more four."""
    if abs(score) >= 1e6:
        return f"{score:.4g}"
    plain = score == 0 or abs(score) >= 10 ** (1 - decimals)
    return f"{score:.{decimals}f}" if plain else f"{score:.2g}"


def text(value: Any) -> str:
    """Write the value of a setting, so that two values have two texts; empty if it is missing.

    A whole number has all its digits. Any other has six if these are the number, or else the fewest that are.
    """
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    if value % 1 == 0 and abs(value) < 2**53:
        return f"{value:.0f}"
    return few if float(few := f"{value:g}") == value else repr(float(value))


def _known(summary: pd.DataFrame) -> list[str]:
    """Write the reference losses of each task, and of its different data, in a line."""
    names = data(summary)
    found: dict[str, list[str]] = {}
    for _, part in summary.groupby(names or ["task"], sort=False, dropna=False):
        row = part.iloc[0]
        known = [
            f"{said} {short(row[c])}" for c, said in REFERENCES.items() if not pd.isna(row.get(c))
        ]
        own = [f"{c} {text(row[c])}" for c in names if c != "task" and not pd.isna(row[c])]
        if known:
            losses = f"{', '.join(known)} {unit(part)}".rstrip()
            found.setdefault(losses, []).append(", ".join([str(row["task"]), *own]))
    return [f"{'; '.join(whose)}: {losses}" for losses, whose in found.items()]
