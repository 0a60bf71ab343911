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


def read_curves(files: Sequence[Path]) -> list[Curve]:
    """Reads result files; one curve per model, subset and kind of window, in the order of the files.

    Raises:
        ValueError: see `read_result_file`.
    """
    results: dict[tuple[str, str], dict[tuple[int, Optional[int]], dict[str, Any]]] = {}
    models = {}
    for path in files:
        content = read_result_file(path)
        model = content["model"]
        models[model["checkpoint"]] = model
        points = results.setdefault((model["checkpoint"], content["subset"]), {})
        points.update({(result["length"], result["stride"]): result for result in content["results"]})
    curves: dict[tuple[str, str, str], Curve] = {}
    for (checkpoint, subset), points in results.items():
        model = models[checkpoint]
        names = window_names(list(points))
        for (length, stride), point in points.items():
            windows = names[length, stride]
            label = f"{model['position_method']}, trained on {model['training_length']}"
            if windows != "non-overlapping":
                label = f"{label}, {windows}"
            method, training_length = model["position_method"], model["training_length"]
            curve = curves.setdefault(
                (checkpoint, subset, windows), Curve(label, method, windows, checkpoint, subset, training_length)
            )
            for measure in MEASURES:
                if measure in point:
                    getattr(curve, measure)[length] = point[measure]
    distinguish_labels(list(curves.values()))
    return list(curves.values())


def distinguish_labels(curves: Sequence[Curve]) -> None:
    """Adds to equal labels what differs: the checkpoint's path, the subset."""
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
