"""`fairseq-alibi prepare-text`."""

import argparse

from ..data import prepare_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi prepare-text`."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi prepare-text`."""
    prepare_data.main(["text", *args.arguments])
