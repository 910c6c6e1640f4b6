"""The headline: what does each way of truncating cost in bias, variance, time and learning?

`bptt-study -m experiment=compare_strategies` makes the tables and draws the figures;
`python experiments/compare_strategies.py [FOLDER]` draws them again.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.csv_tables import read_table

CHARACTERS = 60
SAID = "{median}: median; {spread}: its 95 % bootstrap interval over {seeds}. {runs}."


def draw(folder: Path) -> list[Path]:
    """Draw all figures of the study from the tables in the folder, and return their files."""
    rows = read_table(folder / "table.csv.gz")
    with figure_layout.style():
        files = _curves(rows, folder) + _final(rows, folder)
        if (folder / "cuts.csv.gz").is_file():
            files += _cuts(read_table(folder / "cuts.csv.gz"), rows, folder)
    return files


def _cuts(cuts: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> list[Path]:
    found = set(cuts["strategy"])
    names = [name for name in ("randomized", "fixed", "full") if name in found] or sorted(found)
    table = tables.opening(cuts, rows, names)
    table = table[table["position"] < CHARACTERS]
    figure, [[ax]] = figure_layout.figure(
        1,
        1,
        (13, 4.4),
        f"Comparing strategies: where the gradient is cut, on the first {CHARACTERS} characters",
        "The gradient travels back within a box and never from a box to the one before it; the hidden "
        "state passes on everywhere. Truncation length in time steps: the window of fixed, the mean "
        f"of randomized truncation (the draw of the first seed's first update). {_runs(table, rows)}.",
    )
    plots.cut_text(table, ax, plots.looks(rows["strategy"]))
    return figure_layout.save(figure, folder, "cuts")


def _scores(rows: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, str, str]]:
    """Yield each row of panels: rows of one task, a score, its label; for images the accuracy too."""
    for part in tables.panels(rows, tables.apart(rows)):
        label = plots.loss_label(part["task"].iloc[0], tables.unit(part))
        yield part, "validation_loss", label
        if not tables.measured(part, "bits_per_character") and tables.measured(part, "accuracy"):
            yield part, "accuracy", plots.LABELS["accuracy"]


def _curves(rows: pd.DataFrame, folder: Path) -> list[Path]:
    wanted = [
        (part, tables.curves(part, score), score, label) for part, score, label in _scores(rows)
    ]
    named, also = plots.looks(rows["strategy"]), tables.apart(rows)
    lengths = sorted(tables.lengths(rows).dropna().unique()) or [float("nan")]
    shown = pd.concat([table for _, table, _, _ in wanted])
    figure, axes = figure_layout.figure(
        len(wanted),
        len(lengths),
        (2.5 + 5.2 * len(lengths), 1.4 + 3.1 * len(wanted)),
        "Learning curves against tokens: each strategy, by truncation length",
        SAID.format(
            median="Line", spread="band", seeds=plots.seeds(shown, also), runs=_runs(shown, rows)
        )
        + " Dotted: models without a network. The y axes fit what follows the first tenth of training.",
        plots.handles(named),
        sharey="row",
        sharex="row",
    )
    for (part, table, score, label), panels in zip(wanted, axes, strict=True):
        known = tables.references(part, score)
        for length, ax in zip(lengths, panels, strict=True):
            # the first tenth of training is steep and alike for all, and would flatten the rest
            late = table[table["tokens"] >= table["tokens"].max() / 10]
            ax.set_ylim(plots.limits(late))
            alike = table[table["length"].isna() | (table["length"] == length)]
            plots.learning_curves(alike, ax, named, "tokens", label)
            plots.references(known, ax, named=ax is panels[-1])
            name = plots.panel_name(part.iloc[0], also)
            plots.titled(ax, name + f": truncation length {length:g}" * (not pd.isna(length)))
        for ax in panels[1:]:
            ax.set_ylabel("")
    return figure_layout.save(figure, folder, "learning_curves_tokens")


def _final(rows: pd.DataFrame, folder: Path) -> list[Path]:
    named, also = plots.looks(rows["strategy"]), tables.apart(rows)
    wanted = [
        (part, tables.final_scores(part, score), score, label)
        for part, score, label in _scores(rows)
    ]
    shown = pd.concat([table for _, table, _, _ in wanted])
    figure, axes = figure_layout.figure(
        1,
        len(wanted),
        (2 + 4.4 * len(wanted), 6),
        "Final score by strategy and truncation length",
        SAID.format(
            median="Marker", spread="bar", seeds=plots.seeds(shown, also), runs=_runs(shown, rows)
        )
        + " Without a truncation length, as Full: line and band across.",
        plots.handles(named, markers=True),
    )
    for (part, table, score, label), ax in zip(wanted, axes[0], strict=True):
        ax.set_ylim(plots.limits(table))
        plots.scores(table, ax, named, label)
        plots.references(tables.references(part, score), ax)
        plots.titled(ax, plots.panel_name(part.iloc[0], also))
    return figure_layout.save(figure, folder, "final_scores")


def _runs(shown: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Describe task, text, network and budget of the runs shown in words."""
    rows = rows[rows["run"].isin(shown["run"])]
    said, also = [], tables.apart(rows)
    for part in tables.panels(rows, also):
        row, last = part.iloc[0], part["update"].max()
        said.append(
            f"{plots.panel_name(row, also)}: {row.get('corpus')}, {row.get('hidden')} units, "
            f"{last} updates of {row.get('steps')} time steps × {row.get('batch_size')} sequences"
        )
    return "; ".join(said)


if __name__ == "__main__":
    print(*draw(figure_layout.folder(__file__)), sep="\n")
