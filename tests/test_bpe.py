"""Byte-level BPE: merges by hand, parity with the tokenizers library, lossless round trips, existing files."""

import importlib
import itertools
import json
import re
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from extras import bpe as module
from extras.bpe import BPETokenizer, read_tokenizer, train_bpe
from tokenizer import END_ID, MASK_ID, SPECIAL_TOKENS, START_ID, SimpleTokenizer, StreamDecoder

PROSE = "\n\n".join(topics[key] for key in sorted(topics))[:200_000]  # documentation that ships with Python
HARD = [
    "naïve café — 試験 🙂 👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301 is not é, ﬁ is not fi, \ufeff\u200b\u2028\u00a0\ufffd\U0010ffff",
    "\x00\x01\t\r\n\x0b\x0c\x1c\x7f\x85  \n\n   x ",
    "[MASK] [PAD][START]x[END] <s> </s> <pad> <|endoftext|> Ġ Ċ",
    "",
]
NAMES = ["<unk>", *SPECIAL_TOKENS, "<|endoftext|>"]
GPT4 = (  # the regular expression of cl100k_base
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL = train_bpe(["ab ab é é 試 試"], 300)
EMPTY = tokenizers.Tokenizer(models.BPE()).to_str()  # without tokens, and without the special ones
examples = settings(derandomize=True, deadline=None)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([PROSE], 600)


def library_of(tokenizer: BPETokenizer) -> tokenizers.Tokenizer:
    """The library's tokenizer of the same file, which does not read names of special tokens in a text as such."""
    library = tokenizers.Tokenizer.from_str(tokenizer.to_dict()["tokenizer_json"])
    library.encode_special_tokens = True
    return library


def byte_level(special=NAMES, split=None, **options) -> tokenizers.Tokenizer:
    """A byte-level tokenizer as others train it, its special tokens at the end."""
    library = tokenizers.Tokenizer(models.BPE(**options))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split:
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), words])
    library.pre_tokenizer, library.decoder = words, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([PROSE], trainer)
    library.add_special_tokens(list(special))
    return library


@pytest.fixture
def read(tmp_path):
    """read(library): `read_tokenizer` of the file of a tokenizer of the library."""

    def saved(library: tokenizers.Tokenizer) -> BPETokenizer:
        library.save(str(tmp_path / "tokenizer.json"))
        return read_tokenizer(tmp_path / "tokenizer.json")

    return saved


# ------------------------------------------------------------------------------------------------- training, encoding
def test_merges_by_hand():
    """Words of "aab ab ab": `a b` occurs 3 times, then ` ab` (2); `a ab` occurs once and is not merged."""
    tokenizer = train_bpe(["aab ab ab"], 1000)
    assert tokenizer.vocab_size == 4 + 256 + 2
    assert [tokenizer.id_to_char[i] for i in (260, 261)] == ["ab", " ab"]
    assert [tokenizer.id_to_char[i] for i in tokenizer.encode("aab ab ba")] == ["a", "ab", " ab", " ", "b", "a"]
    assert tokenizer.characters_per_token[260:].tolist() == [2, 3]
    assert not tokenizer.is_exact  # "aab" could also be a, a, b


def test_special_tokens_and_bytes_come_first_and_half_of_a_character_is_replaced(bpe):
    assert [bpe.id_to_char[i] for i in range(4)] == list(SPECIAL_TOKENS)
    assert sorted(bpe.bytes_of(np.array([i])) for i in range(4, 260)) == [bytes([byte]) for byte in range(256)]
    assert (bpe.vocab_size, bpe.dtype) == (600, np.uint16)
    ids = [START_ID, *bpe.encode("ab").tolist(), MASK_ID, END_ID]
    assert bpe.decode(ids) == "ab"
    assert bpe.decode(ids, skip_special_tokens=False) == "[START]ab[MASK][END]"
    emoji = bpe.encode("🙂")
    assert len(emoji) == 4
    assert bpe.decode(emoji[:3]) == "\ufffd"
    assert bpe.id_to_char[int(emoji[0])] == "\\xf0"


def test_training_is_deterministic_and_takes_parts_of_text(bpe):
    assert train_bpe(iter([PROSE]), 600).to_dict() == bpe.to_dict()
    assert train_bpe(PROSE.splitlines(keepends=True), 400).vocab_size == 400


@pytest.mark.parametrize("text", [PROSE, *HARD], ids=["prose", *map(str, range(len(HARD)))])
def test_ids_of_the_library_and_round_trip(bpe, read, text):
    """Of our own file, and of a foreign one, whose special tokens are at the end: its ids are permuted."""
    foreign = read(byte_level())
    assert [int(foreign.our_id[library_of(foreign).token_to_id(name)]) for name in NAMES] == [504, 0, 1, 2, 3, 505]
    assert foreign.our_id[:500].tolist() == list(range(4, 504))
    assert bpe.our_id.tolist() == list(range(600))
    for tokenizer in (bpe, foreign):
        ids, library = tokenizer.encode(text), library_of(tokenizer)
        expected = np.array(library.encode(text, add_special_tokens=False).ids, dtype=int)
        assert np.array_equal(ids, tokenizer.our_id[expected])
        assert ids.dtype == tokenizer.dtype
        assert tokenizer.decode(ids) == text == library.decode(expected.tolist())
        assert tokenizer.characters_per_token[ids].sum() == len(text)
        assert (ids >= len(SPECIAL_TOKENS)).all()


@examples
@given(st.text())
def test_every_text_round_trips_and_streams_never_show_half_of_a_character(text):
    for tokenizer in (SMALL, SimpleTokenizer(text)):
        ids, decoder = tokenizer.encode(text), StreamDecoder(tokenizer)
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.characters_per_token[ids].sum() == len(text)
        shown = list(itertools.accumulate(decoder.push([i]) for i in (START_ID, *ids.tolist(), END_ID)))
        assert all(text.startswith(part) for part in shown)
        assert shown[-1] == text
        assert decoder.flush() == ""


@pytest.mark.parametrize("split", [None, GPT4], ids=["gpt2", "gpt4"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_parts_do_not_change_the_ids(split, newline, monkeypatch, read):
    tokenizer = read(byte_level(split=split))
    text = (PROSE[:20_000] + "\n\n  \n" + "試験 🙂\n naïve  x\n" * 20 + "y" * 3000 + "   ").replace("\n", newline)
    whole = tokenizer.encode(text)
    expected = library_of(tokenizer).encode(text, add_special_tokens=False).ids
    assert np.array_equal(whole, tokenizer.our_id[expected])
    monkeypatch.setattr(module, "PART", re.compile(module.PART.pattern.replace("65536", "3")))
    assert len(module.PART.findall(text)) > 100 or newline == "\r\n"  # files are read with "\n" alone
    assert np.array_equal(tokenizer.encode(text), whole)


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        (lambda: SMALL.encode("xxx\ud83d.", start=20), r"lone surrogate '\\ud83d' at position 23: not UTF-8 text"),
        (lambda: train_bpe(["\ud83d."], 300), "surrogates not allowed"),
        (lambda: train_bpe(["text"], 259), "vocab_size must be at least 260"),
    ],
)
def test_what_cannot_be_used_is_refused(use, problem):
    with pytest.raises(ValueError, match=problem):
        use()


@examples
@given(st.lists(st.integers(0, SMALL.vocab_size - 1)), st.integers(1, 3))
def test_streams_join_to_the_decoded_text(ids, size):
    """For any ids, also those that are not UTF-8 text."""
    decoder = StreamDecoder(SMALL)
    parts = [decoder.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(parts) + decoder.flush() == SMALL.decode(ids)


def test_without_the_library_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "extras.bpe")
    with pytest.raises(ValueError, match=r"^BPE needs the tokenizers library: pip install tokenizers==0\.23\.3$"):
        importlib.import_module("extras.bpe")


# ------------------------------------------------------------------------------------------------- existing files
@pytest.mark.parametrize("names", [["<|endoftext|>"], ["<pad>", "<mask>", "<s>", "</s>"], SPECIAL_TOKENS[1:]])
def test_a_file_without_our_special_tokens_is_refused_with_what_adds_them(read, names):
    library = byte_level(names)
    if "<pad>" in names:
        library.add_tokens(["[MASK]"])  # text is encoded as it: it is not special
    with pytest.raises(ValueError, match=r"json: .* it lacks special tokens: add them in Python with ") as caught:
        read(library)
    (missing,) = re.findall(r"add_special_tokens\((\[.*\])\)", str(caught.value))
    library.add_special_tokens(json.loads(missing.replace("'", '"')))
    assert read(library).vocab_size == 504 + len(set(names) - set(SPECIAL_TOKENS))


def test_added_tokens_are_text_and_settings_of_the_file_do_not_apply(read):
    library = byte_level(dropout=0.5)
    library.add_tokens(["é!", "    ", "<tool>"])
    library.enable_truncation(3)
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    library.enable_padding(length=7)
    library.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[(name, library.token_to_id(name)) for name in ("[START]", "[END]")]
    )
    tokenizer = read(library)
    text = "é!     <tool> Combining e\u0301, and the rest of the text " * 3
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.id_to_char[int(ids[0])] == "é!"
    assert all(np.array_equal(tokenizer.encode(text), ids) for _ in range(5))
    bang = read(byte_level(["!", *SPECIAL_TOKENS]))  # CLIP pads with "!"
    assert bang.decode(bang.encode("Oh!")) == "Oh!"


def finished(model, pre_tokenizer=None) -> tokenizers.Tokenizer:
    """A tokenizer of the library with our special tokens."""
    library = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    library.add_special_tokens(list(SPECIAL_TOKENS))
    return library


LOSSY = {
    "prefix space": (byte_level().model, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "some bytes": (models.BPE({"x": 0, "Ġ": 1}, [], unk_token="x"), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "characters": (models.BPE({"x": 0, " ": 1, "y": 2}, []), None),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_files_that_change_text_refuse_it(kind, read):
    with pytest.raises(ValueError, match=r"^'.*' at position \d+ does not survive encoding$"):
        read(finished(*LOSSY[kind])).encode("inner ## of the tokens", start=5)


WORDS = finished(models.WordPiece({"[UNK]": 0, "x": 1}, unk_token="[UNK]")).to_str()
PIECES = finished(models.Unigram([("▁", -1.0), ("x", -1.0), ("<unk>", -9.0)], unk_id=2)).to_str()


@pytest.mark.parametrize("content", ["", "text", "[1]", "{}", '{"model": {}}', "PK\3\xff", EMPTY, WORDS, PIECES])
def test_files_that_are_no_tokenizers_are_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content, "latin-1" if "\xff" in content else "utf-8")
    with pytest.raises(ValueError, match=r"x\.json: cannot be used as a tokenizer: ") as caught:
        read_tokenizer(tmp_path / "x.json")
    assert "\n" not in str(caught.value)
    assert content not in (WORDS, PIECES) or "no BPE" in str(caught.value)
    for path in (tmp_path / "y.json", tmp_path):
        with pytest.raises(ValueError, match=r": give the path of a tokenizer\.json$"):
            read_tokenizer(path)
