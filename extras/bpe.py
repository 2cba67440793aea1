"""Subwords: byte-level BPE, run by the `tokenizers` library, with the methods of `tokenizer.SimpleTokenizer`.

A text has many encodings, of which `encode` chooses one: its likelihood is a bound on that of the text.
"""

import re
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import numpy as np

from tokenizer import SPECIAL_TOKENS, Tokenizer

try:
    import tokenizers
except ImportError:
    raise ValueError("BPE needs the tokenizers library: pip install tokenizers==0.23.3") from None

# Parts of a text, to bound the memory of encoding: cut before a word that begins a line, as GPT-2 and GPT-4 always do
PART = re.compile(r"(?s).{65536}.*?(?<=\S\n)(?=\S)|.+")
# GPT-2's table: these bytes stand for themselves in tokens, the others are U+0100, U+0101, ...
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted({*range(0x100)} - {*PRINTABLE}))}


class BPETokenizer(Tokenizer):
    """A tokenizer whose tokens stand for strings of bytes; after SPECIAL_TOKENS they are in the order of the file.

    tokenizer_json: the library's format. `our_id` maps the file's ids to ours. Raises ValueError if the library cannot
    read the file, or the file lacks one of SPECIAL_TOKENS.
    """

    source, is_exact = "tokenizer_json", False

    def __init__(self, tokenizer_json: str):
        try:
            self._library = tokenizers.Tokenizer.from_str(tokenizer_json)
            self._library.model.dropout = None  # of merges, at random
        except Exception as error:  # the library raises no narrower class; other models than BPE have no dropout
            raise ValueError(f"no BPE in the tokenizers library's format ({error})") from None
        self.tokenizer_json = tokenizer_json
        self._library.encode_special_tokens = True  # their names in a text are text
        self._library.normalizer = None  # which would change the text
        self._library.no_truncation()
        self._library.no_padding()
        added = {token.content: token.special for token in self._library.get_added_tokens_decoder().values()}
        if missing := [name for name in SPECIAL_TOKENS if not added.get(name)]:
            add = f"tokenizers.Tokenizer.from_file(FILE).add_special_tokens({missing})"
            raise ValueError(f"it lacks special tokens: add them in Python with {add}, and save it")
        ids = self._library.get_vocab(with_added_tokens=True)
        tokens = [*SPECIAL_TOKENS, *sorted(set(ids) - set(SPECIAL_TOKENS), key=ids.get)]
        self.our_id = np.zeros(max(ids.values()) + 1, dtype=np.int64)
        self.our_id[[ids[token] for token in tokens]] = np.arange(len(tokens))
        self._bytes = [  # "Ġthe" stands for b" the"
            token.encode() if token in added or set(token) - BYTE_OF.keys() else bytes(map(BYTE_OF.get, token))
            for token in tokens
        ]
        self.id_to_char = {i: raw.decode("utf-8", "backslashreplace") for i, raw in enumerate(self._bytes)}
        self.char_to_id = {char: i for i, char in self.id_to_char.items()}
        starts = [sum(byte & 0xC0 != 0x80 for byte in raw) for raw in self._bytes]  # other bytes continue a character
        self.characters_per_token = np.array([0] * len(SPECIAL_TOKENS) + starts[len(SPECIAL_TOKENS) :])
        self.dtype = np.min_scalar_type(self.vocab_size)

    def encode(self, text: str, start: int = 0) -> np.ndarray:
        """Text -> (n,) ids in an unsigned type that fits. start: the position of text[0], in a longer text.

        Raises ValueError with the position for a lone surrogate, and for a text that would be decoded as another, which
        only a tokenizer.json that is not lossless does.
        """
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"lone surrogate {lone[0]!r} at position {start + lone.start()}: not UTF-8 text")
        parts = [self._library.encode(part, add_special_tokens=False).ids for part in PART.findall(text)]
        ids = np.concatenate([np.zeros(0, self.dtype), *(self.our_id[part].astype(self.dtype) for part in parts)])
        if (decoded := self.decode(ids)) != text:
            position = next(i for i, (a, b) in enumerate(zip_longest(text, decoded)) if a != b)
            where = f"{text[position : position + 8]!r} at position {start + position}"
            raise ValueError(f"{where} does not survive encoding")
        return ids

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """Ids -> the bytes that they stand for, which may begin or end inside a character."""
        return b"".join([self._bytes[i] for i in ids.tolist()])


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) of at most vocab_size ids.

    The ids are the 4 special tokens, the 256 bytes, so that every text can be encoded, and merges of pairs that occur
    at least twice, the most frequent first.

    >>> tokenizer = train_bpe(["low low lower lowest"], vocab_size=262)
    >>> [tokenizer.id_to_char[i] for i in tokenizer.encode("slow low")]
    ['s', 'low', ' ', 'low']

    Raises ValueError if vocab_size is below 260 or a text has a lone surrogate.
    """
    if vocab_size < len(SPECIAL_TOKENS) + 256:
        raise ValueError(f"vocab_size must be at least 260 (special tokens and bytes), got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    names, alphabet = list(SPECIAL_TOKENS), list(BYTE_OF)
    settings = {"special_tokens": names, "initial_alphabet": alphabet, "min_frequency": 2, "show_progress": False}
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    return BPETokenizer(tokenizer.to_str())


def read_tokenizer(path: str | Path) -> BPETokenizer:
    """An existing tokenizer.json of byte-level BPE, to which SPECIAL_TOKENS were added by these names.

    Raises ValueError naming a file that cannot be read or is something else.
    """
    try:
        return BPETokenizer(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: give the path of a tokenizer.json") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be used as a tokenizer: {error}") from None
