"""`fairseq-alibi reproduce`: the paper's comparison, on one page."""

import argparse
import shlex
from pathlib import Path

from ..core.methods import COMPARED
from ..core.positions import position_methods
from ..data.builtin_corpus import prepare_builtin
from ..experiments.comparison import Comparison, run_comparison
from ..experiments.comparison_page import write_page
from ..experiments.presets import BUILTIN, PRESETS, TEST_TIME
from ..experiments.probe_comparison import ProbeComparison, with_lengths_of, write_probe_page
from ..files.data_folders import read_dictionary, subset_tokens
from ..files.errors import script_command
from ..files.locks import locked
from .arguments import positive_integer, subset_name

RESUMES = True  # the same command, after an interruption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi reproduce`."""
    add = parser.add_argument
    presets = "laptop (default), slice, probes or paper: see the walk-through"
    add("--preset", choices=list(PRESETS), default="laptop", help=presets)
    add("--data", help="fairseq data folder, for probes FOLDER:FOLDER:... (slice needs it, the others have one)")
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
    preset, kind = PRESETS[args.preset], Comparison
    data = args.data or preset.data
    if data is None:
        raise ValueError("--preset slice needs --data, a folder that scripts/prepare_wikitext103.sh made")
    if args.preset == "paper" and not script_command("train_wikitext103.sh"):
        raise ValueError("--preset paper runs scripts, which an installed package does not have: run it in a clone")
    if args.preset == "probes":
        if args.subset != "valid":
            raise ValueError(f"--subset {args.subset}: probes have texts for evaluation in each folder; drop it")
        preset, kind = with_lengths_of(preset, data), ProbeComparison
    output = args.output or Path("results") / f"reproduce-{args.preset}"
    if str(output).startswith("-"):
        output = output.absolute()  # or fairseq-train takes it for an option
    updates = args.updates or preset.updates
    if max(*args.seeds, updates) >= 2**32:
        raise ValueError(f"{max(*args.seeds, updates)}: pass --seeds and --updates below {2**32}")
    comparison = kind(args.preset, preset, data, args.subset, updates, args.methods, args.seeds, output, args.cpu)
    if args.preset == "paper" and not args.launch:
        for model in comparison.models():
            print("\n".join(shlex.join(command) for command in comparison.commands(model).values()))
        return
    if data == BUILTIN:
        prepare_builtin(Path(data).resolve())
    read_dictionary(data)
    subset_tokens(data, args.subset)
    with locked(output):
        run_comparison(comparison)
        if isinstance(comparison, ProbeComparison):
            write_probe_page(comparison)
        else:
            write_page(comparison)
    print(f"written to {output / 'results.md'}")
