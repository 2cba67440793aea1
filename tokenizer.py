"""Characters <-> integer ids, with the four special tokens of both models.

>>> tokenizer = SimpleTokenizer("hello")
>>> tokenizer.encode("hole").tolist()
[5, 7, 6, 4]
>>> tokenizer.decode([1, 5, 7])
'ho'
>>> tokenizer.decode([1, 5, 7], skip_special_tokens=False)
'[MASK]ho'
"""

import numpy as np

SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[START]", "[END]")
PAD_ID, MASK_ID, START_ID, END_ID = range(4)
NEVER_WRITTEN = (PAD_ID, MASK_ID, START_ID)  # ids that no sampler writes; [END] may be written and ends a text
CHUNK = 1 << 22  # characters encoded at a time: bounds the memory of their UTF-32 copy


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
        ids = np.asarray(ids).reshape(-1)
        if len(ids) == 0:
            return ""
        if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"ids must be integers in 0..{self.vocab_size - 1}, got {ids.min()}..{ids.max()}")
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
        if tuple(state["special_tokens"]) != SPECIAL_TOKENS:
            raise ValueError(f"special tokens {state['special_tokens']} differ from {list(SPECIAL_TOKENS)}")
        tokenizer = cls.__new__(cls)
        tokenizer._set_characters(list(state["characters"]))
        return tokenizer
