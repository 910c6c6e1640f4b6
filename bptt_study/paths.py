"""The places of conf/ and experiments/: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str, marker: str) -> Path:
    """Find the folder that holds the file `marker`.

    Args:
      folder: The folder's name.
      marker: A file that the folder must hold.

    Returns:
      The path of the folder.

    Raises:
      FileNotFoundError: If neither the wheel nor the checkout has it.
    """
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / folder / marker).is_file():
            return parent / folder
    raise FileNotFoundError(f"{folder}/{marker} is neither in {PACKAGE} nor beside it; reinstall")
