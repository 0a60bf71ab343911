"""Types of command-line arguments that several subcommands share. Needs nothing but Python's standard library."""

import argparse
import ast
from typing import Any


def shorten(text: str) -> str:
    """A text of the user's for a message, of at most 100 characters."""
    return text if len(text) <= 100 else f"{text[:100]}..."


def positive_integer(text: str) -> int:
    """Reads a whole number of at least 1, of at most 12 digits; raises ArgumentTypeError."""
    if text.isdecimal() and len(text) > 12:
        raise argparse.ArgumentTypeError(f"'{shorten(text)}' is too large: pass a number of at most 12 digits")
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{shorten(text)}' is no such number: pass a whole number of at least 1")
    return int(text)


def length_list(text: str) -> list[int]:
    """Reads lengths with commas between them; raises ArgumentTypeError."""
    return [positive_integer(part) for part in text.split(",")]


def subset_name(text: str) -> str:
    """Reads the name of a subset of a data folder; raises ArgumentTypeError for a path."""
    if "/" in text or "\\" in text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"'{text}' is a path: pass the name of a subset of the data folder, as valid")
    return text


def model_options(text: str) -> dict[str, Any]:
    """Reads options of a model by name, written as a Python dictionary of literals; raises ArgumentTypeError."""
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        options = None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise argparse.ArgumentTypeError(f"'{shorten(text)}' is no dictionary: pass one as \"{{'attention': 'mask'}}\"")
    return options
