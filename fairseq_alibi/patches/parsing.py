"""Command lines of fairseq: their help shows the options of the model, and contradictions are one line."""

import argparse
import sys
from typing import Any

from fairseq.models import ARCH_MODEL_REGISTRY

from .patch import CommandError, original


def parse_args_and_arch(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
    """Replaces `fairseq.options.parse_args_and_arch`.

    Raises:
        CommandError: Options exclude each other.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--arch", "-a")
    finder.add_argument("--help", "-h", action="store_true")
    known = finder.parse_known_args(args[0] if args else sys.argv[1:])[0]
    if known.help and known.arch in ARCH_MODEL_REGISTRY:
        # Python prints the help and ends before fairseq would add them.
        group = parser.add_argument_group(f"options of {known.arch}", argument_default=argparse.SUPPRESS)
        ARCH_MODEL_REGISTRY[known.arch].add_args(group)
    try:
        return original("fairseq.options:parse_args_and_arch")(parser, *args, **kwargs)
    except ValueError as error:
        message = str(error)
        if "Cannot combine --fp16" in message:  # fairseq sets --tpu for --bf16
            message = "--fp16 excludes --bf16 and --tpu: pass one of them"
        raise CommandError(" ".join(message.split())) from error
