"""The command `fairseq-alibi`, also `python -m fairseq_alibi`."""

import argparse
import importlib
import logging
import sys
from typing import Optional

from . import __version__

#: Modules of the subcommands.
MODULES = {
    "plan": "experiments.plan",
    "evaluate": "evaluation.evaluate",
    "report": "evaluation.report",
    "reproduce": "experiments.reproduce",
    "generate": "evaluation.generate",
    "import-checkpoint": "files.import_checkpoint",
    "export-hf": "files.export_hf",
    "show-bias": "evaluation.show_bias",
    "doctor": "commands.doctor",
}

COMMANDS = {
    "plan": "What a training run will take: parameters, memory, FLOPs, and what fits.",
    "evaluate": "Perplexity of checkpoints at many lengths: by windows or as one stream.",
    "report": "Results of several evaluations as tables and plots.",
    "reproduce": "The paper's comparison: all position methods, trained and evaluated alike, on one page.",
    "generate": "Text that continues a prompt.",
    "import-checkpoint": "Turns a checkpoint of the ALiBi authors' fairseq fork into one of alibi_lm.",
    "export-hf": "Writes a checkpoint as a folder for Hugging Face's transformers: weights, code and tokenizer.",
    "show-bias": "A picture of the ALiBi bias, head by head, causal and in the three forms of encoders.",
    "doctor": "What this environment has, what of it works, and the first thing to fix.",
}


def main(argv: Optional[list[str]] = None) -> None:
    """Runs a subcommand; bad input ends it with one line and status 1."""
    logging.getLogger().setLevel(logging.WARNING)  # fairseq logs its whole configuration
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fairseq-alibi", description="ALiBi language models for fairseq.")
    parser.add_argument("--version", action="version", version=f"fairseq-alibi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    module = None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # no other is imported, as doctor has to run where the others cannot
            try:
                module = importlib.import_module(f".{MODULES[name]}", __package__)
            except Exception as error:  # a broken installation raises anything
                sys.exit(f"fairseq-alibi {name}: {error}; see what to fix first: fairseq-alibi doctor")
            module.add_arguments(command)
    if argv[:1] == ["evaluate"]:  # the one command that several processes can share
        module.follow()
    args = parser.parse_args(argv)
    try:
        module.main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"fairseq-alibi {args.command}: {error}")


if __name__ == "__main__":
    main()
