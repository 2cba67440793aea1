"""Properties that hold for all input: odd texts come back as they are, and threads change nothing."""

import math

import pytest
import torch
from toy import random_model, seeded

from autoregressive import CausalObjective
from data import load_corpus, window_rows
from diffusion import DiffusionObjective
from generation.text import GeneratorTransformer
from model import GPT, LLaDAModel, ModelConfig
from tokenizer import SPECIAL_TOKENS, SimpleTokenizer
from trainer import objective_of

ODD_TEXTS = {
    "one character": "a",
    "CRLF": "to be\r\nor not\r\n" * 20,
    "BOM": "\ufeffto be or not\n" * 20,
    "NUL and escapes": "abc\x00\x1b[2J\x07c\n" * 20,
    "combining marks and four bytes": "e\u0301🎭\U0001d11e\n" * 20,
    "the names of special tokens": "[MASK] [PAD] [START] [END]\n" * 20,
    "more than 255 characters": "".join(map(chr, range(0x100, 0x300))),
    "more than 65,535 characters": "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x13000)])),
    "two megabytes without a newline": "la " * 700_000,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts_are_read_and_written_back_as_they_are(tmp_path, name):
    """But for a byte order mark and the ends of lines, which do not depend on the system that wrote a file."""
    (tmp_path / "text.txt").write_bytes(ODD_TEXTS[name].encode())
    text = ODD_TEXTS[name].removeprefix("\ufeff").replace("\r\n", "\n")
    corpus = load_corpus(str(tmp_path / "text.txt"))
    assert corpus.tokenizer.decode(corpus.ids.numpy()) == text
    assert int(corpus.ids.long().min()) >= len(SPECIAL_TOKENS)  # text is never a special token
    config = ModelConfig(corpus.tokenizer.vocab_size, 8, 4, 1, 1, ngram_rows=11)
    for objective, model in ((DiffusionObjective(), LLaDAModel(config)), (CausalObjective(), GPT(config))):
        rows = [window_rows(corpus.ids[None, :8].long(), corpus.tokenizer)]
        nats = objective.likelihood(model.eval(), rows).nats_per_char  # an untrained model knows nothing
        assert nats == pytest.approx(math.log(corpus.tokenizer.vocab_size - 3), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "flags"), [("llada", {"order": "confidence", "steps": 8, "correct": 1}), ("gpt", {"slide": 8})]
)
def test_results_do_not_depend_on_the_number_of_threads(name, flags):
    """Likelihoods, texts longer than the context, and beams; the model is wide enough for two threads."""
    tokenizer, prompts = SimpleTokenizer("abcdefghijklmnopqrstuvwxyz \n"), ["the king", "is dead", "long live the king"]
    model = random_model(name, vocab_size=tokenizer.vocab_size, block_size=32, n_embd=64, n_layer=1, std=0.1)
    writer, results = GeneratorTransformer(model, tokenizer), []
    config = writer.settings(**{"temperature": 0.9} | flags)
    rows = [window_rows(torch.randint(4, tokenizer.vocab_size, (8, 32), generator=seeded()), tokenizer)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        nats = objective_of(model).likelihood(model, rows, pairs=2).window_nats
        pieces = writer.stream(prompts, config, max_out_tokens=34, seed=3)
        texts = ["".join(parts) for parts in zip(*pieces, strict=True)]
        found = writer.beam_search(prompts[0], num_beams=4, num_return=4, max_out_tokens=34) if name == "gpt" else []
        results.append((nats, texts + [text for text, _ in found], torch.tensor([score for _, score in found])))
    (nats, texts, scores), (other_nats, other_texts, other_scores) = results
    torch.testing.assert_close(nats, other_nats, atol=1e-5 * 32, rtol=0)  # 1e-5 nats a character
    assert texts == other_texts
    torch.testing.assert_close(scores, other_scores, atol=1e-5, rtol=0)
    assert len({text[-20:] for text in texts[:3]}) == 3  # the texts are not all alike
