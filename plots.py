"""The pictures of the report, each drawn from metrics.json alone. Colours are Okabe and Ito's (and one of Tol's): safe
for colour-blind readers, and lines differ in dash or marker too, so that they survive a grey printer."""

from itertools import cycle
from pathlib import Path

COLOURS = {"llada": "#0072B2", "gpt": "#D55E00"}
NAMES = {"llada": "LLaDA", "gpt": "GPT"}
OTHERS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999", "#882255")
MARKERS = "osD^vPX"
SHOWN = {" ": "␣", "\n": "↵", "\t": "⇥"}
STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw_all(metrics: dict, out: Path) -> list[str]:
    """Draw what the metrics have figures for; returns the names of the pictures written to `out`."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    written = []
    with plt.rc_context(STYLE):
        for name, (needs, draw) in PICTURES.items():
            if metrics.get(needs):
                figure = draw(plt, metrics)
                figure.savefig(out / name)
                plt.close(figure)
                written.append(name)
    return written


def loss_curves(plt, metrics: dict):
    """Training and validation loss of both models against the characters they had read."""
    figure, axes = plt.subplots()
    for name, history in metrics["history"].items():
        x = [line["tokens"] / 1e6 for line in history]
        kind = "upper bound" if metrics["models"][name]["is_bound"] else "exact"
        for key, dash, word in (("train_loss", ":", "training"), ("val_loss", "-", "validation")):
            axes.plot(
                x, [line[key] for line in history], dash, color=COLOURS[name], marker="o" if dash == "-" else None,
                markersize=3, label=f"{NAMES[name]} {word} ({kind})",
            )  # fmt: skip
    axes.set(xlabel="characters read in training (millions)", ylabel="loss (nats/char)")
    axes.legend()
    return figure


def masking_curve(plt, metrics: dict):
    """c(m): what one masked character costs when m are masked; the area under it is the bound."""
    import torch

    from likelihood import monotone

    curve = metrics["masking_curve"]
    m = range(1, len(curve) + 1)
    smooth = monotone(torch.tensor([0.0, *curve], dtype=torch.float64))[1:].tolist()
    bound = sum(curve) / len(curve)
    figure, axes = plt.subplots()
    axes.fill_between(m, smooth, alpha=0.12, color=COLOURS["llada"], linewidth=0)
    axes.plot(m, curve, ".", color=COLOURS["llada"], markersize=4, label="c(m), measured")
    axes.plot(m, smooth, color=COLOURS["llada"], label="monotone fit (drawing only)")
    axes.axhline(bound, color=COLOURS["llada"], linestyle="--", label=f"mean over m = the bound, {bound:.3f} nats/char")
    if "gpt" in metrics["models"]:
        gpt = metrics["models"]["gpt"]["nats_per_char"]
        axes.axhline(gpt, color=COLOURS["gpt"], linestyle="-.", label=f"GPT, exact, {gpt:.3f} nats/char")
    axes.set(xlabel=f"masked characters m, of {len(curve)}", ylabel="c(m) (nats per masked character)", ylim=0)
    axes.legend(loc="lower right")
    return figure


def likelihood_against_nfe(plt, metrics: dict):
    """Schedules (bounds, dashed), policies (exact, markers with intervals), GPT as a line."""
    figure, axes = plt.subplots(figsize=(6.4, 5.2))
    dashes = {"uniform": "--", "cosine": ":", "optimal": "-"}
    for name, rows in metrics["schedules"].items():
        x, y = [row["nfe"] for row in rows], [row["nats_per_char"] for row in rows]
        axes.plot(x, y, dashes[name], color=COLOURS["llada"], label=f"random order, {name} schedule (bound)")
    policies: dict[str, list[dict]] = {}
    for row in metrics["policies"]:
        policies.setdefault("threshold" if row["threshold"] is not None else row["order"], []).append(row)
    for (name, rows), colour, marker in zip(policies.items(), cycle(OTHERS), cycle(MARKERS), strict=False):
        rows = sorted(rows, key=lambda row: row["nfe"])
        y = [row["nats_per_char"] for row in rows]
        half = [row["nats_per_char"] - row["ci95"][0] if row["ci95"] else 0 for row in rows]
        label = "confidence above a threshold" if name == "threshold" else f"{name} order"
        axes.errorbar(
            [row["nfe"] for row in rows], y, half, color=colour, marker=marker, markersize=4, linewidth=1, capsize=2,
            label=f"{label} (exact)",
        )  # fmt: skip
    if "gpt" in metrics["models"]:
        axes.axhline(
            metrics["models"]["gpt"]["nats_per_char"], color=COLOURS["gpt"], linestyle="-.", label="GPT (exact)"
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"network evaluations for a text of {metrics['window']} characters", ylabel="nats/char")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def by_position_and_character(plt, metrics: dict):
    """What each place in a window and each frequent character costs."""
    figure, (left, right) = plt.subplots(2, 1, figsize=(6.4, 6.4))
    for name, values in metrics["positions"].items():
        style = "-" if name == "llada" else "--"
        left.plot(range(1, len(values) + 1), values, style, color=COLOURS[name], linewidth=1, label=NAMES[name])
    left.set(xlabel="position in the window", ylabel="loss (nats/char)", ylim=0)
    left.legend()
    frequent = sorted(metrics["characters"].items(), key=lambda item: -item[1]["count"])[:40]
    for name, marker in (("llada", "o"), ("gpt", "D")):
        if name in metrics["models"]:
            values = [entry[name] for _, entry in frequent]
            right.plot(range(len(values)), values, marker, color=COLOURS[name], markersize=4, label=NAMES[name])
    right.set_xticks(range(len(frequent)), [SHOWN.get(c, c) for c, _ in frequent])
    right.set(xlabel="character, most frequent first (␣ space, ↵ newline)", ylabel="loss (nats/char)", ylim=0)
    right.legend()
    return figure


def kind_of(c: str) -> int:
    """0 upper case, 1 lower case, 2 anything else."""
    return 0 if c.isupper() else 1 if c.islower() else 2


def character_map(plt, metrics: dict):
    """The characters' output embeddings on their first two principal components."""
    maps = metrics["embeddings"]
    figure, panels = plt.subplots(1, len(maps), figsize=(4.6 * len(maps), 4.6), squeeze=False)
    for axes, (name, entry) in zip(panels[0], maps.items(), strict=True):
        colours = [(OTHERS[1], OTHERS[0], "#000000")[kind_of(c)] for c in entry["characters"]]
        axes.scatter(*zip(*entry["xy"], strict=True), s=0)  # sets the limits
        for c, xy, colour in zip(entry["characters"], entry["xy"], colours, strict=True):
            weight = "normal" if kind_of(c) < 2 else "bold"
            axes.text(*xy, SHOWN.get(c, c), color=colour, weight=weight, ha="center", va="center", clip_on=True)
        shares = [f"{100 * share:.0f} % of variance" for share in entry["explained"]]
        axes.set(title=NAMES[name], xlabel=f"component 1 ({shares[0]})", ylabel=f"component 2 ({shares[-1]})")
    return figure


# file name -> the entry of metrics.json it needs, and its function
PICTURES = {
    "loss_curves.png": ("history", loss_curves),
    "masking_curve.png": ("masking_curve", masking_curve),
    "likelihood_against_nfe.png": ("schedules", likelihood_against_nfe),
    "by_position_and_character.png": ("positions", by_position_and_character),
    "character_map.png": ("embeddings", character_map),
}
