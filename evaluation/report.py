"""The report: tables for the terminal and for report.md, from metrics.json alone."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.plots import NAMES, draw_pictures, kind
from utils.console import printable, say
from utils.files import atomic_write

LIKELIHOOD_COLUMNS = "model", "nats/char", "95 % interval", "bits/char", "perplexity", "characters", "kind"
LIKELIHOOD = """*Exact* is the negative log-likelihood itself. An *upper bound* lies above it, by an unknown distance:
LLaDA's is for tokens revealed one by one in random order. By its sampler: at temperature 1, without correction."""
SAMPLER_COLUMNS = "sampler", "NFE", "nats/char", "minus first", "95 % interval", "kind"
SAMPLERS = """At temperature 1. NFE: network evaluations for a window. Differences to the first row are paired over the
same windows. LLaDA's presets train it for the sweep: a model that was not would do better in other orders."""
TEXT_COLUMNS = "text", "temperature", "real words", "variety", "longest copy", "NFE", "ms/text"
TEXTS = """{} texts of each kind without a prompt, written as one batch; *default* is what generate.py does. Real words:
share that occurs in the training text. Variety: distinct words over words. Read both together: a lower temperature buys
the first with the second. Longest copy: characters in a row found in the training text."""


def table(columns: Sequence[str], rows: list[Sequence[str]]) -> str:
    """An aligned Markdown table, as readable in a terminal."""
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, rule, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fixed(value: float | None, digits: int) -> str:
    """A number, or - for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def interval(ci95: list[float] | None, digits: int = 4) -> str:
    """A 95 % interval, or - for none."""
    return "-" if ci95 is None else f"{ci95[0]:.{digits}f}..{ci95[1]:.{digits}f}"


# ------------------------------------------------------------------------------------------------- the parts
def likelihood_cells(label: str, m: dict) -> list[str]:
    """A likelihood of metrics.json as cells of LIKELIHOOD_COLUMNS."""
    losses = fixed(m["nats_per_char"], 4), interval(m["ci95"]), fixed(m["bits_per_char"], 4), fixed(m["perplexity"], 3)
    return [label, *losses, f"{m['chars']:,}", kind(m)]


def sampler_cells(row: dict) -> list[str]:
    """A sampler of metrics.json as cells of SAMPLER_COLUMNS."""
    gap, label = row["difference"], f"{NAMES[row['model']]}, {row['sampler']}"
    losses = fixed(row["nats_per_char"], 3), f"{gap['nats_per_char']:+.3f}", interval(gap["ci95"], 3)
    return [label, fixed(row["nfe"], 1), *losses, kind(row)]


def text_cells(row: dict) -> list[str]:
    """The texts of one kind of metrics.json as cells of TEXT_COLUMNS."""
    label = f"{NAMES[row['model']]}, {row['writer']}" if row["model"] else row["writer"]
    columns = {"temperature": 1, "real_words": 3, "variety": 3, "longest_copy": 0, "nfe": 0, "milliseconds": 0}
    return [label, *(fixed(row.get(name), digits) for name, digits in columns.items())]


def sections(metrics: dict) -> dict[str, tuple[str, str]]:
    """Title -> table and what it says, as far as it was measured."""
    rows = [likelihood_cells(NAMES[name], m) for name, m in metrics["models"].items()]
    by_sampler = {name: m for name, m in metrics["written"].items() if metrics["models"][name] != m}
    rows += [likelihood_cells(f"{NAMES[name]}, by its sampler", m) for name, m in by_sampler.items()]
    found = {"Likelihood, on text that no model was trained on": (table(LIKELIHOOD_COLUMNS, rows), LIKELIHOOD)}
    if "samplers" in metrics:
        rows = [sampler_cells(row) for row in metrics["samplers"]]
        found["Loss and network evaluations"] = table(SAMPLER_COLUMNS, rows), SAMPLERS
    rows, caption = [text_cells(row) for row in metrics["texts"]], TEXTS.format(metrics["texts_of_a_kind"])
    return found | {"Texts": (table(TEXT_COLUMNS, rows), caption)}


# ------------------------------------------------------------------------------------------------- the whole
def print_report(metrics: dict) -> None:
    """The tables with their titles on standard output."""
    print("\n\n".join(f"{title}:\n{rows}" for title, (rows, _) in sections(metrics).items()))


def report_text(metrics: dict, pictures: dict[str, str]) -> str:
    """The report in Markdown: results first, settings last."""
    corpus, names = metrics["corpus"], " and ".join(NAMES[name] for name in metrics["models"])
    parts = [
        f"# {names} on `` {printable(Path(corpus['name']).name)} ``",  # as code, in which nothing is markup
        f"The last {100 * corpus['val_fraction']:g} % of {corpus['characters']:,} characters (SHA-256 "
        f"{corpus['sha256']:.16}). Intervals are over windows of {metrics['window']} tokens.",
    ]
    for title, section in sections(metrics).items():
        parts += [f"## {title}", *section]
    for row in metrics["texts"]:
        if row["writer"] in ("validation text", "default"):
            body = printable(row["text"]).strip("\n").replace("\n", "\n    ")
            parts += [f"{NAMES.get(row['model'], 'From the')} {row['writer']}, the first of them:", "    " + body]
    parts += ["## Pictures", *(f"![{name}]({name})\n\n{caption}" for name, caption in pictures.items())]
    settings = json.dumps(metrics["training"] | {"quick": metrics["quick"]}, indent=2)
    return "\n\n".join([*parts, "## Settings", "    " + settings.replace("\n", "\n    ")]) + "\n"


def write_report(metrics: dict, out: Path) -> None:
    """Write metrics.json, the pictures and report.md to the folder `out`."""
    files = {"metrics.json": json.dumps(metrics, indent=1, allow_nan=False) + "\n"}
    files["report.md"] = report_text(metrics, draw_pictures(metrics, out))
    for name, text in files.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    say(f"wrote {out}/report.md, its pictures and metrics.json")
