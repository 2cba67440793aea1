"""The pictures of the report, each drawn from metrics.json alone.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines differ in dash or marker too.
"""

from pathlib import Path

COLOURS, NAMES = {"llada": "#0072B2", "gpt": "#D55E00"}, {"llada": "LLaDA", "gpt": "GPT"}
STYLE = {
    **{"figure.dpi": 150, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8},
}
GROUPS = {  # of characters, and their colours
    **{"vowels": "#D55E00", "consonants": "#0072B2", "capitals": "#009E73"},
    **{"digits": "#CC79A7", "punctuation, blanks": "#000000"},
}


def draw_pictures(metrics: dict, out: Path) -> dict[str, str]:
    """Draw the pictures that the metrics have figures for to the folder `out`. Returns their names and captions."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = {name: draw for name, (needs, draw) in PICTURES.items() if metrics.get(needs)}
    with rc_context(STYLE):
        for name, draw in drawn.items():
            figure = Figure()
            axes = draw(figure, metrics)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
            figure.savefig(out / name)
    return {name: draw.__doc__ for name, draw in drawn.items()}


def kind(row: dict) -> str:
    """What a loss is."""
    return "upper bound" if row["is_bound"] else "exact"


def loss_curves(figure, metrics: dict):
    """Losses while training. LLaDA's own, where it learns the sweep, is weighted: do not compare it with the others."""
    axes = figure.subplots()
    for name, history in metrics["history"].items():
        for key, style, label in (
            ("train_loss", ":", "training"),
            ("val_loss", "-o", f"validation, {kind(metrics['models'][name])}"),
            ("sampler_loss", "--s", "validation, by its sampler (estimate)"),
            ("calibrated_val_loss", "*", "validation, temperature fitted"),
        ):
            if points := [(record["tokens"] / 1e6, record[key]) for record in history if key in record]:
                look = {"color": COLOURS[name], "markersize": 5, "label": f"{NAMES[name]}: {label}"}
                axes.plot(*zip(*points, strict=True), style, **look)
    axes.set(xlabel="tokens read in training (millions)", ylabel="loss (nats/char)")
    return axes


def masking_curve(figure, metrics: dict):
    """c(m) is the loss of one masked token when m are masked. Its mean over m is the upper bound."""
    axes = figure.subplots()
    for name, curve in metrics["masking_curve"].items():
        axes.plot(range(1, len(curve) + 1), curve, ".", color=COLOURS[name], markersize=4, label=f"{NAMES[name]}, c(m)")
    for (name, model), dash in zip(metrics["models"].items(), ("--", "-."), strict=False):
        label = f"loss of {NAMES[name]}, {kind(model)}"
        axes.axhline(model["nats_per_char"], color=COLOURS[name], linestyle=dash, label=label)
    axes.set(xlabel=f"masked tokens m, of {metrics['window']}", ylabel="c(m) (nats/char of masked tokens)", ylim=0)
    return axes


def loss_against_evaluations(figure, metrics: dict):
    """Hollow: upper bounds. Bars: 95 % intervals of the differences to the default sampler."""
    axes, families = figure.subplots(), {}
    for row in metrics["samplers"]:
        families.setdefault(f"{NAMES[row['model']]}, {row['sampler'].split(',')[0]} ({kind(row)})", []).append(row)
    for (label, rows), marker in zip(families.items(), "osD^vP", strict=False):
        colour, (x, y) = COLOURS[rows[0]["model"]], ([row[key] for row in rows] for key in ("nfe", "nats_per_char"))
        gaps = [row["difference"] for row in rows]
        half = [gap["ci95"][1] - gap["nats_per_char"] if gap["ci95"] else 0 for gap in gaps]
        look = {"color": colour, "markerfacecolor": "white" if rows[0]["is_bound"] else colour, "label": label}
        axes.errorbar(x, y, half, marker=marker, markersize=5, linestyle="none", capsize=2, **look)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"network evaluations (NFE) for {metrics['window']} tokens", ylabel="loss (nats/char)")
    return axes


def loss_by_position(figure, metrics: dict):
    """The mean loss at each position of a window."""
    axes = figure.subplots()
    for (name, values), dash in zip(metrics["positions"].items(), ("-", "--"), strict=False):
        label = f"{NAMES[name]}, {kind(metrics['models'][name])}"
        axes.plot(range(1, len(values) + 1), values, dash, color=COLOURS[name], linewidth=1, label=label)
    axes.set(xlabel="position in the window", ylabel="loss (nats/char)", ylim=0)
    return axes


def embeddings(figure, metrics: dict):
    """The characters' embeddings in their two principal components."""
    maps, characters = metrics["embeddings"], metrics["characters"]
    figure.set_size_inches(5 * len(maps), 5.2)
    for axes, (name, found) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        for group, colour in GROUPS.items():
            axes.plot([], [], "o", color=colour, label=group)
        for char, xy in zip(characters, found["xy"], strict=True):
            shown = "␣" if char == " " else repr(char)[1:-1]
            axes.plot(*xy, "o", color=GROUPS[group_of(char)], alpha=0.2)
            axes.annotate(shown, xy, color=GROUPS[group_of(char)], ha="center", va="center", fontsize=9)
        first, second = (f"component, {100 * share:.0f} % of the variance" for share in found["shares"])
        axes.set(title=NAMES[name], xlabel=f"first {first}", ylabel=f"second {second}")
    return axes


def group_of(char: str) -> str:
    """Which of GROUPS a character belongs to.

    >>> [group_of(char) for char in "aB3,"]
    ['vowels', 'capitals', 'digits', 'punctuation, blanks']
    """
    if not char.isalpha():
        return "digits" if char.isdigit() else "punctuation, blanks"
    return "capitals" if char.isupper() else "vowels" if char in "aeiou" else "consonants"


PICTURES = {  # file name -> the entry of metrics.json that it needs, and its function
    "loss_curves.png": ("history", loss_curves),
    "masking_curve.png": ("masking_curve", masking_curve),
    "loss_against_evaluations.png": ("samplers", loss_against_evaluations),
    "loss_by_position.png": ("positions", loss_by_position),
    "embeddings.png": ("embeddings", embeddings),
}
