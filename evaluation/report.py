"""The report: metrics.json, and report.md made from it: tables, pictures and one-line captions."""

import json
import re
from pathlib import Path

from evaluation.plots import NAMES, draw_pictures, kind, policy_name, visible
from utils.console import printable, say, symbol
from utils.files import atomic_write

INTRODUCTION = """\
# {models} on {text}

Measured on {chars:,} characters from the last {percent:g} % of the text ({characters:,} characters, SHA-256
`{sha256:.16}`), which no model was trained on, in {rows}. Losses are in nats/char, lower is better.
Intervals are 95 % intervals over windows.{quick}

- *Exact* is the negative log-likelihood itself; an *upper bound* lies above it, by an unknown distance.
- *NFE* is the number of network evaluations for one text.
- A *schedule* says how many characters each step reveals, an *order* which ones.
- The *sweep* of S steps reveals positions k, k + S, k + 2S, ... at step k; with S = 16 it is the default sampler.
"""


def write_json(metrics: dict, path: Path) -> None:
    """Write plain values to a file, whose folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_report(metrics: dict, out: Path) -> None:
    """Write metrics.json, the pictures and report.md to the folder `out`."""
    write_json(metrics, out / "metrics.json")
    draw_pictures(metrics, out)
    with atomic_write(out / "report.md") as temporary:
        temporary.write_text(report_text(metrics), encoding="utf-8")
    say(f"wrote {out}/report.md, its pictures and metrics.json")


def report_text(metrics: dict) -> str:
    """The report in Markdown."""
    parts = [introduction(metrics)]
    for title, section in SECTIONS.items():
        paragraphs = section(metrics)
        if paragraphs:
            parts += [f"## {title}", *paragraphs]
    parts += [f"Left out ({name}): {why}." for name, why in metrics["left_out"].items()]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------- cells
def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def code(text: str) -> str:
    """Text as a span of Markdown code, in which nothing is markup; control characters and newlines are symbols.

    >>> code("<b>"), code("a`b\\r")
    ('`<b>`', '`` a`b␍ ``')
    """
    text = printable(text).replace("\n", symbol(10))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def plain(value: float | None) -> str:
    return "-" if value is None else str(value)


def fixed(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def interval(ci95: list[float] | None, digits: int = 3) -> str:
    return "-" if ci95 is None else f"{ci95[0]:.{digits}f} to {ci95[1]:.{digits}f}"


def half_width(ci95: list[float] | None) -> str:
    return "" if ci95 is None else f" ± {(ci95[1] - ci95[0]) / 2:.3f}"


def comparison(row: dict) -> str:
    """What a policy's paired interval shows. A bound above an exact loss shows nothing about the loss it bounds."""
    if row["difference_ci95"] is None:
        return "no interval"
    low, high = row["difference_ci95"]
    if low <= 0 <= high:
        return "bound not distinguishable" if row["is_bound"] else "not distinguishable"
    return "lower" if high < 0 else "bound is higher" if row["is_bound"] else "higher"


# ------------------------------------------------------------------------------------------------- sections
def introduction(metrics: dict) -> str:
    corpus = metrics["corpus"]
    return INTRODUCTION.format(
        models=" and ".join(NAMES[name] for name in metrics["models"]),
        text=code(Path(corpus["name"]).name),
        chars=next(iter(metrics["models"].values()))["chars"],
        percent=100 * corpus["val_fraction"],
        characters=corpus["characters"],
        sha256=corpus["sha256"],
        rows=f"windows of {metrics['window']} tokens" if metrics["segments"] == "window" else metrics["segments"],
        quick=" Made with `--quick`: fewer windows, wider intervals." * metrics["quick"],
    ).strip()


def training(metrics: dict) -> list[str]:
    runs = metrics["training"]
    rows = [
        ["checkpoint", *(code(run["path"]) for run in runs.values())],
        ["parameters", *(f"{metrics['models'][name]['params']:,}" for name in runs)],
        ["of which looked up", *(f"{metrics['models'][name]['params_looked_up']:,}" for name in runs)],
        ["steps done", *(f"{run['step']:,}" for run in runs.values())],
        ["tokens read", *(fixed(run["tokens"], 0) for run in runs.values())],
        ["training time, seconds", *(fixed(run["seconds"], 0) for run in runs.values())],
        ["fitted temperature", *(fixed(run["temperature"], 3) for run in runs.values())],
    ]
    for name in dict.fromkeys(name for run in runs.values() for name in run["settings"]):
        values = [run["settings"].get(name) for run in runs.values()]
        rows.append([f"`{name}`", *(code(value) if isinstance(value, str) else plain(value) for value in values)])
    caption = "Losses during training are those before temperature scaling; the final loss after it has its own marker."
    return [table(["", *(NAMES[name] for name in runs)], rows), "![Loss curves](loss_curves.png)", caption]


def likelihood(metrics: dict) -> list[str]:
    rows = [
        [f"{NAMES[name]}, {text}", f"{m['chars']:,}", fixed(m["nats_per_char"], 4), interval(m["ci95"], 4),
         fixed(m["ci95_of_masks"] if m["is_bound"] else None, 4), fixed(m["bits_per_char"], 4),
         fixed(m["perplexity"], 3), kind(m)]
        for text, key in (("validation text", "models"), ("training text", "training_text"))
        for name, m in metrics[key].items()
    ]  # fmt: skip
    if "difference" in metrics:
        gap = metrics["difference"]
        figures = [f"{gap['nats_per_char']:+.4f}", interval(gap["ci95"], 4)]
        rows.append(["LLaDA minus GPT, validation text, paired", "-", *figures, "-", "-", "-", "upper bound"])
    header = ["", "characters", "nats/char", "95 % interval", "due to masks", "bits/char", "perplexity", "kind"]
    caption = (
        "c(m) is the loss of one masked token when m are masked, per character that a token stands for. Its mean over "
        "m is LLaDA's upper bound."
    )
    return [
        table(header, rows),
        "Due to masks: at most the part of the interval's half-width that comes from the masks (parts add in squares).",
        *(["![The masking curve](masking_curve.png)", caption] if "masking_curve" in metrics else []),
        *(["![Loss by position and by character](by_position_and_character.png)",
           "Mean loss at each position of a window, and on each of the 40 most frequent characters."]
          if "positions" in metrics else []),
    ]  # fmt: skip


def policies(metrics: dict) -> list[str]:
    if "policies" not in metrics:
        return []
    rows = []
    for row in metrics["policies"]:
        figures = [fixed(row["nfe"], 1), fixed(row["nats_per_char"], 3), interval(row["ci95"]), kind(row)]
        difference = [f"{row['difference']:+.3f}", interval(row["difference_ci95"]), comparison(row)]
        difference = ["-", "-", "reference"] if row is metrics["policies"][0] else difference
        rows.append([policy_name(row), *figures, *difference])
    header = ["policy", "NFE", "nats/char", "95 % interval", "kind", "minus reference", "95 % interval", "compared"]
    schedules = metrics["schedules"]
    bounds = [
        [f"{name} schedule", *(f"{row['nats_per_char']:.3f}{half_width(row['ci95'])}" for row in entries)]
        for name, entries in schedules.items()
    ]
    return [
        "![Loss against network evaluations](likelihood_against_nfe.png)",
        table(header, rows),
        f"Unmasking policies on {metrics['policies'][0]['windows']} windows; the reference is the default sampler. "
        "Differences are paired over the same windows. *Not distinguishable*: the interval includes 0 (each interval "
        "is at 95 % by itself). In the picture, policies with the same NFE are drawn side by side.",
        table(["nats/char, upper bound, in steps:", *(str(row["steps"]) for row in schedules["uniform"])], bounds),
        "Schedules with positions in random order, ± half of the 95 % interval."
        + " The optimal one is chosen on one half of the windows and scored on the other." * ("optimal" in schedules),
    ]


def samples(metrics: dict) -> list[str]:
    pairs = metrics["segments"] == "pairs"
    blocks = ["Completions, at temperature 1." if pairs else "Continuations of lines of the validation text, at "
              "temperature 1."]  # fmt: skip
    for prompt in dict.fromkeys(row["prompt"] for row in metrics["samples"]):
        blocks.append(f"**Prompt:** {code(visible(prompt))}")
        for row in metrics["samples"]:
            if row["prompt"] == prompt:
                body = printable(row["text"] if pairs else prompt + row["text"]).strip("\n").replace("\n", "\n    ")
                blocks.append(f"{NAMES[row['model']]}, {row['sampler']}, NFE {row['nfe']}:\n\n    {body}")
    return blocks


def sample_metrics(metrics: dict) -> list[str]:
    columns = {"NFE": ("nfe", 0), "ms/text": ("milliseconds", 0)}
    columns |= {f"bits under {NAMES[name]}": (f"bits_under_{name}", 2) for name in metrics["models"]}
    columns |= {"bits under n-grams": ("bits_under_ngram", 2), "entropy": ("character_entropy", 2),
                "real words": ("real_words", 2), "distinct 8-grams": ("distinct_8grams", 2),
                "longest copy": ("longest_copy", 0)}  # fmt: skip
    rows = metrics.get("sample_metrics")
    if rows is None:
        return []
    body = [[sample_name(row), *(fixed(row.get(key), digits) for key, digits in columns.values())] for row in rows]
    return [
        table(["text", *columns], body),
        f"{rows[0]['texts']} texts of {metrics['window']} characters of each kind, at temperature 1 unless named, "
        "without intervals: compare with the validation text. Bits and entropy are in bits/char, exact (under LLaDA: "
        "of its default sampler). Real words: share that occurs in the training text (its first "
        f"{metrics['words_from']:,} characters). Longest copy: longest span found in the training text, in characters.",
    ]


def sample_name(row: dict) -> str:
    name = NAMES.get(row["source"], row["source"])
    name += f", {row['order']} order, {row['steps']} steps" if "order" in row else ""
    return name + (f", temperature {row['temperature']:g}" if row.get("temperature", 1) != 1 else "")


def infilling(metrics: dict) -> list[str]:
    rows = [
        [NAMES[name], str(row["span"]), fixed(row["accuracy"], 3), interval(row["ci95"]), fixed(row["whole"], 3)]
        for name, entries in metrics.get("infilling", {}).items()
        for row in entries
    ]
    caption = "Spans in the middle of validation windows, greedy. LLaDA sees both sides, GPT the left side only."
    header = ["model", "characters", "share of characters right", "95 % interval", "whole spans right"]
    return [table(header, rows), caption] if rows else []


SECTIONS = {
    "Training": training,
    "Likelihood": likelihood,
    "Loss and network evaluations": policies,
    "Samples": samples,
    "Sample metrics": sample_metrics,
    "Infilling": infilling,
}
