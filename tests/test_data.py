"""The download against a server on loopback; corpora by name, file, folder and pipe; the split; windows and batches."""

import gzip
import hashlib
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import data
import utils.download
import utils.files
from checkpoint import load_checkpoint
from data import SEPARATORS, Corpus, ShakespeareDataset, corpus_from_text, load_corpus, load_same_corpus, split_segments
from extras.bpe import train_bpe
from tokenizer import SimpleTokenizer
from utils.download import download
from utils.files import check_seal, plain_text

GOOD = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 300
SHA256 = hashlib.sha256(GOOD).hexdigest()
SUBWORDS = train_bpe(["naïve — 試 "], 270)
ALPHABET = SimpleTokenizer("".join(map(chr, range(1000, 1252))))  # ids 4..255


@pytest.fixture
def server():
    """serve(answer, answer, ...) -> (server, url); each is (status, body, Content-Length), the last one repeats."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers = self.server.answers
            status, body, length = answers.pop(0) if len(answers) > 1 else answers[0]
            self.server.hits += 1
            if status is None:  # no answer at all
                return
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere.txt")
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    def serve(*answers):
        http.answers, http.hits = list(answers), 0
        return http, f"http://127.0.0.1:{http.server_port}/input.txt"

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        yield serve
        http.shutdown()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(utils.download.time, "sleep", lambda seconds: None)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


WHOLE, MISSING, NO_LENGTH = (200, GOOD, len(GOOD)), (404, b"", 0), (200, GOOD, None)
FAILURES = {  # what the error says: the answer
    "404": MISSING,
    "500": (500, b"", 0),
    "IncompleteRead": (200, GOOD[:1000], len(GOOD)),
    "SHA-256 is": (200, GOOD[:-1] + b"!", len(GOOD)),
    "SHA-256 is e3b0c": (200, b"", 0),
    "Connection aborted": (None, b"", 0),
    "redirects": (302, b"", 0),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_download_retries_checks_the_content_and_leaves_the_old_file_if_it_fails(server, tmp_path, reason):
    http, url = server(FAILURES[reason], NO_LENGTH)
    path = download(tmp_path / "a" / "input.txt", url, SHA256)
    assert path.read_bytes() == GOOD
    assert http.hits == 2
    path.write_text("old")
    http, url = server(FAILURES[reason])
    with pytest.raises(OSError, match=reason):
        download(path, url, SHA256)
    assert http.hits == (3 * 31 if reason == "redirects" else 3)  # requests follows 30 redirects
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("input.txt", "old")]


def test_proxies_of_the_environment_are_used(server, tmp_path, monkeypatch):
    http, url = server(WHOLE)
    monkeypatch.setenv("HTTP_PROXY", url)
    monkeypatch.setenv("NO_PROXY", "")
    assert download(tmp_path / "input.txt", "http://nowhere.invalid/input.txt", SHA256).read_bytes() == GOOD
    assert http.hits == 1


def test_two_downloads_at_once_leave_one_whole_file(server, tmp_path):
    url = server(WHOLE)[1]
    program = "import pathlib, sys; from utils.download import download\n"
    program += "download(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    words = [sys.executable, "-c", program, str(tmp_path / "input.txt"), url, SHA256]
    processes = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("input.txt", GOOD)]


def test_tinyshakespeare_is_downloaded_once_and_only_the_default_corpus_falls_back_to_pydoc(
    server, tmp_path, monkeypatch, capsys
):
    http, url = server(*6 * [MISSING], WHOLE)
    for name, value in (("CACHE", tmp_path), ("TINYSHAKESPEARE_SHA256", SHA256), ("TINYSHAKESPEARE_URL", url)):
        monkeypatch.setattr(data, name, value)
    with pytest.raises(OSError, match="could not download"):
        load_corpus("tinyshakespeare")
    assert load_corpus().name == "pydoc"
    assert "WARNING" in capsys.readouterr().err
    for hits, content in ((7, GOOD), (7, b"damaged"), (8, GOOD)):
        corpus = load_corpus()
        assert (corpus.name, corpus.sha256, len(corpus.ids)) == ("tinyshakespeare", SHA256, len(GOOD))
        assert http.hits == hits
        (tmp_path / "tinyshakespeare.txt").write_bytes(content)


def test_training_without_network_warns_and_the_checkpoint_names_the_corpus(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CACHE", tmp_path / "corpora")
    monkeypatch.setattr(data, "TINYSHAKESPEARE_URL", "http://127.0.0.1:9")
    _, messages = run_script("train.py", *TINY, "--steps", "2")
    assert "WARNING" in messages
    known = load_checkpoint(tmp_path / "out/llada/last.pt").corpus
    assert (known["name"], known["sha256"]) == ("pydoc", load_corpus("pydoc").sha256)
    _, messages = run_script("train.py", *TINY, "--steps", "2", "--data", "tinyshakespeare", check=2)
    assert messages.startswith("downloading TinyShakespeare ...\ntrain.py: error: could not download")
    assert messages.count("\n") == 2


# ------------------------------------------------------------------------------------------------- large texts
@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that is memory-mapped, in parts that cut characters and line ends apart; its ids go to corpora/."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "corpora")
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(utils.files, "CHUNK_CHARS", 1001)
    path = tmp_path / "large.txt"
    path.write_bytes(("naïve — 試\r\n " * 5000 + "end").encode())
    return path


@pytest.mark.parametrize("make_tokenizer", [None, lambda texts: SUBWORDS], ids=["characters", "subwords"])
def test_large_texts_are_mapped_and_hold_the_same_ids(large, monkeypatch, make_tokenizer):
    mapped = load_corpus(str(large), make_tokenizer)
    (ids,) = data.CACHE.iterdir()
    assert sys.platform != "linux" or str(ids) in Path("/proc/self/maps").read_text()
    built = ids.stat().st_mtime_ns
    again = load_corpus(str(large), make_tokenizer)
    assert ids.stat().st_mtime_ns == built
    with monkeypatch.context() as patch:
        patch.setattr(data, "IN_MEMORY_BYTES", 1 << 20)
        small = load_corpus(str(large), make_tokenizer)
    for corpus in (mapped, again):
        assert corpus.tokenizer.decode(corpus.ids.numpy()) == small.tokenizer.decode(small.ids.numpy())
        assert (corpus.sha256, corpus.characters) == (small.sha256, small.characters)
        assert corpus.tokenizer.to_dict() == small.tokenizer.to_dict()
        assert make_tokenizer or torch.equal(corpus.ids, small.ids)
    large.write_text("quite another text " * 5000)
    changed = load_corpus(str(large))
    assert changed.tokenizer.decode(changed.ids[:18]) == "quite another text"


def test_a_damaged_cache_of_ids_is_built_again(large):
    large.write_text("long live the king " * 20)
    whole, draw = load_corpus(str(large)), random.Random(0)
    (path,) = data.CACHE.iterdir()
    content, ids = path.read_bytes(), whole.ids.clone()  # a mapped text shows the changes of its file
    bits = [(i, 1 << draw.randrange(8)) for i in range(0, len(content), 9)]
    flipped = [content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :] for i, bit in bits]
    for other in (*flipped, content[:-1], content + b"\n", b""):
        path.write_bytes(other)
        assert torch.equal(load_corpus(str(large)).ids, ids)
        assert path.read_bytes() == content
    check_seal(path)


# ------------------------------------------------------------------------------------------------- texts as they come
LINES = "First Citizen:\nHear me speak.\n\nAll:\nSpeak, speak.\n \t\nFirst Citizen:\nYou are all resolved\n"
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    "content",
    [
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        LINES.replace("\n", "\r\n", 3).encode(),  # the first three lines
        MARK + LINES.encode(),
        gzip.compress(MARK + LINES.replace("\n", "\r\n").encode()),
    ],
    ids=["CRLF", "CR", "both", "byte order mark", "gzip"],
)
def test_line_ends_and_marks_of_other_systems_do_not_change_a_text(tmp_path, monkeypatch, content, chunk):
    monkeypatch.setattr(utils.files, "CHUNK_CHARS", chunk)
    (tmp_path / "other.txt").write_bytes(content)
    corpus = load_corpus(str(tmp_path / "other.txt"), segments="paragraph")
    assert corpus.tokenizer.decode(corpus.ids) == LINES
    assert corpus.sha256 == hashlib.sha256(LINES.encode()).hexdigest()
    assert len(corpus.dataset(corpus.ids, 64, "paragraph")) == 3


@pytest.mark.parametrize("blank", ["", " ", "\t  ", "\xa0"])
def test_blank_lines_between_segments_may_hold_spaces(blank):
    text = f"one\ntwo \n{blank}\nthree\n{blank}\n{blank}\nfour\n"
    assert [segment for segment, _ in split_segments(text, "\n\n")] == ["one\ntwo ", f"three\n{blank}", "four\n"]
    lines = ["one", f"two \n{blank}", f"three\n{blank}\n{blank}", "four", ""]
    assert [segment for segment, _ in split_segments(text, "\n")] == lines


FRENCH = "Être ou ne pas être".encode
REFUSED = {
    "latin1.txt": (FRENCH("latin-1"), r"byte 0\): if it is LATIN1, convert it with iconv -f LATIN1 -t UTF-8 FILE"),
    "bad.txt": (b"abc\xff", r"not UTF-8 text \(byte 3\)"),
    "half.txt": (b"ab\xc3", r"byte 2"),
    "marked.txt": (MARK + b"abc\xff", r"byte 6"),
    "empty.txt": (b"", "the text is empty"),
    "le.txt": (FRENCH("utf-16"), r"not UTF-8 .* if it is UTF-16, convert it with iconv -f UTF-16 -t UTF-8 FILE"),
    "be.txt": (b"\xfe\xff" + FRENCH("utf-16-be"), "iconv -f UTF-16 -t UTF-8"),
    "unmarked.txt": ("to be".encode("utf-16-le"), "UTF-16 text without a byte order mark"),
    "book.docx": (b"PK\x03\x04\x14\0\xff", r"not UTF-8 text \(byte 6\): it is a zip \(or .docx\): give the text that"),
    "text.bz2": (b"BZh91AY&SY\xff", "packed by bzip2"),
    "text.xz": (b"\xfd7zXZ\0", "packed by xz"),
    "book.pdf": (b"%PDF-1.7\n\xff", "a PDF: give the text that it holds"),
    "cut.gz": (gzip.compress(b"text" * 99)[:-9], "damaged: Compressed file ended"),
    "far.txt": (b"a" * 10**6 + b"\xff", r"byte 1000000\)"),
    "flipped.gz": (gzip.compress(b"text" * 99)[:-8] + bytes(8), "damaged: CRC check failed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_not_text_are_refused_with_what_they_are(tmp_path, monkeypatch, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    for chunk in (8, 1 << 20):
        monkeypatch.setattr(utils.files, "CHUNK_CHARS", chunk)
        with pytest.raises(ValueError, match=rf"^\S+{name}: .*{message}" if content else message):
            load_corpus(str(tmp_path / name))
    if content and not name.endswith(".gz"):
        with pytest.raises(ValueError, match=f"^standard input: .*{message}"):
            plain_text(content, "standard input")


@pytest.mark.parametrize("segments", ["window", *SEPARATORS])
def test_folders_and_several_files_are_joined_by_the_separator(tmp_path, capsys, monkeypatch, segments):
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no \.txt files in this folder"):
        load_corpus(str(folder))
    texts = {"b.txt": "two\n", "a.txt": "one\n", "c.TXT": "three", "d.txt": "four\n\n\n", "e.txt": "5"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("notes.md", "._a.txt"):
        (folder / name).write_bytes(b"\xff")
    expected = SEPARATORS.get(segments, "\n\n").join(["one", "two", "three", "four\n\n\n5"])
    for name in (str(folder), [str(folder / name) for name in sorted(texts)]):
        corpus = load_corpus(name, segments=segments)
        assert "reading 5 files: a.txt, b.txt, c.TXT, d.txt, e.txt\n" in capsys.readouterr().err
        assert corpus.tokenizer.decode(corpus.ids) == expected
        again = load_same_corpus({"name": corpus.name, "sha256": corpus.sha256}, segments, corpus.tokenizer)
        assert torch.equal(again.ids, corpus.ids)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(data, "CACHE", tmp_path / "corpora")
    assert torch.equal(load_corpus(str(folder), segments=segments).ids, corpus.ids)
    for name in ("nowhere.txt", [str(folder), "nowhere.txt"], f"{folder}{os.pathsep}nowhere.txt"):
        with pytest.raises(ValueError, match=r"^data nowhere\.txt: no such file; give a UTF-8 text file, a folder"):
            load_corpus(name)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pipe_is_kept_so_that_the_text_can_be_read_again(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(data, "CACHE", tmp_path / "corpora")
    reading, writing = os.pipe()
    os.write(writing, gzip.compress(GOOD) if zipped else GOOD)
    os.close(writing)
    corpus = load_corpus(f"/dev/fd/{reading}")  # what bash makes of <(zcat file)
    os.close(reading)
    assert corpus.sha256 == SHA256
    assert load_corpus(corpus.name).sha256 == SHA256


# ------------------------------------------------------------------------------------------------- the split and rows
def test_split_is_by_position_and_that_of_tinyshakespeare_equals_nanogpts():
    corpus = corpus_from_text("x", "".join(map(chr, range(1000, 2000))))
    for val_fraction in (0.1, 0.2, 0.37):
        train, val = corpus.split(val_fraction)
        assert torch.equal(torch.cat([train, val]), corpus.ids)
        assert len(val) == round(1000 * val_fraction)
    ids = torch.zeros(1_115_394, dtype=torch.uint8)
    parts = Corpus("tinyshakespeare", "", SimpleTokenizer("a"), ids).split(0.1)
    assert [len(part) for part in parts] == [1_003_854, 111_540]


def test_dataset_windows_equal_slices():
    tokenizer, text = SimpleTokenizer("abcdefghij"), "abcdefghij" * 3
    dataset = ShakespeareDataset(text, tokenizer, seq_length=7, stride=4)
    expected = [text[i : i + 7] for i in range(0, 30 - 7 + 1, 4)]
    assert [tokenizer.decode(dataset[i]) for i in range(len(dataset))] == expected
    assert [tokenizer.decode(window) for window in dataset.rows(torch.arange(len(dataset))).tokens] == expected
    assert next(iter(torch.utils.data.DataLoader(dataset, batch_size=6))).shape == (6, 7)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(ValueError, match="too short for one window of 31"):
        ShakespeareDataset(text, tokenizer, 31)


@pytest.mark.parametrize("length", [5, 16, 48, 50])
def test_validation_covers_every_character_once(length):
    ids = torch.arange(4, 4 + length, dtype=torch.uint8)
    windows = [rows.tokens for rows in Corpus("", "", ALPHABET, ids).validation_rows(ids, 16)]
    assert torch.equal(torch.cat([part.flatten() for part in windows]), ids.long())


def test_batches_follow_the_generator():
    dataset = ShakespeareDataset(torch.arange(4, 250, dtype=torch.uint8), ALPHABET, 8)
    one, two, other = (dataset.sample(5, torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert (one[:, 1:] - one[:, :-1] == 1).all()
