"""Measured perplexities beside those that the paper published, which are in paper.json."""

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .curves import Curve, average_seeds

#: Relative difference up to which a number of parameters is that of the paper, which gives millions.
SIZE_TOLERANCE = 0.02
MINIMUM_SEEDS = 3  # seeds from which on their own standard deviation is used


def read_paper() -> dict[str, Any]:
    """Reads paper.json; its results as tables by value, by method, training length, length, windows and subset."""
    paper = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
    published: dict[tuple[Any, ...], dict[float, list[str]]] = {}
    for part in paper["results"]:
        for length, value in part["perplexity"].items():
            key = (part["method"], part["training_length"], int(length), part["windows"], part["subset"])
            published.setdefault(key, {}).setdefault(value, []).append(part["table"])
    return {**paper, "results": published}


def merge_seeds(curves: Sequence[Curve]) -> list[tuple[Curve, int]]:
    """Averages curves that differ in their seed alone; returns each with its number of seeds.

    Curves whose seeds are unknown or equal, such as those of two checkpoints of one run, stay as they are.
    """
    groups: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        alike = [curve.details[name] for name in ("overrides", "model", "dtype", "options", "text", "updates")]
        name = Path(curve.checkpoint).name
        key = (curve.position_method, curve.training_length, curve.windows, curve.subset, name, *alike)
        groups.setdefault(key, []).append(curve)
    merged: list[tuple[Curve, int]] = []
    for group in groups.values():
        seeds = {curve.details["seed"] for curve in group} - {""}
        if len(seeds) == len(group):
            merged.append((average_seeds(group), len(group)))
        else:
            merged += [(curve, 1) for curve in group]
    return merged


def describe_difference(curve: Curve, paper: dict[str, Any]) -> str:
    """Says in what a curve's model or text is not the paper's; empty if its perplexities can be compared."""
    details, parts = curve.details, []
    if curve.position_method not in {key[0] for key in paper["results"]}:
        parts.append("the paper has no such method")
    changes = ", ".join(filter(None, (details["overrides"], details["model"], details["options"])))
    parts += [f"another model or evaluation ({changes})"] if changes else []
    if not details["parameters"]:
        parts.append("the file does not hold the number of parameters (fairseq-alibi evaluate writes it)")
    elif abs(int(details["parameters"]) / paper["parameters"] - 1) > SIZE_TOLERANCE:
        parts.append(f"another size ({int(details['parameters']):,} parameters)")
    expected = paper["tokens"].get(curve.subset)
    if expected is None:
        parts.append(f"the paper has no subset '{curve.subset}'")
    elif others := sorted(set(curve.tokens.values()) - {expected}):
        parts.append(f"another text ({others[0]:,} tokens, {paper['corpus']}'s has {expected:,})")
    elif not curve.tokens:
        parts.append("the file does not hold the number of tokens")
    return "; ".join(parts)


def paper_section(curves: Sequence[Curve]) -> str:
    """Returns published numbers beside measured ones, and what is not compared and why, in Markdown."""
    paper = read_paper()
    rows, left_out = [], []
    for curve, seeds in merge_seeds(curves):
        title = f"{curve.position_method}, trained on {curve.training_length:,}, {curve.windows}, {curve.subset}"
        if reason := describe_difference(curve, paper):
            left_out.append(f"- {title}: {reason}.")
            continue
        missing = []
        stride, share, _ = curve.windows.removeprefix("stride ").partition(" of the length")
        for length, measured in sorted(curve.perplexity.items()):
            windows = f"stride {int(length * Fraction(stride))}" if share else curve.windows
            place = (curve.position_method, curve.training_length, length, windows)
            published = paper["results"].get((*place, curve.subset), {})
            missing += [] if published else [f"{length:,}"]
            own = seeds >= MINIMUM_SEEDS and curve.deviation.get(length, 0) > 0
            deviation = curve.deviation[length] if own else paper["standard_deviation"]
            for value, tables in published.items():
                units = f"{(measured - value) / deviation:+.1f} of {deviation:.2f}" if math.isfinite(measured) else ""
                cells = (f"{value:.2f}", f"{measured:.2f}", seeds, curve.details["updates"])
                source = f"{units} ({'measured' if own else 'paper'})" if units else ""
                rows.append([", ".join(tables), *place, curve.subset, *cells, f"{measured - value:+.2f}", source])
        if missing:
            left_out.append(f"- {title}: the paper has no number at {', '.join(missing)} tokens.")
    headers = ["table", "method", "trained on", "evaluated on", "windows", "subset", "paper", "measured"]
    headers += ["seeds", "updates", "difference", "standard deviations"]
    text = (
        f"{paper['paper']}, on {paper['corpus']}: {paper['parameters'] // 10**6}M parameters, {paper['updates']:,} "
        "updates. Differences are also in standard deviations over seeds: measured ones from "
        f"{MINIMUM_SEEDS} seeds on, otherwise the paper's {paper['standard_deviation']} "
        f"({paper['standard_deviation_of']})."
    )
    formats = {"tablefmt": "github", "intfmt": ",", "disable_numparse": [6, 7, 9, 10]}
    parts = [text, tabulate(rows, headers, **formats) if rows else "Nothing of this can be compared with the paper."]
    return "\n\n".join([*parts, *(["Not compared:\n\n" + "\n".join(left_out)] if left_out else [])])
