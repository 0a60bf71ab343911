"""`fairseq-alibi report`: results of several evaluations as tables and plots."""

import argparse
from pathlib import Path

from ..evaluation.report import REPORT_FILES, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi report`."""
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="JSON files of evaluate or the scripts")
    parser.add_argument("--output", type=Path, default=Path("results/report"), help="folder for report.md, report.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    parser.add_argument("--paper", action="store_true", help="also the paper's numbers beside those that match them")


def run(args: argparse.Namespace) -> None:
    """Writes the report, prints the table of perplexity and the names of the files."""
    print(write_report(args.files, args.output, args.overwrite, args.paper))
    written = [str(args.output / name) for name in REPORT_FILES if (args.output / name).exists()]
    print("\nwritten to " + ", ".join(written))
