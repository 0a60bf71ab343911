"""`fairseq-alibi plan`: what a training run will take."""

import argparse
import math
from pathlib import Path

from ..experiments.plan import plan_tables, training_command
from ..experiments.planned_run import PlannedRun
from ..experiments.run_config import find_dictionary, read_config
from .arguments import positive_integer


def number_of_gib(text: str) -> float:
    """Reads a positive number.

    Raises:
        argparse.ArgumentTypeError: The text is no such number.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no such number: pass the GiB of a GPU, for example 80")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi plan`."""
    add = parser.add_argument
    add("config", metavar="CONFIG", type=Path, help="YAML file of configs/")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="as for fairseq-hydra-train, after CONFIG")
    add("--gpus", type=positive_integer, default=1, metavar="N", help="default: 1")
    add("--gpu-memory", type=number_of_gib, required=True, metavar="GIB", help="memory of a GPU, in GiB")
    vocabulary = "size of the vocabulary, special symbols included; default: that of the dict.txt in task.data, else "
    add("--types", type=positive_integer, metavar="V", help=f"{vocabulary}of the corpus that a config is for")


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi plan`: prints the tables, and the command for the largest batch that fits.

    Raises:
        ValueError: The run cannot be planned, or not one block fits.
    """
    cfg = read_config(args.config, args.overrides)
    planned = PlannedRun(cfg, find_dictionary(cfg, args.config, args.types))
    text, best = plan_tables(planned, args.gpus, args.gpu_memory)
    print(text)
    if best is None:
        raise ValueError(
            f"not one block of {planned.length:,} tokens fits {args.gpu_memory:g} GiB: try "
            "++model.checkpoint_activations=true, common.memory_efficient_fp16=true, or fully_sharded and more --gpus"
        )
    rows, update_freq = best
    settings = {
        "dataset.max_tokens": rows * planned.length,
        "optimization.update_freq": f"[{update_freq}]",
        "distributed_training.distributed_world_size": args.gpus,
    }
    print("\n" + training_command(args.config, args.overrides, settings))
