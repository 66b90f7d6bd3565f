"""The plots of a report: inline SVG, legible on light and on dark paper, with nothing to fetch.

Text and axes are drawn in `INK`, which becomes the page's own text colour; series have colours of middle lightness.
matplotlib is imported when the first plot is drawn, and its global settings stay as they are.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sandcat.measuring.sparsity import Histogram, LayerSparsity
    from sandcat.measuring.speed import SpeedResult
    from sandcat.reports.rows import CurvePoint

INK = "#010203"
DENSE = "#75869a"
SPARSE = "#bb8026"
SERIES = (SPARSE, "#4d8f8b", "#a9607a", DENSE)
WIDTH = 5.4
"""Inches at 72 points: small enough that the text stays readable on a phone."""
WORST = 5
"""The largest ratio of perplexities that `quality` draws."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sandcat",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


def _svg(height: float, description: str, draw: Callable[[Axes], None]) -> Markup:
    """An SVG element with `description` for those who cannot see it. `height` in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(canvas.add_subplot())
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    head = Markup('<svg role="img" aria-label="{}"').format(description)
    return Markup(re.sub(r'<svg|\sxmlns(:\w+)?="[^"]*"', lambda m: head if m[0] == "<svg" else "", svg, count=3))


def roofline(speed: SpeedResult) -> Markup:
    """Measured ms a step, and within each bar the floor: the time that reading its bytes takes."""
    names = ("sparse", "dense")
    measured = [1e3 * s for s in (speed.sparse_seconds, speed.dense_seconds)]
    floor = [1e3 * b / speed.read_bandwidth for b in (speed.sparse_bytes, speed.dense_bytes)]

    def draw(axes: Axes) -> None:
        for y, (taken, least, colour) in enumerate(zip(measured, floor, (SPARSE, DENSE), strict=True)):
            axes.barh(y, taken, 0.56, color=colour, alpha=0.38)
            axes.barh(y, least, 0.56, color=colour)
            text = f"{taken:.3g} ms, floor {least:.3g} ms"
            axes.annotate(text, (max(taken, least), y), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(2), names)
        axes.set_xlim(0, 1.62 * max(measured + floor))
        axes.set_xlabel("ms a token" if speed.batch == 1 else "ms a step")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return _svg(1.55, f"Time of a step after {speed.context} tokens at batch {speed.batch}, against its floor", draw)


def sparsity(rows: list[LayerSparsity]) -> Markup:
    """Per cent dropped at each site of each layer: target, calibration, evaluation text."""

    def per_cent(name: str) -> list[float]:
        return [math.nan if (value := getattr(row, name)) is None else 100 * value for row in rows]

    def draw(axes: Axes) -> None:
        after = 1 + max((row.layer for row in rows if row.layer is not None), default=-1)
        layers = [after if row.layer is None else row.layer for row in rows]  # the head comes after the last
        series = (("target", "_", INK, 9), ("calibrated", "o", DENSE, 6.5), ("realised", ".", SPARSE, 8))
        for name, marker, colour, width in series:
            values = per_cent(name)
            if not all(map(math.isnan, values)):
                hollow: dict[str, Any] = {"markerfacecolor": "none"} if name == "calibrated" else {}
                axes.plot(layers, values, marker, color=colour, markersize=width, label=name, **hollow)
        known = [value for name, *_ in series for value in per_cent(name) if not math.isnan(value)]
        axes.set_ylim(max(0, min(known, default=0) - 10), min(100, max(known, default=100) + 10))
        axes.set_xlabel("layer")
        axes.set_ylabel("% dropped")
        axes.locator_params(axis="x", integer=True)
        axes.figure.legend(loc="outside upper center", ncols=3, handletextpad=0.3, columnspacing=1.2)

    return _svg(2.9, "Share dropped at each site of each layer", draw)


def activations(histogram: Histogram) -> Markup:
    """Magnitudes at one site on a log10 axis, kept above dropped; the median threshold, 10th to 90th percentile."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    counts = [kept + dropped for kept, dropped in zip(histogram.kept, histogram.dropped, strict=True)]
    scale = 100 / max(1, sum(counts))
    dropped, both = [scale * n for n in histogram.dropped], [scale * n for n in counts]
    edges = histogram.log10_edges

    def draw(axes: Axes) -> None:
        axes.stairs(dropped, edges, fill=True, color=DENSE, label="dropped")
        axes.stairs(both, edges, baseline=dropped, fill=True, color=SPARSE, label="kept")
        if histogram.threshold > 0:
            low, middle, high = (
                math.log10(max(10 ** edges[0], t))
                for t in (histogram.threshold_low, histogram.threshold, histogram.threshold_high)
            )
            axes.axvline(middle, color=INK, linewidth=1.2, label="threshold")
            if high > low:
                axes.axvspan(low, high, color=INK, alpha=0.16, linewidth=0, label="10 to 90 %")
        last = max((i for i, n in enumerate(counts) if n), default=len(counts) - 1)
        axes.set_xlim(edges[0], edges[last + 1])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MultipleLocator(1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{10**x:g}"))
        axes.set_xlabel("magnitude")
        axes.set_ylabel("% a bin")
        axes.figure.legend(loc="outside upper center", ncols=4, handlelength=1.1, handletextpad=0.4, columnspacing=1)

    return _svg(2.7, f"Distribution of what is compared at {histogram.site}", draw)


def quality(lines: dict[str, list[tuple[float, float]]]) -> Markup:
    """Perplexity over dense against the bytes that a token reads, a line for each recipe: (bytes, ratio). The first
    line is the one that the others are compared with.

    Ratios above `WORST` are left to the imagination: a line that gets there leaves the plot at its top.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    def draw(axes: Axes) -> None:
        for i, (name, line) in enumerate(lines.items()):
            share, ratios = zip(*line, strict=True)
            style = ("-", "--", ":")[i // len(SERIES) % 3]
            axes.plot([100 * x for x in share], ratios, style, color=SERIES[i % len(SERIES)], marker="o", markersize=4,
                      linewidth=1.4 if i else 2.2, label=name)  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(0.97, min(WORST, 1.05 * max(ratio for line in lines.values() for _, ratio in line)))
        axes.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.2, 1.5, 2, 3, 4]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("weights read, % of dense")
        axes.set_ylabel("perplexity over dense")
        axes.invert_xaxis()
        axes.figure.legend(loc="outside upper left", ncols=3, handlelength=2.2, columnspacing=1.2)

    return _svg(3.8, "Perplexity over dense against the share of weights that a token reads", draw)


def curve(points: list[CurvePoint]) -> Markup:
    """Perplexity ratio with its standard error against sparsity, one line for each recipe that differs in more."""
    from matplotlib.ticker import FuncFormatter

    lines: dict[str, list[CurvePoint]] = {}
    for point in sorted(points, key=lambda p: p.sparsity):
        lines.setdefault(re.sub(r"\bsparsity=[^,\s]*,?", "", point.recipe).rstrip(":,"), []).append(point)

    def draw(axes: Axes) -> None:
        for i, (name, line) in enumerate(lines.items()):
            x, y = [100 * p.sparsity for p in line], [p.perplexity_ratio for p in line]
            errors = [p.ratio_error for p in line]
            colour = SERIES[i % len(SERIES)]
            axes.errorbar(x, y, errors, color=colour, marker="o", markersize=4, capsize=2.5, linewidth=1.4,
                          label=name.replace("$", r"\$"))  # fmt: skip
        axes.axhline(1, color=INK, linewidth=0.7)
        if max((p.perplexity_ratio for p in points if math.isfinite(p.perplexity_ratio)), default=1) > 3:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
        axes.set_xlabel("sparsity asked for, %")
        axes.set_ylabel("perplexity over dense")
        axes.legend(loc="upper left")

    return _svg(3.0, "Perplexity over dense against sparsity", draw)
