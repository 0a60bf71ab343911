"""Results as plots: PNG files."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .curves import Curve

#: Line style and marker of each curve, so that a plot can be read in black and white too.
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "P"), ("-.", "X"), (":", "*"))


@contextlib.contextmanager
def chart(path: Path, labels: Sequence[str], logarithmic: bool = True) -> Iterator[Any]:
    """A context with the matplotlib axes of a chart, which is saved at its end.

    Args:
        path: of the PNG file.
        labels: of all curves, for the legend below the chart.
        logarithmic: whether the axis of values is logarithmic if the values are far apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = 1 if max(map(len, labels)) > 36 else 2
    figure, axes = plt.subplots(figsize=(7, 4.2 + 0.24 * -(-len(labels) // columns)), layout="constrained")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    yield axes
    lines: list[Any] = [line for line in axes.lines if line.get_label() in labels]
    values = [float(value) for line in lines for value in line.get_ydata()]
    finite = [value for value in values if math.isfinite(value)]
    if logarithmic and finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(alpha=0.3)
    if not finite:
        axes.set_yticks([])
    figure.legend(loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curve_styles(count: int) -> list[dict[str, Any]]:
    """Line style and marker for each of `count` curves."""
    colors = [f"C{number}" for number in range(10)] + ["black", "gold", "navy", "lime"]
    return [
        {"linestyle": line, "marker": marker, "color": colors[number % len(colors)]}
        for number, (line, marker) in zip(range(count), itertools.cycle(STYLES))
    ]


def draw_curve(axes: Any, points: Sequence[tuple[float, float]], label: str, style: dict[str, Any]) -> None:
    """Draws a curve, whose infinite values are marked at the upper edge."""
    axes.plot(*zip(*((x, y if math.isfinite(y) else math.nan) for x, y in points)), label=label, **style)
    top = axes.get_xaxis_transform()  # lengths, and shares of the height
    for x in (x for x, y in points if not math.isfinite(y)):
        mark = {"marker": "^", "color": style["color"], "transform": top}
        axes.plot([x], [0.985], clip_on=False, in_layout=False, **mark)
        note: dict[str, Any] = {"textcoords": "offset points", "in_layout": False}
        axes.annotate("\u221e", (x, 0.985), xycoords=top, xytext=(4, -4), **note)


def plot_lengths(curves: Sequence[Curve], path: Path, measure: str = "perplexity") -> None:
    """Plots a measure against evaluation length.

    Args:
        curves: what is plotted.
        path: of the PNG file.
        measure: perplexity, where dotted lines mark the training lengths, or tokens_per_second.
    """
    subsets = ", ".join(sorted({curve.subset for curve in curves}))
    with chart(path, [curve.label for curve in curves], measure == "perplexity") as axes:
        for curve, style in zip(curves, curve_styles(len(curves))):
            # A length that was not evaluated leaves no gap, one without a finite value does.
            draw_curve(axes, sorted(getattr(curve, measure).items()), curve.label, style)
        if measure == "perplexity":
            mark_training_lengths(axes, {curve.training_length for curve in curves})
        lengths = sorted({length for curve in curves for length in getattr(curve, measure)})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("evaluation length (tokens)")
        axes.set_ylabel(f"{measure.replace('_', ' ')} ({subsets})")
        if measure != "perplexity" and math.isfinite(axes.dataLim.ymax):
            axes.set_ylim(bottom=0, top=1.08 * axes.dataLim.ymax)


def mark_training_lengths(axes: Any, lengths: set[int]) -> None:
    """Marks training lengths by dotted vertical lines."""
    for length in sorted(lengths):
        axes.axvline(length, color="gray", linestyle=":", linewidth=1)
        axes.annotate(
            f"training length {length:,} ",
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -4),
            textcoords="offset points",
            rotation=90,
            verticalalignment="top",
            color="gray",
            fontsize="small",
            in_layout=False,
        )


def plot_positions(pooled: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots loss by position in the window.

    Args:
        pooled: see `pool_positions`.
        path: of the PNG file.
    """
    with chart(path, list(pooled)) as axes:
        for (label, bins), style in zip(pooled.items(), curve_styles(len(pooled))):
            centres = [math.sqrt((part["first"] + 1) * (part["last"] + 1)) for part in bins]
            points = list(zip(centres, (part["loss"] for part in bins)))
            draw_curve(axes, points, label, {**style, "markersize": 3})
        axes.set_xlabel("tokens that are seen, from the window's start on")
        axes.set_ylabel("loss (bits per token)")
