"""`fairseq-alibi eval-lm`."""

import argparse

from ..evaluation import eval_lm

PASSES_ARGUMENTS_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi eval-lm`."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi eval-lm`."""
    eval_lm.main([*args.arguments, "--", *args.passed_on])
