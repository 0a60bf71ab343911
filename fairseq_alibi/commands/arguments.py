"""Types of command-line arguments that several subcommands share. Needs nothing but Python's standard library."""

import argparse
import ast
from typing import Any


def positive_integer(text: str) -> int:
    """Reads a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: The text is no such number.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no such number: pass a whole number of at least 1")
    return int(text)


def model_options(text: str) -> dict[str, Any]:
    """Reads options of a model by name, written as a Python dictionary of literals.

    Raises:
        argparse.ArgumentTypeError: The text is no such dictionary.
    """
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is no dictionary: pass one as \"{{'attention': 'mask'}}\"")
    return options
