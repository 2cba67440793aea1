"""Text in, text out, with either model: functions, and `GeneratorTransformer` for a trained model.

A model of segments ends its texts itself. A model of pairs reads a prompt and writes the completion alone.

The arguments have the same names everywhere:
    max_out_tokens: tokens (with a tokenizer of characters: characters) to write after each prompt, at most.
    seed: the same seed gives the same text.
    history: for a model of pairs, the earlier (prompt, completion)s of a conversation, see `infilling.given_ids`.
    stop: a string, or several: GPT ends a text after the first of them, which stays part of it.
    settings: fields of autoregressive.DecodingConfig (GPT) or sampler.SamplingConfig (LLaDA): temperature, top_k,
        top_p, repetition_penalty, slide; GPT also context_len; LLaDA also steps, order, schedule, block_length, ...
    config: such an object; settings replace its fields.
A setting that the model does not have raises TypeError. Bad values and unknown characters raise ValueError (an
ArgumentError where it names an argument), at the call and before anything is written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive import DecodingConfig, SlidingContext, beam_search, decode
from checkpoint import load_checkpoint
from generation.infilling import (
    GenerationState,
    answer_room,
    completed_pieces,
    fill_masks,
    given_ids,
    mask_predictor,
    parse_template,
    prompt_template,
    text_sampling,
)
from generation.streams import write_streams
from logits import in_float64
from model import Transformer, merge_lora
from sampler import SamplingConfig
from tokenizer import MASK_ID, START_ID, StreamDecoder, Tokenizer
from utils.errors import ArgumentError, check_number

MAX_OUT_TOKENS = 200  # default
Config = SamplingConfig | DecodingConfig


# ------------------------------------------------------------------------------------------------- functions
def generate_text(model: Transformer, tokenizer: Tokenizer, prompt: str = "", config=None, **arguments) -> str:
    """The prompt and what the model writes after it; of a model of pairs, what it writes alone.

    arguments: max_out_tokens, seed, stop and settings, see the top of this module.
    """
    return generate_texts(model, tokenizer, [prompt], config, **arguments)[0]


def generate_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], config: Config | None = None, **arguments
) -> list[str]:
    """Each prompt, of any length, with what the model writes after it, as one batch; of pairs, the completions alone.

    A text depends on its prompt, the seed and how many equal prompts stand before it, not on the rest of the batch.
    arguments: max_out_tokens, seed, stop and settings, see the top of this module.
    """
    texts = [""] * len(prompts) if model.config.segments == "pairs" else list(prompts)
    for pieces in stream_texts(model, tokenizer, prompts, config, **arguments):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts


def stream_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: Config | None = None,
    *,
    max_out_tokens: int = MAX_OUT_TOKENS,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    history: Sequence[tuple[str, str]] = (),
    **settings,
) -> Iterator[list[str]]:
    """Yield the next piece of each text as it is written, without the prompts; "" where there is none.

    GPT's pieces are single tokens. LLaDA's are whatever has become complete from the left; with remasking, one
    piece at the end. Arguments: see the top of this module.
    """
    config = config_for(model, config, settings)
    stops = [stop] if isinstance(stop, str) else list(stop)
    generator = torch.Generator().manual_seed(seed)
    if model.fills_masks:
        if stops:
            raise ArgumentError("stop", f"needs a GPT with one stream: this {model.name} writes in many places at once")
        templates = [prompt_template(prompt, max_out_tokens, model, tokenizer, history) for prompt in prompts]
        states = fill_templates(model, [ids for ids, _ in templates], config, generator, may_end=True)
        given = [length for _, length in templates]
        return completed_pieces(states, tokenizer, given, at_end=getattr(config, "remask", None) is not None)
    columns = decode(
        model,
        [prompt_ids(model, tokenizer, prompt, history, answer_room(model, max_out_tokens)) for prompt in prompts],
        config,
        max_out_tokens=max_out_tokens,
        generator=generator,
        stop=stop_rule(stops, tokenizer),
    )
    return decoded_pieces(columns, tokenizer, len(prompts))


def fill_templates(
    model: Transformer, templates: list[Tensor], config: Config, generator: torch.Generator, may_end: bool
) -> Iterator[GenerationState]:
    """The states of `fill_masks` (LLaDA) or `write_streams` (GPT)."""
    if model.causal:
        return write_streams(model, templates, config, generator=generator)
    return fill_masks(model, templates, config, generator=generator, may_end=may_end)


def decoded_pieces(columns: Iterable[Tensor], tokenizer: Tokenizer, count: int) -> Iterator[list[str]]:
    """The text of each column (B,) of tokens, never half of a character; B = count."""
    decoders = [StreamDecoder(tokenizer) for _ in range(count)]
    for column in columns:
        yield [decoder.push([token]) for decoder, token in zip(decoders, column.tolist(), strict=True)]
    last = [decoder.flush() for decoder in decoders]
    if any(last):
        yield last


def infill(
    model: Transformer,
    tokenizer: Tokenizer,
    template: str | Sequence[str],
    config: SamplingConfig | None = None,
    *,
    seed: int = 0,
    **settings,
) -> str | list[str]:
    """Fill the masks of a template, or of several at once, with a LLaDA model. Raises ValueError for a GPT model.

    "ROMEO: [MASK*12] love [MASK*20]" -> a text of that length, whose other characters stay. The template decides how
    long the text is; other arguments: see the top of this module.
    """
    if model.causal:
        raise ValueError("infilling needs a LLaDA model: GPT writes from left to right only")
    if model.config.segments == "pairs":
        raise ValueError("a model of pairs fills no templates: give it a prompt")
    templates = [template] if isinstance(template, str) else template
    ids = [parse_template(text, tokenizer) for text in templates]
    generator = torch.Generator().manual_seed(seed)
    *_, state = fill_masks(model, ids, config_for(model, config, settings), generator=generator)
    texts = [tokenizer.decode(text) for text in state.texts]
    return texts[0] if isinstance(template, str) else texts


def config_for(model: Transformer, config: Config | None, settings: dict) -> Config:
    """The settings of one call: `config`, or the defaults of this kind of model, with `settings` replaced."""
    config_class = DecodingConfig if model.causal else SamplingConfig
    names = [field.name for field in fields(config_class)]
    for name in settings:
        if name not in names:
            raise TypeError(f"{name!r} is not a setting of a {model.name} model; its settings are {', '.join(names)}")
    if config is not None and not isinstance(config, config_class):
        raise TypeError(f"a {model.name} model needs a {config_class.__name__}, got a {type(config).__name__}")
    if config is not None:
        return replace(config, **settings)
    return DecodingConfig(**settings) if model.causal else text_sampling(**settings)


def prompt_ids(model: Transformer, tokenizer: Tokenizer, prompt: str, history=(), room: int = 1) -> Tensor:
    """(T,) ids for GPT: [START] opens every text. history, room, and what is raised: see `infilling.given_ids`."""
    return F.pad(given_ids(prompt, model, tokenizer, history, room), (1, 0), value=START_ID)


def stop_rule(stops: Sequence[str], tokenizer: Tokenizer) -> Callable[[list[int]], bool] | None:
    """The rule `stop` of `decode` that ends a text after any of the strings. Raises ArgumentError for an empty one."""
    if "" in stops:
        raise ArgumentError("stop", "must not be an empty string")
    return partial(ends_in, stops, tokenizer) if stops else None


def ends_in(strings: Sequence[str], tokenizer: Tokenizer, written: list[int]) -> bool:
    """Whether the newest of the written ids completes one of the strings."""
    tail = tokenizer.decode(written[-max(len(string.encode()) for string in strings) :])  # an id is a byte at least
    return any(string in tail for string in strings)


# ------------------------------------------------------------------------------------------------- a trained model
class GeneratorTransformer:
    """A trained model of either kind and its tokenizer. Prompts and results are text. Adapters are merged."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        model = merge_lora(model) if model.config.lora_rank else model
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, device: str = "cpu") -> "GeneratorTransformer":
        """The model of a checkpoint that train.py wrote. Raises ValueError for another file or an unknown device."""
        checkpoint = load_checkpoint(path, device)
        return cls(checkpoint.model, checkpoint.tokenizer)

    def generate(
        self,
        prompt: str = "",
        context_len: int | None = None,
        temperature: float = 1.0,
        max_out_tokens: int = MAX_OUT_TOKENS,
        **arguments,
    ) -> str:
        """The prompt and what the model writes after it, at most `max_out_tokens` characters.

        context_len (GPT): characters it sees (None: block_size). temperature 0 takes the likeliest token.
        arguments: seed, stop and further settings, see the top of this module.
        """
        if context_len is not None:  # LLaDA has no such setting
            arguments["context_len"] = context_len
        if temperature != 1.0 or arguments.get("config") is None:  # a config has a temperature of its own
            arguments["temperature"] = temperature
        return generate_text(self.model, self.tokenizer, prompt, max_out_tokens=max_out_tokens, **arguments)

    def stream(self, prompt: str = "", **arguments) -> Iterator[str]:
        """What `generate` writes after the prompt, piece by piece; its other arguments by name."""
        return (piece for [piece] in stream_texts(self.model, self.tokenizer, [prompt], **arguments))

    def infill(self, template: str | Sequence[str], *, seed: int = 0, **settings) -> str | list[str]:
        """LLaDA: a template, or several, with its masks filled: "ROMEO: [MASK*12] love [MASK*20]". See `infill`."""
        return infill(self.model, self.tokenizer, template, seed=seed, **settings)

    def beam_search(
        self, prompt: str = "", num_beams: int = 5, max_out_tokens: int = MAX_OUT_TOKENS, **settings
    ) -> list[tuple[str, float]]:
        """GPT: the likeliest texts that `num_beams` beams find, as (text, score) pairs, best first.

        Texts include the prompt. settings: fields of autoregressive.BeamConfig, such as length_penalty, early_stopping
        and num_return. Raises ArgumentError for bad values and ValueError for a LLaDA model.
        """
        ids = prompt_ids(self.model, self.tokenizer, prompt)
        found = beam_search(self.model, ids, num_beams=num_beams, max_out_tokens=max_out_tokens, **settings)
        return [(self.tokenizer.decode(ids.cpu()), score) for ids, score in found]

    @torch.inference_mode()
    def next_tokens(self, prompt: str = "", k: int = 10, context_len: int | None = None) -> list[tuple[str, float]]:
        """The k likeliest next tokens with their probabilities, likeliest first; of LLaDA, for a [MASK] at the end."""
        if not self.model.causal:
            ids, _ = prompt_template(prompt, 1, self.model, self.tokenizer)
            return self.tables_of(ids, k, may_end=True)[-1][1]
        context = SlidingContext(self.model, [prompt_ids(self.model, self.tokenizer, prompt)], 0, context_len)
        return self.likeliest(context.next_logits()[0], k)

    @torch.inference_mode()
    def tokens_at_masks(self, template: str, k: int = 10) -> list[tuple[int, list[tuple[str, float]]]]:
        """LLaDA: every [MASK]'s position in the template, and its k likeliest tokens given all that is visible.

        Of a template longer than block_size, the block_size characters around each [MASK] are used.
        """
        return self.tables_of(parse_template(template, self.tokenizer), k)

    def tables_of(self, ids: Tensor, k: int, may_end: bool = False) -> list[tuple[int, list[tuple[str, float]]]]:
        """As `tokens_at_masks`, for the ids (T,) of a template."""
        predict, tables = mask_predictor(self.model, may_end and self.model.is_segmented), []
        size = self.model.config.block_size - self.model.is_segmented
        for position in (ids == MASK_ID).nonzero()[:, 0].tolist():
            start = max(0, min(position - size // 2, len(ids) - size))
            logits = predict(ids[None, start : start + size])[0, position - start]
            tables.append((position, self.likeliest(logits, k)))
        return tables

    def likeliest(self, logits: Tensor, k: int) -> list[tuple[str, float]]:
        """logits (V,) -> the k likeliest tokens with their probabilities, likeliest first."""
        check_number("k", k, low=1)
        best = in_float64(logits).softmax(-1).topk(min(k, int((logits > -torch.inf).sum())))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self.tokenizer.id_to_char[i], p) for i, p in pairs]
