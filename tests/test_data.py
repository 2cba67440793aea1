"""The download against a server on loopback; corpora by name and path; the split; windows and batches."""

import contextlib
import hashlib
import itertools
import json
import mmap
import random
import shutil
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
from data import ShakespeareDataset, load_corpus, validation_rows
from tokenizer import SimpleTokenizer
from utils.download import download

GOOD = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 300
SHA256 = hashlib.sha256(GOOD).hexdigest()
ALPHABET = SimpleTokenizer("".join(map(chr, range(1000, 1252))))  # ids 4..255


@pytest.fixture
def server():
    """serve(answer, answer, ...) -> (server, url); each is (status, body, Content-Length), the last one repeats."""
    started = []

    def serve(*answers):
        answers = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
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
                with contextlib.suppress(OSError):  # the client has had enough
                    for part in [body] if isinstance(body, bytes) else body():
                        self.wfile.write(part)

            def log_message(self, *_):
                pass

        http = HTTPServer(("127.0.0.1", 0), Handler)
        http.hits = 0
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        return http, f"http://127.0.0.1:{http.server_port}/input.txt"

    yield serve
    for http in started:
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(utils.download.time, "sleep", lambda seconds: None)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


whole, missing, broken = (200, GOOD, len(GOOD)), (404, b"", 0), (500, b"", 0)
cut_off, altered = (200, GOOD[:1000], len(GOOD)), (200, GOOD[:-1] + b"!", len(GOOD))


def drip():
    """A body that takes a minute and more."""
    for byte in GOOD:
        threading.Event().wait(0.01)  # time.sleep does nothing in these tests
        yield bytes([byte])


silent, moved, endless = (None, b"", 0), (302, b"", 0), (200, lambda: itertools.repeat(b"x" * 999), None)
slow, no_length, empty = (200, drip, len(GOOD)), (200, GOOD, None), (200, b"", 0)


@pytest.mark.parametrize("first", [missing, broken, cut_off, altered, silent, moved, empty])
def test_download_retries_and_checks_the_content(server, tmp_path, first):
    http, url = server(first, whole)
    path = download(tmp_path / "a" / "input.txt", url, SHA256)
    assert path.read_bytes() == GOOD
    assert http.hits == 2
    assert list(path.parent.iterdir()) == [path]


def test_an_answer_without_a_length_is_downloaded(server, tmp_path):
    assert download(tmp_path / "input.txt", server(no_length)[1], SHA256).read_bytes() == GOOD


def test_proxies_of_the_environment_are_used(server, tmp_path, monkeypatch):
    http, url = server(whole)
    monkeypatch.setenv("HTTP_PROXY", url)
    monkeypatch.setenv("NO_PROXY", "")
    assert download(tmp_path / "input.txt", "http://nowhere.invalid/input.txt", SHA256).read_bytes() == GOOD
    assert http.hits == 1


def test_two_downloads_at_once_leave_one_whole_file(server, tmp_path):
    url = server(whole)[1]
    program = "import pathlib, sys; from utils.download import download\n"
    program += "download(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    words = [sys.executable, "-c", program, str(tmp_path / "input.txt"), url, SHA256]
    processes = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("input.txt", GOOD)]


def test_an_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.download, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path / "input.txt", server(whole)[1], SHA256)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        *((missing, "404"), (broken, "500"), (cut_off, "IncompleteRead"), (altered, "SHA-256"), (empty, "SHA-256")),
        *((silent, "Connection aborted"), (moved, "redirects"), (endless, "more than 100,000 bytes")),
        (slow, r"only [\d,]+ bytes came in 0 seconds"),
    ],
)
def test_failed_download_gives_the_reason_and_leaves_the_old_file(server, tmp_path, monkeypatch, answer, reason):
    monkeypatch.setattr(utils.download, "MOST_BYTES", 100_000)
    monkeypatch.setattr(utils.download, "MOST_SECONDS", 0.5)
    http, url = server(answer)
    (tmp_path / "input.txt").write_text("old")
    with pytest.raises(OSError, match=reason):
        download(tmp_path / "input.txt", url, SHA256)
    assert http.hits == (3 * 31 if answer is moved else 3)  # requests follows 30 redirects
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("input.txt", "old")]


def test_only_the_default_corpus_falls_back_to_pydoc_and_warns(server, tmp_path, monkeypatch, capsys):
    _, url = server(missing)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "TINYSHAKESPEARE_URL", url)
    corpus = load_corpus()
    assert corpus.name == "pydoc"
    assert "WARNING" in capsys.readouterr().err
    with pytest.raises(OSError, match="could not download"):
        load_corpus("tinyshakespeare")
    with pytest.raises(ValueError, match=r"data nowhere\.txt: no such file"):
        load_corpus("nowhere.txt")


def test_tinyshakespeare_is_downloaded_once(server, tmp_path, monkeypatch):
    http, url = server(whole)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "TINYSHAKESPEARE_SHA256", SHA256)
    monkeypatch.setattr(data, "TINYSHAKESPEARE_URL", url)
    for _ in range(2):
        corpus = load_corpus()
        assert (corpus.name, corpus.sha256, len(corpus.ids)) == ("tinyshakespeare", SHA256, len(GOOD))
    assert http.hits == 1
    (tmp_path / "tinyshakespeare.txt").write_text("damaged")
    assert load_corpus().sha256 == SHA256
    assert http.hits == 2


def test_training_without_network_warns_and_the_checkpoint_names_the_corpus(command, tmp_path):
    clone = tmp_path / "clone"  # with an empty folder of corpora
    clone.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, clone)
    shutil.copytree(ROOT / "utils", clone / "utils")
    process = command(clone / "train.py", *TINY, "--steps", 2)
    assert "WARNING" in process.stderr
    assert "pydoc" in process.stderr
    checkpoint = load_checkpoint(tmp_path / "out/llada/last.pt")
    assert checkpoint.corpus["name"] == "pydoc"
    assert checkpoint.corpus["sha256"] == load_corpus("pydoc").sha256
    process = command(clone / "train.py", *TINY, "--steps", 2, "--data", "tinyshakespeare", check=2)
    assert len(process.stderr.strip().splitlines()) == 2
    assert "could not download" in process.stderr


def test_large_texts_are_mapped_and_hold_the_same_ids(tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_text("naïve — 試 " * 5000 + "end", encoding="utf-8")
    small = load_corpus(str(path))
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(utils.files, "CHUNK_BYTES", 1001)  # cuts characters apart
    large = load_corpus(str(path))
    assert torch.equal(small.ids, large.ids)
    assert small.sha256 == large.sha256
    assert small.tokenizer.char_to_id == large.tokenizer.char_to_id
    built = path.with_name("large.txt.ids").stat().st_mtime_ns
    load_corpus(str(path))
    path.touch()  # another time, the same text
    load_corpus(str(path))
    assert path.with_name("large.txt.ids").stat().st_mtime_ns == built
    path.write_text("quite another text " * 5000)
    changed = load_corpus(str(path))
    assert changed.tokenizer.decode(changed.ids[:18]) == "quite another text"
    assert json.loads(path.with_name("large.txt.ids.json").read_text())["sha256"] == changed.sha256


@pytest.mark.parametrize("damaged", ["large.txt.ids", "large.txt.ids.json"])
def test_a_damaged_cache_of_ids_is_built_again(tmp_path, monkeypatch, damaged):
    path = tmp_path / "large.txt"
    path.write_text("long live the king " * 20)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    whole, draw = load_corpus(str(path)), random.Random(0)
    content, whole_note = (tmp_path / damaged).read_bytes(), (tmp_path / "large.txt.ids.json").read_text()
    ids = whole.ids.clone()  # the mapping shows the changes of the file
    bits = [(i, 1 << draw.randrange(8)) for i in range(0, len(content), 9)]
    flipped = [content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :] for i, bit in bits]
    for other in (*flipped, content[:-1], content + b"\n", b""):
        (tmp_path / damaged).write_bytes(other)
        again = load_corpus(str(path))
        assert torch.equal(again.ids, ids)
        assert (again.sha256, again.tokenizer.to_dict()) == (whole.sha256, whole.tokenizer.to_dict())
        assert json.loads((tmp_path / "large.txt.ids.json").read_text()) == json.loads(whole_note)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_reading_a_mapped_text_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 100)
    path = tmp_path / "large.txt"
    path.write_text("the king is dead, long live the king\n" * 2_000_000)  # 74 MB

    def resident_megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6

    load_corpus(str(path))  # builds the ids
    corpus, generator = load_corpus(str(path)), torch.Generator().manual_seed(0)
    windows, grown = ShakespeareDataset(corpus.ids, corpus.tokenizer, 256), {}
    for forget in (True, False):
        before = resident_megabytes()
        for _ in range(200):
            read = windows.sample(16, generator).tokens
            if forget:
                corpus.forget_pages()
        grown[forget] = resident_megabytes() - before
    assert grown[True] < 5
    assert grown[False] > 40, "without forget_pages memory must grow, or this test proves nothing"
    corpus.forget_pages()
    assert corpus.tokenizer.decode(read[0]) in "the king is dead, long live the king\n" * 9


@pytest.mark.parametrize(
    ("content", "message"), [(b"abc\xff", "not UTF-8 .*byte 3"), (b"ab\xc3", "ends inside"), (b"", "empty")]
)
def test_files_that_are_not_text_are_refused(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize("val_fraction", [0.1, 0.2, 0.37])
def test_split_is_by_position_without_leakage(val_fraction):
    corpus = data.corpus_from_text("x", "".join(map(chr, range(1000, 2000))))  # every character once
    train, val = corpus.split(val_fraction)
    assert torch.equal(torch.cat([train, val]), corpus.ids)
    assert len(val) == round(1000 * val_fraction)
    windows = ShakespeareDataset(train, corpus.tokenizer, 16)
    assert not set(windows.gather(torch.arange(len(windows))).unique().tolist()) & set(val.tolist())


def test_split_of_tinyshakespeare_equals_nanogpts():
    ids = torch.zeros(1_115_394, dtype=torch.uint8)
    parts = data.Corpus("tinyshakespeare", "", SimpleTokenizer("a"), ids).split(0.1)
    assert [len(part) for part in parts] == [1_003_854, 111_540]


def test_dataset_windows_equal_slices():
    tokenizer = SimpleTokenizer("abcdefghij")
    text = "abcdefghij" * 3
    dataset = ShakespeareDataset(text, tokenizer, seq_length=7, stride=4)
    expected = [text[i : i + 7] for i in range(0, 30 - 7 + 1, 4)]
    assert [tokenizer.decode(dataset[i]) for i in range(len(dataset))] == expected
    assert dataset[0].dtype == torch.long
    assert next(iter(torch.utils.data.DataLoader(dataset, batch_size=6))).shape == (6, 7)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(ValueError, match="too short for one window of 31"):
        ShakespeareDataset(text, tokenizer, 31)


@pytest.mark.parametrize("length", [5, 16, 48, 50])
def test_validation_covers_every_character_once(length):
    ids = torch.arange(4, 4 + length, dtype=torch.uint8)
    windows = [rows.tokens for rows in validation_rows(ids, ALPHABET, 16)]
    assert torch.equal(torch.cat([part.flatten() for part in windows]), ids.long())


def test_batches_follow_the_generator():
    dataset = ShakespeareDataset(torch.arange(4, 250, dtype=torch.uint8), ALPHABET, 8)
    one, two, other = (dataset.sample(5, torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert (one[:, 1:] - one[:, :-1] == 1).all()
