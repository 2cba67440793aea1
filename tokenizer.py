"""Text <-> integer ids: one id for each character, after the four special tokens of both models.

>>> tokenizer = SimpleTokenizer("hello")
>>> tokenizer.encode("hole").tolist()
[5, 7, 6, 4]
>>> tokenizer.decode([1, 5, 7])
'ho'
>>> tokenizer.decode([1, 5, 7], skip_special_tokens=False)
'[MASK]ho'

Text is never read as a special token, and decode(encode(text)) == text for every text that can be encoded.
"""

import codecs

import numpy as np

SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[START]", "[END]")
PAD_ID, MASK_ID, START_ID, END_ID = range(4)
NEVER_WRITTEN = (PAD_ID, MASK_ID, START_ID)  # ids that no sampler writes; [END] may be written and ends a text


class Tokenizer:
    """What tokenizers share. Each has `encode`, `bytes_of`, and these attributes."""

    source: str  # the attribute and argument that a tokenizer can be made from
    is_exact: bool  # whether a text has one encoding; if not, the likelihood of one is a bound on that of the text
    id_to_char: dict[int, str]  # the text of every id
    char_to_id: dict[str, int]
    characters_per_token: np.ndarray  # (V,) int64: 0 for special tokens
    dtype: np.dtype  # of ids: the smallest unsigned type that holds vocab_size too

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included (characters of TinyShakespeare: 69)."""
        return len(self.id_to_char)

    def check_ids(self, ids) -> np.ndarray:
        """Ids (any sequence, array or tensor) as an array (n,). Raises ValueError unless all are in 0..vocab_size-1."""
        ids = np.asarray(ids).reshape(-1)
        if len(ids) and not (np.issubdtype(ids.dtype, np.integer) and 0 <= ids.min() <= ids.max() < self.vocab_size):
            raise ValueError(f"ids must be integers in 0..{self.vocab_size - 1}, got {ids.min()}..{ids.max()}")
        return ids.astype(np.int64)

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """Ids (any sequence, array or tensor) -> text; special tokens are left out unless asked for.

        Half of a character becomes U+FFFD. Raises ValueError for an id outside 0..vocab_size-1.
        """
        ids = self.check_ids(ids)
        return self.bytes_of(ids[ids >= len(SPECIAL_TOKENS)] if skip_special_tokens else ids).decode("utf-8", "replace")

    def to_dict(self) -> dict:
        """Plain values only, for checkpoints; `from_dict` inverts it."""
        return {"special_tokens": list(SPECIAL_TOKENS), self.source: getattr(self, self.source)}

    @classmethod
    def from_dict(cls, state: dict) -> "Tokenizer":
        """The inverse of `to_dict`. Raises ValueError for other special tokens."""
        if tuple(state["special_tokens"]) != SPECIAL_TOKENS:
            raise ValueError(f"special tokens {state['special_tokens']} differ from {list(SPECIAL_TOKENS)}")
        return cls(**{cls.source: state[cls.source]})


class SimpleTokenizer(Tokenizer):
    """A character tokenizer: after the special tokens come `characters`, then the others of `text`, sorted."""

    source, is_exact = "characters", True

    def __init__(self, text: str = "", characters: str = ""):
        self.characters = characters = characters + "".join(sorted(set(text) - set(characters)))
        self.id_to_char = dict(enumerate((*SPECIAL_TOKENS, *characters)))
        self.char_to_id = {char: i for i, char in self.id_to_char.items()}
        self.characters_per_token = np.array([0] * len(SPECIAL_TOKENS) + [1] * len(characters))
        self.dtype = np.min_scalar_type(self.vocab_size)  # the value vocab_size means "unknown" in the table of ids
        code_points = np.array([ord(char) for char in characters], dtype=np.int64)
        # The entry after the last known code point stands for all larger ones.
        self._id_of = np.full(int(code_points.max(initial=0)) + 2, self.vocab_size, dtype=self.dtype)
        self._id_of[code_points] = np.arange(len(SPECIAL_TOKENS), self.vocab_size)

    def extended(self, text: str) -> "SimpleTokenizer":
        """A tokenizer with the same ids for the known characters and new ids for the others of `text`, sorted."""
        return SimpleTokenizer(text, self.characters)

    def encode(self, text: str, start: int = 0) -> np.ndarray:
        """Text -> (len(text),) ids in the smallest unsigned type that fits.

        Raises ValueError with the first unknown character and its position. start: that of text[0], in a longer text.
        """
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._id_of[np.minimum(code_points, len(self._id_of) - 1)]
        unknown = ids == self.vocab_size
        if unknown.any():
            position = int(unknown.argmax())
            char = f"{text[position]!r} (U+{ord(text[position]):04X}) at position {start + position}"
            raise ValueError(f"unknown character {char}: not among the {len(self.characters)} of the training text")
        return ids

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """Ids -> the UTF-8 bytes of their text."""
        return "".join([self.id_to_char[i] for i in ids.tolist()]).encode("utf-8", "surrogatepass")


class StreamDecoder:
    """Decodes one text that arrives in parts: never half of a character, and together what `decode` makes of all."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self._decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids) -> str:
        """The text that the next ids complete, without special tokens. Raises ValueError as `decode` does."""
        ids = self.tokenizer.check_ids(ids)
        return self._decoder.decode(self.tokenizer.bytes_of(ids[ids >= len(SPECIAL_TOKENS)]))

    def flush(self) -> str:
        """At the end: U+FFFD if the text ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
