"""`fairseq-alibi prepare-text`: a data folder of plain-text files."""

import argparse
import os
import platform
import tempfile
from pathlib import Path

from ..data.binarize import SPLITS
from ..data.builtin_corpus import write_builtin_corpus
from ..data.plain_text import prepare_text
from .arguments import positive_integer

BUILTIN_BYTES = 6_000_000
MERGES = {True: 2_000, False: 10_000}  # by whether the corpus is the built-in one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi prepare-text`."""
    add = parser.add_argument
    add("dest", type=Path, metavar="DEST", help="the data folder that is made")
    for split in SPLITS:
        add(f"--{split}", type=Path, metavar="FILE", help=f"plain text of the {split} split")
    add("--builtin", action="store_true", help="the source of Python's standard library instead of FILEs")
    add("--max-bytes", type=positive_integer, metavar="N", help="size limit of --builtin (default: 6000000)")
    add("--bpe-merges", type=positive_integer, metavar="N", help="BPE merges (default: 10000, with --builtin 2000)")
    add("--word-level", action="store_true", help="Moses tokens only, no BPE")
    add("--workers", type=positive_integer, metavar="N", default=os.cpu_count(), help="processes (default: all cores)")


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi prepare-text`.

    Raises:
        ValueError: The arguments contradict each other, or see `prepare_text`.
    """
    files = [split for split in SPLITS if getattr(args, split)]
    if len(files) != (0 if args.builtin else len(SPLITS)):
        raise ValueError("give all of --train, --valid and --test, or --builtin alone")
    if args.word_level and args.bpe_merges:
        raise ValueError(f"--bpe-merges {args.bpe_merges} and --word-level exclude each other: give one of them")
    if args.max_bytes and not args.builtin:
        raise ValueError(f"--max-bytes {args.max_bytes} is for --builtin only: leave it out")
    merges = None if args.word_level else args.bpe_merges or MERGES[args.builtin]
    destination = args.dest.resolve()
    if args.builtin:
        with tempfile.TemporaryDirectory() as folder:
            texts = write_builtin_corpus(Path(folder), args.max_bytes or BUILTIN_BYTES)
            source = f"standard library of Python {platform.python_version()}"
            prepare_text(destination, texts, source, merges, args.workers)
    else:
        texts = {split: getattr(args, split) for split in SPLITS}
        sources = {split: str(path) for split, path in texts.items()}
        prepare_text(destination, texts, sources, merges, args.workers)
