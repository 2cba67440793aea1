"""Round trips, a hand example, and errors that show what was wrong."""

import re

import numpy as np
import pytest

from tokenizer import CHUNK, END_ID, NEVER_WRITTEN, SPECIAL_TOKENS, SimpleTokenizer

TEXT = "To be, or not to be:\nthat is the question — naïve 試 🙂"


def test_hand_example():
    tokenizer = SimpleTokenizer("hello")
    assert tokenizer.encode("hole").tolist() == [5, 7, 6, 4]
    assert tokenizer.decode([1, 5, 7]) == "ho"
    assert tokenizer.decode([1, 5, 7], skip_special_tokens=False) == "[MASK]ho"
    assert tokenizer.vocab_size == 8
    assert [tokenizer.id_to_char[i] for i in range(4)] == list(SPECIAL_TOKENS)
    assert [tokenizer.char_to_id[c] for c in "ehlo"] == [4, 5, 6, 7]


def test_only_end_may_be_written_among_the_special_tokens():
    assert [SPECIAL_TOKENS[i] for i in NEVER_WRITTEN] == ["[PAD]", "[MASK]", "[START]"]
    assert {*NEVER_WRITTEN, END_ID} == set(range(len(SPECIAL_TOKENS)))


def test_round_trips():
    tokenizer = SimpleTokenizer(TEXT)
    again = SimpleTokenizer.from_dict(tokenizer.to_dict())
    for text in (TEXT, "", "be", TEXT[::-1]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert np.array_equal(again.encode(text), tokenizer.encode(text))
    assert again.char_to_id == tokenizer.char_to_id
    assert again.id_to_char == tokenizer.id_to_char


def test_names_of_special_tokens_in_a_text_are_text():
    text = "".join(SPECIAL_TOKENS)
    tokenizer = SimpleTokenizer(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert ids.min() >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text


def test_every_token_of_text_is_one_character():
    assert SimpleTokenizer("hello").characters_per_token.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert SimpleTokenizer("").characters_per_token.tolist() == [0, 0, 0, 0]


def test_extended_tokenizers_keep_their_ids():
    tokenizer = SimpleTokenizer("hello")
    extended = tokenizer.extended("old 🙂 cold")
    assert extended.characters == "ehlo cd🙂"
    assert extended.encode("hello").tolist() == tokenizer.encode("hello").tolist()
    assert extended.decode(extended.encode("cold 🙂")) == "cold 🙂"
    assert SimpleTokenizer.from_dict(extended.to_dict()).char_to_id == extended.char_to_id
    assert extended.extended("hello").to_dict() == extended.to_dict()
    assert tokenizer.characters == "ehlo"


def test_texts_longer_than_a_chunk_are_encoded_completely():
    text = "ab" * (CHUNK // 2) + "c" * 3
    tokenizer = SimpleTokenizer("abc")
    assert np.array_equal(tokenizer.encode(text), np.array([4, 5] * (CHUNK // 2) + [6] * 3))
    with pytest.raises(ValueError, match=f"'é'.*position {CHUNK + 1}:"):
        tokenizer.encode(text[: CHUNK + 1] + "é")


@pytest.mark.parametrize(
    ("n_characters", "dtype"), [(200, np.uint8), (251, np.uint8), (252, np.uint16), (70_000, np.uint32)]
)
def test_smallest_unsigned_type(n_characters, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + n_characters)))
    tokenizer = SimpleTokenizer(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(4, 4 + n_characters))
    with pytest.raises(ValueError, match="unknown character 'a'"):
        tokenizer.encode("a")


@pytest.mark.parametrize("unknown", ["é", "\x00", "🙂", "\ud800"])
def test_unknown_character_is_shown_with_its_position(unknown):
    with pytest.raises(ValueError, match=re.escape(f"(U+{ord(unknown):04X}) at position 3:")):
        SimpleTokenizer("hello").encode("hel" + unknown)


@pytest.mark.parametrize("ids", [[8], [-1], [0.5]])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match=r"ids must be integers in 0\.\.7"):
        SimpleTokenizer("hello").decode(ids)
