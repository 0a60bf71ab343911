"""Result files as curves: one measure against evaluation length, per model, subset and kind of window."""

import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional

import numpy

from ..files.results import read_result_file

MINIMUM_WINDOWS = 10  # a bin of positions is shown if at least this many windows score its tokens
SPEED_DETAILS = ("hardware", "processes", "tokens in a batch")  # what the speed of a run depends on

#: Details that a label names if any two curves of a report differ in them, whatever their models.
COMMON_DETAILS = ("subset", "dtype", "device", "model", "options", "data", "text", *SPEED_DETAILS)

#: Details that a label names if it would be that of another curve too.
OWN_DETAILS = ("checkpoint", "updates", "weights", "model_options", "file")

#: Details that a file need not name: then it is as another of the same model and settings, if those agree.
OPTIONAL_DETAILS = ("device", "text", "weights", "model_options", "updates", "seed", "parameters")

#: What a model's description says that labels and keys take from elsewhere, or that changes no result.
NAMED_ELSEWHERE = (
    *("checkpoint", "position_method", "training_length", "architecture"),
    *("updates", "parameters", "seed", "alibi_length_scale", "rotary_scaling"),
)

#: Options of fairseq-eval-lm that change no result or are named elsewhere: flags, and options with a value.
IGNORED_FLAGS = ("--cpu", "--fp16", "--no-progress-bar", "--add-bos-token")
IGNORED_OPTIONS = ("--model-overrides", "--output-dictionary-size", "--softmax-batch", "--log-format")

#: What a curve shows of a result; a result may lack all but the first.
MEASURES = ("perplexity", "bits_per_byte", "tokens_per_second", "by_position", "tokens", "run")


@dataclass
class Curve:
    """The results of one model on one subset with one kind of window."""

    label: str  # for a legend or the head of a column
    position_method: str
    windows: str  # "non-overlapping", "stride 256", "stride 1/2 of the length" or "streaming"
    checkpoint: str
    subset: str
    training_length: int
    subject: dict[str, Any] = field(default_factory=dict)  # what was evaluated, see `evaluation_subject`
    details: dict[str, str] = field(default_factory=dict)  # all that may tell two curves apart; "" is unknown
    scales_with_length: bool = False  # the model differs from length to length
    #: Measures by evaluation length; all but the first may be empty.
    perplexity: dict[int, float] = field(default_factory=dict)
    bits_per_byte: dict[int, float] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    by_position: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)  # that are scored
    run: dict[int, dict[str, Any]] = field(default_factory=dict)  # that made the perplexity, see `run_of`
    deviation: dict[int, float] = field(default_factory=dict)  # of the perplexity over seeds


def window_names(windowings: Sequence[tuple[int, Optional[int]]]) -> dict[tuple[int, Optional[int]], str]:
    """Names the curve of each (length, stride); stride None is streaming.

    A sliding window belongs either to the windows of equal stride or to those of equal stride / length, whichever are
    more.
    """
    sliding = [(length, stride) for length, stride in windowings if stride not in (None, length)]
    strides = Counter(stride for _, stride in sliding)
    shares = Counter(Fraction(stride, length) for length, stride in sliding if stride is not None)
    names: dict[tuple[int, Optional[int]], str] = {}
    for length, stride in windowings:
        if stride is None:
            names[length, stride] = "streaming"
        elif stride == length:
            names[length, stride] = "non-overlapping"
        else:
            share = Fraction(stride, length)
            by_share = shares[share] > strides[stride]
            names[length, stride] = f"stride {share} of the length" if by_share else f"stride {stride}"
    return names


def as_dictionary(value: Any) -> dict[str, Any]:
    """Returns a value of a file that has to be a dictionary, or an empty one."""
    return value if isinstance(value, dict) else {}


def evaluation_details(content: dict[str, Any], path: Path) -> dict[str, str]:
    """What a result file says of its evaluation, by name; "" where it says nothing."""
    subject, model = as_dictionary(content.get("subject")), content["model"]
    options = content.get("options")
    options = [str(option) for option in options] if isinstance(options, list) else []
    ignored = IGNORED_OPTIONS if "model_overrides" in subject else IGNORED_OPTIONS[1:]
    others = (f"{name}={value}" for name, value in model.items() if name not in NAMED_ELSEWHERE)
    return {
        "checkpoint": os.path.abspath(model["checkpoint"]),
        "subset": content["subset"],
        "position_method": model["position_method"],
        "training_length": str(model["training_length"]),
        "model": ", ".join(others),
        "overrides": override_text(subject.get("model_overrides")),
        "dtype": str(subject.get("dtype") or ("float16" if "--fp16" in options else "float32")),
        "options": " ".join(other_options(options, ignored)),
        **{name: str(as_dictionary(content.get("speed")).get(name) or "") for name in SPEED_DETAILS},
        "data": str(content.get("data") or ""),
        **{name: str(subject.get(name) or "") for name in ("device", "text", "weights", "model_options")},
        **{name: str(model.get(name) or "") for name in ("updates", "seed", "parameters")},
        "file": str(path),
    }


def run_of(content: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What a result file says of the run that made one of its results: of `evaluate` or, at the top, of `eval-lm`."""
    run = as_dictionary(content.get("runs")).get(str(result.get("run")))
    run = as_dictionary(run) or {"command": result.get("command"), "environment": content.get("environment")}
    return {**run, "environment": as_dictionary(run.get("environment"))}


def split_by_speed(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits the content of a result file by the `SPEED_DETAILS` of the run of each result."""
    parts: dict[str, dict[str, Any]] = {}
    for result in content["results"]:
        run = run_of(content, result)
        values = run["environment"].get("device"), run.get("processes"), run.get("max_tokens")
        speed = dict(zip(SPEED_DETAILS, values))
        part = parts.setdefault(str(speed), {**content, "speed": speed, "results": []})
        part["results"].append(result)
    return list(parts.values())


def other_options(options: Sequence[str], ignored: Sequence[str]) -> list[str]:
    """The options of fairseq-eval-lm but `IGNORED_FLAGS` and `ignored`, which have a value."""
    others: list[str] = []
    before = ""
    for option in options:
        if before not in ignored and option not in (*IGNORED_FLAGS, *ignored) and option.split("=")[0] not in ignored:
            others.append(option)
        before = option
    return others


def override_text(overrides: Any) -> str:
    """Options of a model that were overridden, as "name=value, name=value", without those that are named elsewhere."""
    if not isinstance(overrides, dict):
        return ""
    names = [name for name in overrides if name not in ("position_method", "tokens_per_sample")]
    return ", ".join(f"{name}={overrides[name]}" for name in names)


def evaluation_key(details: dict[str, str]) -> tuple[str, ...]:
    """What is equal for result files of one evaluation, except for `OPTIONAL_DETAILS`."""
    return tuple(details[name] for name in sorted(details) if name not in (*OPTIONAL_DETAILS, "data", "file"))


def merge_unknown(files: Sequence[dict[str, str]]) -> None:
    """Fills in what a file does not name, if all files of the same `evaluation_key` that name it agree."""
    for name in OPTIONAL_DETAILS:
        known = {details[name] for details in files} - {""}
        if len(known) == 1:
            for details in files:
                details[name] = next(iter(known))


def contradict(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two contents give different perplexities for equal windows, and so are of different evaluations."""
    before, after = (
        {(result["length"], result["stride"]): result["perplexity"] for result in content["results"]}
        for content in (first, second)
    )
    common = before.keys() & after.keys()
    return any(not math.isclose(before[windows], after[windows], rel_tol=1e-4) for windows in common)


def read_curves(files: Sequence[Path], by_speed: bool = False) -> list[Curve]:
    """Reads result files; one curve per evaluated model, subset and kind of window, in the order of the files.

    With `by_speed` these are curves of speed: results whose speeds cannot be compared are on curves of their own, see
    `split_by_speed`, and those without a speed are left out.
    """
    contents, all_details = [], []
    for path in files:
        content = read_result_file(path)
        parts = split_by_speed(content) if by_speed else [content]
        contents += parts
        all_details += [evaluation_details(part, path) for part in parts]
    keys = [evaluation_key(details) for details in all_details]
    for key in dict.fromkeys(keys):
        merge_unknown([details for other, details in zip(keys, all_details) if other == key])
    groups: list[tuple[dict[str, str], list[dict[str, Any]]]] = []
    for key, details, content in zip(keys, all_details, contents):
        for other, members in groups:
            equal = evaluation_key(other) == key and all(other[name] == details[name] for name in OPTIONAL_DETAILS)
            if equal and not any(contradict(member, content) for member in members):
                members.append(content)
                break
        else:
            groups.append((details, [content]))
    curves = [curve for details, members in groups for curve in curves_of_model(members, details)]
    if by_speed:
        curves = [curve for curve in curves if curve.tokens_per_second]
    distinguish_labels(curves)
    for curve in curves:  # a line break or a bar would end a cell of a table
        curve.label = " ".join(curve.label.split()).replace("|", "\u2223")
    return curves


def curves_of_model(contents: Sequence[dict[str, Any]], details: dict[str, str]) -> list[Curve]:
    """The curves of one evaluated model, one per kind of window.

    Of two results with equal windows the last one's measures are taken, and those of the first that it lacks.
    """
    content = contents[-1]
    model = content["model"]
    points: dict[tuple[int, Optional[int]], dict[str, Any]] = {}
    for made_by, result in ((run_of(file, result), result) for file in contents for result in file["results"]):
        points.setdefault((result["length"], result["stride"]), {}).update(result, run=made_by)
    names = window_names(list(points))
    curves: dict[str, Curve] = {}
    for (length, stride), point in points.items():
        windows = names[length, stride]
        if windows not in curves:
            parts = (model["position_method"], f"trained on {model['training_length']}", details["overrides"])
            label = ", ".join(filter(None, parts))
            curves[windows] = Curve(
                label=label if windows == "non-overlapping" else f"{label}, {windows}",
                position_method=model["position_method"],
                windows=windows,
                checkpoint=model["checkpoint"],
                subset=content["subset"],
                training_length=model["training_length"],
                subject=as_dictionary(content.get("subject")),
                details=details,
                scales_with_length=model.get("alibi_length_scale") == "auto" or "rotary_scaling" in model,
            )
        for measure in MEASURES:
            if measure in point:
                getattr(curves[windows], measure)[length] = point[measure]
    return list(curves.values())


def distinguish_labels(curves: Sequence[Curve]) -> None:
    """Adds to labels what differs: the text and settings between any two curves, the rest between equal labels."""
    unneeded = ["text"] if names_texts(curves, "subset", "data") else []  # a path says more than a checksum
    unneeded = ["data", "text"] if names_texts(curves, "subset") else unneeded
    for name in COMMON_DETAILS:
        if name not in unneeded and differ(curves, name):
            add_detail(curves, name)
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.label, []).append(curve)
    for group in groups.values():
        for name in OWN_DETAILS:
            equal = len({curve.label for curve in group}) < len(group)
            if equal and differ(group, name):
                add_detail(group, name)


def names_texts(curves: Sequence[Curve], *names: str) -> bool:
    """Whether curves that agree in the details `names` have the same text; not if any of it is unknown."""
    texts: dict[tuple[str, ...], set[str]] = {}
    for curve in curves:
        texts.setdefault(tuple(curve.details[name] for name in names), set()).add(curve.details["text"])
    return not any("" in (*key, *values) or len(values) > 1 for key, values in texts.items())


def differ(curves: Sequence[Curve], name: str) -> bool:
    """Whether a detail is not the same for all curves; unknown is no difference."""
    return len({curve.details[name] for curve in curves} - ({""} if name in (*OPTIONAL_DETAILS, "data") else set())) > 1


def add_detail(curves: Sequence[Curve], name: str) -> None:
    """Adds a detail to the label of each curve; of paths, what they do not have in common."""
    values = [curve.details[name] for curve in curves]
    if name in ("checkpoint", "file", "data") and all(values):
        common = os.path.commonpath(map(os.path.abspath, values))
        values = [os.path.relpath(value, common) for value in values]
    title = "" if name in ("checkpoint", "subset", "model") else f"{name.replace('_', ' ')} "
    unknown = "none" if name in ("options", "model") else "unknown"
    for curve, value in zip(curves, values):
        curve.label += f" ({title}{value or unknown})"


def average_seeds(curves: Sequence[Curve]) -> Curve:
    """The mean of curves that differ in their seed alone, with standard deviations; at the lengths that all have."""

    def over_seeds(measure: str, function: Callable[[Sequence[float]], float]) -> dict[int, float]:
        values: list[dict[int, float]] = [getattr(curve, measure) for curve in curves]
        lengths = [length for length in values[0] if all(length in value for value in values)]
        return {length: function([value[length] for value in values]) for length in lengths}

    shares: dict[int, list[dict[str, Any]]] = {}
    for curve in curves:
        for length, bins in curve.by_position.items():
            shares.setdefault(length, []).extend({**part, "tokens": part["tokens"] / len(curves)} for part in bins)
    measures: dict[str, Any] = {
        name: over_seeds(name, statistics.fmean) for name in ("perplexity", "bits_per_byte", "tokens_per_second")
    }
    deviation = over_seeds("perplexity", lambda values: float(numpy.std(values, ddof=1))) if len(curves) > 1 else {}
    finite = {length: value for length, value in deviation.items() if math.isfinite(value)}
    return replace(curves[0], **measures, by_position=shares, deviation=finite)


def pool_positions(curves: Sequence[Curve]) -> dict[str, list[dict[str, Any]]]:
    """Loss by position for each curve that has it, in bins, averaged over its windows of all lengths.

    In a causal model a token at position p has p tokens before it, whatever the length of its window. Only a model that
    scales slopes or frequencies by the length differs from length to length, and is not averaged. Positions that few
    windows score are left out, such as those that only the first of many sliding windows scores.
    """
    pooled_curves = {}
    for curve in curves:
        parts = {curve.label: [part for bins in curve.by_position.values() for part in bins]}
        if curve.scales_with_length:
            parts = {f"{curve.label}, length {length}": bins for length, bins in sorted(curve.by_position.items())}
        for label, bins in parts.items():
            pooled: dict[int, dict[str, Any]] = {}
            for part in bins:
                whole = pooled.setdefault(part["first"], {"first": part["first"], "last": 0, "tokens": 0, "loss": 0.0})
                tokens = whole["tokens"] + part["tokens"]
                loss = (whole["loss"] * whole["tokens"] + part["loss"] * part["tokens"]) / tokens
                whole.update(tokens=tokens, loss=loss, last=max(whole["last"], part["last"]))
            bins = [pooled[first] for first in sorted(pooled)]
            bins = [part for part in bins if part["tokens"] >= MINIMUM_WINDOWS * (part["last"] - part["first"] + 1)]
            if bins:
                pooled_curves[label] = bins
    return pooled_curves
