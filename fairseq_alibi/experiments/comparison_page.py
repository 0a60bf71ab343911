"""The page of the paper's comparison: perplexity, loss by position, speed and memory of all models."""

import json
import math
import shlex
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from ..core import ALiBi, position_methods
from ..evaluation.curves import Curve, average_seeds, pool_positions, read_curves
from ..evaluation.paper import paper_section
from ..evaluation.plots import plot_lengths, plot_positions
from ..evaluation.tables import length_table, position_table
from ..files.results import write_text, written_whole
from .comparison import EVALUATION, TRAINING, ComparedModel, Comparison, finished_steps, read_record
from .presets import ROOT


def median_training_speed(log: Path) -> Optional[float]:
    """Returns the median of the tokens per second in a log of fairseq-train, without the start; None for too few."""
    speeds = []
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("{") and '"wps"' in line:
            speeds.append(float(json.loads(line)["wps"]))
    return statistics.median(speeds[1:]) if len(speeds) > 1 else None


def compare_with_paper(curves: list[Curve], length: int) -> str:
    """Says whether the methods that the paper compares have the paper's order at an evaluation length."""
    perplexity = {curve.label: curve.perplexity[length] for curve in curves if length in curve.perplexity}
    order = sorted(perplexity, key=perplexity.__getitem__)
    ranks = {name: method.paper_rank for name, method in position_methods().items() if method.paper_rank is not None}
    ours = [name for name in order if name in ranks]
    theirs = sorted(ours, key=ranks.__getitem__)
    verdict = "as in the paper" if ours == theirs else f"**not as in the paper**, where it is {', '.join(theirs)}"
    return f"At {length:,} tokens the order is {', '.join(order)} (best first); among the paper's methods, {verdict}."


def better_than(groups: list[list[Curve]], name: str) -> str:
    """Says which methods have a lower mean perplexity than one, where, and with how many seeds.

    Each group has the curves of a method, one per seed in the same order, labelled by the method.
    """
    (base,) = (group for group in groups if group[0].label == name)
    means = average_seeds(base).perplexity
    texts = []
    for group in groups:
        values = []
        for length, mean in average_seeds(group).perplexity.items():
            if length in means and mean < means[length]:
                wins = sum(one.perplexity[length] < other.perplexity[length] for one, other in zip(group, base))
                values.append(f"{length:,} ({mean - means[length]:.2f}, {wins} of {len(base)} seeds)")
        if values:
            texts.append(f"{group[0].label} at {', '.join(values)}")
    return f"Better than {name}: {'; '.join(texts) or 'none'}."


def cost_table(models: list[ComparedModel]) -> str:
    """Returns training speed, CPU time and peak memory of every method, in Markdown: medians over the seeds."""
    rows = []
    for length, method in dict.fromkeys((model.length, model.method) for model in models):
        seeds = [model for model in models if (model.length, model.method) == (length, method)]
        steps = [finished_steps(model) for model in seeds]
        speeds = [speed for model in seeds if (speed := median_training_speed(model.training_log)) is not None]
        row: list[Any] = [length, method, statistics.median(speeds) if speeds else None]
        row.append(statistics.median(step[TRAINING].get("cpu_seconds", math.nan) for step in steps))
        for name in (TRAINING, EVALUATION):
            memory = [step[name]["peak_memory_bytes"] / 2**20 for step in steps if name in step]
            row.append(statistics.median(memory) if memory else None)
        rows.append(row)
    headers = ["trained on", "method", "training, tokens/s", "training, CPU s", "training, MiB", "evaluation, MiB"]
    return tabulate(rows, headers, tablefmt="github", intfmt=",", floatfmt=",.0f")


def describe_load(steps: list[dict[str, Any]], parallel: int) -> str:
    """Says how long the steps took and whether other work ran on the machine."""
    steps = [step for step in steps if "cpu_seconds" in step]
    if not steps:
        return ""
    minutes, wall = (sum(step[name] for step in steps) / 60 for name in ("cpu_seconds", "wall_seconds"))
    loads = sorted(step["load_average"] for step in steps)
    text = f" All steps together: {minutes:,.0f} CPU minutes, {wall / parallel:,.0f} minutes at {parallel} at a time."
    text += f" Load average at their ends: {loads[0]:.1f} to {loads[-1]:.1f}, median {statistics.median(loads):.1f}"
    shared = statistics.median(loads) > parallel + 0.5
    return text + ("; other work ran on the machine, so speeds say little." if shared else ".")


def page_head(comparison: Comparison, title: str, source: str) -> list[str]:
    """Returns the title, the settings, of which `source` names the script and the data, and the first commands."""
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
    seeds = [str(seed) for seed in dict.fromkeys(comparison.seeds)]
    spread = "; means and standard deviations over them (bands in the plots)" if len(seeds) > 1 else ""
    return [
        f"# {title}",
        f"{source} {comparison.updates:,} updates. Seeds {', '.join(seeds)}{spread}. Models of one seed have the same "
        f"data order and, where shapes agree, initial weights. {' and '.join(made_in)}.{parallel}"
        f"{describe_load(steps, preset.parallel)}",
        "The first model's commands; the others differ in method, length and seed:",
        "```sh\n" + "\n".join(shlex.join(command) for command in commands.values()).replace(f"{ROOT}/", "") + "\n```",
    ]


def length_section(groups: list[list[Curve]], length: int, longest: int, output: Path) -> list[str]:
    """Returns the section of a training length, see `seed_curves`, and writes its plots into the folder of the page.

    At `longest`, the longest evaluation length, the order of the methods is compared with the paper's.
    """
    text = [f"## Trained on {length:,} tokens"]
    blocks = [group for group in groups if group[0].windows == "non-overlapping"]
    sliding = [group for group in groups if group[0].windows.startswith("stride")]
    for title, suffix, some in (
        ("Non-overlapping blocks:", "", blocks),
        (f"Sliding window, {sliding[0][0].windows}:" if sliding else "", "-sliding", sliding),
    ):
        if not some:
            continue
        curves, name = [average_seeds(group) for group in some], f"perplexity-{length}{suffix}.png"
        with written_whole(output / name) as partial:
            plot_lengths(curves, partial)
        text += [title, f"![Perplexity against evaluation length]({name})", length_table(curves, "github")]
        if length < longest:
            text.append(compare_with_paper(curves, longest))
        if any(curve.label == ALiBi.name for curve in curves):
            text.append(better_than(some, ALiBi.name))
    curves = [average_seeds(group) for group in blocks]
    # A model that changes with the length has a loss by position for each length.
    if positions := pool_positions([curve for curve in curves if not curve.scales_with_length]):
        name = f"positions-{length}.png"
        with written_whole(output / name) as partial:
            plot_positions(positions, partial)
        text += ["Loss, bits per token, by position in the block:", f"![Loss by position]({name})"]
        text.append(position_table(positions))
    text.append("Evaluation, tokens per second, non-overlapping:")
    return [*text, length_table(curves, "github", "tokens_per_second")]


def seed_curves(comparison: Comparison, length: int) -> list[list[Curve]]:
    """Returns the curves of a training length: one list per method and kind of window, with a curve per seed."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for name in dict.fromkeys(comparison.methods):
        for model in comparison.models():
            file = model.result_file(name, comparison.subset)
            # Others may have written into the folder.
            if (model.method, model.length) == (name.partition("+")[0], length) and file.exists():
                for curve in read_curves([file]):
                    groups.setdefault((name, curve.windows), []).append(replace(curve, label=name))
    return list(groups.values())


def write_page(comparison: Comparison) -> str:
    """Writes results.md and its plots into the output folder, of the finished steps; returns the Markdown."""
    longest = max(comparison.preset.evaluation_lengths)
    lengths = " and ".join(map(str, comparison.preset.training_lengths))
    script = f"`bash scripts/reproduce.sh --preset {comparison.name}`"
    source = f"Made by {script}: {comparison.data}, evaluated on {comparison.subset}."
    text, every = page_head(comparison, f"Position methods, trained on {lengths} tokens", source), []
    for length in comparison.preset.training_lengths:
        groups = seed_curves(comparison, length)
        text += length_section(groups, length, longest, comparison.output)
        every += [curve for curves in groups for curve in curves]
    text += ["## Speed and memory", cost_table(comparison.models())]
    if comparison.name == "paper":
        text += ["## Beside the paper", paper_section(every)]
    page = "\n\n".join(text) + "\n"
    write_text(comparison.output / "results.md", page)
    return page
