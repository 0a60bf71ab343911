"""Help that shows the options of the model, which fairseq's commands leave out."""

import argparse
import sys
from typing import Any

from fairseq.models import ARCH_MODEL_REGISTRY

from .patch import original

TARGET = "argparse:_HelpAction.__call__"


def show_model_options(
    action: argparse.Action, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
) -> None:
    """Prints the help of a parser; that of a command of fairseq gets the options of the `--arch` in the command line.

    Python parses `--help` before fairseq adds the options of the model.
    """
    is_fairseq = any(known.choices == ARCH_MODEL_REGISTRY.keys() for known in parser._actions if known.dest == "arch")
    if is_fairseq:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--arch", "-a")
        architecture = finder.parse_known_args(sys.argv[1:])[0].arch
        if architecture in ARCH_MODEL_REGISTRY:
            group = parser.add_argument_group(f"options of {architecture}", argument_default=argparse.SUPPRESS)
            ARCH_MODEL_REGISTRY[architecture].add_args(group)
    original(TARGET)(action, parser, namespace, values, option)
