"""Results, and the bias that is added to the scores, as plots: PNG files."""

import contextlib
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.alibi import ENCODER_FORMS, ALiBi, EncoderALiBi
from .curves import Curve

#: Line style and marker of each curve, so that a plot can be read in black and white too.
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "P"), ("-.", "X"), (":", "*"))

LEGEND_WIDTH = 80  # characters in a line of a legend, which would be cut off at the figure's edges

LONGEST_AXIS = 12  # names of lengths that fit beside each other
FORMS = ("causal", *ENCODER_FORMS)  # forms of the bias, in the order of its picture
SHOWN_HEADS = 8  # the largest number of heads in a picture

#: The bias with the darkest colour. A key with this bias weighs e^-8 = 0.0003 of what it would weigh without a bias.
DARKEST_BIAS = -8


def pyplot() -> Any:
    """matplotlib's pyplot, imported only for a plot and without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names of models and files may hold dollars
    from matplotlib import pyplot

    return pyplot


@contextlib.contextmanager
def chart(path: Path, labels: Sequence[str], logarithmic: bool = True) -> Iterator[Any]:
    """A context with the matplotlib axes of a chart, which is saved at its end; the legend names all `labels`.

    Its axis of values is logarithmic if the values are far apart and `logarithmic` is true.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plt = pyplot()
    figure, axes = plt.subplots(layout="constrained")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    yield axes
    lines: list[Any] = [line for line in axes.lines if line.get_label() in labels]
    values = [float(value) for line in lines for value in line.get_ydata()]
    finite = [value for value in values if math.isfinite(value)]
    if logarithmic and finite and min(finite) > 0 and max(finite) > 5 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(finite) < 1e4 * min(finite) else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(alpha=0.3)
    if not finite:
        axes.set_yticks([])
    names = [textwrap.fill(line.get_label(), LEGEND_WIDTH, subsequent_indent="    ") for line in lines]
    columns = 1 if max(map(len, names)) > 36 else 2
    figure.set_size_inches(7, 4.2 + 0.24 * -(-sum(name.count("\n") + 1 for name in names) // columns))
    figure.legend(lines, names, loc="outside lower center", ncols=columns)
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


def name_lengths(axes: Any, lengths: Sequence[int]) -> None:
    """Names lengths, in ascending order, on the axis; of those whose names would overlap the first."""
    named = list(lengths[:1])
    for length in lengths:
        if length > named[-1] * (lengths[-1] / lengths[0]) ** (1 / LONGEST_AXIS):
            named.append(length)
    axes.set_xticks(named, [f"{length:,}" for length in named])


def plot_lengths(curves: Sequence[Curve], path: Path, measure: str = "perplexity") -> None:
    """Plots against evaluation length perplexity, with the training lengths as dotted lines, or tokens_per_second.

    Bands around perplexities are standard deviations over seeds.
    """
    subsets = ", ".join(sorted({curve.subset for curve in curves}))
    with chart(path, [curve.label for curve in curves], measure == "perplexity") as axes:
        for curve, style in zip(curves, curve_styles(len(curves))):
            # A length that was not evaluated leaves no gap, one without a finite value does.
            points = sorted(getattr(curve, measure).items())
            draw_curve(axes, points, curve.label, style)
            if measure == "perplexity" and curve.deviation:
                spread = curve.deviation
                bounds = [(x, y - spread[x], y + spread[x]) for x, y in points if x in spread]
                axes.fill_between(*zip(*bounds), color=style["color"], alpha=0.2, linewidth=0)
        if measure == "perplexity":
            mark_training_lengths(axes, {curve.training_length for curve in curves})
        name_lengths(axes, sorted({length for curve in curves for length in getattr(curve, measure)}))
        axes.set_xlabel("evaluation length (tokens)")
        axes.set_ylabel(f"{measure.replace('_', ' ')} ({subsets})")
        if measure != "perplexity" and math.isfinite(axes.dataLim.ymax):
            axes.set_ylim(bottom=0, top=1.08 * axes.dataLim.ymax)


def mark_training_lengths(axes: Any, lengths: set[int]) -> None:
    """Marks training lengths by dotted vertical lines."""
    for length in sorted(lengths):
        axes.axvline(length, color="gray", linestyle=":", linewidth=1)
        place: Any = {"xycoords": ("data", "axes fraction"), "xytext": (3, -4), "textcoords": "offset points"}
        style = {"rotation": 90, "verticalalignment": "top", "color": "gray", "fontsize": "small", "in_layout": False}
        axes.annotate(f"training length {length:,} ", (length, 1), **place, **style)


def plot_positions(pooled: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots loss by position in the window, see `pool_positions`."""
    with chart(path, list(pooled)) as axes:
        for (label, bins), style in zip(pooled.items(), curve_styles(len(pooled))):
            centres = [math.sqrt((part["first"] + 1) * (part["last"] + 1)) for part in bins]
            points = list(zip(centres, (part["loss"] for part in bins)))
            draw_curve(axes, points, label, {**style, "markersize": 3})
        axes.set_xlabel("tokens that are seen, from the window's start on")
        axes.set_ylabel("loss (bits per token)")


def alibi_bias(form: str, heads: int, length: int, max_bias: float = 8.0) -> Tensor:
    """The bias of a form, (H, L, L) float32; -inf where a query does not see a key. ValueError: see `ALiBi`."""
    if form == "causal":
        return ALiBi(heads, max_bias).future_mask(length, length)
    return EncoderALiBi(heads, form, max_bias).full_mask(length)


def draw_biases(biases: dict[str, Tensor], path: Path) -> None:
    """Draws (H, L, L) biases with a row per form and a column for some heads; row i of a cell is query i."""
    plt = pyplot()
    heads, length = next(iter(biases.values())).shape[:2]
    shown = sorted({round(n) for n in torch.linspace(0, heads - 1, min(heads, SHOWN_HEADS)).tolist()})
    size = (1.6 * len(shown) + 1.6, 1.7 * len(biases) + 0.5)
    figure, axes = plt.subplots(len(biases), len(shown), figsize=size, squeeze=False, layout="constrained")
    colours = plt.get_cmap("viridis").with_extremes(bad="#cccccc")
    for row, (form, bias) in zip(axes, biases.items()):
        for cell, head in zip(row, shown):
            values = bias[head].masked_fill(bias[head].isinf(), torch.nan)
            image = cell.imshow(values.numpy(), cmap=colours, vmin=DARKEST_BIAS, vmax=0, interpolation="nearest")
            cell.set(xticks=[0, length - 1], yticks=[0, length - 1])
            cell.tick_params(labelsize=7)
        row[0].set_ylabel(f"{form}\nquery", fontsize=9)
    for top, bottom, head in zip(axes[0], axes[-1], shown):
        top.set_title(f"head {head + 1}", fontsize=9)
        bottom.set_xlabel("key", fontsize=9)
    figure.colorbar(image, ax=axes, extend="min", label="bias (grey: not seen)", shrink=0.8, pad=0.02)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_reach(content: dict[str, Any], path: Path) -> None:
    """Plots the distances that each head can see and sees in a text, a row for each head; see `describe_reach`."""
    heads, plt = content["heads"], pyplot()
    names = {"half_within": "half of the weight", "most_within": "99% of the weight"}
    names.update(reach_in_text="reach in the text", reach="reach, whatever the text")
    figure, axes = plt.subplots(figsize=(7, 1.6 + 0.16 * len(heads)), layout="constrained")
    shown = [name for name in names if name in heads[0]]
    for name, style in zip(shown, curve_styles(len(shown))):
        points = [(max(1, head[name]), row) for row, head in enumerate(heads) if head[name] is not None]
        style = {**style, "linestyle": "", "markersize": 4}
        axes.plot([x for x, _ in points], [row for _, row in points], label=names[name], **style)
    for row, head in enumerate(heads):
        if head["reach"] is None:
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate("\u221e", (1, row), xytext=(-12, -3), **place)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("distance (tokens)")
    axes.set_ylabel("layer, head")
    axes.set_yticks(range(len(heads)), [f"{head['layer']}, {head['head']}" for head in heads], fontsize="x-small")
    axes.set_ylim(len(heads) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
