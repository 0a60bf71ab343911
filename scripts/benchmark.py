"""Speed and peak memory of attention with and without a mask: in one layer, in training, in evaluation; of scoring.

What is compared stands in `benchmark_contenders`, how it is measured in `benchmark_measure`.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from benchmark_contenders import METHODS, PRECISION, SCORING, contenders_of
from benchmark_measure import BASES, memory, quiet, timed, timed_method, timed_scoring
from benchmark_models import HEADS, Case, first_tokens, train_model
from benchmark_report import write_report
from tqdm import tqdm

from fairseq_alibi.__main__ import exit_interrupted, interrupt
from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.files.checkpoints import describe_model
from fairseq_alibi.files.results import check_absent, check_writable, describe_environment, write_json

HEAD_DIMS = (64, 128)  # of one layer of attention
PARTS = ("attention", "training", "methods", "evaluation", "scoring", "memory")
MODELS = {False: "4 layers, width 256, 8 heads, 8,000 types", True: "alibi_lm_wiki103 and transformer_lm_wiki103"}
#: The vocabularies of the WikiText-103 slice that this was developed with, and of the whole corpus.
CASES = (
    Case(32_496, "4000,8000", 512, 512, 8192),
    Case(32_496, None, 512, 512, 8192),
    Case(267_744, "20000,60000", 512, 512, 4096),
    Case(32_496, "4000,8000", 512, 128, 4096),
    Case(32_496, "4000,8000", 128, 1, 512),  # 128 of them are scored by the first window at once
)
#: What the two levels measure; memory has lengths for training and for evaluation.
QUICK: dict[str, Any] = {
    "attention": (512, 4096),
    "training": (512, 2048),
    "methods": (512,),
    "evaluation": (512, 8192),
    "memory of training": (2048,),
    "memory of evaluation": (4096,),
    "cases": (CASES[0], *(case._replace(tokens=case.tokens // 2) for case in CASES[2:])),
    "repeats": 3,
    "budget": 3.0,
    "updates": 40,
}
ALL_LENGTHS: dict[str, Any] = {
    "attention": (512, 1024, 2048, 4096, 8192),
    "training": (128, 256, 512, 1024, 2048, 4096),
    "methods": (512, 2048),
    "evaluation": (512, 2048, 8192, 32768, 131072),
    "memory of training": (128, 256, 512, 1024, 2048, 4096),
    "memory of evaluation": (512, 2048, 8192, 32768, 131072),
    "cases": tuple(case._replace(tokens=4 * case.tokens) for case in CASES),
    "repeats": 5,
    "budget": 60.0,
    "updates": 300,
}


def lengths_of(part: str, args: argparse.Namespace) -> list[int]:
    """The lengths at which a part, or `memory of training` or `memory of evaluation`, is measured."""
    return sorted(set(args.lengths or (ALL_LENGTHS if args.all_lengths else QUICK)[part]))


def jobs(args: argparse.Namespace) -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """What is to be measured, one after the other: a title, and what returns measurements."""
    found: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    for part in args.parts:
        if part == "scoring":
            for case in (ALL_LENGTHS if args.all_lengths else QUICK)["cases"]:
                found.append((f"scoring {case.title}", partial(timed_scoring, case, args)))
        elif part == "methods":
            for method in METHODS:
                for length in lengths_of(part, args):
                    found.append((f"{method}, length {length:,}", partial(timed_method, method, length, args)))
        elif part == "memory":
            if args.device == "cpu":  # what a process takes before it does anything
                found.append((part, partial(memory, None, "imports only", 0, args)))
            for name in ("training", "evaluation"):
                for length in lengths_of(f"memory of {name}", args):
                    for contender in contenders_of(name, length, args):
                        if contender != "no skipping":  # it makes the tensors that are made with skipping too
                            title = f"memory of {name}, length {length:,}"
                            found.append((title, partial(memory, name, contender, length, args)))
            found += [("memory of scoring", partial(memory, "scoring", name, 0, args)) for name in SCORING]
        else:
            for head_dim in HEAD_DIMS if part == "attention" else (0,):
                for length in lengths_of(part, args):
                    found.append((f"{part}, length {length:,}", partial(timed, part, length, head_dim, args)))
    return found


def benchmark(args: argparse.Namespace) -> str:
    """Measures what `args` asks for and writes benchmark.json (after every job), .md and .png; returns the tables.

    Raises:
        ValueError: bad input, see `parse`; or the result is there already.
    """
    result = args.output / "benchmark.json"
    check_absent([result], args.overwrite)
    if (args.checkpoint is None) != (args.data is None):
        raise ValueError("--checkpoint and --data, the folder it was trained on, go together: pass both or neither")
    todo = jobs(args)
    if {"evaluation", "memory"} & set(args.parts):
        if args.checkpoint is None:
            args.checkpoint, args.data = train_model(args.output, args.updates, args.device == "cpu")
        method = describe_model(str(args.checkpoint))["position_method"]
        if method != "alibi":
            raise ValueError(f"{args.checkpoint} has the position method {method}: name a checkpoint of an ALiBi model")
        parts = [part for part in ("evaluation", "memory of evaluation") if part.split()[0] in args.parts]
        first_tokens(str(args.data), 1 + max(length for part in parts for length in lengths_of(part, args)))
    check_writable(result)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    content = {
        "command": shlex.join(sys.argv),
        "environment": describe_environment(),
        "load_average": os.getloadavg()[0],  # other work on the same cores slows the contenders unequally
        "settings": settings,
        "model": MODELS[args.full],
        "heads": HEADS,
        "bases": BASES,
        "measurements": [],
    }
    bar = tqdm(todo, desc="benchmark", unit="job", file=sys.stderr)
    try:
        for title, job in bar:
            bar.set_postfix_str(title)
            content["measurements"] += job()
            write_json(result, content)
    finally:  # an interrupted run loses nothing
        bar.close()
        text = write_report(content, args.output) if content["measurements"] else ""
    return text


def some_parts(text: str) -> list[str]:
    """An argparse type: parts with commas between."""
    for part in text.split(","):
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"'{part}' is no part: choose of {','.join(PARTS)}, with commas between")
    return list(dict.fromkeys(text.split(",")))


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    """Parses the command line and settles what was left open: device, dtype, repeats, budget and updates."""
    parser = argparse.ArgumentParser(prog="benchmark.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="few lengths, few repeats: a few minutes (default)")
    level.add_argument("--all-lengths", action="store_true", help="lengths up to 131,072 tokens, more repeats")
    add("--full", action="store_true", help="train the WikiText-103 architecture of the paper, 247M parameters")
    add("--parts", type=some_parts, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    add("--lengths", type=positive_integer, nargs="+", metavar="N", help="tokens in a sequence, for every part")
    add(
        "--tokens",
        type=positive_integer,
        default=2048,
        metavar="N",
        help="tokens in a batch, at least 1 row (default 2048)",
    )
    add(
        "--repeats",
        type=positive_integer,
        metavar="N",
        help="rounds that count, at least 3 (default 3, with --all-lengths 5)",
    )
    add("--budget", type=positive_integer, metavar="SECONDS", help="for one length, after which no fourth round begins")
    add("--checkpoint", type=Path, help="ALiBi model for evaluation; default: a small one, trained first")
    add("--data", type=Path, help="fairseq data folder of the checkpoint")
    add("--output", type=Path, default=Path("results/benchmark"), metavar="DIR", help="default: results/benchmark")
    add("--overwrite", action="store_true", help="replace a result that is there")
    add("--cpu", action="store_true", help="do not use the GPU")
    add("--dtype", choices=list(PRECISION), help="default: float32 on a CPU, bfloat16 on a GPU")
    args = parser.parse_args(argv)
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for a GPU
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    chosen = ALL_LENGTHS if args.all_lengths else QUICK
    args.repeats, args.budget = args.repeats or chosen["repeats"], args.budget or chosen["budget"]
    args.updates = chosen["updates"]
    return args


def main(argv: Optional[list[str]] = None) -> None:
    """The command behind scripts/benchmark.sh."""
    args = parse(argv)
    quiet()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        print("\n" + benchmark(args))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt as interruption:
        exit_interrupted("benchmark", interruption, f"; what was measured is in {args.output / 'benchmark.json'}")
    print(f"written to {args.output}/benchmark.json, benchmark.md and benchmark.png")


if __name__ == "__main__":
    main()
