"""Text in, text out, with either model: `generate_text`, and `GeneratorTransformer`, a trained model that writes.

Prompts become ids, ids become text; the writing itself is autoregressive.py (GPT) and templates.py (LLaDA).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoregressive import SlidingContext, beam_search, decode
from checkpoint import load_checkpoint
from model import Transformer
from templates import mask_predictor, parse_template, stream_prompts
from tokenizer import MASK_ID, START_ID, SimpleTokenizer

LENGTH = 200  # tokens written unless asked otherwise


def generate_text(model: Transformer, tokenizer: SimpleTokenizer, prompt: str = "", **settings) -> str:
    """The prompt and what the model writes after it. Settings: see `stream_texts`."""
    return generate_texts(model, tokenizer, [prompt], **settings)[0]


def generate_texts(
    model: Transformer, tokenizer: SimpleTokenizer, prompts: Sequence[str], **settings
) -> list[str]:
    """Each prompt, of any length, with what the model writes after it; one batch. Settings: see `stream_texts`."""
    texts = list(prompts)
    for pieces in stream_texts(model, tokenizer, prompts, **settings):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts


def stream_texts(
    model: Transformer,
    tokenizer: SimpleTokenizer,
    prompts: Sequence[str],
    length: int = LENGTH,
    seed: int = 0,
    stop: Sequence[str] = (),
    **settings,
) -> Iterator[list[str]]:
    """Yield the next piece of each text as it is written, "" for those that have ended, without the prompts.

    length: tokens to write at most. A text depends on its prompt, the seed and how many equal prompts stand before it,
    not on the rest of the batch. GPT's ends early after [END] or any of the strings `stop`, which stay part of it.
    Other settings: those of `autoregressive.decode` (GPT), `templates.write` and `sampler.reverse_process` (LLaDA).
    Raises ValueError for unknown characters and bad values, at once.
    """
    generator = torch.Generator().manual_seed(seed)
    if not model.causal:
        if stop:
            raise ValueError("stop: a LLaDA model writes the whole length at once, it cannot stop on the way")
        return stream_prompts(model, tokenizer, prompts, length, generator=generator, **settings)
    if "" in stop:
        raise ValueError("stop: the empty string stands everywhere; leave it out")
    longest = max(map(len, stop), default=0)

    def stopped(written: list[int]) -> bool:
        tail = tokenizer.decode(written[-longest:])  # every token is a character at least
        return any(string in tail for string in stop)

    tokens = decode(
        model,
        [prompt_ids(tokenizer, prompt) for prompt in prompts],
        max_out_tokens=length,
        generator=generator,
        stop=stopped if longest else None,
        **settings,
    )
    return ([tokenizer.decode([token]) for token in row.tolist()] for row in tokens)


def prompt_ids(tokenizer: SimpleTokenizer, prompt: str) -> Tensor:
    """(1 + len(prompt),) ids: [START] opens every text. Raises ValueError for unknown characters."""
    return torch.tensor([START_ID, *tokenizer.encode(prompt).tolist()])


class GeneratorTransformer:
    """A trained model that writes. Prompts are text, so are answers; all randomness follows from `seed`."""

    def __init__(self, model: Transformer, tokenizer: SimpleTokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, device: str = "cpu") -> "GeneratorTransformer":
        """The model of a file train.py wrote. Raises ValueError that names the file if it is none."""
        checkpoint = load_checkpoint(path, device)
        return cls(checkpoint.model, checkpoint.tokenizer)

    def generate(
        self,
        prompt: str = "",
        context_len: int | None = None,
        temperature: float = 1.0,
        max_out_tokens: int = LENGTH,
        **settings,
    ) -> str:
        """The prompt and at most `max_out_tokens` more. Settings: see `stream_texts`."""
        return prompt + "".join(self.stream(prompt, context_len, temperature, max_out_tokens, **settings))

    def stream(
        self,
        prompt: str = "",
        context_len: int | None = None,
        temperature: float = 1.0,
        max_out_tokens: int = LENGTH,
        **settings,
    ) -> Iterator[str]:
        """What `generate` writes after the prompt, as it is written."""
        if context_len is not None:
            settings["context_len"] = context_len
        pieces = stream_texts(
            self.model, self.tokenizer, [prompt], length=max_out_tokens, temperature=temperature, **settings
        )
        return (piece for [piece] in pieces)

    def beam_search(
        self, prompt: str = "", num_beams: int = 5, max_out_tokens: int = LENGTH, **settings
    ) -> list[tuple[str, float]]:
        """(text, score) pairs, best first, prompt included. Settings: see `autoregressive.beam_search`."""
        ids = prompt_ids(self.tokenizer, prompt)
        found = beam_search(self.model, ids, num_beams=num_beams, max_out_tokens=max_out_tokens, **settings)
        return [(self.tokenizer.decode(ids.cpu()), score) for ids, score in found]

    @torch.inference_mode()
    def next_tokens(self, prompt: str = "", k: int = 10, context_len: int | None = None) -> list[tuple[str, float]]:
        """The k likeliest next tokens with their probabilities, likeliest first; of LLaDA, for a [MASK] at the end."""
        if not self.model.causal:
            return self.tokens_at_masks(prompt + "[MASK]", k)[-1][1]
        context = SlidingContext(self.model, [prompt_ids(self.tokenizer, prompt)], 0, context_len)
        return self.likeliest(context.next_logits()[0], k)

    @torch.inference_mode()
    def tokens_at_masks(self, template: str, k: int = 10) -> list[tuple[int, list[tuple[str, float]]]]:
        """LLaDA: every [MASK]'s position in the template, and its k likeliest tokens given all that is visible.

        Of a template longer than block_size, the block_size characters around each [MASK] are read.
        """
        ids = parse_template(template, self.tokenizer).to(next(self.model.parameters()).device)
        size, tables = self.model.config.block_size, []
        for position in (ids == MASK_ID).nonzero()[:, 0].tolist():
            start = max(0, min(position - size // 2, len(ids) - size))
            logits = mask_predictor(self.model)(ids[None, start : start + size])[0, position - start]
            tables.append((position, self.likeliest(logits, k)))
        return tables

    def likeliest(self, logits: Tensor, k: int) -> list[tuple[str, float]]:
        """logits (V,) -> the k likeliest tokens with their probabilities, likeliest first."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = logits.double().softmax(-1).topk(min(k, int((logits > -torch.inf).sum())))
        return [
            (self.tokenizer.id_to_char[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
