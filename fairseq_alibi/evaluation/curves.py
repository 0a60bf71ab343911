"""Result files as curves: one measure against evaluation length, per model, subset and kind of window."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional

#: A bin of positions is shown if at least this many windows score its tokens.
MINIMUM_WINDOWS = 10

#: Details by which curves of one checkpoint are told apart.
DETAILS = ("dtype", "options", "data", "text", "weights")

#: Options of fairseq-eval-lm that change no result or are named elsewhere: flags, and options with a value.
IGNORED_FLAGS = ("--cpu", "--fp16", "--no-progress-bar", "--add-bos-token")
IGNORED_OPTIONS = ("--model-overrides", "--output-dictionary-size", "--softmax-batch", "--log-format")

#: What a curve shows of a result; a result may lack the last two.
MEASURES = ("perplexity", "tokens_per_second", "by_position")


@dataclass
class Curve:
    """The results of one model on one subset with one kind of window.

    Args:
        label: for a legend or the head of a column.
        position_method: of the model.
        windows: "non-overlapping", "stride 256", "stride 1/2 of the length" or "streaming".
        checkpoint: path of the checkpoint.
        subset: valid, test, ...
        training_length: tokens.
        details: what else may tell two curves apart, such as the dtype, by name.
        perplexity: by evaluation length.
        tokens_per_second: by evaluation length; may be empty.
        by_position: bins of positions by evaluation length; may be empty.
    """

    label: str
    position_method: str
    windows: str
    checkpoint: str
    subset: str
    training_length: int
    details: dict[str, str] = field(default_factory=dict)
    perplexity: dict[int, float] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    by_position: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written."""
    return isinstance(value, str) and bool(value.encode())


def is_index(value: Any) -> bool:
    """Whether a value is a whole number from 0 on that every library accepts."""
    return type(value) is int and 0 <= value < 2**53


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1 on that every library accepts."""
    return is_index(value) and value > 0


def is_measure(value: Any) -> bool:
    """Whether a value is a number from 0 on; infinity is allowed."""
    return is_index(value) or (type(value) is float and value >= 0)


def check_values(part: dict[str, Any], **checks: Callable[[Any], bool]) -> None:
    """Checks values of a part of a file by name.

    Raises:
        ValueError: a value fails its check.
        KeyError: a value is missing.
    """
    for name, is_valid in checks.items():
        if not is_valid(part[name]):
            raise ValueError(f"{name} is {str(part[name])[:50]!r}")


def check_content(content: Any) -> None:
    """Checks what a result file holds.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: something is missing or of the wrong kind.
    """
    check_values(content, subset=is_text)
    check_values(content["model"], checkpoint=is_text, position_method=is_text, training_length=is_count)
    for result in content["results"]:
        check_values(result, length=is_count, perplexity=is_measure)
        if result["stride"] is not None:
            check_values(result, stride=is_count)
        if "tokens_per_second" in result:
            check_values(result, tokens_per_second=is_measure)
        for part in result.get("by_position", []):
            check_values(part, first=is_index, last=is_index, tokens=is_count, loss=is_measure)
            if part["last"] < part["first"]:
                raise ValueError(f"a bin of positions ends at {part['last']}, before its first, {part['first']}")


def read_result_file(path: Path) -> dict[str, Any]:
    """Reads a JSON file of `fairseq-alibi evaluate` or `fairseq-alibi eval-lm`.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    if path.exists() and not path.is_file():  # a folder, a device or a pipe, of which some never end
        raise ValueError(f"{path} cannot be read (it is no file): name JSON files of evaluate or the eval scripts")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_content(content)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): name JSON files of evaluate or the eval scripts"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise ValueError(f"{path} is no result of an evaluation ({reason}): name one of their JSON files") from error
    return content


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


def evaluation_details(content: dict[str, Any]) -> dict[str, str]:
    """What a result file says of its evaluation beyond checkpoint, subset and windows; "" where it says nothing."""
    subject = content.get("subject")
    subject = subject if isinstance(subject, dict) else {}
    options = content.get("options")
    options = [str(option) for option in options] if isinstance(options, list) else []
    ignored = IGNORED_OPTIONS if "model_overrides" in subject else IGNORED_OPTIONS[1:]
    return {
        "overrides": override_text(subject.get("model_overrides")),
        "dtype": str(subject.get("dtype") or ("float16" if "--fp16" in options else "float32")),
        "options": " ".join(other_options(options, ignored)),
        "data": str(content.get("data") or ""),
        "text": str(subject.get("text") or ""),
        "weights": str(subject.get("weights") or ""),
    }


def other_options(options: Sequence[str], ignored: Sequence[str]) -> list[str]:
    """The options of fairseq-eval-lm but `IGNORED_FLAGS` and `ignored`, which have a value."""
    others: list[str] = []
    before = ""
    for option in options:
        if before not in ignored and option not in (*IGNORED_FLAGS, *ignored) and option.split("=")[0] not in ignored:
            others.append(option)
        before = option
    return others


def evaluation_key(content: dict[str, Any], details: dict[str, str]) -> tuple[str, ...]:
    """What is equal for result files of one evaluation, except for checksums, which a file may not name.

    Args:
        content: of the result file.
        details: see `evaluation_details`.
    """
    model = content["model"]
    described = (model["checkpoint"], content["subset"], model["position_method"], str(model["training_length"]))
    return (*described, details["overrides"], details["dtype"], details["options"])


def override_text(overrides: Any) -> str:
    """Options of a model that were overridden, as "name=value, name=value", without those that are named elsewhere."""
    if not isinstance(overrides, dict):
        return ""
    names = [name for name in overrides if name not in ("position_method", "tokens_per_sample")]
    return ", ".join(f"{name}={overrides[name]}" for name in names)


def model_label(model: dict[str, Any], overrides: Any = None) -> str:
    """A name for a model as it was evaluated: position method, training length, overridden options.

    Args:
        model: the description in a result file.
        overrides: options of the model that were overridden, by name.
    """
    parts = (model["position_method"], f"trained on {model['training_length']}", override_text(overrides))
    return ", ".join(filter(None, parts))


def merge_unknown(files: Sequence[dict[str, str]]) -> None:
    """Fills in a checksum that a file does not name, if all files that name it agree.

    Args:
        files: see `evaluation_details`; of the same checkpoint, subset, options and dtype.
    """
    for name in ("text", "weights"):
        known = {details[name] for details in files} - {""}
        if len(known) == 1:
            for details in files:
                details[name] = next(iter(known))


def read_curves(files: Sequence[Path]) -> list[Curve]:
    """Reads result files; one curve per evaluated model, subset and kind of window, in the order of the files.

    Raises:
        ValueError: see `read_result_file`.
    """
    contents = [read_result_file(path) for path in files]
    all_details = [evaluation_details(content) for content in contents]
    keys = [evaluation_key(content, details) for content, details in zip(contents, all_details)]
    for key in dict.fromkeys(keys):
        merge_unknown([details for other, details in zip(keys, all_details) if other == key])
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, (key, details) in enumerate(zip(keys, all_details)):
        groups.setdefault((*key, details["text"], details["weights"]), []).append(number)
    curves = []
    for numbers in groups.values():
        curves += curves_of_model([contents[number] for number in numbers], all_details[numbers[-1]])
    distinguish_labels(curves)
    return curves


def curves_of_model(contents: Sequence[dict[str, Any]], details: dict[str, str]) -> list[Curve]:
    """The curves of one evaluated model, one per kind of window.

    Args:
        contents: of its result files. Of two results with equal windows the last is taken.
        details: see `evaluation_details`.
    """
    content = contents[-1]
    model = content["model"]
    subject = content.get("subject")
    overrides = subject.get("model_overrides") if isinstance(subject, dict) else None
    points = {(result["length"], result["stride"]): result for file in contents for result in file["results"]}
    names = window_names(list(points))
    curves: dict[str, Curve] = {}
    for (length, stride), point in points.items():
        windows = names[length, stride]
        if windows not in curves:
            label = model_label(model, overrides)
            curves[windows] = Curve(
                label=label if windows == "non-overlapping" else f"{label}, {windows}",
                position_method=model["position_method"],
                windows=windows,
                checkpoint=model["checkpoint"],
                subset=content["subset"],
                training_length=model["training_length"],
                details=details,
            )
        for measure in MEASURES:
            if measure in point:
                getattr(curves[windows], measure)[length] = point[measure]
    return list(curves.values())


def distinguish_labels(curves: Sequence[Curve]) -> None:
    """Adds to equal labels what differs: the checkpoint's path, the subset, and other details."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.label, []).append(curve)
    for group in groups.values():
        paths = {curve.checkpoint for curve in group}
        subsets = {curve.subset for curve in group}
        for curve in group:
            if len(paths) > 1:
                common = os.path.commonpath(map(os.path.abspath, paths))
                curve.label += f" ({os.path.relpath(curve.checkpoint, common)})"
            if len(subsets) > 1:
                curve.label += f" ({curve.subset})"
        for name in DETAILS:
            equal = len({curve.label for curve in group}) < len(group)
            if equal and len({curve.details[name] for curve in group}) > 1:
                for curve in group:
                    curve.label += f" ({name} {curve.details[name] or 'unknown'})"


def pool_positions(curves: Sequence[Curve]) -> dict[str, list[dict[str, Any]]]:
    """Loss by position for each curve that has it, in bins, averaged over its windows of all lengths.

    In a causal model a token at position p has p tokens before it, whatever the length of its window. Positions that
    few windows score are left out, such as those that only the first of many sliding windows scores.
    """
    pooled_curves = {}
    for curve in curves:
        pooled: dict[int, dict[str, Any]] = {}
        for bins in curve.by_position.values():
            for part in bins:
                whole = pooled.setdefault(part["first"], {"first": part["first"], "last": 0, "tokens": 0, "loss": 0.0})
                tokens = whole["tokens"] + part["tokens"]
                whole["loss"] += (part["loss"] - whole["loss"]) * part["tokens"] / tokens
                whole.update(tokens=tokens, last=max(whole["last"], part["last"]))
        bins = [pooled[first] for first in sorted(pooled)]
        bins = [part for part in bins if part["tokens"] >= MINIMUM_WINDOWS * (part["last"] - part["first"] + 1)]
        if bins:
            pooled_curves[curve.label] = bins
    return pooled_curves
