"""Measurements of the benchmark: time in turns, peak memory in fresh processes.

The contenders take turns within one run, so that a machine that gets slower does so for all of them. Each is made and
run once before, which compiles and warms up and counts neither as speed nor for the budget. Medians are compared.
"""

import argparse
import functools
import gc
import logging
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from benchmark_contenders import (
    ATTENTION,
    SCORING,
    attention_step,
    contenders_of,
    evaluated_model,
    evaluation_step,
    perplexity,
    score,
    skipped_scores,
    training_step,
)
from benchmark_models import Case, first_tokens, made_up_model, rows
from torch.utils.flop_counter import FlopCounterMode

from fairseq_alibi.files.errors import one_line

#: Rounds that are measured whatever the budget.
ROUNDS = 3
#: Those that the others are compared with.
BASES = {
    "attention": ("mask", "no bias"),
    "training": ("mask", "transformer_lm"),
    "methods": ("mask", "alibi"),
    "evaluation": ("mask", "no skipping"),
    "scoring": ("fairseq-eval-lm",),
    "generation": ("all keys",),
}
#: Peak memory is measured with this one.
MEMORY_CASE = Case(32_496, "4000,8000", 8192, 8192, 16_384)


class Timing(NamedTuple):
    """What was measured of a contender.

    Args:
        seconds: of every round that counts.
        first_seconds: of the first call, with compilation; None if it failed.
        error: why it failed; None if it did not.
    """

    seconds: list[float]
    first_seconds: Optional[float]
    error: Optional[str]


def alternate(
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Runs all contenders in turn, again and again, after one call of each that does not count.

    Args:
        contenders: what to run, by name.
        repeats: rounds that count, at least `ROUNDS`.
        budget: seconds after which no round begins, but for the first `ROUNDS`.
        clock: returns seconds.
    """
    first: dict[str, float] = {}
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def timed_call(name: str) -> float:
        synchronize()
        started = clock()
        try:
            contenders[name]()
            synchronize()
        except Exception as error:  # a kernel, a compiler, a driver, memory
            errors[name] = "out of memory" if out_of_memory(error) else one_line(error)
        return clock() - started

    for name in contenders:
        first[name] = timed_call(name)
    begun, names = time.perf_counter(), list(contenders)
    for number in range(max(ROUNDS, repeats)):
        if number >= ROUNDS and time.perf_counter() - begun > budget:
            break
        names = names[1:] + names[:1]  # another contender begins each round, because the caches that it finds differ
        for name in names:
            if name not in errors:
                seconds[name].append(timed_call(name))
    return {
        name: Timing([], None, errors[name]) if name in errors else Timing(seconds[name], first[name], None)
        for name in contenders
    }


def made_once(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A contender that is made by its first call, so that making it may fail like running it."""
    made = functools.cache(make)
    return lambda: made()()


def synchronize() -> None:
    """Waits for the GPU, where there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def out_of_memory(error: Exception) -> bool:
    """Says whether an error of PyTorch means that memory ran out, on a GPU or a CPU."""
    return any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory"))


def compared(part: str, length: int, tokens: int, times: dict[str, Timing], **more: Any) -> list[dict[str, Any]]:
    """The measurements of one length, each contender's speed beside that of the part's bases.

    Args:
        part: one that has `BASES`.
        length: tokens in a sequence.
        tokens: that were worked on in all.
        times: see `alternate`.
        more: goes into every measurement.

    Returns:
        Per contender: what was measured, seconds of every repeat and of the first call, their median and spread (half
        of the range, as a share of the median), tokens_per_second, and `times_as_fast` as each base; or an `error`.
    """
    medians = {name: statistics.median(timing.seconds) for name, timing in times.items() if timing.seconds}
    measurements = []
    for name, (seconds, first_seconds, error) in times.items():
        measurement = {"part": part, "contender": name, "length": length, "tokens": tokens, **more, "seconds": seconds}
        if error is None:
            measurement["first_seconds"] = first_seconds
            measurement["median_seconds"] = medians[name]
            measurement["spread"] = (max(seconds) - min(seconds)) / 2 / medians[name]
            measurement["tokens_per_second"] = tokens / medians[name]
            measurement["times_as_fast"] = {b: medians[b] / medians[name] for b in BASES[part] if b in medians}
        else:
            measurement["error"] = error
        measurements.append(measurement)
    return measurements


def timed(part: str, length: int, head_dim: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the speed of all contenders of a part at one length, see `compared`."""
    more: dict[str, Any] = {}
    if part == "attention":
        more = {"head_dim": head_dim}
        makers = {name: partial(attention_step, name, length, head_dim, args) for name in ATTENTION}
    elif part == "training":
        makers = {name: partial(training_step, name, length, args) for name in contenders_of(part, length, args)}
    else:
        makers = {name: partial(evaluation_step, name, length, args) for name in contenders_of(part, length, args)}
        tokens = first_tokens(str(args.data), length)[None].to(args.device)
        more = skipped_scores(evaluated_model("auto", args), tokens)
    batch = 1 if part == "evaluation" else rows(length, args.tokens)
    steps = {name: made_once(make) for name, make in makers.items()}
    times = alternate(steps, args.repeats, args.budget)
    measurements = compared(part, length, batch * length, times, rows=batch, **more)
    for measurement in measurements:
        contender = measurement["contender"]
        if part == "training" and contender == "auto" and measurement["seconds"]:
            measurement["product_share"] = product_share(steps["auto"], measurement["median_seconds"], args)
        if (
            part == "evaluation" and contender.startswith("auto") and measurement["seconds"]
        ):  # the others compute what auto does
            measurement["perplexity"] = perplexity(contender, length, args)
    return measurements


def timed_method(method: str, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the speed of training with a position method, under a mask too, beside ALiBi, see `compared`."""
    named = {"auto": method, "mask": f"{method}, mask", "alibi": "alibi"}
    steps = {name: made_once(partial(training_step, contender, length, args)) for name, contender in named.items()}
    batch = rows(length, args.tokens)
    times = alternate(steps, args.repeats, args.budget)
    return compared("methods", length, batch * length, times, rows=batch, case=f"{method}, {length:,}")


def timed_scoring(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures how fast the commands score a text, reading the checkpoint included, see `compared`."""
    with tempfile.TemporaryDirectory() as folder:
        made_up_model(case, Path(folder), args)
        times = alternate(
            {name: partial(score, name, case, folder, args) for name in SCORING}, args.repeats, args.budget
        )
    more = {"case": case.title, "stride": case.stride, "types": case.types}
    return compared("scoring", case.length, case.tokens, times, **more)


def peak_memory(of: Optional[str], contender: str, length: int, args: argparse.Namespace) -> int:
    """Bytes of memory at the highest, from here on where on a GPU, else of this process since it began.

    Args:
        of: training, evaluation, scoring, or None for doing nothing.
        contender, length, args: what is run; training twice, for the optimizer's state comes with the first update.
    """
    if args.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    quiet()
    if of == "scoring":
        with tempfile.TemporaryDirectory() as folder:
            made_up_model(MEMORY_CASE, Path(folder), args)
            score(contender, MEMORY_CASE, folder, args)
    elif of is not None:
        step = (training_step if of == "training" else evaluation_step)(contender, length, args)
        for _ in range(2 if of == "training" else 1):
            step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return highest_memory()


def highest_memory() -> int:
    """Bytes of this process at its highest since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(of: Optional[str], contender: str, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures peak memory; on a CPU in a fresh process that has imported everything and run nothing yet."""
    measurement = {"part": "memory", "of": of, "contender": contender, "length": length, "rows": 1}
    if of == "training":
        measurement["rows"] = rows(length, args.tokens)
    if of == "scoring":
        measurement.update(case=MEMORY_CASE.title, length=MEMORY_CASE.length)
    try:
        if args.device == "cuda":
            return [{**measurement, "peak_memory_bytes": peak_memory(of, contender, length, args)}]
        # Forked from a server that did the imports: a process started from here would inherit this one's peak.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["fairseq.trainer", "fairseq_alibi", "benchmark_contenders", "fairseq_cli.eval_lm"]
        )
        with ProcessPoolExecutor(1, context) as pool:
            peak = pool.submit(peak_memory, of, contender, length, args).result()
        return [{**measurement, "peak_memory_bytes": peak}]
    except Exception as error:  # a process that was killed ran out of memory too
        memory_error = isinstance(error, BrokenProcessPool) or out_of_memory(error)
        return [{**measurement, "error": "out of memory" if memory_error else one_line(error)}]


def quiet() -> None:
    """Errors only: fairseq logs every model and every step."""
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("fairseq").setLevel(logging.ERROR)


def product_rate(args: argparse.Namespace) -> float:
    """Floating-point operations per second of this device in one large matrix product, the best of some."""
    n = 4096 if args.device == "cuda" else 1024
    x = torch.ones(n, n, device=args.device, dtype=getattr(torch, args.dtype))
    times = alternate({"product": lambda: x @ x}, 10, 10.0)
    return 2 * n**3 / min(times["product"].seconds)


def product_share(step: Callable[[], Any], seconds: float, args: argparse.Namespace) -> float:
    """The roofline of training: what share of `seconds` an update's matrix products need at `product_rate`.

    Those of the layers and the output; not those inside attention, which are another kernel's.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / product_rate(args) / seconds
