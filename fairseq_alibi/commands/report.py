"""`fairseq-alibi report`: results of evaluations, context gain and probes as tables and plots."""

import argparse
from pathlib import Path

from ..evaluation.report import write_report
from ..experiments.report_sections import laboratory_sections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi report`."""
    text = "JSON files of evaluate, the scripts, probe eval and probe gain"
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help=text)
    parser.add_argument("--output", type=Path, default=Path("results/report"), help="folder for report.md, report.png")
    text = "as --output DEST, with all of it in one file, report.html, which opens without a network"
    parser.add_argument("--page", type=Path, metavar="DEST", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    parser.add_argument("--paper", action="store_true", help="also the paper's numbers beside those that match them")


def run(args: argparse.Namespace) -> None:
    """Writes the report, prints the table of perplexity and the names of the files."""
    files, sections = laboratory_sections(args.files)
    output = args.page or args.output
    text, paths = write_report(files, output, args.overwrite, args.paper, sections, args.page is not None)
    print(f"{text}\n\nwritten to {', '.join(map(str, paths))}".lstrip())
