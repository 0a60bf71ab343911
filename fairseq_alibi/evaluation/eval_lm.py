"""Perplexity of a checkpoint at several lengths through fairseq-eval-lm: one table, one JSON file.

Two ways to cut a subset into windows (Press et al. 2022, section 4 and appendix B):

non-overlapping   blocks of L tokens; a token sees its own block only, so tokens early in a block see little.
sliding window    windows of L tokens, each `stride` tokens further; a window scores its last `stride` tokens, which see
                  L - stride tokens of context. The first window scores what it holds.

Either way every token of the subset is scored exactly once. fairseq-eval-lm does this right in one process without
data workers only, and says nothing when it scores too few tokens: so it is run, and the tokens are counted.
"""

import argparse
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm
from tabulate import tabulate

from ..commands.arguments import model_options, positive_integer
from ..files.inputs import check_dictionary, describe_model, one_line, read_checkpoint, read_dictionary, subset_tokens
from ..files.results import check_writable, describe_environment, write_json

#: What decides which tokens are scored with which context: set here, so not for the user to pass on.
FIXED_OPTIONS = (
    *("--path", "--gen-subset", "--tokens-per-sample", "--context-window", "--max-tokens", "--batch-size"),
    *("--num-workers", "--num-shards", "--shard-id", "--distributed-world-size"),
)


class TokenCounter(logging.Handler):
    """Reads from fairseq-eval-lm's log how many tokens it scored, and whether it left some out."""

    def __init__(self):
        super().__init__()
        self.scored = 0

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("skipping tokens with inf scores"):
            raise ValueError(
                "the model gives infinite scores: it has diverged, train it anew or use another checkpoint"
            )
        found = re.match(r"Evaluated ([\d,]+) tokens", str(record.msg))
        if found:
            self.scored = int(found.group(1).replace(",", ""))


def eval_lm_arguments(
    data: str, checkpoint: str, subset: str, length: int, stride: int, positions: int, extra: Sequence[str]
) -> list[str]:
    """The arguments of fairseq-eval-lm that score `subset` in windows of `length` tokens, `stride` further each time.

    fairseq counts only a window's new tokens against `--max-tokens`, so `positions`, the tokens in a batch with their
    context, is turned into whole windows first.
    """
    windows = max(1, positions // length)
    arguments = [*extra, "--user-dir", str(Path(__file__).parents[1]), "--path", checkpoint, "--gen-subset", subset]
    arguments += ["--tokens-per-sample", length, "--context-window", length - stride, "--max-tokens", windows * stride]
    arguments += ["--num-workers", 0, "--num-shards", 1, "--distributed-world-size", 1]
    return [data, *map(str, arguments)]


def run_eval_lm(arguments: list[str]) -> tuple[float, int]:
    """Runs fairseq-eval-lm in this process, so that its imports and progress bar are the terminal's.

    Returns:
        The loss per scored token in bits, and the number of tokens scored.
    """
    counter = TokenCounter()
    logger = logging.getLogger("fairseq_cli.eval_lm")
    logger.addHandler(counter)
    try:
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), arguments)
        model_options(args.model_overrides)  # which fairseq evaluates, whatever stands there
        results = eval_lm.main(convert_namespace_to_omegaconf(args))
    finally:
        logger.removeHandler(counter)
    return float(results["loss"]), counter.scored


def evaluate(
    data: str,
    checkpoint: str,
    windows: list[tuple[int, int]],
    output: Path,
    subset: str = "valid",
    positions: int = 4096,
    extra: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores a subset with each (length, stride) in turn; `output` holds what is done after every one.

    Args:
        data: fairseq data folder.
        checkpoint: of a language model.
        windows: length and stride in tokens; stride = length is non-overlapping.
        output: JSON file to write.
        subset: train, valid, test, ...
        positions: tokens in a batch, context included.
        extra: more arguments for fairseq-eval-lm.

    Returns:
        What the file holds: model, data, environment, and per window the tokens scored, loss (bits per token),
        perplexity and seconds.

    Raises:
        ValueError: bad input, or fairseq-eval-lm scored other than all tokens of the subset.
    """
    expected, state = subset_tokens(data, subset), read_checkpoint(checkpoint)
    check_dictionary(read_dictionary(data), data, checkpoint, state)
    content = {
        "model": describe_model(checkpoint, state),
        "data": data,
        "subset": subset,
        "options": list(extra),
        "environment": describe_environment(),
        "results": [],
    }
    check_writable(output)
    for length, stride in windows:
        arguments = eval_lm_arguments(data, checkpoint, subset, length, stride, positions, extra)
        started = time.perf_counter()
        try:
            loss, scored = run_eval_lm(arguments)
        except (Exception, SystemExit) as error:  # fairseq raises whatever it likes, over many lines
            reason = "it refuses its arguments, see above" if isinstance(error, SystemExit) else one_line(error)
            raise ValueError(f"fairseq-eval-lm failed at length {length}, stride {stride}: {reason}") from error
        if scored != expected:
            raise ValueError(
                f"fairseq-eval-lm scored {scored:,} of the {expected:,} tokens of '{subset}' at length {length}: the "
                "model was built with a longest sequence (pass -- --model-overrides \"{'max_target_positions': N}\"), "
                "or an option passed on drops tokens"
            )
        if not math.isfinite(loss):
            raise ValueError(f"the loss at length {length} is {loss}: the model has diverged, use another checkpoint")
        result = {
            "length": length,
            "stride": stride,
            "context_window": length - stride,
            "tokens": scored,
            "loss": loss,
            "perplexity": 2**loss,
            "seconds": round(time.perf_counter() - started, 2),
            "command": shlex.join(["fairseq-eval-lm", *arguments]),
        }
        content["results"].append(result)
        write_json(output, content)
        print(f"length {length}, stride {stride}: perplexity {result['perplexity']:.2f} ({result['seconds']} s)")
    return content


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; what follows `--` goes to fairseq-eval-lm as it is."""
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_alibi.eval_lm",
        description="Perplexity at several lengths, through fairseq-eval-lm.",
        epilog="What follows -- goes to fairseq-eval-lm, for example: -- --fp16 --softmax-batch 256",
    )
    ways = parser.add_subparsers(dest="way", required=True)
    nonoverlapping = ways.add_parser("nonoverlapping", help="blocks of each LENGTH")
    sliding = ways.add_parser("sliding", help="windows of one LENGTH, each STRIDE tokens further")
    for way in (nonoverlapping, sliding):
        way.add_argument("data", metavar="DATA", help="fairseq data folder")
        way.add_argument("checkpoint", metavar="CHECKPOINT")
        way.add_argument("--subset", default="valid", help="valid (default), test, ...")
        way.add_argument(
            "--output", type=Path, help="JSON file; default: beside the checkpoint, named by what it holds"
        )
        way.add_argument("--overwrite", action="store_true", help="replace the JSON file if it exists")
        way.add_argument(
            "--positions",
            type=positive_integer,
            default=4096,
            help="tokens in a batch, context included (default 4096)",
        )
    nonoverlapping.add_argument("lengths", metavar="LENGTH", type=positive_integer, nargs="+")
    sliding.add_argument("length", metavar="LENGTH", type=positive_integer)
    sliding.add_argument("strides", metavar="STRIDE", type=positive_integer, nargs="+")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.extra = argv[end + 1 :]
    return args


def main(argv: Optional[list[str]] = None) -> None:
    """The command behind scripts/eval_nonoverlapping.sh and scripts/eval_sliding_window.sh."""
    args = parse(sys.argv[1:] if argv is None else argv)
    # fairseq logs its whole configuration once per run; errors and warnings still come through
    logging.getLogger().setLevel(logging.WARNING)
    eval_lm.logger.setLevel(logging.INFO)
    eval_lm.logger.propagate = False
    try:
        if args.way == "sliding":
            too_long = [stride for stride in args.strides if stride > args.length]
            if too_long:
                raise ValueError(
                    f"stride {too_long[0]} is longer than the window of {args.length} and would skip tokens"
                )
            windows = [(args.length, stride) for stride in args.strides]
            name = f"sliding_{args.length}_{args.subset}.json"
        else:
            windows = [(length, length) for length in args.lengths]
            name = f"nonoverlapping_{args.subset}.json"
        fixed = [option for option in args.extra if option.partition("=")[0] in FIXED_OPTIONS]
        if fixed:
            raise ValueError(f"{fixed[0]} decides what is scored and is set by this command: drop it")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("fairseq-eval-lm under torchrun scores one process's share only: run one process")
        output = args.output or Path(args.checkpoint).parent / name
        if output.exists() and not args.overwrite:
            raise ValueError(f"{output} exists: pass --overwrite to replace it, or another --output")
        content = evaluate(args.data, args.checkpoint, windows, output, args.subset, args.positions, args.extra)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate: {error}")
    model = content["model"]
    print(f"\n{model['position_method']}, trained on {model['training_length']} tokens, evaluated on {args.subset}")
    columns = ("length", "stride", "context_window", "tokens", "loss", "perplexity", "seconds")
    rows = [[result[column] for column in columns] for result in content["results"]]
    formats = (",", ",", ",", ",", ".4f", ".2f", ".1f")
    print(tabulate(rows, [column.replace("_", " ") for column in columns], floatfmt=formats, intfmt=","))
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
