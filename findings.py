"""What the figures in metrics.json say, a sentence a finding; an empty string where there is no figure to say it."""

from plots import NAMES

CLOSE = 0.02  # nats/char: what counts as no worse
BAR = 0.05  # nats/char: a gap or trend worth acting on


def interval(ci95: list[float] | None, digits: int = 3) -> str:
    return "no interval: too few windows" if ci95 is None else f"{ci95[0]:.{digits}f} to {ci95[1]:.{digits}f}"


def listing(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def ahead(metrics: dict) -> str:
    """Which model, by how much, and whether the intervals overlap."""
    if "difference" not in metrics:
        return ""
    gap, ci95 = metrics["difference"]["nats_per_char"], metrics["difference"]["ci95"]
    if ci95 is not None and ci95[0] <= 0 <= ci95[1]:
        return f"Neither model is ahead: LLaDA's bound minus GPT's loss is {gap:+.3f} nats/char ({interval(ci95)})."
    winner, caveat = "LLaDA", ""
    if gap > 0:
        winner, caveat = "GPT", " LLaDA's figure is an upper bound: part of the distance may be the bound's."
    a, b = metrics["models"]["llada"]["ci95"], metrics["models"]["gpt"]["ci95"]
    words = ""
    if a and b and ci95:
        apart = "overlap" if a[0] <= b[1] and b[0] <= a[1] else "do not overlap"
        words = f" ({interval(sorted(map(abs, ci95)))}, paired); the two models' own intervals {apart}"
    return f"{winner} is ahead by {abs(gap):.3f} nats/char{words}.{caveat}"


def best_policy(metrics: dict) -> str:
    """The policy with the lowest exact loss, against the bound."""
    if not metrics.get("policies"):
        return ""
    best, bound = min(metrics["policies"], key=lambda row: row["nats_per_char"]), metrics["models"]["llada"]
    gain = bound["nats_per_char"] - best["nats_per_char"]
    verdict = f"{abs(gain):.3f} {'below' if gain > 0 else 'above'} the bound for random orders"
    return (
        f"LLaDA's best unmasking policy is {name_of(best)} with {best['nfe']:.0f} network evaluations a text: "
        f"{best['nats_per_char']:.3f} nats/char, exact ({interval(best['ci95'])}), {verdict}."
    )


def name_of(row: dict) -> str:
    return f"the {row['order']} order" + (f", threshold {row['threshold']:g}" if row["threshold"] is not None else "")


def saturation(metrics: dict) -> str:
    """The fewest evaluations that are no worse than the most, in the best case known."""
    if not metrics.get("policies"):
        return ""
    row = cheapest_good_policy(metrics["policies"])
    return (
        f"Quality saturates at about {row['nfe']:.0f} of {metrics['window']} evaluations: {name_of(row)} then has "
        f"{row['nats_per_char']:.3f} nats/char, within {CLOSE:g} of the best policy."
    )


def cheapest_good_policy(policies: list[dict]) -> dict:
    """The one with the fewest network evaluations among those that are CLOSE to the best."""
    best = min(row["nats_per_char"] for row in policies)
    return min((row for row in policies if row["nats_per_char"] <= best + CLOSE), key=lambda row: row["nfe"])


def overfitting(metrics: dict) -> str:
    """Training text against validation text."""
    words = []
    for name, seen in metrics.get("training_text", {}).items():
        gap = metrics["models"][name]["nats_per_char"] - seen["nats_per_char"]
        side = "below" if gap > 0 else "above"
        figure = f"{seen['nats_per_char']:.3f} nats/char ({interval(seen['ci95'])})"
        words.append(f"{NAMES[name]} has {figure}, {abs(gap):.3f} {side} its validation loss")
    return f"On windows of the training text {listing(words)}." if words else ""


def best_infiller(metrics: dict) -> str:
    rows = metrics.get("infilling", {})
    if not all(rows.get(name) for name in ("llada", "gpt")):
        return ""
    spans = listing([str(row["span"]) for row in rows["llada"]])
    found = [listing([f"{100 * row['accuracy']:.0f}" for row in rows[name]]) for name in ("llada", "gpt")]
    return (
        f"In gaps of {spans} characters LLaDA, which sees both sides, finds {found[0]} % of the characters; GPT, which "
        f"sees the left, {found[1]} %."
    )


def late_fall(history: list[dict]) -> float | None:
    """How far the validation loss fell over the last third of a run; None for fewer than four validations."""
    return history[-1 - len(history) // 3]["val_loss"] - history[-1]["val_loss"] if len(history) >= 4 else None


def next_steps(metrics: dict) -> str:
    """Advice, each with the figure that it follows from."""
    advice = []
    for name, model in metrics["models"].items():
        seen, fall = metrics.get("training_text", {}).get(name), late_fall(metrics["history"].get(name, []))
        gap = model["nats_per_char"] - seen["nats_per_char"] if seen else 0.0
        if fall is not None and fall > BAR:
            advice.append(f"Train {NAMES[name]} longer: its loss still fell by {fall:.3f} over the run's last third")
        elif gap > BAR and fall is not None and fall < 0:
            advice.append(
                f"Regularise {NAMES[name]} (dropout, weight decay, more text): it is {gap:.3f} better on the training "
                f"text, and its validation loss rose by {-fall:.3f} over the run's last third"
            )
        elif fall is not None:
            advice.append(
                f"Give {NAMES[name]} more parameters: over the run's last third its loss moved by {abs(fall):.3f}"
            )
    if metrics.get("policies"):
        cheap = cheapest_good_policy(metrics["policies"])
        advice.append(f"Sample LLaDA with {name_of(cheap)} in {cheap['nfe']:.0f} evaluations, where it saturates")
    return "\n".join(f"- {line}." for line in advice)
