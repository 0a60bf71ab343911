"""`fairseq-alibi prepare-wikitext103`: a data folder of WikiText-103."""

import argparse
import os
from pathlib import Path

from ..data.binarize import check_workers
from ..data.wikitext103 import prepare_wikitext103
from .arguments import positive_integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi prepare-wikitext103`."""
    add = parser.add_argument
    add("dest", nargs="?", type=Path, default=Path("data-bin/wikitext-103"), metavar="DEST", help="the data folder")
    add("--from", dest="source", type=Path, metavar="PATH", help="zip archive or folder that you have")
    add("--url", dest="urls", action="append", help="download from here instead; may be repeated")
    add("--md5", type=str.lower, help="of the archive, if it is not the original one")
    add("--workers", type=positive_integer, metavar="N", default=os.cpu_count(), help="processes (default: all cores)")


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi prepare-wikitext103`; ValueError if arguments contradict each other."""
    check_workers(args.workers)
    if args.source and args.urls:
        raise ValueError(f"--from {args.source} and --url {args.urls[0]} exclude each other: give one of them")
    prepare_wikitext103(Path(os.path.realpath(args.dest)), args.source, args.urls, args.md5, args.workers)
