"""The pictures of the report, each drawn from metrics.json alone.

Colours are those of Okabe and Ito, and one of Tol's, which colour-blind readers can tell apart. Lines differ in dash or
marker too, for printing in grey. Legends stand outside the axes: a marker in a legend must not look like data.
"""

from itertools import cycle
from pathlib import Path

COLOURS = {"llada": "#0072B2", "gpt": "#D55E00"}
NAMES = {"llada": "LLaDA", "gpt": "GPT"}
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9", "#882255", "#999999")
MARKERS = "osD^vPX"
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
STYLE = {
    "figure.figsize": (6.4, 4.4),
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def visible(text: str) -> str:
    r"""Text with symbols for blanks and codes for control characters, whose symbols the font of pictures lacks.

    >>> visible("to be"), visible("\x1b")
    ('to␣be', '\\x1b')
    """
    return "".join(VISIBLE.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def draw_pictures(metrics: dict, out: Path) -> None:
    """Draw the pictures that the metrics have figures for, to the folder `out`."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        for name, (needs, draw) in PICTURES.items():
            if metrics.get(needs):
                figure = draw(plt, metrics)
                figure.savefig(out / name)
                plt.close(figure)


def kind(row: dict) -> str:
    """What a loss is."""
    return "upper bound" if row["is_bound"] else "exact"


def label_of(metrics: dict, name: str) -> str:
    """A model's name with the kind of its losses."""
    return f"{NAMES[name]}, {kind(metrics['models'][name])}"


def policy_name(row: dict, steps: bool = True) -> str:
    """An unmasking policy in words."""
    if row["threshold"] is not None:
        return f"{row['order']} order, threshold {row['threshold']:g}"
    return f"{row['order']} order" + (f", {row['steps']} steps" if steps else "")


def add_legend(figure, axes, columns: int = 2) -> None:
    """A legend below the figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def add_band(axes, x, values: list[float], half_widths: list[float | None], colour: str, label: str) -> None:
    """The 95 % intervals of values as a band."""
    half = [float("nan") if width is None else width for width in half_widths]
    low, high = ([value + sign * width for value, width in zip(values, half, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0, label=label)


def add_level(axes, model: dict, **style) -> None:
    """A model's loss as a horizontal line, with its 95 % interval as a band."""
    line = axes.axhline(model["nats_per_char"], **style)
    if model.get("ci95"):
        axes.axhspan(*model["ci95"], color=line.get_color(), alpha=0.2, linewidth=0)


def loss_curves(plt, metrics: dict):
    """Training and validation losses of both models before calibration; the calibrated loss as a separate marker."""
    figure, axes = plt.subplots()
    for name, history in metrics["history"].items():
        x, colour, label = [line["tokens"] / 1e6 for line in history], COLOURS[name], label_of(metrics, name)
        axes.plot(x, [line["train_loss"] for line in history], ":", color=colour, label=f"{label}: training")
        axes.plot(
            x, [line["val_loss"] for line in history], "-o", color=colour, markersize=3, label=f"{label}: validation"
        )
        if history and "calibrated_val_loss" in history[-1]:
            temperature = f"validation after scaling by temperature {history[-1]['temperature']:.2f}"
            axes.plot(x[-1:], [history[-1]["calibrated_val_loss"]], "*", color=colour, markersize=9,
                      markeredgecolor="black", linestyle="none", label=f"{label}: {temperature}")  # fmt: skip
    axes.set(xlabel="tokens read in training (millions)", ylabel="loss (nats/char)")
    add_legend(figure, axes, columns=1)
    return figure


def masking_curve(plt, metrics: dict):
    """c(m), the loss of one masked character when m are masked; its mean is the bound."""
    curve, fit = metrics["masking_curve"], metrics["masking_curve_fit"]
    m, colour = range(1, len(curve) + 1), COLOURS["llada"]
    figure, axes = plt.subplots()
    axes.plot(m, curve, ".", color=colour, markersize=4, alpha=0.5, label="c(m), measured")
    add_band(axes, m, curve, metrics["masking_curve_half_widths"], colour, "its 95 % interval")
    axes.plot(m, fit, color="black", linewidth=1, label="c(m), monotone fit")
    for name, model in metrics["models"].items():
        dash = "--" if name == "llada" else "-."
        nats, mean = model["nats_per_char"], "mean of c(m) = " if name == "llada" else ""
        add_level(axes, model, color=COLOURS[name], linestyle=dash,
                  label=f"{mean}{label_of(metrics, name)}: {nats:.3f} nats/char")  # fmt: skip
    axes.set(xlabel=f"masked tokens m, of {len(curve)}", ylabel="c(m) (nats/char of masked tokens)", ylim=0)
    add_legend(figure, axes)
    return figure


def likelihood_against_nfe(plt, metrics: dict):
    """Schedules (lines), policies (markers with intervals; hollow for upper bounds), GPT as a horizontal line."""
    figure, axes = plt.subplots(figsize=(6.4, 5.6))
    for (name, rows), dash in zip(metrics["schedules"].items(), ("--", ":", "-"), strict=False):
        x, y = [row["nfe"] for row in rows], [row["nats_per_char"] for row in rows]
        axes.plot(x, y, dash, color=COLOURS["llada"], label=f"random order, {name} schedule (upper bound)")
    policies: dict[str, list[dict]] = {}
    for row in sorted(metrics["policies"], key=lambda row: row["nfe"]):
        policies.setdefault(f"{policy_name(row, steps=False)} ({kind(row)})", []).append(row)
    styles = zip(cycle(OTHERS), cycle(MARKERS), strict=False)
    for i, ((label, rows), (colour, marker)) in enumerate(zip(policies.items(), styles, strict=False)):
        shift = 1.05 ** (i - len(policies) / 2)  # policies with the same NFE are drawn side by side
        half = [row["nats_per_char"] - row["ci95"][0] if row["ci95"] else 0 for row in rows]
        axes.errorbar(
            [shift * row["nfe"] for row in rows], [row["nats_per_char"] for row in rows], half, color=colour,
            marker=marker, markersize=4, markerfacecolor="white" if rows[0]["is_bound"] else colour, linewidth=1,
            capsize=2, label=label,
        )  # fmt: skip
    if "gpt" in metrics["models"]:
        add_level(axes, metrics["models"]["gpt"], color=COLOURS["gpt"], linestyle="-.", label="GPT (exact)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    xlabel = f"network evaluations (NFE) for a text of {metrics['window']} tokens"
    axes.set(xlabel=xlabel, ylabel="loss (nats/char), with 95 % intervals")
    add_legend(figure, axes)
    return figure


def by_position_and_character(plt, metrics: dict):
    """Loss at each position of a window with intervals, and on each frequent character."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 6.8))
    frequent = sorted(metrics["characters"].items(), key=lambda item: -item[1]["count"])[:40]
    for i, (name, values) in enumerate(metrics["positions"].items()):
        colour, label = COLOURS[name], label_of(metrics, name)
        dash, marker = ("-", "o") if name == "llada" else ("--", "D")
        x = range(1, len(values) + 1)
        top.plot(x, values, dash, color=colour, linewidth=1, label=f"{label}, by position")
        add_band(top, x, values, metrics["position_half_widths"][name], colour, "its 95 % interval")
        places = [place + 0.3 * (i - 0.5) for place in range(len(frequent))]  # side by side: none hides another
        losses = [entry[name] for _, entry in frequent]
        bottom.plot(places, losses, marker, color=colour, markersize=4, label=f"{label}, by character")
    top.set(xlabel="position in the window", ylabel="loss (nats/char)", ylim=0)
    bottom.set_xticks(range(len(frequent)), [visible(c) for c, _ in frequent])
    bottom.set(xlabel="character, most frequent first (␣ space, ↵ newline)", ylabel="loss (nats/char)", ylim=0)
    handles = [axes.get_legend_handles_labels() for axes in (top, bottom)]
    handles, labels = (a + b for a, b in zip(*handles, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1, handlelength=1.4)
    return figure


# file name -> the entry of metrics.json it needs, and its function
PICTURES = {
    "loss_curves.png": ("history", loss_curves),
    "masking_curve.png": ("masking_curve", masking_curve),
    "likelihood_against_nfe.png": ("schedules", likelihood_against_nfe),
    "by_position_and_character.png": ("positions", by_position_and_character),
}
