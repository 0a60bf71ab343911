"""The command `fairseq-alibi`, also `python -m fairseq_alibi`."""

import argparse
import logging
import sys
from typing import Optional

from . import __version__, evaluate, generate, import_checkpoint, plan, report, reproduce, show_bias

COMMANDS = {
    "plan": plan,
    "evaluate": evaluate,
    "report": report,
    "reproduce": reproduce,
    "generate": generate,
    "import-checkpoint": import_checkpoint,
    "show-bias": show_bias,
}


def main(argv: Optional[list[str]] = None) -> None:
    """Runs a subcommand; bad input ends it with one line and status 1."""
    parser = argparse.ArgumentParser(prog="fairseq-alibi", description="ALiBi language models for fairseq.")
    parser.add_argument("--version", action="version", version=f"fairseq-alibi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq logs its whole configuration
    try:
        COMMANDS[args.command].main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"fairseq-alibi {args.command}: {error}")


if __name__ == "__main__":
    main()
