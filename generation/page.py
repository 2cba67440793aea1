"""One self-contained HTML page: models that run in it, or recorded histories that it plays. No network, no library.

page.html is the page, page.js its script: network, sampler and viewer. The Content-Security-Policy admits this one
script, by its hash. The data are JSON: {"title", "settings", "histories": [...], "models": [...]}, one list empty;
page.js begins with what a history and a model are.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from generation.history import History
from layers import NGRAMS
from utils.errors import ArgumentError
from utils.files import atomic_write

TEMPLATE, SCRIPT = Path(__file__).with_name("page.html"), Path(__file__).with_name("page.js")
MOST_BYTES = 20_000_000  # of a page with models
TABLES = "encoder.ngrams.tables.weight"
SIZES = ("vocab_size", "block_size", "n_embd", "n_head", "n_layer", "ngram_rows", "ngram_base")


def write_page(path: str | Path, histories: Sequence[History], title: str, settings: str = "") -> None:
    """Write the page that plays histories, several side by side. settings: how they came about, with the seed."""
    write_html(path, {"title": title, "settings": settings, "histories": [*map(packed, histories)], "models": []}, [])


def write_live_page(path: str | Path, checkpoints: Sequence, title: str, settings: str = "") -> None:
    """Write the page in which models run: LLaDA, GPT, or both. checkpoints: objects with `model` and `tokenizer`.

    Raises ArgumentError (a ValueError) for models that no page can run, and for a page of more than MOST_BYTES.
    """
    models, weights = zip(*(packed_model(c.model, c.tokenizer) for c in checkpoints), strict=True)
    if any(model["characters"] != models[0]["characters"] for model in models):
        raise ArgumentError("page", "needs models of one text, and these know different characters: name one --model")
    write_html(path, {"title": title, "settings": settings, "histories": [], "models": models}, weights)


def write_html(path: str | Path, data: dict, weights: Sequence[bytes]) -> None:
    """Fill the template and write it atomically."""
    script = SCRIPT.read_text("utf-8")
    elements = [f'<script type="text/plain" class="weights">{base64.b64encode(w).decode()}</script>' for w in weights]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    slots = {"script": script, "script hash": digest, "data": json_in_html(data), "weights": "\n".join(elements)}
    html = re.sub(r"\{\{(.*?)\}\}", lambda slot: slots[slot[1]], TEMPLATE.read_text("utf-8"))
    if data["models"] and len(html) > MOST_BYTES:
        problem = f"would have {len(html) / 1e6:.1f} MB, more than the {MOST_BYTES / 1e6:g} that open quickly: "
        raise ArgumentError("page", problem + "name one --model, or train with fewer --ngram-rows or --ngram-width 16")
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(html, "utf-8")


def json_in_html(data) -> str:
    """JSON in ASCII that no HTML parser can take for markup: <, > and & are escaped as well."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and lone surrogates are escaped
    return re.sub("[<>&]", lambda char: f"\\u{ord(char[0]):04x}", text)


def packed(history: History) -> dict:
    """A history as compact plain values, see page.js."""
    ids: dict[str | None, int] = {None: -1}

    def pairs(*candidates) -> list:  # (text, p), ... -> index, p, index, p, ...
        return [value for token, p in candidates for value in (ids.setdefault(token, len(ids) - 1), round(p, 4))]

    start, frames = [ids.setdefault(token, len(ids) - 1) for token in history.start], []
    for frame in history.frames:
        written = [[position, *pairs(pair)] for position, pair in frame.written.items()]
        beliefs = {position: pairs(*candidates) for position, candidates in frame.beliefs.items()}
        frames.append([frame.nfe, round(frame.seconds, 4), written, beliefs])
    return {"label": history.label, "tokens": [*ids][1:], "start": start, "frames": frames}


def packed_model(model, tokenizer) -> tuple[dict, bytes]:
    """A model's description, see page.js, and its weights. Raises ArgumentError."""
    config, characters = model.config, [tokenizer.id_to_char[i] for i in range(model.config.vocab_size)]
    for wrong, problem in (
        (config.arch != "rotary", f"cannot run the network {config.arch}: train one of --arch rotary"),
        (config.lora_rank, "cannot run adapters: merge them into the model with train.py --export"),
        (config.segments != "window", f"writes running text: train a model without --segments {config.segments}"),
        (any(len(token) != 1 for token in characters[4:]), "knows no subwords: train a model of --tokenizer char"),
    ):
        if wrong:
            raise ArgumentError("page", problem)
    tensors, parts, offset = {}, [], 0
    for name, tensor in model.state_dict().items():
        q, scales = quantized(tensor.float().cpu().numpy(), len(NGRAMS[model.causal]) if name == TABLES else None)
        tensors[name] = {"shape": q.shape, "offset": offset, "scales": scales.size}
        parts.append(q.tobytes() + scales.astype("<f4").tobytes())
        offset += len(parts[-1])
    description = {"name": model.name, "causal": model.causal, "ngrams": NGRAMS[model.causal], "characters": characters}
    description |= {"config": {size: getattr(config, size) for size in SIZES}, "tensors": tensors}
    return description, gzip.compress(b"".join(parts), mtime=0)


def quantized(w: np.ndarray, kinds: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """w (n, k) -> int8 (n, k) and its float32 scales: a row's (n, 1, 1) or, of tables, a column's (kinds, 1, k)."""
    groups = w.reshape(kinds or len(w), -1, w.shape[1])
    scales = np.abs(groups).max(axis=1 if kinds else (1, 2), keepdims=True).astype(np.float32) / 127
    scales[scales == 0] = 1
    return np.rint(groups / scales).astype(np.int8).reshape(w.shape), scales
