"""Results of probes: JSON, a table, curves of accuracy against size, and heat maps of depth against size."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..evaluation.curves import override_text
from ..evaluation.plots import chart, curve_styles, pyplot
from ..files.results import write_json, write_text, written_whole
from .probe_evaluation import DEPTHS

#: The files of a result.
FILES = ("probe.json", "probe.md", "probe.png", "depth.png")


def model_labels(contents: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each model: its position method, what was overridden, and the checkpoint where that is needed."""
    labels = []
    for content in contents:
        overrides = override_text(content["model"]["overrides"])
        method = f"{content['model']['position_method']}, trained on {content['model']['training_length']}"
        labels.append(f"{method}, with {overrides}" if overrides else method)
    counts = Counter(labels)
    paths = [content["model"]["checkpoint"] for content in contents]
    return [label if counts[label] == 1 else f"{label} ({path})" for label, path in zip(labels, paths)]


def probe_table(contents: Sequence[dict[str, Any]], style: str) -> str:
    """Exact match with a row per size and a column per model; the last row has the effective lengths.

    Args:
        contents: see `evaluate_probe`.
        style: one of tabulate's formats.
    """
    rows = []
    for number, result in enumerate(contents[0]["results"]):
        row = [f"{result['size']:,}"]
        for content in contents:
            low, high = content["results"][number]["interval"]
            row.append(f"{content['results'][number]['exact_match']:.1%} ({low:.0%} to {high:.0%})")
        rows.append(row)
    rows.append(["effective length", *(f"{content['effective_length']:,}" for content in contents)])
    unit, width = contents[0]["probe"]["unit"], 16 if style == "simple" else None
    headers = [f"size ({unit})", *model_labels(contents)]
    return tabulate(rows, headers, tablefmt=style, stralign="right", disable_numparse=True, maxheadercolwidths=width)


def plot_accuracy(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots exact match against size, with 95% intervals; dotted lines mark the largest size in training."""
    labels, probe = model_labels(contents), contents[0]["probe"]
    with chart(path, labels, logarithmic=False) as axes:
        for content, label, style in zip(contents, labels, curve_styles(len(contents))):
            sizes = [result["size"] for result in content["results"]]
            axes.plot(sizes, [result["exact_match"] for result in content["results"]], label=label, **style)
            low, high = zip(*(result["interval"] for result in content["results"]))
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.axvline(probe["train_sizes"][1], color="gray", linestyle=":", linewidth=1)
        axes.axhline(contents[0]["threshold"], color="gray", linestyle="--", linewidth=0.8)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(f"size of the text ({probe['unit']}); dotted: largest in training")
        axes.set_ylabel(f"{probe['task']}: share of answers that are right")


def plot_depths(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws, for each model, exact match as color: size of the text across, depth of what is asked for down."""
    import numpy

    plt = pyplot()
    columns = min(3, len(contents))
    lines = -(-len(contents) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(1 + 3.6 * columns, 0.6 + 2.8 * lines), squeeze=False)
    figure.set_layout_engine("constrained")
    for axes, content, label in zip(grid.flat, contents, model_labels(contents)):
        shares = numpy.full((DEPTHS, len(content["results"])), numpy.nan)
        for column, result in enumerate(content["results"]):
            for part in result["by_depth"]:
                shares[round(part["depth"] * DEPTHS), column] = part["exact_match"]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_facecolor("lightgray")  # a depth without answers
        axes.set_title(label, fontsize="small", wrap=True)
        sizes = [f"{result['size']:,}" for result in content["results"]]
        axes.set_xticks(range(len(sizes)), sizes, rotation=45 if len(sizes) > 5 else 0)
        axes.set_yticks(range(0, DEPTHS, 3), [f"{n / DEPTHS:.0%}" for n in range(0, DEPTHS, 3)])
        axes.set_xlabel(f"size of the text ({content['probe']['unit']})")
    for axes in grid.flat[len(contents) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylabel("depth")
    figure.colorbar(image, ax=grid, label="share of answers that are right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_probe_results(folder: Path, contents: Sequence[dict[str, Any]]) -> None:
    """Writes JSON, table and plots, each whole or not at all.

    Args:
        folder: see `FILES`.
        contents: see `evaluate_probe`, of the same data and sizes.
    """
    probe = contents[0]["probe"]
    text = (
        f"Share of answers of `{probe['task']}` that are right in all tokens, with 95% intervals. Trained on "
        f"{probe['train_sizes'][0]:,} to {probe['train_sizes'][1]:,} {probe['unit']}. Effective length: the longest up "
        f"to which all have {contents[0]['threshold']:.0%}.\n\n{probe_table(contents, 'github')}\n"
    )
    with written_whole(folder / "probe.png") as partial:
        plot_accuracy(contents, partial)
    with written_whole(folder / "depth.png") as partial:
        plot_depths(contents, partial)
    write_text(folder / "probe.md", text)
    write_json(folder / "probe.json", {"models": list(contents)})
