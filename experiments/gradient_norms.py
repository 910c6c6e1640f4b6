"""How far does the gradient reach? Its norm over time steps and over the lag, before and after training.

`bptt-study -m experiment=gradient_norms` makes the tables and draws the figures;
`python experiments/gradient_norms.py [FOLDER]` draws them again.
"""

from pathlib import Path

import pandas as pd

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.csv_tables import read_table

AXES = ("time", "lag")


def draw(folder: Path) -> list[Path]:
    """Draw all figures of the study from the tables in the folder, and return their files."""
    file = folder / "gradient_norms.csv.gz"
    if not file.is_file():  # snapshots=0
        return []
    rows = read_table(folder / "table.csv.gz")
    table = read_table(file)
    first, last = table["update"].min(), table["update"].max()
    moments = {"start": first, "end": last} if last > first else {"start": first}
    lengths = sorted(tables.lengths(rows).dropna().unique()) or [float("nan")]
    files = []
    with figure_layout.style():
        for moment, update in moments.items():
            norms = tables.norms(table[table["update"] == update], rows)
            for length in lengths:
                alike = norms[norms["length"].isna() | (norms["length"] == length)]
                name = f"gradient_norms_{moment}" + f"_{length:g}" * (len(lengths) > 1)
                files += _norms(alike, rows, update, length, folder, name)
    return files


def _norms(
    norms: pd.DataFrame, rows: pd.DataFrame, update: int, length: float, folder: Path, name: str
) -> list[Path]:
    named, also = plots.looks(rows["strategy"]), tables.apart(rows)
    networks = tables.panels(norms, also)
    rows = rows[rows["run"].isin(norms["run"])]
    row, data = rows.iloc[0], ", ".join(map(str, rows.get("corpus", rows["task"]).unique()))
    when = f"after {update} updates" if update else "before training"
    figure, axes = figure_layout.figure(
        len(AXES),
        len(networks),
        (2 + 2.8 * len(networks), 8.4),
        f"How far back the gradient reaches, {when}",
        "Norm of each strategy's own gradient. Top: of the mean loss L by the hidden state of time step t. "
        "Bottom: of the last step's loss by the state k steps before, mean over the sequences. Randomized: "
        "mean over draws. A line that drops to the axis is exactly zero from there on. "
        f"Median and 95 % bootstrap interval over {plots.seeds(norms, also)}. "
        f"Truncation length {length:g} time steps; {plots.TASKS.get(row['task'], row['task'])}, "
        f"{data}, {row.get('hidden')} units, sequences of {row.get('steps')} time steps.",
        [*plots.handles(named), plots.end_handle()],
        sharey="row",
        sharex="row",
    )
    for axis, panels in zip(AXES, axes, strict=True):
        along = norms[norms["axis"] == axis]
        for network, ax in zip(networks, panels, strict=True):
            ax.set_yscale("log")
            ax.set_ylim(plots.limits(along, log=True))
            plots.gradient_norms(network[network["axis"] == axis], ax, named, axis)
            plots.titled(ax, plots.network_name(network.iloc[0], also))
        for ax in panels[1:]:
            ax.set_ylabel("")
    return figure_layout.save(figure, folder, name)


if __name__ == "__main__":
    print(*draw(figure_layout.folder(__file__)), sep="\n")
