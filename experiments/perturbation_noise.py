"""Is the noise of perturbations less if they are drawn anew in each unroll, or kept? On three kinds of text.

`bptt-study -m experiment=perturbation_noise` makes the tables and draws the figure;
`python experiments/perturbation_noise.py [FOLDER]` draws it again.

Nothing is sampled: the probe `perturbation_variance` has both variances in closed form.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.csv_tables import read_table, write_table
from bptt_study.validation import counted

TABLE = "perturbation_variance.csv.gz"
TEXTS = {
    "stdlib_docs": "real text",
    "time_machine": "real text",
    "random_letters": "random letters",
    "one_letter": "one letter, repeated",
}
MOMENTS = {"start": "before training", "middle": "in training", "end": "after training"}
DASHES = {"start": "-", "middle": ":", "end": "--"}


def analyse(folder: Path) -> list[Path]:
    """Write `noise.csv`: for each text, moment, estimator and number of unrolls the noise, variance ÷ ‖∇L‖².

    With noise_low and noise_high, the median over n seeds and its 95 % interval; ratio (_low, _high): the same
    of the noise ÷ that of nres, seed by seed; lower: whether the whole interval of the ratio lies below 1.
    """
    if not (folder / TABLE).is_file():  # snapshots=0
        return []
    rows = tables.same_data(read_table(folder / "table.csv.gz"), ["task", "corpus"])
    seeds = tables.with_settings(read_table(folder / TABLE), rows)
    last = seeds.groupby("run")["update"].transform("max")
    seeds = seeds.assign(
        moment=np.select(
            [seeds["update"] == 0, seeds["update"] == last], ["start", "end"], "middle"
        ),
        diverged=~np.isfinite(seeds["noise"]),
    )
    kept = seeds[seeds["estimator"] == "nres"].rename(columns={"noise": "kept"})
    at = ["run", "seed", "update", "unrolls"]
    seeds = seeds.merge(kept[[*at, "kept"]], on=at, validate="m:1")
    seeds["ratio"] = seeds["noise"] / seeds["kept"]
    keys = ["corpus", "moment", "estimator", "unrolls"]
    found = tables.aggregate(seeds, keys, "noise")
    ratio = tables.aggregate(seeds, keys, "ratio")
    names = {"median": "noise", "low": "noise_low", "high": "noise_high"}
    found = found.rename(columns=names).assign(
        ratio=ratio["median"], ratio_low=ratio["low"], ratio_high=ratio["high"]
    )
    write_table(found.assign(lower=found["ratio_high"] < 1), folder / "noise.csv")
    return [folder / "noise.csv"]


def draw(folder: Path) -> list[Path]:
    """Draw the figure of the study from the tables in the folder, and return its files."""
    if not (folder / TABLE).is_file():
        return []
    table, row = read_table(folder / "noise.csv"), read_table(folder / "table.csv.gz").iloc[0]
    looks = plots.looks(table["estimator"])
    texts = list(dict.fromkeys(table["corpus"]))
    with figure_layout.style():
        figure, axes = figure_layout.figure(
            1,
            len(texts),
            (2 + 4.4 * len(texts), 6.6),
            "Perturbations drawn anew in each unroll, or kept: which is noisier depends on the text",
            "Exact variance of one pair of perturbations, σ → 0, over the squared norm of the gradient. "
            f"{row['steps']} time steps are divided into unrolls. PES draws a perturbation in each; NRES keeps "
            f"one, with the noise P - 1, P the cell's parameters. {row['cell']} of {row['hidden']} units, one "
            f"sequence from the zero state, before and after {counted(row['updates'], 'update')} of full BPTT. "
            f"Median and 95 % bootstrap interval over n = {counted(table['n'].max(), 'seed')}.",
            [
                *plots.handles(looks),
                *(
                    Line2D([], [], color="0.4", linestyle=DASHES[moment], label=said)
                    for moment, said in MOMENTS.items()
                    if moment in set(table["moment"])
                ),
            ],
            sharey=True,
        )  # fmt: skip
        for text, ax in zip(texts, axes[0], strict=True):
            _text(table[table["corpus"] == text], looks, ax).set_title(TEXTS.get(text, text))
        axes[0, 0].set_ylabel("variance ÷ ‖∇L‖²")
        return figure_layout.save(figure, folder, "noise")


def _text(table: pd.DataFrame, looks: dict[str, plots.Look], ax: Axes) -> Axes:
    """Draw the noise over the number of unrolls, a line per estimator and moment."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    for (name, moment), line in table.groupby(["estimator", "moment"], sort=False):
        line, color = line.sort_values("unrolls"), looks[str(name)].color
        ax.plot(line["unrolls"], line["noise"], DASHES[str(moment)], color=color, linewidth=2.5)
        low, high = line["noise_low"], line["noise_high"]
        ax.fill_between(line["unrolls"], low, high, color=color, alpha=0.15, linewidth=0)
    ticks = [
        n
        for n in sorted(set(table["unrolls"]))
        if n in (1, 4, 20, 100) or n == max(table["unrolls"])
    ]
    ax.set_xticks(ticks, [f"{n}" for n in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("unrolls of the sequence")
    return ax


if __name__ == "__main__":
    print(*draw(figure_layout.folder(__file__)), sep="\n")
