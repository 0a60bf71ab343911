"""Perplexity of a checkpoint at several lengths through fairseq-eval-lm, in one JSON file.

Blocks and sliding windows, see `measurement`, score every token of the subset exactly once. fairseq-eval-lm does so
only in one process without data workers, and does not report tokens that it leaves out. This module therefore runs it
that way and counts the tokens.
"""

import argparse
import logging
import math
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm

from ..files import checkpoints
from ..files.data_folders import read_dictionary
from ..files.errors import one_line
from ..files.results import check_writable, describe_environment, write_json
from ..patches.data import SampleTooLongError
from ..patches.option_checks import parse_overrides
from ..patches.patch import CommandError
from .result_files import evaluation_subject
from .text import perplexity, read_evaluation_text

#: These options decide which tokens are scored with which context. This module sets them.
FIXED_OPTIONS = (
    *("--path", "--gen-subset", "--tokens-per-sample", "--context-window", "--max-tokens", "--batch-size"),
    *("--num-workers", "--num-shards", "--shard-id", "--distributed-world-size"),
)


class TokenCounter(logging.Handler):
    """Reads the number of blocks and of scored tokens from fairseq-eval-lm's log; ValueError for infinite scores."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.tokens = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        if str(record.msg).startswith("skipping tokens with inf scores"):
            raise ValueError(
                "the model gives infinite scores: it has diverged, train it anew or use another checkpoint"
            )
        if blocks := re.search(r" ([\d,]+) examples$", str(record.msg)):
            self.blocks = int(blocks[1].replace(",", ""))
        if tokens := re.match(r"Evaluated ([\d,]+) tokens", str(record.msg)):
            self.tokens = int(tokens[1].replace(",", ""))


@dataclass(frozen=True)
class EvalLmSettings:
    """What fairseq-eval-lm evaluates; ValueError if a stride is too long, or a fixed option is passed on."""

    data: str
    checkpoint: str
    windowings: Sequence[tuple[int, int]]  # (length, stride) in tokens; stride = length is non-overlapping
    subset: str = "valid"
    positions: int = 4096  # tokens in a batch, context included
    passed_on: Sequence[str] = ()  # more arguments for fairseq-eval-lm

    def __post_init__(self) -> None:
        """Checks the settings."""
        for length, stride in self.windowings:
            if stride > length:
                raise ValueError(f"stride {stride} is longer than the window of {length} and would skip tokens")
        fixed = [option for option in self.passed_on if option.partition("=")[0] in FIXED_OPTIONS]
        if fixed:
            raise ValueError(f"{fixed[0]} decides what is scored and is set by this command: drop it")

    def as_trained(self, state: dict[str, Any]) -> "EvalLmSettings":
        """Adds the task options that change what a checkpoint reads or predicts; ValueError for contradictions."""
        trained = checkpoints.reading_options(state)
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--add-bos-token", action="store_true")
        parser.add_argument("--output-dictionary-size", type=int, default=0)
        given = vars(parser.parse_known_args(list(self.passed_on))[0])
        added = []
        for name, value in given.items():
            expected = trained.get(name, type(value)())
            option = f"--{name.replace('_', '-')}"
            if value and value != expected:
                raise ValueError(f"{self.checkpoint} was not trained with {option}: drop it")
            if expected and not value:
                added += [option] if expected is True else [f"{option}={expected}"]
        if trained.get("add_bos_token") and any(stride < length for length, stride in self.windowings):
            raise ValueError(
                f"{self.checkpoint} was trained with --add-bos-token: fairseq-eval-lm puts <s> into the middle of "
                "sliding windows; use fairseq-alibi evaluate with --stride"
            )
        return replace(self, passed_on=[*self.passed_on, *added])

    def arguments(self, length: int, stride: int) -> list[str]:
        """The arguments of fairseq-eval-lm for one windowing.

        fairseq counts only the new tokens of a window against --max-tokens, so `positions` becomes a number of windows
        first.
        """
        windows = max(1, self.positions // length)
        arguments: list[Any] = [self.data, *self.passed_on, "--user-dir", Path(__file__).parents[1]]
        arguments += ["--path", self.checkpoint, "--gen-subset", self.subset]
        arguments += ["--tokens-per-sample", length, "--context-window", length - stride]
        arguments += ["--max-tokens", windows * stride]
        arguments += ["--num-workers", 0, "--num-shards", 1, "--distributed-world-size", 1]
        return [str(argument) for argument in arguments]


def passed_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """The value of --model-overrides among arguments."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model-overrides", default="{}")
    return parse_overrides(parser.parse_known_args(list(arguments))[0].model_overrides)


def run_eval_lm(arguments: Sequence[str]) -> tuple[float, int]:
    """Runs fairseq-eval-lm in this process, with its progress bar; loss per scored token in bits, and their number."""
    counter = TokenCounter()
    logger = logging.getLogger("fairseq_cli.eval_lm")
    logger.addHandler(counter)
    try:
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), list(arguments))
        parse_overrides(args.model_overrides)
        results = eval_lm.main(convert_namespace_to_omegaconf(args))
    except SampleTooLongError:
        return 0.0, 0  # which the caller explains
    finally:
        logger.removeHandler(counter)
    # fairseq counts the <s> in front of each block, though it does not score it.
    return float(results["loss"]), counter.tokens - (counter.blocks if args.add_bos_token else 0)


def evaluate_windowing(settings: EvalLmSettings, length: int, stride: int, expected: int) -> dict[str, Any]:
    """Runs fairseq-eval-lm for one windowing; ValueError if it fails or does not score all `expected` tokens."""
    arguments = settings.arguments(length, stride)
    started = time.perf_counter()
    try:
        loss, scored = run_eval_lm(arguments)
    except (Exception, SystemExit) as error:  # fairseq raises errors of any kind, often over many lines
        said = isinstance(error, SystemExit) and not isinstance(error, CommandError)
        reason = "it refuses its arguments, see above" if said else one_line(error)
        raise ValueError(f"fairseq-eval-lm failed at length {length}, stride {stride}: {reason}") from error
    if scored != expected:
        raise ValueError(
            f"fairseq-eval-lm scored {scored:,} of the {expected:,} tokens of '{settings.subset}' at length {length}: "
            "the model was built with a longest sequence (pass -- --model-overrides \"{'max_target_positions': N}\"), "
            "or an option passed on drops tokens"
        )
    if not math.isfinite(loss):
        raise ValueError(f"the loss at length {length} is {loss}: the model has diverged, use another checkpoint")
    return {
        "length": length,
        "stride": stride,
        "context_window": length - stride,
        "tokens": scored,
        "loss": loss,
        "perplexity": perplexity(loss),
        "seconds": round(time.perf_counter() - started, 2),
        "command": shlex.join(["fairseq-eval-lm", *arguments]),
    }


def evaluate_with_fairseq(settings: EvalLmSettings, output: Path) -> dict[str, Any]:
    """Evaluates all windowings in turn; the JSON file `output`, whose content is returned, is written after each."""
    text = read_evaluation_text(settings.data, settings.subset, None)
    state = checkpoints.read_checkpoint(settings.checkpoint)
    checkpoints.check_dictionary(read_dictionary(settings.data), settings.data, settings.checkpoint, state)
    settings, overrides = settings.as_trained(state), passed_overrides(settings.passed_on)
    checkpoints.describe_model(settings.checkpoint, state)  # raises an error for a model of another task
    device = "cuda" if torch.cuda.is_available() and "--cpu" not in settings.passed_on else "cpu"
    dtype = "float16" if "--fp16" in settings.passed_on else "float32"
    subject = evaluation_subject(state, text, overrides, dtype, device)
    checkpoints.override_options(state, overrides)
    results: list[dict[str, Any]] = []
    content = {
        "model": checkpoints.describe_evaluated(settings.checkpoint, state, overrides),
        "data": settings.data,
        "subset": settings.subset,
        "subject": subject,
        "options": list(settings.passed_on),
        "environment": describe_environment(device),
        "results": results,
    }
    check_writable(output)
    for length, stride in settings.windowings:
        result = evaluate_windowing(settings, length, stride, text.tokens)
        results.append(result)
        write_json(output, content)
        print(f"length {length}, stride {stride}: perplexity {result['perplexity']:.2f} ({result['seconds']} s)")
    return content
