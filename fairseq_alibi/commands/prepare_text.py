"""`fairseq-alibi prepare-text`: a data folder of plain-text files."""

import argparse
import functools
import os
import re
from pathlib import Path

from ..data import builtin_corpus
from ..data.binarize import SPLITS, check_workers
from ..data.plain_text import MERGES, TextSettings, prepare_text
from ..data.shards import prepare_shards
from .arguments import positive_integer, shorten


def language(text: str) -> str:
    """Reads the code of a language; raises ArgumentTypeError."""
    if not re.fullmatch("[a-z]{2,3}", text):
        raise argparse.ArgumentTypeError(f"'{shorten(text)}' is no code of a language: pass one such as de or zh")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi prepare-text`."""
    add = parser.add_argument
    add("dest", type=Path, metavar="DEST", help="the data folder that is made")
    for split in SPLITS:
        add(f"--{split}", type=Path, metavar="FILE", help=f"plain text of the {split} split")
    add("--builtin", action="store_true", help="the source of Python's standard library instead of FILEs")
    limit = f"size limit of --builtin (default: {builtin_corpus.BYTES})"
    add("--max-bytes", type=positive_integer, metavar="N", help=limit)
    merges = f"BPE merges, or pieces of sentencepiece (default: {MERGES}, with --builtin {builtin_corpus.MERGES})"
    add("--bpe-merges", type=positive_integer, metavar="N", help=merges)
    kinds = "moses (default), white space alone, or a model of sentencepiece, which keeps the text of any language"
    add("--tokenizer", choices=("moses", "none", "sentencepiece"), default="moses", help=kinds)
    add("--language", type=language, default="en", metavar="XX", help="of Moses' tokenizer (default: en)")
    add("--no-escape", action="store_true", help="Moses' tokenizer writes quotes, brackets and & as they are")
    add("--no-dash-splits", action="store_true", help="Moses' tokenizer does not split words at dashes")
    add("--word-level", action="store_true", help="tokens of the tokenizer only, no BPE")
    shards = "folders in DEST instead of one, for fairseq to train on in turn; a stopped command resumes"
    add("--shards", type=positive_integer, metavar="N", help=shards)
    add("--workers", type=positive_integer, metavar="N", default=os.cpu_count(), help="processes (default: all cores)")


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi prepare-text`; ValueError if arguments contradict each other."""
    check_workers(args.workers)
    files = [split for split in SPLITS if getattr(args, split)]
    if len(files) != (0 if args.builtin else len(SPLITS)):
        raise ValueError("give all of --train, --valid and --test, or --builtin alone")
    if args.word_level and args.bpe_merges:
        raise ValueError(f"--bpe-merges {args.bpe_merges} and --word-level exclude each other: give one of them")
    if args.max_bytes and not args.builtin:
        raise ValueError(f"--max-bytes {args.max_bytes} is for --builtin only: leave it out")
    merges = None if args.word_level else args.bpe_merges or (builtin_corpus.MERGES if args.builtin else MERGES)
    chosen = [name for name in ("no_escape", "no_dash_splits") if getattr(args, name)]
    chosen += ["language"] if args.language != "en" else []
    if chosen and args.tokenizer != "moses":
        raise ValueError(f"--{chosen[0].replace('_', '-')} is for Moses' tokenizer only: drop it")
    if args.word_level and args.tokenizer == "sentencepiece":
        raise ValueError("--word-level: a model of sentencepiece has no words; pass --tokenizer moses or none")
    settings = TextSettings(args.tokenizer, merges, args.language, not args.no_escape, not args.no_dash_splits)
    prepare = functools.partial(prepare_shards, shards=args.shards) if args.shards else prepare_text
    destination = Path(os.path.realpath(args.dest))
    if args.builtin:
        size = args.max_bytes or builtin_corpus.BYTES
        builtin_corpus.prepare_builtin(destination, size, settings, args.workers, prepare)
    else:
        texts = {split: getattr(args, split) for split in SPLITS}
        sources = {split: str(path) for split, path in texts.items()}
        prepare(destination, texts, sources, settings, args.workers)
