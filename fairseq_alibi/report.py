"""Results of several evaluations as one table and one plot: perplexity against evaluation length."""

import argparse
import json
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .results import write_text, written_whole

#: Line style and marker per series, so that a plot can be read in black and white too.
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "P"), ("-.", "X"), (":", "*"))


def read_results(path: Path) -> dict[str, Any]:
    """Reads a file that `fairseq_alibi.evaluate` wrote.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"]["position_method"], content["model"]["training_length"], content["subset"]
        for result in content["results"]:
            result["length"], result["stride"], result["perplexity"]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name JSON files of the eval scripts") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of the eval scripts ({error!r}): name one of their JSON files"
        ) from error
    return content


def ways(windows: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Names for each (length, stride) the curve that it is a point of.

    A sliding window belongs with those of equal stride or with those of equal stride / length, whichever are more.
    """
    strides = Counter(stride for _, stride in windows)
    shares = Counter(Fraction(stride, length) for length, stride in windows)
    names = {}
    for length, stride in windows:
        share = Fraction(stride, length)
        sliding = f"stride {share} of the length" if shares[share] > strides[stride] else f"stride {stride}"
        names[length, stride] = "non-overlapping" if stride == length else sliding
    return names


def series(files: list[Path]) -> list[dict[str, Any]]:
    """One series per model, subset and way of evaluation, in the order of the files.

    Returns:
        For each: label, checkpoint, subset, training_length (tokens) and perplexity by evaluation length.

    Raises:
        ValueError: see `read_results`.
    """
    measured: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    models = {}
    for path in files:
        content = read_results(path)
        model = content["model"]
        models[model["checkpoint"]] = model
        points = measured.setdefault((model["checkpoint"], content["subset"]), {})
        points.update({(one["length"], one["stride"]): one["perplexity"] for one in content["results"]})
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (checkpoint, subset), points in measured.items():
        model = models[checkpoint]
        names = ways(list(points))
        for (length, stride), perplexity in points.items():
            way = names[length, stride]
            label = f"{model['position_method']}, trained on {model['training_length']}"
            one = found.setdefault(
                (checkpoint, subset, way),
                {
                    "label": label if way == "non-overlapping" else f"{label}, {way}",
                    "checkpoint": checkpoint,
                    "subset": subset,
                    "training_length": model["training_length"],
                    "perplexity": {},
                },
            )
            one["perplexity"][length] = perplexity
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
                one["label"] += f" ({os.path.relpath(one['checkpoint'], os.path.commonpath(paths))})"
            if len(subsets) > 1:
                one["label"] += f" ({one['subset']})"


def table(all_series: list[dict[str, Any]], style: str) -> str:
    """Perplexity, a row per evaluation length and a column per series; `style` is one of tabulate's formats."""
    lengths = sorted({length for one in all_series for length in one["perplexity"]})
    rows = [[length, *(one["perplexity"].get(length) for one in all_series)] for length in lengths]
    headers = ["evaluation length", *(one["label"] for one in all_series)]
    width = 16 if style == "simple" else None  # a terminal is narrow, Markdown wants a line per row
    return tabulate(rows, headers, tablefmt=style, floatfmt=".2f", intfmt=",", maxheadercolwidths=width)


def plot(all_series: list[dict[str, Any]], path: Path) -> None:
    """Draws perplexity against evaluation length to a PNG; dotted lines mark the training lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = 1 if max(len(one["label"]) for one in all_series) > 36 else 2  # of the legend, below the curves
    legend_rows = -(-len(all_series) // columns)
    figure, axes = plt.subplots(figsize=(7, 4.2 + 0.24 * legend_rows), layout="constrained")
    for one, (line, marker) in zip(all_series, STYLES * (len(all_series) // len(STYLES) + 1)):
        points = sorted(one["perplexity"].items())
        axes.plot(*zip(*points), linestyle=line, marker=marker, label=one["label"])
    lengths = sorted({length for one in all_series for length in one["perplexity"]})
    for length in sorted({one["training_length"] for one in all_series}):
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
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    perplexities = [perplexity for one in all_series for perplexity in one["perplexity"].values()]
    if max(perplexities) > 5 * min(perplexities):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel(f"perplexity ({', '.join(sorted({one['subset'] for one in all_series}))})")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(files: list[Path], output: Path, overwrite: bool = False) -> str:
    """Writes report.md and report.png into the folder `output`; returns the table for the terminal.

    Raises:
        ValueError: see `read_results`, or the files hold no result, or `output` holds a report already.
    """
    text, picture = output / "report.md", output / "report.png"
    existing = [path for path in (text, picture) if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists: pass --overwrite to replace it, or another --output")
    all_series = series(files)
    if not all_series:
        raise ValueError(f"no result in {', '.join(map(str, files))}: the evaluation ended before its first length")
    write_text(text, table(all_series, "github") + "\n")
    with written_whole(picture) as partial:
        plot(all_series, partial)
    return table(all_series, "simple")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi report`."""
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="JSON files of the eval scripts")
    parser.add_argument("--output", type=Path, default=Path("results/report"), help="folder for report.md, report.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")


def main(args: argparse.Namespace) -> None:
    """`fairseq-alibi report`: prints the table and says where table and plot were written."""
    print(report(args.files, args.output, args.overwrite))
    print(f"\nwritten to {args.output}/report.md and {args.output}/report.png")
