"""The comparison's table and figure, made from its samples alone."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lib.base.numbers import finite

COLUMNS = (
    "method",
    "bits per weight",
    "perplexity",
    "x teacher",
    "KL",
    "top-1",
    "seconds",
    "peak GB",
    "run",
)
MARKERS = "osD^vP*X"

Sample = dict[str, Any]
"""``status`` (ok, not installed, or failed: and why), ``about``, and where it is ok the figures."""


def family(name: str) -> str:
    """The part of a method's name before its bits, by which the figure joins them."""
    return name.rsplit("-", 1)[0]


def number(sample: Sample, key: str, digits: int, unit: float = 1.0) -> str:
    """A figure, rounded, thousands separated (large ones with three digits); empty where there is
    none."""
    if key not in sample:
        return ""
    if sample[key] is None:
        return "not finite"
    value = sample[key] / unit
    return f"{value:,.{digits}f}" if value < 1e5 else f"{value:.3g}"


def row(name: str, sample: Sample, teacher: Sample) -> str:
    """A line of the table."""
    label = f"`{name}`: {sample['about']}"
    if sample["status"] != "ok":
        cells = [label, sample["status"], *[""] * (len(COLUMNS) - 2)]
        return f"| {' | '.join(cells)} |"
    done = sample.get("run", {})
    run = [f"{done[key]} {key}" for key in ("steps", "iterations", "sequences") if key in done]
    cells = [
        label,
        number(sample, "bits", 2),
        number(sample, "perplexity", 2),
        number(sample, "perplexity", 3, teacher["perplexity"]),
        number(sample, "kl", 4),
        number(sample, "top1", 4),
        number(sample, "seconds", 0),
        number(sample, "peak_bytes", 2, 1e9),
        ", ".join(run),
    ]
    return f"| {' | '.join(cells)} |"


def table(samples: dict[str, Sample], config: dict[str, Any], versions: dict[str, str]) -> str:
    """Markdown: the teacher, then every method that was asked for, those without figures too."""
    teacher = samples["teacher"]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [row(name, sample, teacher) for name, sample in samples.items()]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += [
        "",
        f"Budget of {config['budget']:.0f} s on {config['threads']} threads for what trains; the "
        "others take what they take. Perplexity over "
        f"{teacher['scored_tokens']} test tokens, KL(teacher || model) and top-1 agreement over "
        f"{teacher['scored_positions']} positions. Bits per weight of the quantized layers, "
        "scales, zero points and tables counted; embeddings are left alone in all rows. Seconds "
        "include the teacher's pass over the sequences seen (cached before), and neither loading "
        f"nor trial runs. {packages}.",
    ]
    return "\n".join(lines) + "\n"


def draw(samples: dict[str, Sample]) -> Figure:
    """Bits per weight against perplexity (logarithmic); a line per family, dashed the teacher."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    families: dict[str, list[tuple[float, float]]] = {}
    for name, sample in samples.items():
        if name == "teacher" or sample["status"] != "ok":
            continue
        if (perplexity := finite(sample["perplexity"])) is not None:
            families.setdefault(family(name), []).append((sample["bits"], perplexity))
    for place, (name, points) in enumerate(families.items()):
        bits, perplexities = zip(*sorted(points), strict=True)
        own = name == "lutqat"
        axes.plot(
            bits,
            perplexities,
            marker=MARKERS[place % len(MARKERS)],
            linewidth=2.0 if own else 1.0,
            color="black" if own else None,
            label=name,
        )
    teacher = finite(samples["teacher"]["perplexity"])
    if teacher is not None:
        axes.axhline(teacher, color="gray", linewidth=0.8, linestyle="--", label="teacher")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the quantized layers")
    axes.set_ylabel("perplexity on held-out text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
