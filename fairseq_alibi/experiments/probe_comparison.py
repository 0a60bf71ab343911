"""Position methods compared on probes: each model learns the texts of all tasks at once; a page shows what it finds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.utils import split_paths
from tabulate import tabulate

from ..core import position_methods
from ..files.data_folders import read_preparation
from ..files.results import write_text, written_whole
from .comparison import EVALUATION, TRAINING, ComparedModel, Comparison, finished_steps, read_record
from .comparison_page import page_head
from .presets import BUILTIN_PROBES, Preset
from .probe_data import make_probe_data
from .probe_evaluation import ProbeEvaluation, effective_length
from .probe_results import FILES, plot_accuracy, plot_maps, probe_table
from .probe_tasks import PROBES

MEASURES = ("exact_match", "token_accuracy")  # what a model's results say of its answers


@dataclass(frozen=True)
class ProbeComparison(Comparison):
    """A comparison of models that learn the probes of `data`: folders with colons between them."""

    def probes(self) -> dict[str, dict[str, Any]]:
        """Returns the settings of each data folder, with the folder, by its name."""
        return {
            Path(folder).name: {**ProbeEvaluation(folder).preparation(), "folder": folder}
            for folder in split_paths(self.data)
        }

    def evaluations(self, model: ComparedModel, name: str) -> dict[str, list[str]]:
        """See `Comparison.evaluations`."""
        commands = {}
        for probe, settings in self.probes().items():
            sizes = settings["test_sizes"]
            if position_methods()[model.method].limited_to_training_length:
                sizes = [size for size in sizes if size <= settings["train_sizes"][1]]
            evaluate = ["fairseq-alibi", "probe", "eval", settings["folder"], str(model.checkpoint)]
            evaluate += ["--sizes", ",".join(map(str, sizes)), "--overwrite"]  # of a step that was interrupted
            commands[f"{EVALUATION} {probe}"] = [*evaluate, "--output", str(self.result_folder(model, name, probe))]
        return commands

    def result_folder(self, model: ComparedModel, name: str, probe: str) -> Path:
        """The folder of a model's results on a probe as `name`, see `ComparedModel.result_folder`."""
        return model.result_folder(name) / f"{model.folder.name}-{probe}"

    def results(self, probe: str) -> dict[str, list[dict[str, Any]]]:
        """Returns the results of every method on a probe, one per seed."""
        results: dict[str, list[dict[str, Any]]] = {}
        for name in dict.fromkeys(self.methods):
            for model in self.models():
                file = self.result_folder(model, name, probe) / FILES[0]
                if model.method == name.partition("+")[0] and file.exists():
                    results.setdefault(name, []).append(read_record(file)["models"][0])
        return results


def with_lengths_of(preset: Preset, data: str) -> Preset:
    """Returns a preset with the lengths of its data, after making those folders that every machine can make.

    ValueError: a folder holds no probes, or two have the same name.
    """
    folders, lengths, sizes = split_paths(data), [], set()
    if len({Path(folder).name for folder in folders}) < len(folders):
        raise ValueError(f"--data {data}: two folders have one name, under which their results would stand: rename one")
    for folder in folders:
        if folder in BUILTIN_PROBES:
            make_probe_data(Path(folder), BUILTIN_PROBES[folder])
        sizes.update(ProbeEvaluation(folder).preparation()["test_sizes"])
        lengths.append(read_preparation(Path(folder))["counts"]["train"]["longest"])
    return preset._replace(training_lengths=(max(lengths),), evaluation_lengths=tuple(sorted(sizes)))


def average(name: str, contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of results that differ in their seed alone, with standard deviations, labelled by the method."""
    results = []
    for parts in zip(*(content["results"] for content in contents)):
        means = {measure: statistics.fmean(part[measure] for part in parts) for measure in MEASURES}
        result = {**parts[0], **means}
        if len(parts) > 1:
            spread = {measure: statistics.stdev(part[measure] for part in parts) for measure in MEASURES}
            mean, half = means["exact_match"], spread["exact_match"]
            result |= {"deviation": spread, "interval": [max(0, mean - half), min(1, mean + half)]}
        for shown in ("by_depth", "by_gap"):
            bins: dict[Any, list[dict[str, Any]]] = {}
            for one in (one for part in parts for one in part[shown]):
                bins.setdefault(one.get("depth", one.get("first")), []).append(one)
            result[shown] = [
                {**ones[0], "exact_match": statistics.fmean(one["exact_match"] for one in ones)}
                for _, ones in sorted(bins.items())
            ]
        results.append(result)
    reached = [effective_length(content["results"], content["threshold"]) for content in contents]
    return {**contents[0], "label": name, "results": results, "effective_lengths": reached}


def summary_table(comparison: ProbeComparison) -> str:
    """Exact match at the largest size in training, and its mean over all larger ones, in Markdown."""
    every = {probe: comparison.results(probe) for probe in comparison.probes()}
    headers, rows = ["method"], []
    for probe, settings in comparison.probes().items():
        longest = settings["train_sizes"][1]
        headers += [f"{probe}, up to {longest:,}", f"longer than {longest:,}"]
    for name in dict.fromkeys(comparison.methods):
        row = [name]
        for probe, settings in comparison.probes().items():
            for past in (False, True):
                means = []
                for content in every[probe].get(name, []):
                    parts = [part for part in content["results"] if (part["size"] > settings["train_sizes"][1]) is past]
                    means += [statistics.fmean(part["exact_match"] for part in parts)] if parts else []
                spread = f" ± {statistics.stdev(means):.1%}" if len(means) > 1 else ""
                row.append(f"{statistics.fmean(means):.1%}{spread}" if means else "")
        steps = [finished_steps(model) for model in comparison.models() if model.method == name]
        row.append(f"{statistics.median(step[TRAINING]['cpu_seconds'] for step in steps):,.0f}" if steps else "")
        rows.append(row)
    return tabulate(rows, [*headers, "training, CPU s"], tablefmt="github", stralign="right", disable_numparse=True)


def write_probe_page(comparison: ProbeComparison) -> None:
    """Writes results.md and its plots into the output folder, of the finished steps."""
    title = f"Position methods on probes, trained on texts of up to {comparison.preset.training_lengths[0]:,} tokens"
    source = f"Made by `bash scripts/probe.sh`: each model learns the texts of {comparison.data} at once."
    text = page_head(comparison, title, source)
    text += ["Share of answers that are right in all tokens, and its mean over the sizes past those of the training:"]
    text += [summary_table(comparison)]
    for probe, settings in comparison.probes().items():
        contents = [average(name, seeds) for name, seeds in comparison.results(probe).items()]
        options = ", ".join(f"{name} {value}" for name, value in settings["options"].items() if name != "filler")
        trained = "{:,} to {:,}".format(*settings["train_sizes"])
        text += [f"## {probe}", f"`{settings['task']}`, {options}; trained on {trained} {settings['unit']}."]
        with written_whole(comparison.output / f"{probe}.png") as partial:
            plot_accuracy(contents, partial)
        text += [f"![Share of right answers against size]({probe}.png)", probe_table(contents, "github")]
        if any(result["token_accuracy"] != result["exact_match"] for one in contents for result in one["results"]):
            text += ["Share of tokens that are right:", probe_table(contents, "github", "token_accuracy")]
        shown = PROBES[settings["task"]].shown_by
        if any(len(result[shown]) > 1 for content in contents for result in content["results"]):
            with written_whole(comparison.output / f"{probe}-map.png") as partial:
                plot_maps(contents, partial)
            text += [f"![Share of right answers by size and {shown[3:]}, mean of the seeds]({probe}-map.png)"]
    write_text(comparison.output / "results.md", "\n\n".join(text) + "\n")
