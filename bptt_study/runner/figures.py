"""The figures of a study, made at the end of a sweep and by the command `bptt-study-figures`. No jax."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bptt_study.report import csv_tables, figure_layout, sweep_figures
from bptt_study.runner import gather, run_folder
from bptt_study.runner.run_folder import one_line
from bptt_study.validation import SettingError, one_line_errors


def make(experiment: str | None, folder: Path) -> tuple[list[Path], list[str]]:
    """Make the experiment's own tables and figures, or those of any sweep if it has none.

    Args:
      experiment: The experiment, or None.
      folder: The study's folder of tables.

    Returns:
      The files, and a line for each step that failed. A failure does not affect the finished runs.
    """
    own = gather.experiment_module(experiment)
    steps: dict[str, Callable[[], list[Path]]] = {
        "tables of the experiment": lambda: gather.analyse(experiment, folder),
        "figures of the experiment": lambda: gather.draw(experiment, folder),
    }
    files: list[Path] = []
    left_out: list[str] = []
    for name, step in steps.items() if own else ():
        try:
            files += step()
        except Exception as error:  # the code may be the user's, and may not expect these tables
            left_out.append(f"{name}: {one_line(error)}")
    if left_out or not hasattr(own, "draw"):
        found = sweep_figures.draw(folder)
        return [*files, *found.files], [*left_out, *found.left_out]
    return files, left_out


def main(arguments: list[str] | None = None) -> None:
    """Run `bptt-study-figures`; its status is 2 for a wrong argument.

    Args:
      arguments: The arguments. None: those of this process.
    """
    parser = argparse.ArgumentParser(
        "bptt-study-figures",
        description="Draws the figures of a study again from its tables. Without options, a study of an "
        "experiment gets the experiment's figures. Otherwise the figures are learning curves, final scores and "
        "gradient norms.",
    )
    parser.add_argument("folder", type=Path, help="RESULTS_DIR/STUDY")
    texts = {
        "x": "setting on the x axis of the final scores; tokens, update or seconds for the learning curves",
        "hue": "setting that the colour shows",
        "style": "setting that dashes and markers show",
        "facet": "setting whose values each get a panel",
    }
    for name, text in texts.items():
        parser.add_argument(f"--{name}", metavar="SETTING", help=text)
    figure_layout.add_format(parser)
    given = parser.parse_args(arguments)
    roles = {name: getattr(given, name) for name in texts}
    with one_line_errors("bptt-study-figures"), figure_layout.write_as(given.format):
        folder = given.folder.resolve()
        if not (folder / csv_tables.TABLE).is_file():
            way_out = "`bptt-study -m` makes the table."
            raise SettingError(
                "FOLDER", given.folder, f"a folder with a {csv_tables.TABLE}", way_out
            )
        if any(roles.values()):
            files, left_out = sweep_figures.draw(folder, **roles)
        else:
            with figure_layout.of(folder):
                files, left_out = make(experiment_of(folder), folder)
        for file in files:
            print(file)
        for line in left_out:
            print(f"left out: {line}", file=sys.stderr)


def experiment_of(folder: Path) -> str | None:
    """Find the experiment of a study: that of its last sweep, or the one of its name.

    Args:
      folder: The study's folder of tables.

    Returns:
      The experiment, or None.
    """
    results_dir, study = folder.parent, folder.name
    if study in run_folder.studies(results_dir):
        return run_folder.latest_sweep(results_dir, study).experiment
    return study if gather.experiment_module(study) else None


if __name__ == "__main__":
    main()
