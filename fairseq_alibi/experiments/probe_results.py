"""Results of probes: JSON, a table, curves of accuracy against size, and heat maps of depth or gap against size."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..evaluation.curves import override_text
from ..evaluation.plots import chart, curve_styles, name_lengths, pyplot
from ..files.results import write_json, write_text, written_whole
from .probe_evaluation import DEPTHS
from .probe_tasks import PROBES

FILES = ("probe.json", "probe.md", "probe.png", "depth.png")  # the files of a result


def model_labels(contents: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each model: its label, or its method and what was overridden, with the checkpoint where needed."""
    labels = []
    for content in contents:
        model, overrides = content["model"], override_text(content["model"]["overrides"])
        label = f"{model['position_method']}, trained on {model['training_length']}"
        labels.append(content.get("label", f"{label}, with {overrides}" if overrides else label))
    counts = Counter(labels)
    paths = [content["model"]["checkpoint"] for content in contents]
    return [label if counts[label] == 1 else f"{label} ({path})" for label, path in zip(labels, paths)]


def all_sizes(contents: Sequence[dict[str, Any]]) -> list[int]:
    """The sizes at which any of the models was evaluated."""
    return sorted({result["size"] for content in contents for result in content["results"]})


def probe_table(contents: Sequence[dict[str, Any]], style: str, measure: str = "exact_match") -> str:
    """A measure with a row per size and a column per model; below exact match stand the effective lengths.

    `contents` are those of `evaluate_probe`, or means over seeds, see `probe_comparison.average`; `style` is one of
    tabulate's formats, `measure` exact_match or token_accuracy.
    """

    def cell(content: dict[str, Any], size: int) -> str:
        for result in (result for result in content["results"] if result["size"] == size):
            spread = f" ± {result['deviation'][measure]:.1%}" if "deviation" in result else ""
            if not spread and measure == "exact_match":
                spread = " ({:.0%} to {:.0%})".format(*result["interval"])
            return f"{result[measure]:.1%}{spread}"
        return ""

    rows = [[f"{size:,}", *(cell(content, size) for content in contents)] for size in all_sizes(contents)]
    if measure == "exact_match":
        reached = [content.get("effective_lengths", [content["effective_length"]]) for content in contents]
        rows.append(["effective length", *(", ".join(f"{length:,}" for length in lengths) for lengths in reached)])
    unit, width = contents[0]["probe"]["unit"], 16 if style == "simple" else None
    headers = [f"size ({unit})", *model_labels(contents)]
    return tabulate(rows, headers, tablefmt=style, stralign="right", disable_numparse=True, maxheadercolwidths=width)


def plot_accuracy(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots exact match against size, with 95% intervals or deviations; a dotted line is the largest in training."""
    labels, probe = model_labels(contents), contents[0]["probe"]
    with chart(path, labels, logarithmic=False) as axes:
        for content, label, style in zip(contents, labels, curve_styles(len(contents))):
            sizes = [result["size"] for result in content["results"]]
            axes.plot(sizes, [result["exact_match"] for result in content["results"]], label=label, **style)
            low, high = zip(*(result["interval"] for result in content["results"]))
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.axvline(probe["train_sizes"][1], color="gray", linestyle=":", linewidth=1)
        axes.axhline(contents[0]["threshold"], color="gray", linestyle="--", linewidth=0.8)
        name_lengths(axes, all_sizes(contents))
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(f"size of the text ({probe['unit']}); dotted: largest in training")
        axes.set_ylabel(f"{probe['task']}: share of answers that are right")


def plot_maps(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws, for each model, exact match as color: size of the text across, depth or gap of what is asked for down."""
    import numpy

    plt, probe = pyplot(), contents[0]["probe"]
    shown, sizes = PROBES[probe["task"]].shown_by, all_sizes(contents)
    parts = [part for content in contents for result in content["results"] for part in result[shown]]
    if shown == "by_depth":
        depths = {n / DEPTHS for n in range(DEPTHS)} | {part["depth"] for part in parts}
        names = {depth: f"{depth:.0%}" for depth in sorted(depths)}
    else:
        gaps = sorted({(part["first"], part["last"]) for part in parts})
        names = {first: f"{first:,} to {last:,}" if first > 1 else f"{first}" for first, last in gaps}
    places = {value: number for number, value in enumerate(names)}
    columns = min(3, len(contents))
    lines = -(-len(contents) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(1.4 + 3.4 * columns, 0.6 + 2.6 * lines), squeeze=False)
    figure.set_layout_engine("constrained")
    for axes, content, label in zip(grid.flat, contents, model_labels(contents)):
        shares = numpy.full((len(names), len(sizes)), numpy.nan)
        for result in content["results"]:
            for part in result[shown]:
                row = places[part["depth" if shown == "by_depth" else "first"]]
                shares[row, sizes.index(result["size"])] = part["exact_match"]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_facecolor("lightgray")  # no answers
        axes.set_title(label, fontsize="small", wrap=True)
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes], rotation=45 if len(sizes) > 5 else 0)
        axes.set_yticks(range(len(names)), names.values(), fontsize="small")
    for axes in grid.flat[len(contents) :]:
        axes.set_axis_off()
    figure.supxlabel(f"size of the text ({probe['unit']})", fontsize="medium")
    figure.supylabel("depth" if shown == "by_depth" else "tokens from source to answer", fontsize="medium")
    figure.colorbar(image, ax=grid, label=f"{probe['task']}: share of answers that are right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_probe_results(folder: Path, contents: Sequence[dict[str, Any]]) -> None:
    """Writes `FILES` of contents of the same data and sizes, see `evaluate_probe`, each whole or not at all."""
    text = f"{describe_probe(contents[0])}\n\n{probe_table(contents, 'github')}\n"
    with written_whole(folder / "probe.png") as partial:
        plot_accuracy(contents, partial)
    with written_whole(folder / "depth.png") as partial:
        plot_maps(contents, partial)
    write_text(folder / "probe.md", text)
    write_json(folder / "probe.json", {"models": list(contents)})


def describe_probe(content: dict[str, Any]) -> str:
    """Says what is asked, what was trained on, and what an effective length is."""
    probe = content["probe"]
    return (
        f"Share of answers of `{probe['task']}` that are right in all tokens, with 95% intervals. Trained on "
        f"{probe['train_sizes'][0]:,} to {probe['train_sizes'][1]:,} {probe['unit']}. Effective length: the longest up "
        f"to which all have {content['threshold']:.0%}."
    )
