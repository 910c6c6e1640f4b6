"""The figures of a study, made at the end of a sweep and by the command `bptt-study-figures`. No jax."""

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from bptt_study.report import csv_tables, figure_layout, study, sweep_figures
from bptt_study.report.study import Made, Study
from bptt_study.runner import census, run_folder, stories
from bptt_study.validation import SettingError, each, one_line_errors


def make(story: Study | None, folder: Path, noted: str | None = None, tables: bool = True) -> Made:
    """Make the study's own tables and figures, or the figures of any sweep if it has none.

    Args:
      story: The study, or None.
      folder: The study's folder of tables.
      noted: The name of the study in the note of its sweep, which is shown and not imported.
      tables: Whether the study's own tables are made, too.

    Returns:
      The files, and a line for each table and figure that was left out or failed. The finished runs stay.
    """
    if story is None:
        way_out = f"{noted}: --story={noted} makes the study's own tables and figures"
        return Made([], [way_out] * bool(noted), []) + sweep_figures.draw(folder)
    made = (study.make if tables else study.draw)(story, folder)
    if any(".csv" not in file.suffixes for file in made.files):
        return made
    return made + sweep_figures.draw(folder)


def main(arguments: list[str] | None = None) -> None:
    """Run `bptt-study-figures`; its status is 1 if a figure failed, and 2 for a wrong argument.

    Args:
      arguments: The arguments. None: those of this process.
    """
    parser = argparse.ArgumentParser(
        "bptt-study-figures",
        description="Makes the tables and figures of a study again from the tables of its runs. A shipped "
        "study has its own, and so has one of yours with --story. Any other study, and any with --x, --hue, "
        "--style or --facet, gets learning curves, final scores and gradient norms.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="RESULTS_DIR/STUDY")
    texts = {
        "x": "setting on the x axis of the final scores; tokens, update or seconds for the learning curves",
        "hue": "setting that the colour shows",
        "style": "setting that dashes and markers show",
        "facet": "setting whose values each get a panel",
    }
    for name, text in texts.items():
        parser.add_argument(f"--{name}", metavar="SETTING", help=text)
    parser.add_argument(
        "--only-figures",
        action="store_true",
        help="leave the tables of the study's own as they are",
    )
    parser.add_argument(
        "--story",
        metavar="MODULE.NAME",
        help="the bptt_study.Study of a study of your own, which PYTHONPATH finds",
    )
    figure_layout.add_format(parser)
    given = parser.parse_args(arguments)
    roles = {name: getattr(given, name) for name in texts}
    with one_line_errors("bptt-study-figures"), figure_layout.write_as(given.format):
        failed = False
        for made in each(given.folders, partial(_of_folder, given, roles)):
            for file in made.files:
                print(file)
            for line in made.left_out:
                print(f"left out: {line}", file=sys.stderr)
            for line in made.failed:
                print(f"failed: {line}", file=sys.stderr)
            failed = failed or bool(made.failed)
    if failed:
        sys.exit(1)


def _of_folder(given: argparse.Namespace, roles: dict[str, str | None], folder: Path) -> Made:
    """Make what is asked for of one folder."""
    if not (folder / csv_tables.TABLE).is_file():
        allowed = f"a folder with a {csv_tables.TABLE}"
        raise SettingError("FOLDER", folder, allowed, "`bptt-study -m` makes the table.")
    folder = folder.resolve()
    with _only_writer(folder):
        census.say_faults(folder)
        drawn = _drawn(folder, given.story, roles, not given.only_figures)
        census.renew(folder, drawn.files)
    return drawn


def _only_writer(folder: Path) -> AbstractContextManager[Any]:
    """Wait for a gathering that makes the tables anew, if the runs of the study lie here."""
    here = run_folder.runs_folder(folder.parent, folder.name).is_dir()
    return census.only_writer(folder.parent, folder.name) if here else nullcontext()


def _drawn(folder: Path, name: str | None, roles: dict[str, str | None], tables: bool) -> Made:
    """Draw the figures of one study, its own unless a role is given."""
    if any(roles.values()):
        return sweep_figures.draw(folder, **roles)
    noted, story = run_folder.noted(folder).story, stories.find(name, experiment_of(folder))
    made = make(story, folder, noted, tables)
    if story and tables and not made.failed:  # after an edit, the story may have other figures
        census.remove_former(folder, made.files)
    return made


def experiment_of(folder: Path) -> str | None:
    """Find the experiment of a study: that of its last sweep, or of its name if no sweep is known.

    Args:
      folder: The study's folder of tables.

    Returns:
      The experiment, or None.
    """
    if folder.name in run_folder.studies(folder.parent):
        return run_folder.noted(folder).experiment
    return folder.name if stories.shipped(folder.name) else None


if __name__ == "__main__":
    main()
