"""`fairseq-alibi eval-lm`: perplexity at several lengths through fairseq-eval-lm."""

import argparse
import logging
import os
from pathlib import Path

from fairseq_cli import eval_lm
from tabulate import tabulate

from ..evaluation.fairseq_eval_lm import EvalLmSettings, evaluate_with_fairseq
from ..evaluation.tables import model_title
from ..files.locks import locked
from ..files.results import check_absent
from .arguments import positive_integer, subset_name

PASSES_ARGUMENTS_ON = True  # what follows `--` goes to fairseq-eval-lm
COLUMNS = ("length", "stride", "context_window", "tokens", "loss", "perplexity", "seconds")  # columns of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi eval-lm`."""
    parser.epilog = "What follows -- goes to fairseq-eval-lm, for example: -- --fp16 --softmax-batch 256"
    kinds = parser.add_subparsers(dest="windows", required=True)
    nonoverlapping = kinds.add_parser("nonoverlapping", help="blocks of each LENGTH")
    sliding = kinds.add_parser("sliding", help="windows of one LENGTH, each STRIDE tokens further")
    for kind in (nonoverlapping, sliding):
        add = kind.add_argument
        add("data", metavar="DATA", help="fairseq data folder")
        add("checkpoint", metavar="CHECKPOINT")
        add("--subset", type=subset_name, default="valid", help="valid (default), test, ...")
        add("--output", type=Path, help="JSON file; default: beside the checkpoint, named by what it holds")
        add("--overwrite", action="store_true", help="replace the JSON file if it exists")
        batch_help = "tokens in a batch, context included (default 4096)"
        add("--positions", type=positive_integer, default=4096, help=batch_help)
    nonoverlapping.add_argument("lengths", metavar="LENGTH", type=positive_integer, nargs="+")
    sliding.add_argument("length", metavar="LENGTH", type=positive_integer)
    sliding.add_argument("strides", metavar="STRIDE", type=positive_integer, nargs="+")


def run(args: argparse.Namespace) -> None:
    """Evaluates a checkpoint and prints a table; raises ValueError for bad input, or if fairseq-eval-lm failed."""
    eval_lm.logger.setLevel(logging.INFO)  # `TokenCounter` reads it
    eval_lm.logger.propagate = False
    if args.windows == "sliding":
        windowings = [(args.length, stride) for stride in args.strides]
        name = f"sliding_{args.length}_{args.subset}.json"
    else:
        windowings = [(length, length) for length in args.lengths]
        name = f"nonoverlapping_{args.subset}.json"
    source = args.data, args.checkpoint
    settings = EvalLmSettings(*source, windowings, args.subset, args.positions, args.passed_on)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("fairseq-eval-lm under torchrun scores one process's share only: run one process")
    output = args.output or Path(args.checkpoint).parent / name
    with locked(output):
        check_absent([output], args.overwrite)
        content = evaluate_with_fairseq(settings, output)
    print(f"\n{model_title(content)}, evaluated on {args.subset}")
    rows = [[result[column] for column in COLUMNS] for result in content["results"]]
    formats = (",", ",", ",", ",", ".4f", ".2f", ".1f")
    print(tabulate(rows, [column.replace("_", " ") for column in COLUMNS], floatfmt=formats, intfmt=","))
    print(f"\nwritten to {output}")
