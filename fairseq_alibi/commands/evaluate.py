"""`fairseq-alibi evaluate`: perplexity of checkpoints at many lengths."""

import argparse
import contextlib
import re
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import torch

from ..evaluation import processes
from ..evaluation.checkpoint_evaluation import EvaluationSettings, evaluate_checkpoint, evaluation_dtype
from ..evaluation.result_files import log_to_tensorboard
from ..evaluation.tables import checkpoint_table
from ..evaluation.text import read_evaluation_text
from ..files.data_folders import first_folder, text_options
from ..files.results import check_writable
from .arguments import length_list, model_options, positive_integer, shorten, subset_name

RESUMES = True  # the same command, after an interruption
SHORT_FRACTION = re.compile(r"\d{1,18}/\d{1,18}")  # a share of the length that is written as a fraction

#: Under torchrun the processes join before the arguments are parsed, so that only the first prints what is wrong.
join_processes = processes.join


def share_of_length(text: str) -> Fraction:
    """Reads a share of the length, above 0 and up to 1, written as 1/4 or 0.25; raises ArgumentTypeError."""
    share = Fraction(0)
    with contextlib.suppress(ValueError, ZeroDivisionError, OverflowError):
        # Not Fraction(text): a text such as 1e-99999999 would take all memory.
        share = Fraction(text) if SHORT_FRACTION.fullmatch(text) else Fraction(repr(float(text)))
    if not 0 < share <= 1:
        shown = shorten(text)
        raise argparse.ArgumentTypeError(f"'{shown}' is no share of the length: pass one above 0 and up to 1, as 1/4")
    return share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi evaluate`."""
    add = parser.add_argument
    add("data", metavar="DATA", help="fairseq data folder")
    add("checkpoints", metavar="CHECKPOINT", nargs="+")
    lengths_help = "tokens in a window (default: 1, 2, 4, 8 and 16 times what the model was trained on)"
    add("--lengths", type=length_list, default=[], metavar="N,N,...", help=lengths_help)
    windows = parser.add_mutually_exclusive_group()  # without any, blocks do not overlap
    stride_help = "sliding window: tokens from one window to the next"
    windows.add_argument("--stride", type=positive_integer, metavar="N", help=stride_help)
    share_help = "the same as a share of each length, as 1/4 or 0.25"
    windows.add_argument("--stride-fraction", type=share_of_length, metavar="F", help=share_help)
    streaming_help = "one stream: a token attends to the last N tokens, without --lengths to all before it"
    windows.add_argument("--streaming", action="store_true", help=streaming_help)
    add("--subset", type=subset_name, default="valid", help="valid (default), test, ...")
    add("--by-position", action="store_true", help="also the loss by position in the window")
    losses_help = "the loss of every token, in bits, as numpy's .npz"
    add("--save-token-losses", type=Path, metavar="FILE", dest="token_losses", help=losses_help)
    words_help = "also count words: '@@ ' (without a value, and by itself where DATA holds bpe.codes) or sentencepiece"
    add("--remove-bpe", "--post-process", nargs="?", const="@@ ", metavar="MARKER", dest="marker", help=words_help)
    tokens_help = "in a batch, context included (default 4096; on a GPU as many as fill it)"
    add("--max-tokens", type=positive_integer, metavar="N", help=tokens_help)
    add("--model-overrides", type=model_options, default={}, metavar="DICT", help="options of the model, by name")
    dtype_help = "of the model (default float32; on a GPU bfloat16, or float16 where it has none)"
    add("--dtype", choices=("float32", "float16", "bfloat16"), help=dtype_help)
    add("--cpu", action="store_true", help="do not use the GPU")
    add("--output", type=Path, metavar="DIR", help="folder for the JSON files (default: beside each checkpoint)")
    add("--overwrite", action="store_true", help="replace earlier results; without it they are kept and completed")
    add("--tensorboard-logdir", type=Path, metavar="DIR", help="also write scalars against length")


def evaluation_settings(args: argparse.Namespace) -> EvaluationSettings:
    """The settings that the arguments of the same names ask for; ValueError if two contradict each other."""
    if args.marker is None:  # how the subword units of the data folder are marked
        bpe = text_options(first_folder(args.data))["bpe"]
        args.marker = {"subword_nmt": "@@ ", "sentencepiece": "sentencepiece"}.get(bpe)
    args.device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    args.dtype = args.dtype or evaluation_dtype(args.device)
    return EvaluationSettings(**{option.name: getattr(args, option.name) for option in fields(EvaluationSettings)})


def run(args: argparse.Namespace) -> None:
    """Evaluates the checkpoints; prints a table for each, and where its results are."""
    with processes.fail_together():
        settings = evaluation_settings(args)
        settings.check_checkpoints(args.checkpoints)
        text = read_evaluation_text(settings.data, settings.subset, settings.marker)
        if args.tensorboard_logdir is not None and processes.is_first():
            check_writable(args.tensorboard_logdir / "events")
    tables = []
    try:
        for checkpoint in args.checkpoints:
            content = evaluate_checkpoint(checkpoint, text, settings)
            with processes.fail_together():
                if processes.is_first():
                    windowings = settings.windowings(content["model"]["training_length"], text.tokens)
                    table = checkpoint_table(content, windowings)
                    tables.append(f"{table}\nwritten to {settings.result_path(checkpoint)}")
                    if args.tensorboard_logdir is not None:
                        log_to_tensorboard(args.tensorboard_logdir / settings.run_name(content), content)
    finally:
        print("".join(f"\n{table}\n" for table in tables), end="")
