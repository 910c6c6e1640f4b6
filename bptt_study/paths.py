"""Where conf/ and experiments/ lie: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str, marker: str) -> Path:
    """`folder` that holds the file `marker`, from the wheel or the checkout; FileNotFoundError if neither."""
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / folder / marker).is_file():
            return parent / folder
    raise FileNotFoundError(f"{folder}/{marker} is neither in {PACKAGE} nor beside it; reinstall")
