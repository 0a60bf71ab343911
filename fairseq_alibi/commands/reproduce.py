"""`fairseq-alibi reproduce`: the paper's comparison, on one page."""

import argparse
import shlex
import sys
from pathlib import Path

from ..core.methods import COMPARED
from ..core.positions import position_methods
from ..data.builtin_corpus import prepare_builtin
from ..experiments.comparison import Comparison, run_comparison
from ..experiments.comparison_page import write_page
from ..experiments.presets import BUILTIN, PRESETS, TEST_TIME
from ..files.data_folders import read_dictionary, subset_tokens
from ..files.errors import script_command
from ..files.locks import locked
from .arguments import positive_integer, subset_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi reproduce`."""
    add = parser.add_argument
    presets = "laptop (default), slice or paper: see the walk-through"
    add("--preset", choices=list(PRESETS), default="laptop", help=presets)
    add("--data", help="fairseq data folder (default of laptop: Python's own source; slice has none)")
    add("--subset", type=subset_name, default="valid", help="valid (default), test, ...")
    add("--updates", type=positive_integer, metavar="N", help="of training, in the place of the preset's")
    methods = [*position_methods(), *TEST_TIME]
    methods_help = f"default: {' '.join(COMPARED)}; METHOD+NAME changes METHOD's model at evaluation"
    add("--methods", nargs="+", choices=methods, default=list(COMPARED), metavar="METHOD", help=methods_help)
    add("--seeds", nargs="+", type=positive_integer, default=[1, 2, 3], metavar="N", help="of training (default 1 2 3)")
    add("--output", type=Path, metavar="DIR", help="default: results/reproduce-PRESET; finished steps there are kept")
    add("--launch", action="store_true", help="run the commands of the preset paper, which are printed otherwise")
    add("--cpu", action="store_true", help="do not use the GPU")


def run(args: argparse.Namespace) -> None:
    """Runs `fairseq-alibi reproduce` and says where the page is."""
    preset = PRESETS[args.preset]
    data = args.data or preset.data
    if data is None:
        raise ValueError("--preset slice needs --data, a folder that scripts/prepare_wikitext103.sh made")
    if args.preset == "paper" and not script_command("train_wikitext103.sh"):
        raise ValueError("--preset paper runs scripts, which an installed package does not have: run it in a clone")
    output = args.output or Path("results") / f"reproduce-{args.preset}"
    updates = args.updates or preset.updates
    methods, seeds = args.methods, args.seeds
    comparison = Comparison(args.preset, preset, data, args.subset, updates, methods, seeds, output, args.cpu)
    if args.preset == "paper" and not args.launch:
        for model in comparison.models():
            print("\n".join(shlex.join(command) for command in comparison.commands(model).values()))
        return
    if data == BUILTIN:
        prepare_builtin(Path(data).resolve())
    read_dictionary(data)
    subset_tokens(data, args.subset)
    try:
        with locked(output):
            run_comparison(comparison)
            write_page(comparison)
    except KeyboardInterrupt:
        sys.exit("fairseq-alibi reproduce: interrupted; start the same command again, and it continues")
    print(f"written to {output / 'results.md'}")
