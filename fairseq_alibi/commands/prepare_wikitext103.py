"""`fairseq-alibi prepare-wikitext103`."""

import argparse

from ..data import prepare_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi prepare-wikitext103`."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi prepare-wikitext103`."""
    prepare_data.main(["wikitext103", *args.arguments])
