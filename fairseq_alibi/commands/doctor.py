"""`fairseq-alibi doctor`: what this environment has, what of it works, and the first thing to fix."""

import argparse
from pathlib import Path

from .. import __version__
from .environment_checks import PARTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`fairseq-alibi doctor` has no arguments."""


def run(args: argparse.Namespace) -> None:
    """Prints a line for each part and, last, what to fix first.

    Raises:
        ValueError: A required part does not work.
    """
    print(f"{'fairseq-alibi':<16}{__version__} in {Path(__file__).parents[1]}")
    broken = []
    for part in PARTS:
        try:
            report = part.check()
        except Exception as error:  # a broken installation raises anything
            reason = " ".join(str(error).split())[:200] or repr(error)
            report = f"BROKEN, needed for {part.needed_for or 'everything'}: {reason}"
            broken.append(part)
        print(f"{part.name:<16}{report}", flush=True)
    if not broken:
        print("\nnothing to fix")
        return
    first = next((part for part in broken if part.needed_for is None), broken[0])
    advice = f"fix first: {first.name}, with: {first.remedy}"
    if first.needed_for is None:
        raise ValueError(advice)
    print(f"\n{advice}")
