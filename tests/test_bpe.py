"""Byte-level BPE: merges by hand, parity with the tokenizers library, lossless round trips, existing files."""

import builtins
import itertools
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import tokenizer as module
from tokenizer import (
    END_ID,
    MASK_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    START_ID,
    BPETokenizer,
    SimpleTokenizer,
    StreamDecoder,
    read_tokenizer,
    tokenizer_from_dict,
    train_bpe,
)

PROSE = "\n\n".join(topics[key] for key in sorted(topics))[:200_000]  # documentation that ships with Python
HARD = [
    "naïve café — 試験 🙂 👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301 is not é, ﬁ is not fi, \ufeff\u200b\u2028\u00a0\ufffd\U0010ffff",
    "\x00\x01\t\r\n\x0b\x0c\x1c\x7f\x85  \n\n   x ",
    "[MASK] [PAD][START]x[END] <s> </s> <pad> <|endoftext|> Ġ Ċ",
    "",
]
NAMES = ["<pad>", "<mask>", "<s>", "</s>", "<unk>"]
GPT4 = (  # the regular expression of cl100k_base
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL = train_bpe(["ab ab é é 試 試"], 300)
EMPTY = tokenizers.Tokenizer(models.BPE()).to_str().encode()  # a file without tokens
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
    library.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    library.add_special_tokens(special)
    return library


def saved(library: tokenizers.Tokenizer, folder: Path) -> Path:
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


# ------------------------------------------------------------------------------------------------- training, encoding
def test_merges_by_hand():
    """Words of "aab ab ab": `a b` occurs 3 times, then ` ab` (2); `a ab` occurs once and is not merged."""
    tokenizer = train_bpe(["aab ab ab"], 1000)
    assert tokenizer.vocab_size == 4 + 256 + 2
    assert [tokenizer.id_to_char[i] for i in (260, 261)] == ["ab", " ab"]
    assert [tokenizer.id_to_char[i] for i in tokenizer.encode("aab ab ba")] == ["a", "ab", " ab", " ", "b", "a"]
    assert tokenizer.characters_per_token[260:].tolist() == [2, 3]


def test_special_tokens_and_bytes_come_first(bpe):
    assert bpe.vocab_size == 600
    assert [bpe.id_to_char[i] for i in range(4)] == list(SPECIAL_TOKENS)
    assert bpe.characters_per_token[:4].tolist() == [0] * 4
    assert sorted(bpe.bytes_of([i]) for i in range(4, 260)) == [bytes([byte]) for byte in range(256)]
    assert bpe.dtype == np.uint16
    assert all(bpe.id_to_char[i] == char for char, i in bpe.char_to_id.items())
    assert set(module.BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())


def test_training_is_deterministic_and_takes_parts_of_text():
    states = [train_bpe(iter(texts), 400).to_dict() for texts in ([PROSE], [PROSE], PROSE.splitlines(keepends=True))]
    assert states[0] == states[1]
    assert len(json.loads(states[2]["tokenizer_json"])["model"]["vocab"]) == 400


@pytest.mark.parametrize("text", [PROSE, *HARD], ids=["prose", *map(str, range(len(HARD)))])
def test_ids_of_the_library_and_round_trip(bpe, text):
    library = library_of(bpe)
    ids = bpe.encode(text)
    assert np.array_equal(ids, library.encode(text, add_special_tokens=False).ids)
    assert ids.dtype == bpe.dtype
    assert bpe.decode(ids) == text == library.decode(ids.tolist())
    assert bpe.characters_per_token[ids].sum() == len(text)
    assert (ids >= len(SPECIAL_TOKENS)).all()


@examples
@given(st.text())
def test_every_text_round_trips(text):
    for tokenizer in (SMALL, SimpleTokenizer(text)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.characters_per_token[ids].sum() == len(text)


@pytest.mark.parametrize("split", [None, GPT4], ids=["gpt2", "gpt4"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_parts_do_not_change_the_ids(split, newline, monkeypatch, tmp_path):
    tokenizer = read_tokenizer(saved(byte_level(split=split), tmp_path))
    text = (PROSE[:20_000] + "\n\n  \n" + "試験 🙂\n naïve  x\n" * 20 + "y" * 3000 + "   ").replace("\n", newline)
    whole = tokenizer.encode(text)
    expected = library_of(tokenizer).encode(text, add_special_tokens=False).ids
    assert np.array_equal(whole, tokenizer.our_id[expected])
    monkeypatch.setattr(module, "PART", 3)
    assert len(list(tokenizer._parts(text))) > 1500
    assert np.array_equal(tokenizer.encode(text), whole)


def test_a_text_that_cannot_be_cut_is_encoded_whole(monkeypatch):
    """Words without a split between them, or tokens with spaces inside, stand across every cut."""
    text = "to be or not to be " * 50
    unsplit = tokenizers.Tokenizer(models.BPE())
    unsplit.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    unsplit.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    spaced = byte_level()
    spaced.add_tokens(["be or"])
    monkeypatch.setattr(module, "PART", 5)
    for library in (unsplit, spaced):
        tokenizer = BPETokenizer(library.to_str())
        assert len(list(tokenizer._parts(text))) == 1
        expected = library.encode(text, add_special_tokens=False).ids
        assert np.array_equal(tokenizer.encode(text), tokenizer.our_id[expected])


@pytest.mark.parametrize("position", [0, 3])
def test_a_lone_surrogate_is_shown_with_its_position(bpe, position):
    text = "x" * position + "\ud83d."
    with pytest.raises(ValueError, match=rf"lone surrogate '\\ud83d' at position {position}: not UTF-8 text"):
        bpe.encode(text)
    with pytest.raises(ValueError, match=r"training text has a lone surrogate, '\\ud83d'"):
        train_bpe([text], 300)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 260"):
        train_bpe(["text"], 259)
    assert train_bpe(["text"], 260).vocab_size == 260


def test_errors_of_the_reader_of_the_training_text_are_kept():
    def texts():
        yield "text"
        raise ValueError("text.txt: not UTF-8 text")

    with pytest.raises(ValueError, match=r"^text\.txt: not UTF-8 text$"):
        train_bpe(texts(), 300)


# ------------------------------------------------------------------------------------------------- decoding
def test_special_tokens_are_left_out_unless_asked_for(bpe):
    ids = [START_ID, *bpe.encode("ab").tolist(), MASK_ID, END_ID]
    assert bpe.decode(ids) == "ab"
    assert bpe.decode(ids, skip_special_tokens=False) == "[START]ab[MASK][END]"
    assert bpe.decode([]) == ""


@pytest.mark.parametrize("ids", [[600], [-1], [0.5]])
def test_ids_out_of_range_are_refused(bpe, ids):
    with pytest.raises(ValueError, match=r"ids must be integers in 0\.\.599"):
        bpe.decode(ids)


def test_half_of_a_character_is_the_replacement_character(bpe):
    emoji = bpe.encode("🙂")
    assert len(emoji) == 4
    assert bpe.decode(emoji[:3]) == "\ufffd"
    assert bpe.id_to_char[int(emoji[0])] == "\\xf0"


@examples
@given(st.lists(st.integers(0, SMALL.vocab_size - 1)), st.integers(1, 3), st.booleans())
def test_streams_join_to_the_decoded_text(ids, size, skip):
    """For any ids, also those that are not UTF-8 text."""
    decoder = StreamDecoder(SMALL, skip)
    parts = [decoder.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(parts) + decoder.flush() == SMALL.decode(ids, skip)


@examples
@given(st.text())
def test_streams_never_show_half_of_a_character(text):
    for tokenizer in (SMALL, SimpleTokenizer(text)):
        decoder = StreamDecoder(tokenizer)
        shown = list(itertools.accumulate(decoder.push([i]) for i in tokenizer.encode(text).tolist()))
        assert all(text.startswith(part) for part in shown)
        assert "".join(shown[-1:]) == text
        assert decoder.flush() == ""


def test_streams_show_special_tokens_if_asked_to():
    for tokenizer in (SMALL, SimpleTokenizer("ab")):
        ids = [START_ID, *tokenizer.encode("ab").tolist(), END_ID]
        assert StreamDecoder(tokenizer).push(ids) == "ab"
        assert StreamDecoder(tokenizer, skip_special_tokens=False).push(ids) == "[START]ab[END]"


# ------------------------------------------------------------------------------------------------- checkpoints
def test_state_is_plain_and_gives_the_same_tokenizer(bpe):
    for tokenizer in (bpe, SimpleTokenizer("hello")):
        state = json.loads(json.dumps(tokenizer.to_dict()))
        again = tokenizer_from_dict(state)
        assert type(again) is type(tokenizer)
        assert again.to_dict() == tokenizer.to_dict()
        assert again.id_to_char == tokenizer.id_to_char
        with pytest.raises(ValueError, match="special tokens"):
            tokenizer_from_dict({**state, "special_tokens": ["[PAD]"]})


def test_without_the_library_there_is_one_line(bpe, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for use, arguments in ((train_bpe, ([""], 300)), (read_tokenizer, ["x"]), (tokenizer_from_dict, [bpe.to_dict()])):
        with pytest.raises(ValueError, match=r"^BPE needs the tokenizers library: pip install tokenizers==0\.23\.3$"):
            use(*arguments)


# ------------------------------------------------------------------------------------------------- existing files
def test_ids_of_an_existing_file_are_permuted(tmp_path):
    library = byte_level()
    tokenizer = read_tokenizer(saved(library, tmp_path))
    assert tokenizer.vocab_size == 500 + len(SPECIAL_TOKENS)  # <unk> is left out
    named = {name: int(tokenizer.our_id[library.token_to_id(name)]) for name in NAMES}
    assert named == {"<pad>": PAD_ID, "<mask>": MASK_ID, "<s>": START_ID, "</s>": END_ID, "<unk>": PAD_ID}
    assert tokenizer.our_id[:500].tolist() == list(range(4, 504))
    library.encode_special_tokens = True
    for text in (PROSE, *HARD):
        ids = tokenizer.encode(text)
        expected = np.array(library.encode(text, add_special_tokens=False).ids, dtype=int)
        assert np.array_equal(ids, tokenizer.our_id[expected])
        assert tokenizer.decode(ids) == text


def test_missing_special_tokens_are_added(tmp_path):
    tokenizer = read_tokenizer(saved(byte_level(["<|endoftext|>"]), tmp_path))
    assert tokenizer.vocab_size == 504
    assert tokenizer.our_id[500] == END_ID
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


def test_our_own_file_keeps_its_ids(bpe, tmp_path):
    tokenizer = read_tokenizer(saved(library_of(bpe), tmp_path))
    assert tokenizer.our_id.tolist() == list(range(600))
    assert tokenizer.id_to_char == bpe.id_to_char


def test_special_tokens_that_are_also_text_stay_text(tmp_path):
    """CLIP pads with "!", a byte. And merges may make a special token's name out of text."""
    bang = read_tokenizer(saved(byte_level(["!", "<pad>"]), tmp_path))
    assert bang.decode(bang.encode("Oh!")) == "Oh!"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "s"), ("<s", ">")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.add_special_tokens(["<s>"])
    tokenizer = read_tokenizer(saved(library, tmp_path))
    assert tokenizer.encode("<s>").tolist() == [4 + 257]
    assert tokenizer.decode([4 + 257]) == "<s>"


def test_added_tokens_are_text_and_settings_of_the_file_do_not_apply(tmp_path):
    library = byte_level(dropout=0.5)
    library.add_tokens(["é!", "    ", "<tool>"])
    library.enable_truncation(3)
    library.enable_padding(length=7)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, library.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    library.normalizer = normalizers.NFC()
    tokenizer = read_tokenizer(saved(library, tmp_path))
    text = "é!     <tool> combining e\u0301, and the rest of the text " * 3
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.id_to_char[int(ids[0])] == "é!"
    assert all(np.array_equal(tokenizer.encode(text), ids) for _ in range(5))
    assert tokenizer.decode(tokenizer.encode("")) == ""


def lossy(kind: str) -> tokenizers.Tokenizer:
    library = byte_level()
    if kind == "prefix space":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "lower case":
        library.normalizer = normalizers.Lowercase()
    elif kind == "white space":
        library.normalizer = normalizers.Strip()
    elif kind == "eats spaces":
        library.add_tokens([tokenizers.AddedToken("##", lstrip=True)])
    elif kind == "some bytes":
        library = tokenizers.Tokenizer(models.BPE({"x": 0, "Ġ": 1}, [], unk_token="x"))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "characters":
        library = tokenizers.Tokenizer(models.BPE({"x": 0, " ": 1, "y": 2}, []))
    elif kind == "words":
        library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "pieces":
        library = tokenizers.Tokenizer(models.Unigram([("▁", -1.0), ("x", -1.0), ("<unk>", -9.0)], unk_id=2))
        library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library


@pytest.mark.parametrize(
    "kind",
    ["prefix space", "lower case", "white space", "eats spaces", "some bytes", "characters", "words", "pieces"],
)
def test_files_that_change_text_are_refused(kind, tmp_path):
    path = saved(lossy(kind), tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be used.*: '.*' at position \d+ does not survive"):
        read_tokenizer(path)


def test_what_does_not_survive_is_shown_with_its_position(monkeypatch):
    monkeypatch.setattr(module, "PART", 5)
    monkeypatch.setattr(module, "PARTS", 1)
    with pytest.raises(ValueError, match=r"^'Lower ca' at position 601 does not survive encoding$"):
        BPETokenizer(lossy("lower case").to_str()).encode("in the " * 85 + "inner Lower case")


@pytest.mark.parametrize("content", [b"", b"text", b"[1]", b"{}", b'{"model": {}}', b"\xff\xfe", b"PK\x03", EMPTY])
def test_files_that_are_no_tokenizers_are_refused(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json: cannot be used as a tokenizer: ") as caught:
        read_tokenizer(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "x.json", tmp_path):
        with pytest.raises(ValueError, match=r": give the path of a tokenizer\.json$"):
            read_tokenizer(path)
