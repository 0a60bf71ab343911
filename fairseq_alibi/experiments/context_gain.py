"""What a longer context gives, token by token, from the losses that `evaluate --save-token-losses` writes."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy
from tabulate import tabulate

from ..evaluation.measurement import Windowing
from ..evaluation.plots import chart, curve_styles
from ..files.results import check_outputs, write_json, write_text, written_whole

FILES = ("gain.json", "gain.md", "gain.png")  # the files of a result
KEY_GAIN, KEY_LOSS = 2.0, 2.0  # least gain of a key token and largest loss of one, in nats (LongPPL, Fang et al. 2024)
FREQUENCIES = (1, 10, 100, 1000)  # smallest number of occurrences in the text of each group of tokens by frequency


class TokenLosses(NamedTuple):
    """The content of a file of token losses."""

    name: str
    tokens: Any  # (N,) of the text
    losses: dict[Windowing, Any]  # (N,) bits
    subject: dict[str, Any]  # what was evaluated, as result files say it


class ContextGain(NamedTuple):
    """Losses of the same tokens with little and with much context."""

    name: str
    tokens: Any  # (N,)
    context: Any  # (N,) tokens that the short window shows before each token
    windows: tuple[Windowing, Windowing]  # short, long
    short: Any  # (N,) bits
    long: Any  # (N,) bits
    subject: dict[str, Any]  # see `TokenLosses`


def read_token_losses(path: Path) -> TokenLosses:
    """Reads a file of token losses; ValueError if it is none."""
    losses = {}
    try:
        if not path.is_file():  # a pipe, which may never end
            raise OSError
        with numpy.load(path) as stored:
            tokens, subject = stored["tokens"], dict(json.loads(str(stored["subject"])))
            for name in stored.files:
                if found := re.fullmatch(r"length (\d+), (?:stride (\d+)|streaming)", name):
                    losses[Windowing(int(found[1]), int(found[2]) if found[2] else None)] = stored[name].astype(float)
        arrays = all(values.shape == tokens.shape and numpy.isfinite(values).all() for values in losses.values())
        windows = all(1 <= (window[1] if window[1] is not None else window[0]) <= window[0] for window in losses)
        whole = arrays and windows and tokens.ndim == 1 and tokens.dtype.kind in "iu" and tokens.min() >= 0
    except Exception:  # numpy and zipfile raise many kinds
        whole = False
    if not whole or not losses:
        raise ValueError(f"{path} holds no losses of tokens: make it with fairseq-alibi evaluate --save-token-losses")
    return TokenLosses(str(path), tokens, losses, subject)


def context_before(count: int, windowing: Windowing) -> Any:
    """(N,) tokens that a model sees before each token; in a stream those of one layer."""
    numbers = numpy.arange(count)
    if windowing.stride is None:
        return numpy.minimum(numbers, windowing.length - 1)
    starts = numbers // windowing.stride * windowing.stride - (windowing.length - windowing.stride)
    return numbers - numpy.maximum(0, starts)


def compare_contexts(file: TokenLosses, short: Optional[int], long: Optional[int]) -> ContextGain:
    """Sets the losses with windows of `short` tokens beside those of `long`; by default the shortest and the longest.

    Of windows of one length those with the larger stride are taken. ValueError: there are no two such lengths.
    """
    by_length: dict[int, Windowing] = {}
    for windowing in sorted(file.losses, key=lambda one: one.stride or 0):
        by_length[windowing.length] = windowing
    low, high = short or min(by_length), long or max(by_length)
    held = ", ".join(map(str, sorted(by_length)))
    for length in (low, high):
        if length not in by_length:
            raise ValueError(f"{file.name} has no losses at length {length}, only at {held}: evaluate with --lengths")
    if low >= high:
        raise ValueError(f"{file.name}: {low} tokens are not fewer than {high} (of {held}): pass --short and --long")
    windows = by_length[low], by_length[high]
    context, losses = context_before(len(file.tokens), windows[0]), file.losses
    return ContextGain(file.name, file.tokens, context, windows, losses[windows[0]], losses[windows[1]], file.subject)


def key_tokens(gain: ContextGain) -> Any:
    """(N,) whether each token is a key token: the context made it likely."""
    bits = 1 / math.log(2)
    return (gain.short - gain.long > KEY_GAIN * bits) & (gain.long < KEY_LOSS * bits)


def groups_of(gain: ContextGain, keys: Any) -> Iterator[tuple[str, Any]]:
    """Names and members of the groups of tokens that a table has."""
    half = gain.windows[0].length / 2
    yield "all", numpy.ones(len(gain.tokens), dtype=bool)
    yield f"with less than {half:g} tokens of short context", gain.context < half
    yield f"with {half:g} tokens of short context or more", gain.context >= half
    yield "key tokens", keys
    occurrences = numpy.bincount(gain.tokens)[gain.tokens]
    for first, following in zip(FREQUENCIES, (*FREQUENCIES[1:], math.inf)):
        last = "" if math.isinf(following) else f" to {following - 1:,}"
        name = f"{first:,}{last} times in the text" if last else f"{first:,} times or more"
        yield name, (occurrences >= first) & (occurrences < following)


def summarize(gain: ContextGain, keys: Any) -> list[dict[str, Any]]:
    """For each group: tokens, mean losses and gain in bits, share of tokens that gain, perplexity with `long`."""
    rows = []
    for name, members in groups_of(gain, keys):
        if members.any():
            short, long = gain.short[members], gain.long[members]
            row = {"tokens": int(members.sum()), "short": float(short.mean()), "long": float(long.mean())}
            share = float((short > long).mean())
            row |= {"gain": row["short"] - row["long"], "share_that_gains": share, "perplexity": 2 ** row["long"]}
            rows.append({"group": name, **row})
    return rows


def gain_by_context(gain: ContextGain) -> list[dict[str, Any]]:
    """Mean gain by octave of the context in the short window."""
    octaves = numpy.frexp(gain.context.astype(float))[1]  # 0 -> 0, 1 -> 1, 2 and 3 -> 2, ...
    rows = []
    for octave in numpy.unique(octaves):
        members = octaves == octave
        first, difference = int(gain.context[members].min()), gain.short[members] - gain.long[members]
        rows.append({"first": first, "tokens": int(members.sum()), "gain": float(difference.mean())})
    return rows


def write_gains(folder: Path, gains: Sequence[ContextGain], chosen_by: Optional[ContextGain], overwrite: bool) -> str:
    """Writes JSON, tables and a plot; returns the tables for the terminal.

    `chosen_by` is the model whose losses choose the key tokens; None for each its own. ValueError: there are results
    already, or that model read another text.
    """
    check_outputs([folder / name for name in FILES], overwrite)
    contents: list[dict[str, Any]] = []
    for gain in gains:
        if chosen_by is not None and not numpy.array_equal(chosen_by.tokens, gain.tokens):
            raise ValueError(f"{chosen_by.name} is of another text than {gain.name}: evaluate both on one subset")
        rows = summarize(gain, key_tokens(chosen_by or gain))
        named = {"file": gain.name, "short": gain.windows[0].name, "long": gain.windows[1].name}
        keys = {"key_tokens_of": (chosen_by or gain).name, "subject": gain.subject}
        contents.append({**named, **keys, "groups": rows, "by_context": gain_by_context(gain)})
    texts = {style: "\n\n".join(gain_table(content, style) for content in contents) for style in ("simple", "github")}
    with written_whole(folder / "gain.png") as partial:
        plot_gains(contents, partial)
    write_text(folder / "gain.md", texts["github"] + "\n")
    write_json(folder / "gain.json", {"files": contents})
    return texts["simple"]


def gain_table(content: dict[str, Any], style: str) -> str:
    """The groups of one file as a table in one of tabulate's formats."""
    title = f"{content['file']}: losses in bits, {content['short']} against {content['long']}"
    headers = ["tokens", "number", "short", "long", "gain", "share that gains", "perplexity, long"]
    formats = ("", ",", ".3f", ".3f", "+.3f", ".1%", ",.2f")
    rows = [[format(value, form) for value, form in zip(row.values(), formats)] for row in content["groups"]]
    align = ("left", *["right"] * 6)
    return f"{title}\n\n" + tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=align)


def plot_gains(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots mean gain against the context that the short window shows."""
    labels = [content["file"] for content in contents]
    with chart(path, labels, logarithmic=False) as axes:
        for content, style in zip(contents, curve_styles(len(contents))):
            points = [(part["first"] + 1, part["gain"]) for part in content["by_context"]]
            axes.plot(*zip(*points), label=content["file"], **style)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set_xlabel("tokens of the short context, from the window's start on")
        axes.set_ylabel("gain of the long context (bits per token)")
