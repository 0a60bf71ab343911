"""`fairseq-alibi prepare-text`: a data folder of plain-text files."""

import argparse
import os
from pathlib import Path

from ..data import builtin_corpus
from ..data.binarize import SPLITS, check_workers
from ..data.plain_text import MERGES, prepare_text
from .arguments import positive_integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi prepare-text`."""
    add = parser.add_argument
    add("dest", type=Path, metavar="DEST", help="the data folder that is made")
    for split in SPLITS:
        add(f"--{split}", type=Path, metavar="FILE", help=f"plain text of the {split} split")
    add("--builtin", action="store_true", help="the source of Python's standard library instead of FILEs")
    add(
        "--max-bytes",
        type=positive_integer,
        metavar="N",
        help=f"size limit of --builtin (default: {builtin_corpus.BYTES})",
    )
    merges = f"BPE merges (default: {MERGES}, with --builtin {builtin_corpus.MERGES})"
    add("--bpe-merges", type=positive_integer, metavar="N", help=merges)
    add("--word-level", action="store_true", help="Moses tokens only, no BPE")
    add("--workers", type=positive_integer, metavar="N", default=os.cpu_count(), help="processes (default: all cores)")


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi prepare-text`.

    Raises:
        ValueError: The arguments contradict each other, or see `prepare_text`.
    """
    check_workers(args.workers)
    files = [split for split in SPLITS if getattr(args, split)]
    if len(files) != (0 if args.builtin else len(SPLITS)):
        raise ValueError("give all of --train, --valid and --test, or --builtin alone")
    if args.word_level and args.bpe_merges:
        raise ValueError(f"--bpe-merges {args.bpe_merges} and --word-level exclude each other: give one of them")
    if args.max_bytes and not args.builtin:
        raise ValueError(f"--max-bytes {args.max_bytes} is for --builtin only: leave it out")
    merges = None if args.word_level else args.bpe_merges or (builtin_corpus.MERGES if args.builtin else MERGES)
    destination = args.dest.resolve()
    if args.builtin:
        builtin_corpus.prepare_builtin(destination, args.max_bytes or builtin_corpus.BYTES, merges, args.workers)
    else:
        texts = {split: getattr(args, split) for split in SPLITS}
        sources = {split: str(path) for split, path in texts.items()}
        prepare_text(destination, texts, sources, merges, args.workers)
