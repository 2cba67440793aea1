"""The report: metrics.json in words. Every sentence is made from a figure, and left out where there is none."""

from pathlib import Path

from files import replacing
from findings import (
    ahead,
    best_infiller,
    best_policy,
    interval,
    late_fall,
    listing,
    name_of,
    next_steps,
    overfitting,
    saturation,
)
from plots import NAMES, SHOWN, draw_all


def write_report(metrics: dict, out: Path) -> None:
    """Draw the pictures and write report.md to the directory `out`."""
    draw_all(metrics, out)
    sections = [
        ("", opening(metrics)),
        ("In short", in_short(metrics)),
        ("Likelihood", likelihood(metrics)),
        ("What masking costs", masking(metrics)),
        ("Writing in fewer steps", steps(metrics)),
        ("Where it hurts", where(metrics)),
        ("What the models know of characters", characters(metrics)),
        ("Samples", samples(metrics)),
        ("Quality of samples", quality(metrics)),
        ("Infilling", infilling(metrics)),
        ("What to try next", [next_steps(metrics)]),
    ]
    parts = []
    for title, paragraphs in sections:
        paragraphs = [paragraph for paragraph in paragraphs if paragraph]
        if paragraphs:
            parts += [f"## {title}"] * bool(title) + paragraphs
    with replacing(out / "report.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- small words
def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def fixed(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show(text: str) -> str:
    """Characters as the pictures show them."""
    return "".join(SHOWN.get(c, c) for c in text)


# ------------------------------------------------------------------------------------------------- sections
def opening(metrics: dict) -> list[str]:
    corpus, first = metrics["corpus"], next(iter(metrics["models"].values()))
    return [
        f"# {listing([NAMES[name] for name in metrics['models']])} on {Path(corpus['name']).name}",
        f"Measured on {first['chars']:,} characters from the last {100 * corpus['val_fraction']:g} % of the text "
        f"({corpus['characters']:,} characters, SHA-256 `{corpus['sha256'][:16]}`), which no model was trained on, in "
        f"windows of {metrics['window']}. Losses are in nats/char, lower is better; 95 % intervals are over windows. "
        "*Exact* is the negative log-likelihood itself, an *upper bound* lies above it."
        + (" Made with `--quick`: few windows for policies and samples, so wide intervals there." * metrics["quick"]),
    ]


def in_short(metrics: dict) -> list[str]:
    points = [ahead(metrics), best_policy(metrics), saturation(metrics), overfitting(metrics), best_infiller(metrics)]
    return ["\n".join(f"- {point}" for point in points if point)]


def likelihood(metrics: dict) -> list[str]:
    rows = [
        [NAMES[name], f"{m['params']:,}", f"{m['nats_per_char']:.4f}", interval(m["ci95"], 4),
         f"{m['bits_per_char']:.4f}", f"{m['perplexity']:.3f}", "upper bound" if m["is_bound"] else "exact"]
        for name, m in metrics["models"].items()
    ]  # fmt: skip
    header = ["model", "parameters", "nats/char", "95 % interval", "bits/char", "perplexity", "kind"]
    trends = [
        f"Over the last third of training {NAMES[name]}'s validation loss "
        f"{'fell' if fall > 0 else 'rose'} by {abs(fall):.3f} nats/char."
        for name in metrics["models"]
        for fall in [late_fall(metrics["history"].get(name, []))]
        if fall is not None
    ]
    return [table(header, rows), width(metrics), "![Loss curves](loss_curves.png)", " ".join(trends)]


def width(metrics: dict) -> str:
    """Why LLaDA's interval is as wide as it is."""
    llada = metrics["models"].get("llada")
    if not llada or not llada["ci95"] or llada["ci95_of_masks"] is None:
        return ""
    half, masks = (llada["ci95"][1] - llada["ci95"][0]) / 2, llada["ci95_of_masks"]
    if masks > half:  # an upper estimate, as it does not know of the strata
        return ""
    return (
        f"The half-width of LLaDA's interval is {half:.4f} nats/char over {llada['windows']:,} windows. The masks that "
        f"were drawn account for {masks:.4f} of it (added in squares); the rest is how much the windows of this text "
        "differ, and only more text would narrow it."
    )


def masking(metrics: dict) -> list[str]:
    curve = metrics.get("masking_curve")
    if not curve:
        return []
    T, quarter = len(curve), max(1, len(curve) // 4)
    text = (
        f"A masked character costs {sum(curve[:quarter]) / quarter:.3f} nats on average while up to {quarter} of {T} "
        f"are masked, {sum(curve[-quarter:]) / quarter:.3f} while at least {T - quarter + 1} are, and {curve[-1]:.3f} "
        "when all are. The mean of the curve is the bound."
    )
    gpt = metrics["models"].get("gpt")
    if gpt:
        cheap = next((m for m, c in enumerate(curve) if c > gpt["nats_per_char"]), T)
        text += (
            f" Up to m = {cheap} a masked character costs LLaDA less than GPT's average character: the price is paid "
            "where little is visible." if cheap else " No masked character is as cheap as GPT's average character."
        )  # fmt: skip
    return ["![The masking curve](masking_curve.png)", text]


def steps(metrics: dict) -> list[str]:
    if not metrics.get("schedules"):
        return []
    schedules = metrics["schedules"]
    budgets = [row["steps"] for row in schedules["uniform"]]
    cells = {name: {row["steps"]: row["nats_per_char"] for row in rows} for name, rows in schedules.items()}
    for row in metrics["policies"]:
        if row["threshold"] is None:
            cells.setdefault(f"{row['order']} order", {})[round(row["nfe"])] = row["nats_per_char"]
    rows = [[name] + [fixed(values.get(K), 3) for K in budgets] for name, values in cells.items()]
    own_pace = [row for row in metrics["policies"] if row["threshold"] is not None]
    words = "; ".join(f"{name_of(r)}: {r['nats_per_char']:.3f} in {r['nfe']:.1f}" for r in own_pace)
    return [
        "![Loss against network evaluations](likelihood_against_nfe.png)",
        table(["nats/char in K steps", *map(str, budgets)], rows),
        "Schedules reveal positions in random order (bounds); orders choose them from what is visible (exact). "
        "The optimal schedule is chosen on one half of the windows and priced on the other. The widest 95 % interval "
        f"is {widest(schedules.values())} either way for schedules and {widest([metrics['policies']])} for orders."
        + (f" At their own pace (nats/char in evaluations a text): {words}." if words else ""),
    ]


def widest(groups) -> str:
    """Half the width of the widest interval of any row of any group."""
    widths = [(row["ci95"][1] - row["ci95"][0]) / 2 for rows in groups for row in rows if row["ci95"]]
    return fixed(max(widths), 3) if widths else "unknown"


def where(metrics: dict) -> list[str]:
    sentences = []
    for name, values in metrics["positions"].items():
        T = len(values)
        if T >= 16:
            middle = values[T // 4 : 3 * T // 4]
            sentences.append(
                f"{NAMES[name]} pays {values[0]:.2f} nats for the first character of a window, "
                f"{sum(middle) / len(middle):.2f} in the middle half and {values[-1]:.2f} for the last."
            )
    frequent = sorted(metrics["characters"].items(), key=lambda item: -item[1]["count"])[:40]
    for name in metrics["models"]:
        ordered = [show(c) for c, _ in sorted(frequent, key=lambda item: item[1][name])]
        sentences.append(
            f"Of the {len(frequent)} most frequent characters {NAMES[name]} finds `{' '.join(ordered[:5])}` the "
            f"easiest and `{' '.join(ordered[-5:])}` the hardest."
        )
    if len(metrics["models"]) == 2:
        better = [show(c) for c, entry in frequent if entry["llada"] < entry["gpt"]]
        sentences.append(f"LLaDA beats GPT on {len(better)} of them" + (f": `{' '.join(better)}`." if better else "."))
    return ["![Loss by position and by character](by_position_and_character.png)", " ".join(sentences)]


def characters(metrics: dict) -> list[str]:
    sentences = []
    for name, entry in metrics.get("embeddings", {}).items():
        known = [c for c in ".ae" if c in entry["nearest"]] or entry["characters"][:3]
        words = [f"`{show(c)}`: `{' '.join(show(n) for n in entry['nearest'][c])}`" for c in known]
        sentences.append(f"Nearest by cosine in {NAMES[name]}: {', '.join(words)}.")
    return ["![Characters by their output embeddings, PCA](character_map.png)", " ".join(sentences)]


def samples(metrics: dict) -> list[str]:
    blocks, prompt = [], None
    for row in metrics.get("samples", []):
        if row["prompt"] != prompt:
            prompt = row["prompt"]
            blocks.append(f"**Prompt:** `{show(prompt)}`")
        title = NAMES[row["model"]] + (f", {row['order']} order, {row['steps']} steps" if row["steps"] else "")
        body = (row["prompt"] + row["text"]).strip("\n").replace("\n", "\n    ")
        blocks.append(f"{title}:\n\n    {body}")
    return blocks


def quality(metrics: dict) -> list[str]:
    rows = metrics.get("quality", [])
    if not rows:
        return []
    judges = [name for name in ("llada", "gpt") if name in metrics["models"]]
    header = ["text", "NFE", "ms/text", *(f"bits under {NAMES[name]}" for name in judges), "bits under n-grams",
              "entropy", "real words", "distinct 8-grams", "longest copy"]  # fmt: skip
    body = [
        [title_of(r), fixed(r.get("nfe"), 0), fixed(r.get("milliseconds"), 0),
         *(fixed(r.get(f"bits_under_{name}")) for name in judges), fixed(r.get("bits_under_ngram")),
         fixed(r.get("character_entropy")), fixed(r.get("real_words")), fixed(r.get("distinct_8grams")),
         fixed(r.get("longest_copy"), 0)]
        for r in rows
    ]  # fmt: skip
    return [
        table(header, body),
        f"{rows[0]['texts']} texts of {metrics['window']} characters of each kind, temperature 1 where no other is "
        "named. Bits and entropy are in bits/char, all exact (under LLaDA, of its default sampler); then the share of "
        f"words that occur in the training text (its first {metrics['words_from']:,} characters, whence the n-grams "
        "too), the share of spans of 8 characters that differ, and the longest span copied from the training text, in "
        "characters. What good writing scores is the validation text's row, not the lowest figure.",
        *(closest(rows, temperature) for temperature in sorted({r["temperature"] for r in rows[1:]}, reverse=True)),
    ]


def title_of(row: dict) -> str:
    if row["source"] != "llada":
        name = NAMES.get(row["source"], row["source"])
    else:
        name = f"LLaDA, {row['order']} order, {row['steps']} steps"
    return name + (f", temperature {row['temperature']:g}" if row.get("temperature", 1) != 1 else "")


def closest(rows: list[dict], temperature: float) -> str:
    """Whose text of this temperature looks most like the validation text to the n-grams and in its words."""
    real = rows[0]
    written = [row for row in rows[1:] if row.get("real_words") is not None and row["temperature"] == temperature]
    if not written or real.get("real_words") is None:
        return ""
    by_ngram = min(written, key=lambda row: abs(row["bits_under_ngram"] - real["bits_under_ngram"]))
    by_words = max(written, key=lambda row: row["real_words"])
    return (
        f"At temperature {temperature:g} the text that the n-grams find nearest to the validation text is "
        f"{title_of(by_ngram)} ({by_ngram['bits_under_ngram']:.2f} against {real['bits_under_ngram']:.2f} bits/char); "
        f"the largest share of real words is that of {title_of(by_words)} ({by_words['real_words']:.2f} against "
        f"{real['real_words']:.2f})."
    )


def infilling(metrics: dict) -> list[str]:
    rows = metrics.get("infilling", {})
    body = [
        [NAMES[name], str(r["span"]), fixed(r["accuracy"], 3), interval(r["ci95"]), fixed(r["whole"], 3)]
        for name, entries in rows.items()
        for r in entries
    ]
    if not body:
        return []
    note = "Spans in the middle of held-out windows, greedy. LLaDA sees both sides, GPT the left side only."
    return [table(["model", "span", "share of characters right", "95 % interval", "whole spans right"], body), note]
