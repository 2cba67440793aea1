"""Benchmark of two small tasks with a held-out part: reversing words, and facts that are asked in the other direction.

Reversing: pairs {"prompt": "tarpol", "completion": "loprat"}. All words are made up, so a held-out word can only be
reversed by a rule.

Facts: lines of text "tarpol > minusa", one for each pair of names. Of every second fact the text also has the line in
the other direction, "minusa < tarpol", so that this form is known. The other facts are asked in the direction that was
never trained ("reversal curse", Berglund et al., arXiv 2309.12288; LLaDA, arXiv 2502.09992, section 3.3).
"""

import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from autoregressive import exact_nll
from benchmarks.timing import Row, timed
from benchmarks.training import MODELS, run_train
from checkpoint import Checkpoint, load_checkpoint
from data import Pair
from evaluation.likelihoods import mean_and_interval
from evaluation.pairs import GREEDY_LLADA, complete_pairs, wilson_interval
from generation.text import generate_texts, infill
from tokenizer import END_ID, START_ID
from utils.console import say
from utils.files import atomic_write

SHORTEST, LONGEST = 3, 8  # letters of a word to reverse
NAME = 6  # letters of a name in a fact
NETWORK = ("--n-layer=3", "--n-head=2", "--n-embd=64", "--block-size=24", "--ngram-rows=1009", "--calibration=0")
FILES = REVERSED, HELD_OUT, FACTS = "train.jsonl", "heldout.jsonl", "facts.txt"


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked."""

    words: int = 8000  # to train on
    held_out: int = 300  # words
    facts: int = 60  # of which half in both directions
    word_steps: int = 1000
    fact_steps: int = 3000
    seeds: int = 3


FULL = Sizes()
QUICK = Sizes(words=500, held_out=50, facts=20, word_steps=100, fact_steps=100, seeds=1)


# ------------------------------------------------------------------------------------------------- data
def made_up_words(count: int, shortest: int, longest: int, seed: int) -> list[str]:
    """Different words of consonants and vowels in turn."""
    generator, words = random.Random(seed), {}
    while len(words) < count:
        length, first = generator.randint(shortest, longest), generator.randrange(2)
        letters = ("bcdfghjklmnprstvz", "aeiou")
        words["".join(generator.choice(letters[(first + i) % 2]) for i in range(length))] = None
    return list(words)


def reversals(count: int, seed: int) -> list[Pair]:
    """Words and their reversals; none is the reversal of another."""
    words = dict.fromkeys(made_up_words(2 * count, SHORTEST, LONGEST, seed))
    kept = [word for word in words if word < word[::-1] or word[::-1] not in words]  # one of two that mirror each other
    return [Pair(word, word[::-1]) for word in kept[:count]]


def facts_of(count: int, seed: int) -> list[tuple[str, str]]:
    """(a, b) of each fact. Those with an even number are trained in both directions."""
    names = made_up_words(2 * count, NAME, NAME, seed)
    return list(zip(names[::2], names[1::2], strict=True))


def facts_text(facts: list[tuple[str, str]], seed: int) -> str:
    """The lines of the facts in random order, twice: the second half of the text is for validation."""
    lines = [f"{a} > {b}" for a, b in facts] + [f"{b} < {a}" for a, b in facts[::2]]
    random.Random(seed).shuffle(lines)
    return "\n".join(lines * 2)


def write_data(folder: Path, sizes: Sizes, seed: int) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Write train.jsonl, heldout.jsonl and facts.txt; the held-out pairs and the facts. Raises ValueError."""
    pairs, facts = reversals(sizes.words + sizes.held_out, seed), facts_of(sizes.facts, seed)
    files = {
        REVERSED: json_lines(pairs[: sizes.words]),
        HELD_OUT: json_lines(pairs[sizes.words :]),
        FACTS: facts_text(facts, seed),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with atomic_write(folder / name) as temporary:
                temporary.write_text(text)
    except OSError as error:
        raise ValueError(f"--write {folder}: cannot write there ({error.strerror})") from None
    return pairs[sizes.words :], facts


def json_lines(pairs: list[Pair]) -> str:
    """The pairs as train.py --pairs reads them."""
    return "".join(json.dumps(pair._asdict()) + "\n" for pair in pairs)


# ------------------------------------------------------------------------------------------------- questions
def answer(checkpoint: Checkpoint, prompts: list[str]) -> list[str]:
    """What a model of lines writes after each prompt, greedily."""
    model, settings = checkpoint.model, {} if checkpoint.model.causal else GREEDY_LLADA
    length = model.config.block_size - len(prompts[0]) - 1
    texts = generate_texts(model, checkpoint.tokenizer, prompts, max_out_tokens=length, temperature=0.0, **settings)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def fill_names(checkpoint: Checkpoint, ends: list[str]) -> list[str]:
    """LLaDA: the name before each end of a line, greedily, the most confident letter first."""
    templates = [f"[MASK*{NAME}]{end}" for end in ends]
    filled = infill(checkpoint.model, checkpoint.tokenizer, templates, order="confidence", temperature=0.0)
    return [text[:NAME] for text in filled]


def likeliest_names(checkpoint: Checkpoint, names: list[str], ends: list[str]) -> list[str]:
    """GPT: of all names, the one with which the whole line is the likeliest, exactly."""
    chosen = []
    for end in ends:
        ids = [torch.from_numpy(checkpoint.tokenizer.encode(name + end)).long() for name in names]
        lines = F.pad(torch.stack(ids), (0, 1), value=END_ID)
        chosen.append(names[int(exact_nll(checkpoint.model, lines, START_ID).sum(1).argmin())])
    return chosen


def fact_questions(facts: list[tuple[str, str]]) -> dict[tuple[str, str, str], Callable[[Checkpoint], list[bool]]]:
    """(question, model, how) -> the function that says which answers of such a model are right."""
    names, both, forward = [a for a, _ in facts], facts[::2], facts[1::2]

    def check(found: Callable[[Checkpoint], list[str]], wanted: list[str]) -> Callable[[Checkpoint], list[bool]]:
        return lambda checkpoint: [a == b for a, b in zip(found(checkpoint), wanted, strict=True)]

    questions = {}
    for model in MODELS:
        for question, pairs, prompt, wanted in (
            ("a > ?, trained", forward, "{0} > ", 1),
            ("b < ?, trained", both, "{1} < ", 0),
            ("b < ?, only a > b trained", forward, "{1} < ", 0),
        ):
            found = partial(answer, prompts=[prompt.format(*pair) for pair in pairs])
            questions[question, model, "writes"] = check(found, [pair[wanted] for pair in pairs])
    ends, wanted = [f" > {b}" for _, b in forward], [a for a, _ in forward]
    backward = "? > b, only a > b trained"
    ranked = partial(likeliest_names, names=names, ends=ends)
    questions[backward, "gpt", f"ranks {len(names)} names"] = check(ranked, wanted)
    questions[backward, "llada", "infills"] = check(partial(fill_names, ends=ends), wanted)
    return questions


# ------------------------------------------------------------------------------------------------- the table
def train(folder: Path, model: str, steps: int, seed: int, *flags: str) -> tuple[float, Checkpoint]:
    """Train a model; seconds of wall time, and the model."""
    out = folder / "out"
    flags = (f"--model={model}", f"--steps={steps}", f"--seed={seed}", "--batch-size=32", *NETWORK, *flags)
    seconds, _ = timed(run_train, out, *flags)
    return seconds, load_checkpoint(out / model / "last.pt")


def answer_all(folder: Path, sizes: Sizes, seed: int) -> Iterator[tuple[tuple[str, str, str, str], list[bool], float]]:
    """((task, question, model, how), which answers are right, seconds of training) of one seed."""
    held_out, facts = write_data(folder, sizes, seed)
    wanted = [pair.completion for pair in held_out]
    for model in MODELS:
        flags = (f"--pairs={folder / REVERSED}", "--val-fraction=0.02")
        seconds, trained = train(folder, model, sizes.word_steps, seed, *flags)
        texts = complete_pairs(trained.model, trained.tokenizer, held_out, 0.0, seed)
        right = [a == b for a, b in zip(texts, wanted, strict=True)]
        yield ("reversing", "a held-out word", model, "writes"), right, seconds
        flags = (f"--data={folder / FACTS}", "--segments=line", "--val-fraction=0.5")
        seconds, trained = train(folder, model, sizes.fact_steps, seed, *flags)
        for (question, asked, how), check in fact_questions(facts).items():
            if asked == model:
                yield ("facts", question, model, how), check(trained), seconds


def share_and_interval(right: list[list[bool]]) -> tuple[float, tuple[float, float]]:
    """The share of right answers of several seeds, in %, and its 95 % interval.

    Its ends are the outer ones of two intervals: Student's t over seeds, and Wilson's over all questions, which has
    some width also if all seeds agree.

    >>> share, (low, high) = share_and_interval([[False] * 30] * 3)
    >>> round(share, 1), round(low, 1), round(high, 1)
    (0.0, 0.0, 4.1)
    """
    shares = torch.tensor([statistics.mean(answers) for answers in right], dtype=torch.float64)
    mean, over_seeds = mean_and_interval(shares)
    low, high = wilson_interval(sum(map(sum, right)), sum(map(len, right)))
    if over_seeds is not None:
        low, high = max(0.0, min(low, over_seeds[0])), min(1.0, max(high, over_seeds[1]))
    return 100 * mean, (100 * low, 100 * high)


def compare_tasks(quick: bool) -> Iterator[Row]:
    """Table of the share of right answers: over seeds, its interval, and all seeds. Rows come when all is trained."""
    sizes = QUICK if quick else FULL
    yield "task", "question", "model", "how", "right, %", "95 % interval", "all seeds", "training, s"
    found: dict[tuple, list[tuple[list[bool], float]]] = {}
    for seed in range(sizes.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for key, right, seconds in answer_all(Path(folder), sizes, seed):
                say(f"seed {seed}: {' '.join(key)}: {sum(right)} of {len(right)}")
                found.setdefault(key, []).append((right, seconds))
    for key in sorted(found, key=lambda key: (key[0], key[1])):
        right, seconds = zip(*found[key], strict=True)
        share, (low, high) = share_and_interval(right)
        shares = " ".join(f"{100 * statistics.mean(answers):.1f}" for answers in right)
        yield *key, f"{share:.1f}", f"{low:.1f}..{high:.1f}", shares, f"{statistics.median(seconds):.0f}"
