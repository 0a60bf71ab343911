"""Sections of a report on context gain and probes, from the JSON files that `fairseq-alibi probe` writes."""

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from ..evaluation.curves import Curve, as_dictionary, read_curves
from ..evaluation.report import OVERVIEW, Section
from ..files.errors import one_line
from .context_gain import gain_table, plot_gains
from .probe_results import describe_probe, plot_accuracy, plot_maps, probe_table
from .probe_tasks import PROBES as PROBE_KINDS

GAINS, PROBES = "files", "models"  # the entry of a file that tells what it holds
#: What is equal where losses of tokens are of the model, settings and text of a curve.
SAME_EVALUATION = ("weights", "model_options", "model_overrides", "dtype", "text")


def read_laboratory_file(path: Path) -> Optional[dict[str, Any]]:
    """Reads a file of `probe gain` or `probe eval`; None for any other."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if isinstance(content, dict) and any(isinstance(content.get(kind), list) for kind in (GAINS, PROBES)):
            return content
    return None


def check_laboratory_file(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError if a file of `probe gain` or `probe eval` lacks something that a report shows."""
    try:
        for gain in content.get(GAINS, []):
            gain_table(gain, "github")
            sum(part["first"] + part["gain"] for part in gain["by_context"])
        for model in content.get(PROBES, []):
            describe_probe(model), probe_table([model], "github"), model["model"]["checkpoint"]
            shown = PROBE_KINDS[model["probe"]["task"]].shown_by
            parts = [part for result in model["results"] for part in result[shown]]
            sum(part["exact_match"] + part["depth" if shown == "by_depth" else "first"] for part in parts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no whole result of a probe ({one_line(error)}): make it anew") from error


def laboratory_sections(files: Sequence[Path]) -> tuple[list[Path], list[Section]]:
    """Divides files into those of evaluations and the sections of the others, with an overview if there are both.

    ValueError names a file that is not whole.
    """
    contents = {path: read_laboratory_file(path) for path in files}
    others = [path for path, content in contents.items() if content is None]
    gains: list[dict[str, Any]] = []
    tasks: dict[str, list[dict[str, Any]]] = {}
    for path, content in contents.items():
        if content is not None:
            check_laboratory_file(path, content)
            gains += content.get(GAINS, [])
            for model in content.get(PROBES, []):
                tasks.setdefault(json.dumps([model["probe"], model["threshold"]], sort_keys=True), []).append(model)
    sections = []
    if gains:
        text = "\n\n".join(gain_table(gain, "github") for gain in gains)
        sections.append(Section("What a longer context gives", text, "gain.png", partial(plot_gains, gains)))
    for number, models in enumerate(tasks.values(), 1):
        sections += probe_sections(models, number)
    if others and sections:
        sections.append(overview(read_curves(others), gains, [model for models in tasks.values() for model in models]))
    return others, sections


def probe_sections(models: Sequence[dict[str, Any]], number: int) -> list[Section]:
    """The sections of models that were evaluated on one probe; their files are numbered."""
    task, text = models[0]["probe"]["task"], f"{describe_probe(models[0])}\n\n{probe_table(models, 'github')}"
    shown = PROBE_KINDS[task].shown_by
    maps = Section(f"{task} by size and {shown[3:]}", "", f"probe-{number}-map.png", partial(plot_maps, models))
    accuracy = Section(f"Probe {task}", text, f"probe-{number}.png", partial(plot_accuracy, models))
    return [accuracy, *([maps] if any(len(result[shown]) > 1 for one in models for result in one["results"]) else [])]


def overview(curves: Sequence[Curve], gains: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]]) -> Section:
    """A row for each model: perplexity, speed, what context gives to tokens that have some, and effective lengths."""
    rows: list[dict[str, Any]] = []
    for curve in (curve for curve in curves if curve.windows == "non-overlapping"):
        row = {"model": curve.label}
        for length in sorted({min(curve.perplexity), max(curve.perplexity)}):
            row[f"perplexity at {length:,}"] = f"{curve.perplexity[length]:.2f}"
            if length in curve.tokens_per_second:
                row[f"tokens/s at {length:,}"] = f"{curve.tokens_per_second[length]:,.0f}"
        for gain in gains:
            subject = as_dictionary(gain.get("subject"))
            if subject and all(subject.get(name) == curve.subject.get(name) for name in SAME_EVALUATION):
                for group in gain["groups"]:
                    if group["group"].startswith("with "):
                        row[f"gain, bits, of tokens {group['group']}"] = f"{group['gain']:+.3f}"
        for model in probes:
            same = Path(model["model"]["checkpoint"]).resolve() == Path(curve.checkpoint).resolve()
            if same and model["model"].get("overrides", {}) == curve.subject.get("model_overrides", {}):
                row[f"{model['probe']['task']}, effective length"] = f"{model['effective_length']:,}"
        rows.append(row)
    headers = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in headers] for row in rows]
    text = tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    return Section(OVERVIEW, text)
