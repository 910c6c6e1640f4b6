"""Fonts for the letters of a figure that DejaVu Sans, which comes with matplotlib, does not have."""

from collections.abc import Set
from contextlib import suppress
from functools import cache

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

DEJAVU = "DejaVu Sans"
LAST_RESORT = "Last Resort"  # fonts of this name draw one box for all letters of a script


def complete(figure: Figure) -> str | None:
    """Give the texts of a figure, beside their own fonts, fonts of this machine that have the other letters.

    Args:
      figure: The figure, drawn once, so that it has all its texts.

    Returns:
      None if DejaVu Sans has all letters. Otherwise a sentence about those that no font of this machine has,
      which is empty if there are none.
    """
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    letters = {letter for text in texts for letter in text.get_text() if letter.isprintable()}
    wanted = frozenset(map(ord, letters)).difference(_letters(font_manager.findfont(DEJAVU)))
    if not wanted:
        return None
    names, lost = _covering(wanted)
    for text in texts if names else ():
        text.set_fontfamily([*text.get_fontfamily(), DEJAVU, *names])
    if not lost:
        return ""
    listed = ", ".join(f"U+{letter:04X}" for letter in sorted(lost)[:4]) + ", …" * (len(lost) > 4)
    return f"No font on this machine has {listed}: a box stands for each."


@cache
def _covering(wanted: frozenset[int]) -> tuple[list[str], Set[int]]:
    """Choose fonts, those with the most of the letters first; return their names, and the letters left."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:
        with suppress(OSError, RuntimeError, ValueError, KeyError):  # damaged, or of pixels
            font_manager.fontManager.addfont(path)
    found = [
        (font.name, wanted & _letters(font.fname))
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and not font.name.startswith(LAST_RESORT)
    ]
    names: list[str] = []
    while True:
        best, has = max(found, key=lambda font: (len(font[1] & wanted), font[0]))
        if not has & wanted:
            return names, wanted
        names, wanted = [*names, best], wanted - has


def _letters(path: str) -> Set[int]:
    """Read which letters a font has, by their numbers; none if the font is gone or damaged."""
    with suppress(OSError, RuntimeError):
        return font_manager.get_font(path).get_charmap().keys()
    return frozenset()
