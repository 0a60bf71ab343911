"""`fairseq-alibi merge-checkpoint`: makes one file of a checkpoint of `--use-sharded-state`."""

import argparse
from pathlib import Path

import torch

from ..files.checkpoints import check_exists
from ..files.results import check_absent, written_whole
from ..files.safe_reading import checked_reading
from ..files.shard_sets import read_shards

WRITES = "target"  # the argument that a lock is taken on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi merge-checkpoint`."""
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint with a folder shards-... beside it")
    parser.add_argument("target", metavar="OUT", type=Path, help="checkpoint to write, which needs no folder")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    """Prints where the result is."""
    check_exists(args.source)
    check_absent([args.target], args.overwrite, "another name")
    with checked_reading(args.source):
        state = torch.load(args.source, map_location="cpu", weights_only=True)
        whole = read_shards(str(args.source), state)
    if whole is state:
        raise ValueError(f"{args.source} is whole already: copy it")
    with written_whole(args.target) as temporary:
        torch.save(whole, temporary)
    print(f"written to {args.target}")
