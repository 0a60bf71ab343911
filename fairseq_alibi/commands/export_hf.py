"""`fairseq-alibi export-hf`: writes a checkpoint as a folder for Hugging Face's transformers."""

import argparse
from pathlib import Path

from ..files.results import check_writable
from .arguments import model_options

WRITES = "out"  # the argument that a lock is taken on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi export-hf`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of alibi_lm")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--data", default="", help="its fairseq data folder (default: the one it was trained on)")
    overrides = "options of the model, by name"
    parser.add_argument("--model-overrides", type=model_options, default={}, metavar="DICT", help=overrides)


def run(args: argparse.Namespace) -> None:
    """Prints what was written and where."""
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists: move it away, or pass another name")
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed: get it with pip install 'transformers>=4.57.1,<5.25' safetensors"
        ) from error
    from ..files.export_hf import export

    check_writable(args.out.with_name(f"{args.out.name}.partial"))
    transformers.utils.logging.disable_progress_bar()
    print(export(args.checkpoint, args.out, args.data, args.model_overrides))
    print(f"written to {args.out}")
