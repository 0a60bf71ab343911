"""The page of the paper's comparison: perplexity, loss by position, speed and memory of all models."""

import json
import shlex
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Optional

from tabulate import tabulate

from ..core import position_methods
from ..evaluation.curves import Curve, pool_positions, read_curves
from ..evaluation.plots import plot_lengths, plot_positions
from ..evaluation.tables import length_table, position_table
from ..files.results import write_text, written_whole
from .comparison import EVALUATION, TRAINING, ComparedModel, Comparison, finished_steps, read_record
from .presets import ROOT


def paper_order() -> list[str]:
    """Returns the methods that the paper compares, best first past the training length (figures 1 and 4)."""
    ranks = {name: method.paper_rank for name, method in position_methods().items() if method.paper_rank is not None}
    return sorted(ranks, key=lambda name: ranks[name])


def median_training_speed(log: Path) -> Optional[float]:
    """Returns the median of the tokens per second in a log of fairseq-train, without the start; None for too few."""
    speeds = []
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("{") and '"wps"' in line:
            speeds.append(float(json.loads(line)["wps"]))
    return statistics.median(speeds[1:]) if len(speeds) > 1 else None


def order_at(curves: list[Curve], length: int) -> list[str]:
    """Returns the labels of the curves by perplexity at an evaluation length, best first."""
    present = [curve for curve in curves if length in curve.perplexity]
    return [curve.label for curve in sorted(present, key=lambda curve: curve.perplexity[length])]


def compare_with_paper(curves: list[Curve], length: int) -> str:
    """Says whether the methods that the paper compares have the paper's order at an evaluation length."""
    order, paper = order_at(curves, length), paper_order()
    ours, theirs = ([name for name in names if name in order and name in paper] for names in (order, paper))
    verdict = "as in the paper" if ours == theirs else f"**not as in the paper**, where it is {', '.join(theirs)}"
    return f"At {length:,} tokens the order is {', '.join(order)} (best first); among the paper's methods, {verdict}."


def cost_table(models: list[ComparedModel]) -> str:
    """Returns training speed and peak memory of every model, in Markdown."""
    rows = []
    for model in models:
        finished = finished_steps(model)
        memory = [finished[step]["peak_memory_bytes"] / 2**20 for step in (TRAINING, EVALUATION)]
        rows.append([model.length, model.method, median_training_speed(model.training_log), *memory])
    headers = ["trained on", "method", "training, tokens/s", "training, MiB", "evaluation, MiB"]
    return tabulate(rows, headers, tablefmt="github", intfmt=",", floatfmt=",.0f")


def page_head(comparison: Comparison) -> list[str]:
    """Returns the title, the settings and the commands of the first model."""
    preset = comparison.preset
    begun_in = read_record(comparison.output / "settings.json")["environment"]
    steps = [step for model in comparison.models() for step in finished_steps(model).values()]
    environments = [step.get("environment", begun_in) for step in steps] or [begun_in]
    versions = ("python", "torch", "fairseq", "fairseq_alibi")
    # A comparison that was resumed elsewhere names every environment.
    made_in = dict.fromkeys(
        f"{environment['device']}; " + ", ".join(f"{name} {environment[name]}" for name in versions)
        for environment in environments
    )
    commands = comparison.commands(comparison.models()[0])
    parallel = "" if preset.parallel == 1 else f" {preset.parallel} models at a time, one thread each."
    return [
        f"# Position methods, trained on {' and '.join(map(str, preset.training_lengths))} tokens",
        f"Made by `bash scripts/reproduce.sh --preset {comparison.name}`: {comparison.data}, {comparison.updates:,} "
        f"updates, evaluated on {comparison.subset}; the same seed, data order and, where shapes agree, initial "
        f"weights. {' and '.join(made_in)}.{parallel} The first model's commands; the others differ in "
        "method and length:",
        "```sh\n" + "\n".join(shlex.join(command) for command in commands.values()).replace(f"{ROOT}/", "") + "\n```",
    ]


def length_section(curves: list[Curve], length: int, longest: int, output: Path) -> list[str]:
    """Returns the section of the curves of a training length and writes its plots into the folder of the page.

    At `longest`, the longest evaluation length, the order of the methods is compared with the paper's.
    """
    text = [f"## Trained on {length:,} tokens"]
    blocks = [curve for curve in curves if curve.windows == "non-overlapping"]
    sliding = [curve for curve in curves if curve.windows.startswith("stride")]
    for title, suffix, some in (
        ("Non-overlapping blocks:", "", blocks),
        ("Sliding window, stride half of the length:", "-sliding", sliding),
    ):
        name = f"perplexity-{length}{suffix}.png"
        with written_whole(output / name) as partial:
            plot_lengths(some, partial)
        text += [title, f"![Perplexity against evaluation length]({name})", length_table(some, "github")]
        if length < longest:
            text.append(compare_with_paper(some, longest))
    positions, name = pool_positions(blocks), f"positions-{length}.png"
    with written_whole(output / name) as partial:
        plot_positions(positions, partial)
    text += ["Loss, bits per token, by position in the block:", f"![Loss by position]({name})"]
    text += [position_table(positions), "Evaluation, tokens per second, non-overlapping:"]
    return [*text, length_table(blocks, "github", "tokens_per_second")]


def write_page(comparison: Comparison) -> str:
    """Writes results.md and its plots into the output folder, of the finished steps; returns the Markdown."""
    order = {name: number for number, name in enumerate(position_methods())}
    models = comparison.models()
    # Others may have written into the folder.
    files = [model.result_file(comparison.subset) for model in models]
    every = read_curves([path for path in files if path.exists()])
    longest = max(comparison.preset.evaluation_lengths)
    text = page_head(comparison)
    for length in comparison.preset.training_lengths:
        curves = [replace(one, label=one.position_method) for one in every if one.training_length == length]
        curves.sort(key=lambda one: order[one.position_method])
        text += length_section(curves, length, longest, comparison.output)
    page = "\n\n".join([*text, "## Speed and memory", cost_table(models)]) + "\n"
    write_text(comparison.output / "results.md", page)
    return page
