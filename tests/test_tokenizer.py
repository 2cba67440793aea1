"""Characters: round trips, a hand example, and errors that show what was wrong."""

import re

import numpy as np
import pytest

from tokenizer import END_ID, NEVER_WRITTEN, SPECIAL_TOKENS, SimpleTokenizer

HELLO = SimpleTokenizer("hello")


def test_tables_of_a_small_example():
    assert [HELLO.id_to_char[i] for i in range(HELLO.vocab_size)] == [*SPECIAL_TOKENS, *"ehlo"]
    assert [HELLO.char_to_id[c] for c in "ehlo"] == [4, 5, 6, 7]
    assert HELLO.characters_per_token.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert SimpleTokenizer("").characters_per_token.tolist() == [0, 0, 0, 0]
    assert [SPECIAL_TOKENS[i] for i in NEVER_WRITTEN] == ["[PAD]", "[MASK]", "[START]"]
    assert END_ID not in NEVER_WRITTEN


@pytest.mark.parametrize("text", ["To be, or not to be:\nthat is the question — naïve 試 🙂", "".join(SPECIAL_TOKENS)])
def test_round_trips(text):
    """Names of special tokens in a text are text."""
    tokenizer = SimpleTokenizer(text)
    again = SimpleTokenizer.from_dict(tokenizer.to_dict())
    for part in (text, "", text[3:5], text[::-1]):
        ids = tokenizer.encode(part)
        assert len(ids) == len(part)
        assert (ids >= len(SPECIAL_TOKENS)).all()
        assert tokenizer.decode(ids) == part
        assert np.array_equal(again.encode(part), ids)
    assert (again.char_to_id, again.id_to_char) == (tokenizer.char_to_id, tokenizer.id_to_char)


def test_extended_tokenizers_keep_their_ids():
    extended = HELLO.extended("old 🙂 cold")
    assert extended.characters == "ehlo cd🙂"
    assert extended.encode("hello").tolist() == HELLO.encode("hello").tolist()
    assert SimpleTokenizer.from_dict(extended.to_dict()).char_to_id == extended.char_to_id
    assert extended.extended("hello").to_dict() == extended.to_dict()


@pytest.mark.parametrize(
    ("n_characters", "dtype"), [(200, np.uint8), (251, np.uint8), (252, np.uint16), (70_000, np.uint32)]
)
def test_smallest_unsigned_type(n_characters, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + n_characters)))
    ids = SimpleTokenizer(text).encode(text)
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(4, 4 + n_characters))
    with pytest.raises(ValueError, match="unknown character 'a'"):
        SimpleTokenizer(text).encode("a")


@pytest.mark.parametrize("unknown", ["é", "\x00", "🙂", "\ud800"])
def test_unknown_character_is_shown_with_its_position(unknown):
    """In the text, or in the longer one of which it is a part."""
    for start in (0, 15):
        with pytest.raises(ValueError, match=re.escape(f"(U+{ord(unknown):04X}) at position {start + 3}:")):
            HELLO.encode("hel" + unknown, start)


@pytest.mark.parametrize("ids", [[8], [-1], [0.5]])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match=r"ids must be integers in 0\.\.7"):
        HELLO.decode(ids)
