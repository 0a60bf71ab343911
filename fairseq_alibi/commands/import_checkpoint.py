"""`fairseq-alibi import-checkpoint`: turns a checkpoint of the ALiBi authors' fork into one of `alibi_lm`."""

import argparse
from pathlib import Path

from ..core import ALiBi, position_methods
from ..files.import_checkpoint import import_checkpoint
from ..files.results import check_absent

WRITES = "target"  # the argument that a lock is taken on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi import-checkpoint`."""
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint of the authors' fork, or of transformer_lm")
    parser.add_argument("target", metavar="OUT", type=Path, help="checkpoint of alibi_lm to write")
    parser.add_argument("--dict", type=Path, help="dict.txt of the data, to check that it fits")
    methods, trained = list(position_methods()), "what it was trained with"
    parser.add_argument("--position-method", choices=methods, default=ALiBi.name, help=trained)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    """Prints what was dropped and where the result is."""
    check_absent([args.target], args.overwrite, "another name")
    if args.dict and not args.dict.is_file():
        raise ValueError(f"there is no dictionary {args.dict}: name the dict.txt of the data folder")
    for name in import_checkpoint(args.source, args.target, args.dict, args.position_method):
        print(f"dropped: {name}")
    print(f"written to {args.target}")
