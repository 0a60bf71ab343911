"""`fairseq-alibi probe`: what a model gets right where answers are known, and what context gives it in any text."""

import argparse
import contextlib
import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..experiments.context_gain import compare_contexts, read_token_losses, write_gains
from ..experiments.probe_data import ProbeSettings, make_probe_data
from ..experiments.probe_evaluation import ProbeEvaluation, evaluate_probe
from ..experiments.probe_results import FILES, probe_table, write_probe_results
from ..experiments.probe_tasks import PROBES, ProbeOptions
from ..files.locks import locked
from ..files.results import check_outputs, describe_environment
from .arguments import length_list, model_options, positive_integer, shorten

#: Help of the options that only some tasks have.
OPTION_HELP = {
    "vocabulary": "words that keys, values or symbols are drawn from",
    "pairs": "pairs of key and value in a text",
    "queries": "keys that are asked for",
    "gap_power": "a gap is drawn in proportion to gap ** (gap_power - 1)",
    "digits": "digits of a number",
    "needles": "numbers in a text",
    "asked": "numbers that are asked for",
    "filler": "text file whose words stand around the numbers (default: a few sentences)",
}


def size_range(text: str) -> tuple[int, int]:
    """Reads a size, or the smallest and the largest one as 4-16; raises ArgumentTypeError."""
    first, dash, last = text.partition("-")
    return positive_integer(first), positive_integer(last if dash else first)


def finite_number(text: str, fault: str = "", least: float = -100, most: float = 100) -> float:
    """Reads a number in this range; raises ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if least <= (value := float(text)) <= most:
            return value
    raise argparse.ArgumentTypeError(f"'{shorten(text)}'{fault}: pass a number from {least:g} to {most:g}")


def filler_words(text: str) -> tuple[str, ...]:
    """Reads the words of a text file; raises ArgumentTypeError without any."""
    try:
        words = tuple(Path(text).read_text(encoding="utf-8").split()) if Path(text).is_file() else ()
    except (OSError, ValueError):
        words = ()
    if not words:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is no text file in UTF-8 with words: name another one")
    return words


share = functools.partial(finite_number, fault=" is no share", least=0, most=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi probe`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    tasks = actions.add_parser("make", help="a data folder for fairseq-train --task probe").add_subparsers(
        dest="task", metavar="TASK", required=True
    )
    defaults = ProbeOptions()
    types: dict[str, Callable[[str], Any]] = {"gap_power": finite_number, "filler": filler_words}
    for name, task in PROBES.items():
        text = (task.make.__doc__ or "").replace("`", "")
        add = tasks.add_parser(name, help=text, description=text).add_argument
        add("destination", metavar="DEST", type=Path, help="the folder that is made")
        add("--train-sizes", type=size_range, required=True, metavar="N-N", help=f"{task.unit} of texts for training")
        add("--test-sizes", type=length_list, required=True, metavar="N,N,...", help=f"{task.unit} for evaluation")
        add("--texts", type=positive_integer, default=20000, metavar="N", help="for training (default 20000)")
        add("--tests", type=positive_integer, default=500, metavar="N", help="texts of each test size (default 500)")
        add("--seed", type=positive_integer, default=1, help="of the texts (default 1)")
        for option in task.options:
            value = getattr(defaults, option)
            shown = OPTION_HELP[option] + ("" if option == "filler" else f" (default {value})")
            flag, kind = f"--{option.replace('_', '-')}", types.get(option, positive_integer)
            add(flag, type=kind, default=value, help=shown, metavar="FILE" if option == "filler" else "N")
    add = actions.add_parser("eval", help="share of answers that checkpoints get right").add_argument
    add("data", metavar="DATA", help="folder of fairseq-alibi probe make")
    add("checkpoints", metavar="CHECKPOINT", nargs="+")
    add("--sizes", type=length_list, default=[], metavar="N,N,...", help="sizes of texts (default: all in the folder)")
    add("--threshold", type=share, default=0.85, help="accuracy up to the effective length (default 0.85)")
    add("--max-tokens", type=positive_integer, default=8192, metavar="N", help="in a batch (default 8192)")
    add("--model-overrides", type=model_options, default={}, metavar="DICT", help="options of the model, by name")
    add("--cpu", action="store_true", help="do not use the GPU")
    add("--output", type=Path, default=Path("results/probe"), metavar="DIR", help="default results/probe")
    add("--overwrite", action="store_true", help="replace results that are there")
    text = "what a longer context gives, from the losses of single tokens"
    add_gain_arguments(actions.add_parser("gain", help=text, description=text).add_argument)


def add_gain_arguments(add: Callable[..., Any]) -> None:
    """Adds the arguments of `fairseq-alibi probe gain`."""
    text = ".npz of evaluate --save-token-losses, with two lengths"
    add("files", metavar="LOSSES", nargs="+", type=Path, help=text)
    add("--short", type=positive_integer, metavar="N", help="length of the short context (default: the shortest)")
    add("--long", type=positive_integer, metavar="N", help="length of the long context (default: the longest)")
    add("--keys-of", type=Path, metavar="LOSSES", help="the model that chooses the key tokens (default: each its own)")
    add("--output", type=Path, default=Path("results/gain"), metavar="DIR", help="default results/gain")
    add("--overwrite", action="store_true", help="replace results that are there")


def make(args: argparse.Namespace) -> None:
    """Makes a data folder; see `make_probe_data` for errors."""
    options = ProbeOptions(**{name: getattr(args, name) for name in PROBES[args.task].options})
    sizes = (args.train_sizes, tuple(sorted(set(args.test_sizes))))
    make_probe_data(args.destination, ProbeSettings(args.task, *sizes, args.texts, args.tests, args.seed, options))


def evaluate_checkpoints(args: argparse.Namespace) -> None:
    """Evaluates checkpoints and writes a table, plots and JSON; ValueError names bad input."""
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    sizes = sorted(set(args.sizes))
    settings = ProbeEvaluation(args.data, sizes, args.threshold, args.max_tokens, args.model_overrides, device)
    settings.preparation()
    with locked(args.output):
        check_outputs([args.output / name for name in FILES], args.overwrite)
        contents = [evaluate_probe(checkpoint, settings) for checkpoint in args.checkpoints]
        made_by = {"command": shlex.join(sys.argv), "environment": describe_environment(device)}
        write_probe_results(args.output, [{**content, **made_by} for content in contents])
    print(f"\n{probe_table(contents, 'simple')}\nwritten to {args.output}")


def gain(args: argparse.Namespace) -> None:
    """Writes what a longer context gave; ValueError names bad input."""
    gains = [compare_contexts(read_token_losses(path), args.short, args.long) for path in args.files]
    chosen_by = args.keys_of and compare_contexts(read_token_losses(args.keys_of), args.short, args.long)
    with locked(args.output):
        text = write_gains(args.output, gains, chosen_by, args.overwrite)
    print(f"{text}\n\nwritten to {args.output}")


def run(args: argparse.Namespace) -> None:
    """Does what the action says; ValueError names bad input."""
    {"make": make, "eval": evaluate_checkpoints, "gain": gain}[args.action](args)
