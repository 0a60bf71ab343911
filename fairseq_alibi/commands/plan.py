"""`fairseq-alibi plan`: what a training run will take."""

import argparse
import math
import re
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from ..experiments.planned_run import PlannedRun
from ..experiments.run_config import find_dictionary, read_config
from ..experiments.run_memory import plan_tables, training_command
from .arguments import positive_integer

ANY_ORDER = True  # options may stand between the overrides


def number_of_gib(text: str) -> float:
    """Reads a positive number; raises ArgumentTypeError."""
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
    add("words", metavar="CONFIG [KEY=VALUE ...]", nargs="+", help="YAML file of configs/, and overrides of its values")
    add("--gpus", type=positive_integer, default=1, metavar="N", help="default: 1")
    add("--gpu-memory", type=number_of_gib, required=True, metavar="GIB", help="memory of a GPU, in GiB")
    vocabulary = "size of the vocabulary, special symbols included; default: that of the dict.txt in task.data, else "
    add("--types", type=positive_integer, metavar="V", help=f"{vocabulary}of the corpus that a config is for")


def run(args: argparse.Namespace) -> None:
    """Prints the tables, and the command for the largest batch that fits; ValueError if not one block does."""
    # A path may hold an equals sign too.
    name, *overrides = sorted(args.words, key=lambda word: "=" in word and not Path(word).is_file())
    config = Path(name)
    cfg = read_config(config, overrides)
    planned = PlannedRun(cfg, find_dictionary(cfg, config, args.types))
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
    if OmegaConf.is_missing(cfg.task, "data") or not cfg.task.data:
        settings["task.data"] = "DATA"
    if cfg.common.user_dir and not Path(cfg.common.user_dir).exists():  # it is relative to the project
        folder = str(Path(__file__).parents[1])
        plain = re.fullmatch(r"[\w/.-]+", folder)  # hydra takes other characters, such as brackets, in quotes only
        settings["common.user_dir"] = folder if plain else QuotedString(folder, Quote.single).with_quotes()
    print("\n" + training_command(config, overrides, settings))
