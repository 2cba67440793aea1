"""Text <-> integer ids, with the four special tokens of both models: characters, or subwords (byte-level BPE).

>>> tokenizer = SimpleTokenizer("hello")
>>> tokenizer.encode("hole").tolist()
[5, 7, 6, 4]
>>> tokenizer.decode([1, 5, 7])
'ho'
>>> tokenizer.decode([1, 5, 7], skip_special_tokens=False)
'[MASK]ho'

Text is never read as a special token, and decode(encode(text)) == text for every text that can be encoded:

>>> SimpleTokenizer("[MASK]").encode("[MASK]").tolist()
[8, 6, 4, 7, 5, 9]
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from operator import itemgetter
from pathlib import Path

import numpy as np

SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[START]", "[END]")
PAD_ID, MASK_ID, START_ID, END_ID = range(4)
NEVER_WRITTEN = (PAD_ID, MASK_ID, START_ID)  # ids that no sampler writes; [END] may be written and ends a text
NAMED = {  # ids of the special tokens of an existing tokenizer.json, by their names in lower case
    **dict.fromkeys(("[pad]", "<pad>", "<|pad|>"), PAD_ID),
    **dict.fromkeys(("[mask]", "<mask>", "<|mask|>"), MASK_ID),
    **dict.fromkeys(("[start]", "[bos]", "<s>", "<bos>", "<|startoftext|>", "<|begin_of_text|>"), START_ID),
    **dict.fromkeys(("[end]", "[eos]", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"), END_ID),
}

CHUNK = 1 << 22  # characters encoded at a time: bounds the memory of their UTF-32 copy
PART, PARTS = 1 << 16, 16  # BPE: characters in a part, parts encoded at a time (in parallel; 200 bytes a character)
CONTEXT = 100  # characters on both sides of a cut that are shown to the pre-tokenizer
CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")  # before words and lines, where nothing depends on both sides

# The character that stands for each byte in the tokens of a byte-level BPE: the printable bytes of Latin-1 for
# themselves, the others for U+0100, U+0101, ... (GPT-2's table).
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(PRINTABLE)))}

# Texts that an existing tokenizer must not change: every byte that UTF-8 uses, white space, case, combining marks,
# ligatures, names of special tokens.
CODE_POINTS = (*range(0x800), *range(0x800, 0xD800, 0x3F7), *range(0xE000, 0x110000, 0x3F7))
PROBES = ("x", " x  y\n\n\tz \r\n ", "É e\u0301 ﬁ ½ ▁ ## [MASK] <s> </s> <|endoftext|>", "".join(map(chr, CODE_POINTS)))


class SimpleTokenizer:
    """A character tokenizer: ids 0..3 are the special tokens, then the characters of `text` in sorted order.

    `encode` is one table look-up per character (numpy, over 100 MB/s), fast enough for large corpora.
    """

    def __init__(self, text: str):
        self._set_characters(sorted(set(text)))

    def _set_characters(self, characters: list[str]) -> None:
        vocabulary = (*SPECIAL_TOKENS, *characters)
        self.id_to_char = dict(enumerate(vocabulary))
        self.char_to_id = {char: i for i, char in self.id_to_char.items()}
        self.characters_per_token = np.array([0] * len(SPECIAL_TOKENS) + [1] * len(characters))  # (V,) int64
        self.dtype = np.min_scalar_type(len(vocabulary))  # must hold one more value, which means "unknown"
        code_points = np.array([ord(char) for char in characters], dtype=np.uint32)
        self._unknown = len(vocabulary)
        # Look-up tables both ways. The entry after the last known code point stands for all larger ones.
        self._id_of = np.full(int(code_points.max(initial=0)) + 2, self._unknown, dtype=self.dtype)
        self._id_of[code_points] = np.arange(len(SPECIAL_TOKENS), self._unknown, dtype=self.dtype)
        self._code_point_of = np.concatenate([np.zeros(len(SPECIAL_TOKENS), np.uint32), code_points])

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included (TinyShakespeare: 69)."""
        return len(self.id_to_char)

    @property
    def characters(self) -> str:
        """The known characters, in id order."""
        return "".join(list(self.char_to_id)[len(SPECIAL_TOKENS):])

    def extended(self, text: str) -> "SimpleTokenizer":
        """A tokenizer with the same ids for the known characters and new ids for the others of `text`, sorted.

        >>> SimpleTokenizer("hello").extended("cold").characters
        'ehlocd'
        """
        new = sorted(set(text) - set(self.characters))
        return self.from_dict({**self.to_dict(), "characters": self.characters + "".join(new)})

    def encode(self, text: str) -> np.ndarray:
        """Text -> (len(text),) ids in the smallest unsigned type that fits.

        Raises ValueError with the first unknown character and its position.
        """
        ids = np.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), CHUNK):
            part = text[start : start + CHUNK]
            code_points = np.frombuffer(part.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            found = self._id_of[np.minimum(code_points, len(self._id_of) - 1)]
            unknown = found == self._unknown
            if unknown.any():
                position = start + int(unknown.argmax())
                raise ValueError(
                    f"unknown character {text[position]!r} (U+{ord(text[position]):04X}) at position {position}: "
                    f"not among the {len(self.characters)} characters of the training text"
                )
            ids[start : start + len(part)] = found
        return ids

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """Ids (any sequence, array or 1-D tensor) -> text; special tokens are left out unless asked for.

        Raises ValueError for an id outside 0..vocab_size-1.
        """
        ids = checked_ids(ids, self.vocab_size)
        special = ids < len(SPECIAL_TOKENS)
        if not skip_special_tokens and special.any():
            return "".join(self.id_to_char[int(i)] for i in ids)
        return self._code_point_of[ids[~special]].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict:
        """Plain values only, for checkpoints; `from_dict` inverts it."""
        return {"special_tokens": list(SPECIAL_TOKENS), "characters": self.characters}

    @classmethod
    def from_dict(cls, state: dict) -> "SimpleTokenizer":
        """The inverse of `to_dict`. Raises ValueError for other special tokens."""
        check_special_tokens(state)
        tokenizer = cls.__new__(cls)
        tokenizer._set_characters(list(state["characters"]))
        return tokenizer


class BPETokenizer:
    """A byte-level BPE tokenizer, run by the `tokenizers` library: every token stands for a fixed string of bytes.

    tokenizer_json: the library's format, from `train_bpe` or `read_tokenizer`. Ids 0..3 are our special tokens; the
    tokens of text follow in the order of their ids in the file. `our_id` (ids of the file,) maps the file's ids to
    ours, its special tokens by name (`NAMED`). Other special tokens are left out (PAD_ID): no text is encoded as them.
    Raises ValueError if the library is missing or cannot read the file.
    """

    def __init__(self, tokenizer_json: str):
        library = import_tokenizers()
        try:
            self._library = library.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"not a tokenizer.json of the tokenizers library ({error})") from None
        self._json = tokenizer_json
        self._library.encode_special_tokens = True  # their names in a text are text
        self._library.no_truncation()
        self._library.no_padding()
        if type(self._library.normalizer).__name__ in ("NFC", "NFD", "NFKC", "NFKD"):  # Qwen's files have one
            self._library.normalizer = None
        if isinstance(self._library.model, library.models.BPE):
            self._library.model.dropout = None  # of merges, at random
        self._set_vocabulary()

    def _set_vocabulary(self) -> None:
        added = self._library.get_added_tokens_decoder()  # ids -> tokens that are found in a text before all others
        text_tokens = self._library.get_vocab(with_added_tokens=False)
        vocabulary = {**text_tokens, **{token.content: i for i, token in added.items()}}
        self.our_id = np.full(max(vocabulary.values(), default=-1) + 1, PAD_ID)
        self._bytes = [name.encode() for name in SPECIAL_TOKENS]
        for token, i in sorted(vocabulary.items(), key=itemgetter(1)):
            if i in added and added[i].special and i not in self._library.encode(token, add_special_tokens=False).ids:
                self.our_id[i] = NAMED.get(token.lower(), PAD_ID)
            else:  # text, as is a special token that is also a byte or merged from bytes
                self.our_id[i] = len(self._bytes)
                self._bytes.append(token_bytes(token) if token in text_tokens else token.encode())
        self.id_to_char = {i: raw.decode("utf-8", "backslashreplace") for i, raw in enumerate(self._bytes)}
        self.char_to_id = {char: i for i, char in self.id_to_char.items()}
        self.dtype = np.min_scalar_type(self.vocab_size)
        starts = [sum(byte & 0xC0 != 0x80 for byte in raw) for raw in self._bytes]  # other bytes continue a character
        self.characters_per_token = np.array(starts)
        self.characters_per_token[: len(SPECIAL_TOKENS)] = 0
        # Without a pre-tokenizer, or with added tokens such as "New York", a token could stand across a cut.
        spaced = any(re.search(r"\S\s", token.content) for token in added.values())
        self._may_cut = self._library.pre_tokenizer is not None and not spaced

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes)

    def encode(self, text: str) -> np.ndarray:
        """Text -> (n,) ids in an unsigned type that fits: what the library encodes the whole text as, exactly.

        Raises ValueError for a lone surrogate, which has no UTF-8 bytes, and for a text that decodes as another (only a
        tokenizer.json that is not lossless does that), with the position.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            position = error.start
            raise ValueError(f"lone surrogate {text[position]!r} at position {position}: not UTF-8 text") from None
        found, start, parts = [], 0, self._parts(text)
        while group := list(islice(parts, PARTS)):
            encodings = self._library.encode_batch_fast(group, add_special_tokens=False)
            ids = self.our_id[np.concatenate([np.array(encoding.ids, np.int64) for encoding in encodings])]
            expected, decoded = "".join(group), self.decode(ids)
            if decoded != expected:
                position = start + next(i for i, (a, b) in enumerate(zip_longest(expected, decoded)) if a != b)
                raise ValueError(f"{text[position : position + 8]!r} at position {position} does not survive encoding")
            found.append(ids.astype(self.dtype))
            start += len(expected)
        return np.concatenate(found)

    def _parts(self, text: str) -> Iterator[str]:
        """Cut a text into parts of PART characters or a few more, where the pre-tokenizer cuts it in any case."""
        start, search_from = 0, PART
        while self._may_cut and (match := CUT.search(text, search_from)):
            end = match.start()
            near = max(0, end - CONTEXT)
            pieces = self._library.pre_tokenizer.pre_tokenize_str(text[near : end + CONTEXT])
            search_from = end + CONTEXT
            if any(near + stop == end for _, (_, stop) in pieces):
                yield text[start:end]
                start, search_from = end, end + PART
        yield text[start:]

    def bytes_of(self, ids, skip_special_tokens: bool = True) -> bytes:
        """Ids -> the bytes that they stand for, which may begin or end inside a character."""
        ids = checked_ids(ids, self.vocab_size)
        if skip_special_tokens:
            ids = ids[ids >= len(SPECIAL_TOKENS)]
        return b"".join([self._bytes[i] for i in ids.tolist()])

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """Ids (any sequence, array or 1-D tensor) -> text; special tokens are left out unless asked for.

        Bytes that are no UTF-8, such as half of a character, become U+FFFD. Raises ValueError for an id outside
        0..vocab_size-1.
        """
        return self.bytes_of(ids, skip_special_tokens).decode("utf-8", "replace")

    def to_dict(self) -> dict:
        """Plain values only, for checkpoints; `from_dict` inverts it."""
        return {"special_tokens": list(SPECIAL_TOKENS), "tokenizer_json": self._json}

    @classmethod
    def from_dict(cls, state: dict) -> "BPETokenizer":
        """The inverse of `to_dict`. Raises ValueError for other special tokens."""
        check_special_tokens(state)
        return cls(state["tokenizer_json"])


Tokenizer = SimpleTokenizer | BPETokenizer


def tokenizer_from_dict(state: dict) -> Tokenizer:
    """The tokenizer whose `to_dict` this is. Raises ValueError as the two `from_dict` do."""
    return (SimpleTokenizer if "characters" in state else BPETokenizer).from_dict(state)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) of at most vocab_size ids.

    The ids are the 4 special tokens, the 256 bytes, so that every text can be encoded, and merges of pairs that occur
    at least twice, the most frequent first.

    >>> tokenizer = train_bpe(["low low lower lowest"], vocab_size=262)
    >>> [tokenizer.id_to_char[i] for i in tokenizer.encode("slow low")]
    ['s', 'low', ' ', 'low']

    Raises ValueError if vocab_size is below 260, a text has a lone surrogate or the library is missing.
    """
    library = import_tokenizers()
    if vocab_size < (smallest := len(SPECIAL_TOKENS) + 256):
        raise ValueError(f"vocab_size must be at least {smallest} (special tokens and bytes), got {vocab_size}")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(BYTE_OF),
        show_progress=False,
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except UnicodeEncodeError as error:
        raise ValueError(f"the training text has a lone surrogate, {error.object[error.start]!r}") from None
    return BPETokenizer(tokenizer.to_str())


def read_tokenizer(path: str | Path) -> BPETokenizer:
    """An existing byte-level tokenizer.json, such as GPT-2's.

    Raises ValueError naming a file that cannot be read, is no tokenizer.json or does not decode to the text encoded.
    """
    import_tokenizers()
    try:
        tokenizer = BPETokenizer(Path(path).read_text("utf-8"))
        for text in PROBES:
            tokenizer.encode(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: give the path of a tokenizer.json") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be used as a tokenizer: {error}") from None
    return tokenizer


class StreamDecoder:
    """Decodes one text that arrives in parts: never half of a character, and together what `decode` makes of all.

    >>> tokenizer = train_bpe([], vocab_size=260)
    >>> decoder = StreamDecoder(tokenizer)
    >>> [decoder.push([i]) for i in tokenizer.encode("aé!")]
    ['a', '', 'é', '!']
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids) -> str:
        """The text that the next ids complete. Raises ValueError as `decode` does."""
        if isinstance(self.tokenizer, SimpleTokenizer):
            return self.tokenizer.decode(ids, self.skip_special_tokens)
        return self._decoder.decode(self.tokenizer.bytes_of(ids, self.skip_special_tokens))

    def flush(self) -> str:
        """At the end: U+FFFD if the text ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def checked_ids(ids, vocab_size: int) -> np.ndarray:
    """Ids as an array (n,) of integers. Raises ValueError for an id outside 0..vocab_size-1."""
    ids = np.asarray(ids).reshape(-1)
    if len(ids) == 0:
        return ids.astype(np.int64)
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"ids must be integers in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    return ids


def check_special_tokens(state: dict) -> None:
    """Raise ValueError for the state of a tokenizer with other special tokens."""
    if tuple(state["special_tokens"]) != SPECIAL_TOKENS:
        raise ValueError(f"special tokens {state['special_tokens']} differ from {list(SPECIAL_TOKENS)}")


def import_tokenizers():
    """The tokenizers library. Raises ValueError if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("BPE needs the tokenizers library: pip install tokenizers==0.23.3") from None
    return tokenizers


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for.

    >>> token_bytes("Ġthe")
    b' the'
    """
    return bytes(BYTE_OF[char] for char in token) if BYTE_OF.keys() >= set(token) else token.encode()
