"""Results of several evaluations as tables and plots: perplexity, speed and loss by position against length."""

import argparse
import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from ..files.results import write_text, written_whole

#: Line style and marker per series, so that a plot can be read in black and white too.
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "P"), ("-.", "X"), (":", "*"))
#: Windows that score a position, at least, for its loss to be shown.
WINDOWS = 10

#: What a report consists of.
FILES = ("report.md", "report.png", "speed.png", "positions.png")

#: What a report shows of a result, the last two where they are there.
MEASURES = ("perplexity", "tokens_per_second", "by_position")


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written."""
    return isinstance(value, str) and bool(value.encode())


def is_place(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, of a size that every library takes."""
    return type(value) is int and 0 <= value < 2**53


def is_count(value: Any) -> bool:
    """Whether a value is such a number from 1 on."""
    return is_place(value) and value > 0


def is_measure(value: Any) -> bool:
    """Whether a value is a number from 0 on, infinity included."""
    return is_place(value) or (type(value) is float and value >= 0)


def check(part: dict[str, Any], **kinds: Callable[[Any], bool]) -> None:
    """Checks values of a part of a file by name.

    Raises:
        ValueError: one is not of its kind.
        KeyError: one is missing.
    """
    for name, is_kind in kinds.items():
        if not is_kind(part[name]):
            raise ValueError(f"{name} is {str(part[name])[:50]!r}")


def read_results(path: Path) -> dict[str, Any]:
    """Reads a file that `evaluate` or `eval_lm` wrote.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check(content, subset=is_text)
        check(content["model"], checkpoint=is_text, position_method=is_text, training_length=is_count)
        for result in content["results"]:
            check(result, length=is_count, perplexity=is_measure)
            if result["stride"] is not None:
                check(result, stride=is_count)
            if "tokens_per_second" in result:
                check(result, tokens_per_second=is_measure)
            for part in result.get("by_position", []):
                check(part, first=is_place, last=is_place, tokens=is_count, loss=is_measure)
                if part["last"] < part["first"]:
                    raise ValueError(f"a bin of positions ends at {part['last']}, before its first, {part['first']}")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): name JSON files of evaluate or the eval scripts"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise ValueError(f"{path} is no result of an evaluation ({reason}): name one of their JSON files") from error
    return content


def ways(windows: list[tuple[int, Optional[int]]]) -> dict[tuple[int, Optional[int]], str]:
    """Names for each (length, stride) the curve that it is a point of; streaming has no stride.

    A sliding window belongs with those of equal stride or with those of equal stride / length, whichever are more.
    """
    sliding = [(length, stride) for length, stride in windows if stride not in (None, length)]
    strides = Counter(stride for _, stride in sliding)
    shares = Counter(Fraction(stride, length) for length, stride in sliding)
    names = {}
    for length, stride in windows:
        if stride is None:
            names[length, stride] = "streaming"
        elif stride == length:
            names[length, stride] = "non-overlapping"
        else:
            share = Fraction(stride, length)
            by_share = shares[share] > strides[stride]
            names[length, stride] = f"stride {share} of the length" if by_share else f"stride {stride}"
    return names


def series(files: list[Path]) -> list[dict[str, Any]]:
    """One series per model, subset and way of evaluation, in the order of the files.

    Returns:
        For each: label, position_method, way, checkpoint, subset, training_length (tokens) and, by evaluation length,
        perplexity, tokens_per_second and by_position; the last two may be empty.

    Raises:
        ValueError: see `read_results`.
    """
    measured: dict[tuple[str, str], dict[tuple[int, Optional[int]], dict[str, Any]]] = {}
    models = {}
    for path in files:
        content = read_results(path)
        model = content["model"]
        models[model["checkpoint"]] = model
        points = measured.setdefault((model["checkpoint"], content["subset"]), {})
        points.update({(one["length"], one["stride"]): one for one in content["results"]})
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (checkpoint, subset), points in measured.items():
        model = models[checkpoint]
        names = ways(list(points))
        for (length, stride), point in points.items():
            way = names[length, stride]
            label = f"{model['position_method']}, trained on {model['training_length']}"
            one = found.setdefault(
                (checkpoint, subset, way),
                {
                    "label": label if way == "non-overlapping" else f"{label}, {way}",
                    "position_method": model["position_method"],
                    "way": way,
                    "checkpoint": checkpoint,
                    "subset": subset,
                    "training_length": model["training_length"],
                    **{measure: {} for measure in MEASURES},
                },
            )
            for measure in MEASURES:
                if measure in point:
                    one[measure][length] = point[measure]
    tell_apart(list(found.values()))
    return list(found.values())


def tell_apart(all_series: list[dict[str, Any]]) -> None:
    """Adds to labels that stand more than once what differs: the checkpoint's path, the subset."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in all_series:
        groups.setdefault(one["label"], []).append(one)
    for group in groups.values():
        paths = {one["checkpoint"] for one in group}
        subsets = {one["subset"] for one in group}
        for one in group:
            if len(paths) > 1:
                common = os.path.commonpath(map(os.path.abspath, paths))
                one["label"] += f" ({os.path.relpath(one['checkpoint'], common)})"
            if len(subsets) > 1:
                one["label"] += f" ({one['subset']})"


def table(all_series: list[dict[str, Any]], style: str, measure: str = "perplexity") -> str:
    """A measure, a row per evaluation length and a column per series; `style` is one of tabulate's formats."""
    lengths = sorted({length for one in all_series for length in one[measure]})
    rows = [[length, *(one[measure].get(length) for one in all_series)] for length in lengths]
    headers = ["evaluation length", *(one["label"] for one in all_series)]
    width = 16 if style == "simple" else None  # a terminal is narrow, Markdown wants a line per row
    number = ".2f" if measure == "perplexity" else ",.0f"
    return tabulate(rows, headers, tablefmt=style, floatfmt=number, intfmt=",", maxheadercolwidths=width)


def losses_by_position(all_series: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Loss by position for each series that has it, in bins, over its windows of all lengths together.

    In a causal model a token at position p has p tokens before it, however long its window is. Positions that few
    windows score are left out, as those that only the first of all sliding windows does.
    """
    found = {}
    for one in all_series:
        pooled: dict[int, dict[str, Any]] = {}
        for bins in one["by_position"].values():
            for part in bins:
                whole = pooled.setdefault(part["first"], {"first": part["first"], "last": 0, "tokens": 0, "loss": 0.0})
                tokens = whole["tokens"] + part["tokens"]
                whole["loss"] += (part["loss"] - whole["loss"]) * part["tokens"] / tokens
                whole.update(tokens=tokens, last=max(whole["last"], part["last"]))
        bins = [pooled[first] for first in sorted(pooled)]
        bins = [part for part in bins if part["tokens"] >= WINDOWS * (part["last"] - part["first"] + 1)]
        if bins:
            found[one["label"]] = bins
    return found


def position_table(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Loss in bits by position, in Markdown: a row for each doubling of the position and a column for each curve."""
    rows = []
    for octave in range(1 + max(one["last"] for bins in curves.values() for one in bins).bit_length()):
        row = [f"{2**octave // 2:,} - {2**octave - 1:,}" if octave > 1 else f"{octave}"]
        for bins in curves.values():
            inside = [one for one in bins if one["first"].bit_length() == octave]
            tokens = sum(one["tokens"] for one in inside)
            row.append(sum(one["tokens"] * one["loss"] for one in inside) / tokens if tokens else None)
        rows.append(row)
    rows = [row for row in rows if any(loss is not None for loss in row[1:])]
    return tabulate(rows, ["position", *curves], tablefmt="github", floatfmt=".3f", colalign=("right",) * len(rows[0]))


@contextlib.contextmanager
def chart(path: Path, labels: list[str]) -> Iterator[Any]:
    """A context with the axes of a chart against a logarithmic axis, which it draws to a PNG, with a legend below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = 1 if max(map(len, labels)) > 36 else 2  # of the legend, below the curves
    figure, axes = plt.subplots(figsize=(7, 4.2 + 0.24 * -(-len(labels) // columns)), layout="constrained")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    yield axes
    if axes.get_ylim()[0] > 0 and axes.dataLim.ymax > 5 * axes.dataLim.ymin:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def styles(count: int) -> list[dict[str, str]]:
    """Line style and marker for each of some curves."""
    repeated = STYLES * (count // len(STYLES) + 1)
    return [{"linestyle": line, "marker": marker} for line, marker in repeated[:count]]


def plot(all_series: list[dict[str, Any]], path: Path, measure: str = "perplexity") -> None:
    """Draws a measure against evaluation length to a PNG; for perplexity dotted lines mark the training lengths."""
    subsets = ", ".join(sorted({one["subset"] for one in all_series}))
    with chart(path, [one["label"] for one in all_series]) as axes:
        for one, style in zip(all_series, styles(len(all_series))):
            axes.plot(*zip(*sorted(one[measure].items())), label=one["label"], **style)
        of_perplexity = measure == "perplexity"
        for length in sorted({one["training_length"] for one in all_series}) if of_perplexity else ():
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
            )
        lengths = sorted({length for one in all_series for length in one[measure]})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("evaluation length (tokens)")
        axes.set_ylabel(f"{'perplexity' if of_perplexity else 'tokens per second'} ({subsets})")
        if not of_perplexity:
            axes.set_ylim(bottom=0, top=1.08 * axes.dataLim.ymax)


def plot_positions(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws loss by position in the window to a PNG."""
    with chart(path, list(curves)) as axes:
        for (label, bins), style in zip(curves.items(), styles(len(curves))):
            centres = [math.sqrt((one["first"] + 1) * (one["last"] + 1)) for one in bins]
            axes.plot(centres, [one["loss"] for one in bins], label=label, **{**style, "markersize": 3})
        axes.set_xlabel("tokens that are seen, from the window's start on")
        axes.set_ylabel("loss (bits per token)")


def report(files: list[Path], output: Path, overwrite: bool = False) -> str:
    """Writes report.md and report.png into the folder `output`; speed.png and positions.png if results have them.

    Returns:
        The table of perplexity, for the terminal.

    Raises:
        ValueError: see `read_results`, or the files hold no result, or `output` holds a report already.
    """
    existing = [output / name for name in FILES if (output / name).exists()]
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists: pass --overwrite to replace it, or another --output")
    all_series = series(files)
    if not all_series:
        raise ValueError(f"no result in {', '.join(map(str, files))}: the evaluation ended before its first length")
    timed = [one for one in all_series if one["tokens_per_second"]]
    curves = losses_by_position(all_series)
    text = "Perplexity.\n\n" + table(all_series, "github") + "\n"
    with written_whole(output / "report.png") as partial:
        plot(all_series, partial)
    if timed:
        text += "\nTokens per second.\n\n" + table(timed, "github", "tokens_per_second") + "\n"
        with written_whole(output / "speed.png") as partial:
            plot(timed, partial, "tokens_per_second")
    if curves:
        text += "\nLoss, bits per token, by position in the window.\n\n" + position_table(curves) + "\n"
        with written_whole(output / "positions.png") as partial:
            plot_positions(curves, partial)
    write_text(output / "report.md", text)
    return table(all_series, "simple")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi report`."""
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="JSON files of evaluate or the scripts")
    parser.add_argument("--output", type=Path, default=Path("results/report"), help="folder for report.md, report.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")


def main(args: argparse.Namespace) -> None:
    """`fairseq-alibi report`: prints the table and says where table and plot were written."""
    print(report(args.files, args.output, args.overwrite))
    print("\nwritten to " + ", ".join(str(args.output / name) for name in FILES if (args.output / name).exists()))
