"""`fairseq-alibi reach`: the receptive field of a trained model, per layer and head."""

import argparse
import math
import shlex
import sys
from pathlib import Path

from ..evaluation.plots import plot_reach
from ..evaluation.reach_measurement import describe_reach, epsilon_for, load_for_reach, measure_text, reach_table
from ..files.data_folders import read_subset
from ..files.results import check_outputs, describe_environment, write_json, written_whole
from .arguments import model_options, positive_integer, subset_name

WRITES = "output"  # the argument that a lock is taken on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi reach`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--data", metavar="DATA", help="fairseq data folder: also measure how far heads look in a text of it")
    add("--subset", type=subset_name, default="valid", help="of DATA: valid (default), test, ...")
    add("--tokens", type=positive_integer, default=2048, metavar="N", help="of the text that is read (default 2048)")
    which = parser.add_mutually_exclusive_group()
    text = "weight of 1 that may lie beyond a reach (default: the model's attention_epsilon)"
    which.add_argument("--epsilon", type=float, help=text)
    text = "take the epsilon that is proven to change no logit by more"
    which.add_argument("--logits", type=float, metavar="CHANGE", help=text)
    add("--model-overrides", type=model_options, default={}, metavar="DICT", help="options of the model, by name")
    add("--output", type=Path, default=Path("results/reach"), metavar="DIR", help="default results/reach")
    add("--overwrite", action="store_true", help="replace results that are there")


def run(args: argparse.Namespace) -> None:
    """Prints a table, and writes it as JSON and as a plot."""
    if args.epsilon is not None and not 0 < args.epsilon < 1:
        raise ValueError(f"--epsilon {args.epsilon}: pass a number above 0 and below 1, as 1e-7")
    if args.logits is not None and not 0 < args.logits < math.inf:
        raise ValueError(f"--logits {args.logits}: pass a number above 0, as 0.001")
    results, picture = (args.output / name for name in ("reach.json", "reach.png"))
    check_outputs([results, picture], args.overwrite)
    stream = None if args.data is None else read_subset(args.data, args.subset)[: args.tokens]
    description, model = load_for_reach(args.checkpoint, args.data, args.model_overrides)
    epsilon = args.epsilon or model.decoder.setup.settings.epsilon
    content = describe_reach(model, epsilon if args.logits is None else epsilon_for(model.decoder, args.logits))
    if stream is not None:
        measure_text(model, stream, content)
        content["text"] = {"data": args.data, "subset": args.subset, "tokens": len(stream)}
    made_by = {"command": shlex.join(sys.argv), "environment": describe_environment("cpu")}
    content = {"model": description, **made_by, **content}
    write_json(results, content)
    with written_whole(picture) as partial:
        plot_reach(content, partial)
    print(f"{reach_table(content)}\nwritten to {results} and {picture}")
