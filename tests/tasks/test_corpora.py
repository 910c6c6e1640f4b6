"""Texts: found where they should be, in this order, with the right bytes, or a SettingError."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pooch
import pytest

from bptt_study.tasks import corpora
from bptt_study.validation import SettingError

BOOK = b"The Time Traveller (for so it will be convenient to speak of him)"
TIME_MACHINE = Path(__file__).parents[3] / "shared/data/timemachine.txt"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty cache, no data folder, nobody at the download's address, and a book of one line."""
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache")
    monkeypatch.delenv("BPTT_STUDY_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(corpora, "TIME_MACHINE_URL", "http://127.0.0.1:9/timemachine.txt")
    monkeypatch.setattr(corpora, "TIME_MACHINE_SHA1", hashlib.sha1(BOOK).hexdigest())


@pytest.fixture
def server(monkeypatch):
    """Serves `server.book` at the download's address and counts the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.book)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.book, server.requests = BOOK, 0
        address = f"http://127.0.0.1:{server.server_port}/timemachine.txt"
        monkeypatch.setattr(corpora, "TIME_MACHINE_URL", address)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def put(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "timemachine.txt").write_bytes(content)
    return folder / "timemachine.txt"


def test_by_default_it_is_the_documentation_of_python():
    corpus = corpora.find(None, None)
    assert corpus == corpora.find("stdlib_docs", None)
    assert corpus.name == "stdlib_docs"
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


def words(text: str) -> list[str]:
    """Its paragraphs, without white space that makes no difference."""
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]


def test_the_documentation_of_python_has_each_paragraph_once():
    from pydoc_data.topics import topics

    found, topical = words(corpora.stdlib_docs().text), words("\n\n".join(topics.values()))
    assert len(found) == len(set(found)) < len(topical)
    assert set(found) == set(topical)


def test_paragraphs_are_equal_if_their_words_are():
    once = corpora.distinct("one\n two\r\n\r\n   three\n  \n\none   two\n\nThree\n\nthree four")
    assert once == "one\n two\n\n   three\n\nThree\n\nthree four"
    assert corpora.distinct(once) == once
    assert corpora.distinct("a\n\n\n\na\n\nb\n\n\n") == "a\n\nb\n\n"


@pytest.mark.parametrize("text", ["", "one\n\n\n\ntwo", "a\r\n\r\nb", "\n\na\n\nb\n\n\n", "one"])
def test_a_text_without_repeated_paragraphs_stays_as_it_is(text):
    assert corpora.distinct(text) == text


def test_a_file_is_called_by_its_name(tmp_path):
    raw = "\ufeffÄpfel\r\nund Birnen".encode()
    (tmp_path / "obst.txt").write_bytes(raw)
    corpus = corpora.find(None, str(tmp_path / "obst.txt"))
    assert corpus.name == "obst.txt"
    assert corpus.text == "Äpfel\r\nund Birnen"
    assert corpus.sha256 == hashlib.sha256(raw).hexdigest()


def test_a_path_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, BOOK)
    assert corpora.find("time_machine", "~/timemachine.txt").text == BOOK.decode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "empty"),
        ("Äpfel".encode("latin-1"), "not UTF-8"),
        ("folder", "directory"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, why):
    path = tmp_path / "text.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(
        SettingError, match=f"^`path` must be .* UTF-8 text file .*; got {path}. .*{why}"
    ):
        corpora.find(None, path)


@pytest.mark.parametrize("path", [3, "a\0b", ""])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(SettingError, match=r"^`path` must be .*; got "):
        corpora.find(None, path)


def test_unknown_corpora_are_refused_with_the_known_ones():
    known = "stdlib_docs, time_machine, random_letters, one_letter"
    with pytest.raises(SettingError, match=f"`corpus` must be one of {known}; got bible"):
        corpora.find("bible", None)


def test_the_documentation_of_python_has_no_path(tmp_path):
    with pytest.raises(SettingError, match=r"^`path` must be null with corpus=stdlib_docs"):
        corpora.find("stdlib_docs", put(tmp_path, BOOK))


def test_the_time_machine_is_found_at_a_path_first(monkeypatch, tmp_path, server):
    monkeypatch.setenv("BPTT_STUDY_DATA", str(put(tmp_path / "data", b"other").parent))
    corpus = corpora.find("time_machine", put(tmp_path, BOOK))
    assert corpus == ("time_machine", BOOK.decode(), hashlib.sha256(BOOK).hexdigest())
    assert server.requests == 0


def test_then_in_the_data_folder(monkeypatch, tmp_path, server):
    monkeypatch.setenv("BPTT_STUDY_DATA", str(put(tmp_path / "data", BOOK).parent))
    assert corpora.find("time_machine", None).text == BOOK.decode()
    assert server.requests == 0


def test_then_in_the_cache(tmp_path, monkeypatch, server):
    monkeypatch.setenv("BPTT_STUDY_DATA", str(tmp_path))  # which has no such file
    put(tmp_path / "cache", BOOK)
    assert corpora.find("time_machine", None).text == BOOK.decode()
    assert server.requests == 0


def test_then_downloaded_once_and_quietly(server, caplog):
    pooch.get_logger().addHandler(caplog.handler)
    for _ in range(2):
        assert corpora.find("time_machine", None).text == BOOK.decode()
    assert server.requests == 1
    pooch.get_logger().removeHandler(caplog.handler)
    assert not caplog.records


def test_a_spoilt_cache_is_mended(tmp_path, server):
    put(tmp_path / "cache", b"spoilt")
    assert corpora.find("time_machine", None).text == BOOK.decode()


def refused(path=None) -> str:
    with pytest.raises(SettingError) as caught:
        corpora.find("time_machine", path)
    message = str(caught.value)
    ways = "task.path=FILE", "$BPTT_STUDY_DATA", corpora.TIME_MACHINE_URL
    assert all(way in message for way in ways)
    assert "\n" not in message
    return message


def test_another_text_at_the_path_is_refused(tmp_path, server):
    assert refused(put(tmp_path, b"other")).startswith("`path` must be a text with SHA-1 ")


def test_another_text_in_the_data_folder_is_refused(monkeypatch, tmp_path, server):
    monkeypatch.setenv("BPTT_STUDY_DATA", str(put(tmp_path / "data", b"other").parent))
    message = refused()
    assert message.startswith("`corpus` must be ") and "; got time_machine" in message
    assert str(tmp_path / "data") in message


def test_another_text_at_the_address_is_refused(tmp_path, server):
    server.book = b"other"
    assert "another SHA-1" in refused()
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_is_an_error_soon():
    assert "ConnectionError" in refused()


def test_no_cache_folder_is_an_error(monkeypatch, tmp_path, server):
    monkeypatch.setattr(pooch, "os_cache", lambda project: put(tmp_path, BOOK) / "cache")
    assert "The download failed with" in refused()


@pytest.mark.skipif(not TIME_MACHINE.exists(), reason=f"no {TIME_MACHINE} on this machine")
def test_the_known_hash_is_that_of_the_book(monkeypatch):
    monkeypatch.undo()
    assert len(corpora.find("time_machine", TIME_MACHINE).text) == 178979
