"""Corpora: each function finds exactly the text that was asked for, or raises SettingError."""

import hashlib
import os
import random
import re
import stat
import string
from pathlib import Path
from typing import NamedTuple

from bptt_study.validation import QUOTED, SettingError, fits, one_of

TIME_MACHINE_URL = "http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
TIME_MACHINE_SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"
LARGEST = 2**30  # bytes of a text
NUMBERS = (
    20  # of 4 bytes that memory holds for each byte of a text, with its references and the checks
)
MADE = 200_000  # characters of a text that is made
TIMEOUT = 5  # seconds without an answer from the server


class Corpus(NamedTuple):
    name: str
    text: str
    sha256: str  # of the bytes before any normalisation, as `sha256sum` prints it


def find(corpus: str | None, path: str | os.PathLike | None) -> Corpus:
    """Find a corpus by its name, or the UTF-8 file at `path`; if both are None, find `stdlib_docs`.

    Args:
      corpus: `stdlib_docs`, `time_machine` or None.
      path: A file, or None.

    Returns:
      The corpus.

    Raises:
      SettingError: For an unknown name, and for a text that is missing, not UTF-8, or not the text of that
        name. The message says what to do.
    """
    if corpus is None:
        return stdlib_docs() if path is None else text_file(path)
    return CORPORA[one_of("corpus", corpus, CORPORA)](path)


def text_file(path: str | os.PathLike) -> Corpus:
    """Read a UTF-8 text file, with or without a byte order mark.

    Args:
      path: The file.

    Returns:
      The corpus, named after the file.

    Raises:
      SettingError: For a file that is missing, empty, too large, not UTF-8, or no ordinary file.
    """
    allowed = "a readable UTF-8 text file that is not empty"
    if not isinstance(path, str | os.PathLike):  # YAML has made a number of it
        raise SettingError("path", path, allowed, QUOTED)
    try:
        file = Path(path).expanduser()
        str(file).encode()  # it will be in tables
        size = _size(file)
        if size > LARGEST:
            raise SettingError(
                "path", path, f"a file of at most {LARGEST} bytes", f"It has {size}."
            )
        fits("path", path, NUMBERS * size)
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except SettingError:
        raise
    except UnicodeEncodeError as error:
        raise SettingError(
            "path", repr(str(path)), "a path in UTF-8", "Rename the file."
        ) from error
    except UnicodeDecodeError as error:
        raise SettingError("path", path, allowed, "This file is not UTF-8.") from error
    except OSError as error:
        raise SettingError("path", path, allowed, f"Reason: {error.strerror}.") from error
    except (ValueError, RuntimeError) as error:  # a null byte, no such ~user
        raise SettingError("path", path, allowed, f"Reason: {str(error).rstrip('.')}.") from error
    if not text:
        raise SettingError("path", path, allowed, "This file is empty.")
    return Corpus(file.name, text, hashlib.sha256(raw).hexdigest())


def _size(file: Path) -> int:
    """Return the bytes of an ordinary file; a pipe or a device may have no end."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("It is a pipe or a device, not a file")
    return found.st_size


def stdlib_docs(path: str | os.PathLike | None = None) -> Corpus:
    """Read the prose behind Python's `help()`: the topics of `pydoc_data`, each of its paragraphs once.

    Every CPython has it, so it needs no download. It changes with Python's version; the SHA-256 tells the
    versions apart. Many topics repeat each other, so that a text with all of them would stand in its training
    and validation part alike.

    Args:
      path: None.

    Returns:
      The corpus.

    Raises:
      SettingError: For a path.
    """
    from pydoc_data.topics import topics

    return _without_file("stdlib_docs", distinct("\n\n".join(topics.values())), path)


def distinct(text: str) -> str:
    """Keep the first of all paragraphs with the same words; blank lines are between paragraphs.

    One blank line is between those that are kept. A text that repeats none stays as it is.

    >>> distinct("To be.\\n\\nOr not?\\n\\n  To   be.")
    'To be.\\n\\nOr not?'
    """
    first: dict[str, str] = {}
    paragraphs = re.split(r"\r?\n\s*\n", text)
    for paragraph in paragraphs:
        first.setdefault(" ".join(paragraph.split()), paragraph)
    repeats = sum(map(bool, map(str.strip, paragraphs))) > len(first.keys() - {""})
    return "\n\n".join(first.values()) if repeats else text


def random_letters(path: str | os.PathLike | None = None) -> Corpus:
    """A text of which nothing can be learned: letters and blanks, each drawn uniformly, always the same."""
    drawn = random.Random(0).choices(" " + string.ascii_lowercase, k=MADE)
    return _without_file("random_letters", "".join(drawn), path)


def one_letter(path: str | os.PathLike | None = None) -> Corpus:
    """A text whose time steps are all alike: one letter, again and again."""
    return _without_file("one_letter", "e" * MADE, path)


def _without_file(name: str, text: str, path: str | os.PathLike | None) -> Corpus:
    if path is not None:
        way_out = "Leave out the path or the corpus."
        raise SettingError("path", path, f"null with corpus={name}", way_out)
    return Corpus(name, text, hashlib.sha256(text.encode()).hexdigest())


def time_machine(path: str | os.PathLike | None = None) -> Corpus:
    """Find H. G. Wells, The Time Machine (1895), in the edition of Dive into Deep Learning.

    The function looks at `path`, then at `$BPTT_STUDY_DATA/timemachine.txt`, then in the user's cache, into
    which it downloads the text if it is in none of these places. The first file found must have the known
    SHA-1.

    Args:
      path: A file, or None.

    Returns:
      The corpus.

    Raises:
      SettingError: If the text is not found, or has another SHA-1.
    """
    found = path if path is not None else _in_data_folder() or _download()
    corpus, digest = text_file(found), _sha1(found)
    if digest != TIME_MACHINE_SHA1:
        raise _not_found(f"{found} has SHA-1 {digest}", path)
    return corpus._replace(name="time_machine")


CORPORA = {
    "stdlib_docs": stdlib_docs,
    "time_machine": time_machine,
    "random_letters": random_letters,
    "one_letter": one_letter,
}


def _sha1(path: str | os.PathLike) -> str:
    raw = Path(path).expanduser().read_bytes()
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()


def _in_data_folder() -> Path | None:
    """Find the file in `$BPTT_STUDY_DATA`; return None if there is no such folder or file."""
    folder = os.environ.get("BPTT_STUDY_DATA")
    file = Path(folder or "").expanduser() / "timemachine.txt"
    return file if folder and file.exists() else None


def _download() -> Path:
    """Return the file in the user's cache, and download it if it is missing or has the wrong SHA-1."""
    import pooch  # some machines lack it, and only a download needs it

    pooch.get_logger().setLevel("WARNING")
    try:
        cached = pooch.retrieve(
            TIME_MACHINE_URL,
            known_hash=f"sha1:{TIME_MACHINE_SHA1}",
            fname="timemachine.txt",
            path=pooch.os_cache("bptt_study"),
            downloader=pooch.HTTPDownloader(progressbar=False, timeout=TIMEOUT),
        )
    # of the network (requests' errors are OSErrors), of the cache folder, or of a user without a home
    except (OSError, RuntimeError) as error:
        raise _not_found(f"The download failed with {type(error).__name__}") from error
    except ValueError as error:
        raise _not_found("The download has another SHA-1") from error
    return Path(cached)


def _not_found(why: str, path: str | os.PathLike | None = None) -> SettingError:
    name, value = ("corpus", "time_machine") if path is None else ("path", path)
    return SettingError(
        name,
        value,
        f"a text with SHA-1 {TIME_MACHINE_SHA1}",
        f"{why}. Give it as task.path=FILE, put timemachine.txt into the folder $BPTT_STUDY_DATA, "
        f"or download it from {TIME_MACHINE_URL}.",
    )
