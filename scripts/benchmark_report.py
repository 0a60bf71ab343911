"""Results of the benchmark as Markdown tables and one plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from fairseq_alibi.evaluation.plots import STYLES
from fairseq_alibi.files.results import write_text, written_whole

CAPTIONS = {
    "attention": "One layer of attention, forward and backward, {heads} heads of head_dim {head_dim}, random inputs: "
    "milliseconds (times as fast as {bases}).",
    "training": "Training ({model}; dropout 0.1): tokens per second (times as fast as {bases}). Products: share of "
    "auto's time that its matrix products outside attention need at the best rate measured here.",
    "methods": "Training as above, a position method per row: tokens per second with the attention that it has by "
    "itself, under a mask, and of ALiBi in the same run (times as fast as {bases}).",
    "evaluation": "Evaluation, one sequence of real text, no gradients, without the output softmax: tokens per second "
    "(times as fast as {bases}). Perplexity of that text: auto / bf16. Skipped: attention scores not computed. "
    "Reach per head: tokens, median of the layers.",
    "scoring": "Scoring a text with a made-up model (4 layers, width 256, 8 heads), reading the checkpoint included: "
    "tokens per second (times as fast as {bases}).",
    "memory of training": "Peak memory of training: MiB{idle}.",
    "memory of evaluation": "Peak memory of evaluation: MiB{idle}.",
    "memory of scoring": "Peak memory of scoring: MiB{idle}.",
}


def tables(content: dict[str, Any]) -> str:
    """The measurements as Markdown: a table per part, a row per length, a column per contender."""
    environment, settings = content["environment"], content["settings"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "fairseq", "fairseq_alibi"))
    idle = [one for one in content["measurements"] if one.get("of", "") is None]
    text = [
        f"{environment['device']}; {environment['platform']}; {versions}; {settings['dtype']}. Median of "
        f"3 rounds or, within the budget, up to {settings['repeats']}, after one that warms up and compiles; ± half of "
        f"their range. Batches of about {settings['tokens']:,} tokens, at least one sequence. Load average at "
        f"the start: {content['load_average']:.1f}."
    ]
    for part, head_dim, found in groups(content["measurements"]):
        bases = content["bases"].get(part, ())
        columns = list(dict.fromkeys(one["contender"] for one in found))
        first = {"scoring": "length / stride / types", "methods": "method, length"}.get(part.split()[-1], "length")
        lines: dict[Any, list[Any]] = {label(one): [label(one), *[""] * len(columns)] for one in found}
        for one in found:
            lines[label(one)][1 + columns.index(one["contender"])] = cell(one, bases)
        if part == "training":
            columns.append("products")
            for one in found:
                if "product_share" in one:
                    lines[one["length"]].append(f"{one['product_share']:.0%}")
        if part == "evaluation":
            columns += ["perplexity", "skipped", "reach per head"]
            for one in found:
                if one["contender"] == "auto":
                    same = [x["perplexity"] for x in found if x["length"] == one["length"] and "perplexity" in x]
                    lines[one["length"]].append(" / ".join(f"{value:.2f}" for value in same))
                if one["contender"] == "auto" and one["skipped_share"] is not None:
                    ends = ["all" if reach is None else f"{reach:,.0f}" for reach in one["reach_per_head"]]
                    lines[one["length"]] += [f"{one['skipped_share']:.1%}", " ".join(ends)]
        caption = CAPTIONS[part].format(
            heads=content["heads"],
            head_dim=head_dim,
            model=content["model"],
            bases=" / ".join(bases),
            idle=f", of which {cell(idle[0])} are there after the imports" if idle else "",
        )
        aligned = ("right",) * (len(columns) + 1)
        table = tabulate(lines.values(), [first, *columns], tablefmt="github", intfmt=",", colalign=aligned)
        text += [caption, table]
    return "\n\n".join(text) + "\n"


def label(one: dict[str, Any]) -> Any:
    """What a measurement's line in its table begins with."""
    return one.get("case", one["length"])


def groups(found: list[dict[str, Any]]) -> list[tuple[str, Optional[int], list[dict[str, Any]]]]:
    """Measurements that belong into one table: (part, head_dim, measurements), memory by what it is of."""
    tabled: dict[tuple[str, Optional[int]], list[dict[str, Any]]] = {}
    for one in found:
        if one["part"] != "memory" or one["of"]:
            part = f"memory of {one['of']}" if one["part"] == "memory" else one["part"]
            tabled.setdefault((part, one.get("head_dim")), []).append(one)
    return [(*key, group) for key, group in tabled.items()]


def drawn(found: list[dict[str, Any]]) -> list[tuple[str, Optional[int], list[dict[str, Any]]]]:
    """The groups whose measurements are speed or memory against length."""
    return [group for group in groups(found) if group[0].split()[-1] not in ("scoring", "methods")]


def cell(one: dict[str, Any], bases: Sequence[str] = ()) -> str:
    """A measurement as a table shows it, beside the bases of its part."""
    if "error" in one:
        return one["error"]
    if one["part"] == "memory":
        return f"{one['peak_memory_bytes'] / 2**20:,.0f}"
    speed = f"{one['tokens_per_second']:,.0f}"
    if one["part"] == "attention":
        speed = f"{1000 * one['median_seconds']:,.1f}"
    ratios = (one["times_as_fast"].get(base) for base in bases)
    if "spread" in one:
        speed += f" ±{one['spread']:.0%}"
    return f"{speed} ({' / '.join('-' if ratio is None else f'{ratio:.2f}' for ratio in ratios)})"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draws tokens per second and peak memory against length to a PNG, a panel per table of those."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = drawn(found)
    names = list(dict.fromkeys(one["contender"] for *_, group in panels for one in group))  # one style each in all
    columns = min(2, len(panels))
    figure, all_axes = plt.subplots(
        *(-(-len(panels) // columns), columns),
        figsize=(5.4 * columns, 3.9 * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for axes, (part, head_dim, group) in zip(all_axes.flat, panels):
        of_memory = part.startswith("memory")
        for name in dict.fromkeys(one["contender"] for one in group):
            good = [one for one in group if one["contender"] == name and "error" not in one]
            values = [one["peak_memory_bytes"] / 2**30 if of_memory else one["tokens_per_second"] for one in good]
            index = names.index(name)
            line, marker = STYLES[index % len(STYLES)]
            axes.plot(
                *([one["length"] for one in good], values),
                **{"linestyle": line, "marker": marker, "color": f"C{index}", "fillstyle": "none", "label": name},
            )
        lengths = sorted({one["length"] for one in group})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        if of_memory:
            axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.set_title(part if head_dim is None else f"{part}, head_dim {head_dim}", fontsize="medium")
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("peak memory (GiB)" if of_memory else "tokens per second")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in all_axes.flat[len(panels) :]:
        axes.set_visible(False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(content: dict[str, Any], folder: Path) -> str:
    """Writes benchmark.md and benchmark.png, neither ever seen half-written; returns the Markdown.

    Args:
        content: of benchmark.json.
        folder: where to.
    """
    text = tables(content)
    write_text(folder / "benchmark.md", text)
    if drawn(content["measurements"]):
        with written_whole(folder / "benchmark.png") as partial:
            plot(content["measurements"], partial)
    return text
