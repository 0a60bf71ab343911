"""Speed and memory of generation at long contexts: the bounded cache beside one of all keys and beside other libraries.

    python scripts/benchmark_generation.py --lengths 1000 10000 100000
    python scripts/benchmark_generation.py --lengths --soak 200000

Contenders take turns, `STEPS` tokens each; medians are compared. Memory is that of keys and values after the context,
and that of a fresh process at its highest, which reads the context and makes `STEPS` tokens. With --soak it is that of
the process, every tenth of the run. Without --checkpoint a model of 4 layers, width 256 and 8 heads is trained once on
Python's own source and kept in the output folder. The other libraries' models have random weights and these sizes.
"""

import argparse
import dataclasses
import functools
import math
import multiprocessing
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_measure import alternate, compared, highest_memory, quiet
from benchmark_models import train_model
from tabulate import tabulate
from torch import Tensor

from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.core.bounded_cache import bounded_cache_in
from fairseq_alibi.files.checkpoints import load_model, read_checkpoint
from fairseq_alibi.files.results import check_outputs, describe_environment, write_json, write_text
from fairseq_alibi.models.decoder import PROGRESS

STEPS = 8  # tokens in a step that is timed
TYPES = 8000  # in the vocabulary of the other libraries' models


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a cache, whatever holds them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in tensors_in(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in tensors_in(item))
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        yield from tensors_in({name: item for name, item in vars(value).items() if not callable(item)})


def cache_bytes(cache: Any) -> int:
    """Bytes of the storage behind all tensors of a cache."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_in(cache)}
    return sum(storages.values())


class Ours:
    """Greedy generation with a checkpoint, with a cache that is bounded or keeps and reads all keys."""

    def __init__(self, args: argparse.Namespace, bounded: bool, context: int):
        model = load_model(str(args.checkpoint), read_checkpoint(str(args.checkpoint)), str(args.data))
        self.decoder = model.decoder
        self.state: dict[str, Any] = {} if bounded else {PROGRESS: {"kept": 0, "dropped": 0}}  # as one that has begun
        settings = dataclasses.replace(self.decoder.setup.settings, epsilon=args.epsilon)
        self.decoder.setup.settings = settings
        types = len(self.decoder.dictionary)
        prompt = torch.randint(4, types, (1, context), generator=torch.Generator().manual_seed(1))
        self.tokens, self.length = prompt.new_zeros(1, context + args.soak + 100_000), context
        self.tokens[:, :context] = prompt
        self.step(1)

    @torch.no_grad()
    def step(self, count: int = STEPS) -> None:
        """Adds `count` tokens."""
        for _ in range(count):
            tokens = self.tokens[:, : self.length]
            logits = self.decoder(tokens, incremental_state=self.state)[0]
            self.tokens[:, self.length] = logits[:, -1].argmax(-1)
            self.length += 1


class Other:
    """Greedy generation with another library's model of the same sizes and random weights.

    Args:
        forward: takes tokens and the cache, None at first; returns logits and the cache.
        context: random tokens that are read first, 1,024 at a time.
    """

    def __init__(self, forward: Callable[[Tensor, Any], tuple[Tensor, Any]], context: int):
        self.forward, self.state = forward, None
        for self.tokens in torch.randint(4, TYPES, (1, context)).split(1024, dim=1):
            self.step(1)

    @torch.no_grad()
    def step(self, count: int = STEPS) -> None:
        """Adds `count` tokens."""
        for _ in range(count):
            logits, self.state = self.forward(self.tokens, self.state)
            self.tokens = logits[:, -1:].argmax(-1)


def bloom(context: int) -> Other:
    """BLOOM in transformers."""
    from transformers import BloomConfig, BloomForCausalLM
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # newer releases call the cache otherwise
    model = BloomForCausalLM(BloomConfig(vocab_size=TYPES, hidden_size=256, n_layer=4, n_head=8)).eval()

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = model(tokens, past_key_values=state, use_cache=True, logits_to_keep=1)
        return output.logits, output.past_key_values

    return Other(forward, context)


def x_transformers(context: int) -> Other:
    """The package x-transformers with ALiBi, torch's fused attention and its cache of keys and values."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=256, depth=4, heads=8, attn_dim_head=32, alibi_pos_bias=True, attn_flash=True)
    sizes = {"num_tokens": TYPES, "max_seq_len": context + 100_000, "use_abs_pos_emb": False}
    model = TransformerWrapper(**sizes, attn_layers=layers, input_not_include_cache=True).eval()

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return model(tokens, cache=state, cache_age=tokens.shape[1], return_intermediates=True)

    return Other(forward, context)


def make(contender: str, context: int, args: argparse.Namespace) -> Any:
    """A contender that has read `context` tokens and made one."""
    torch.manual_seed(1)
    if contender in OTHERS:
        return OTHERS[contender](context)
    return Ours(args, contender == "bounded", context)


def peak_bytes(contender: str, context: int, args: argparse.Namespace) -> int:
    """Memory of this process at its highest, with a contender that makes `STEPS` tokens after a context."""
    quiet()
    make(contender, context, args).step()
    return highest_memory()


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that --cpu-time chooses, in seconds."""
    return time.process_time if args.cpu_time else time.perf_counter


def measure_context(context: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second, bytes of the cache and of the process of all contenders after a context; or their error."""
    others = args.others if context <= args.longest_others else []
    made = {name: functools.cache(partial(make, name, context, args)) for name in ["bounded", "all keys", *others]}
    steps = {name: (lambda one=one: one().step()) for name, one in made.items()}
    times = alternate(steps, args.repeats, math.inf, clock_of(args))
    found = compared("generation", context, STEPS, times, context=context)
    for one in found:
        if "error" not in one:
            one["cache_bytes"] = cache_bytes(made[one["contender"]]().state)
            with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
                one["peak_bytes"] = pool.submit(peak_bytes, one["contender"], context, args).result()
    return found


OTHERS: dict[str, Callable[[int], Other]] = {"bloom": bloom, "x-transformers": x_transformers}


def soak(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Generates `args.soak` tokens; speed and memory after every tenth."""
    ours, clock, found = Ours(args, True, 1), clock_of(args), []
    for _ in range(10):
        started = clock()
        ours.step(args.soak // 10)
        seconds = clock() - started
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        memory = {"cache_bytes": cache_bytes(bounded_cache_in(ours.state)), "process_bytes": resident}
        found.append({"tokens": ours.length, "tokens_per_second": args.soak // 10 / seconds, **memory})
        print(found[-1], file=sys.stderr)
    return found


def table(content: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    rows, environment = [], content["environment"]
    for one in content["measurements"]:
        row = [f"{one['context']:,}", one["contender"]]
        if "error" in one:
            rows.append([*row, one["error"]])
            continue
        ratio = one["times_as_fast"].get("all keys", math.nan)
        row += [f"{one['tokens_per_second']:,.1f} ±{one['spread']:.0%}", f"{ratio:.2f}"]
        rows.append(row + [f"{one[size] / 2**20:,.1f}" for size in ("cache_bytes", "peak_bytes")])
    heads = ["context", "cache", "tokens/s", "times all keys", "keys and values, MiB", "process at its highest, MiB"]
    aligned = ("right", "left", "right", "right", "right", "right")
    text = tabulate(rows, heads, tablefmt="github", colalign=aligned) if rows else ""
    for one in content["soak"]:
        sizes = f"{one['cache_bytes'] / 2**20:,.1f} MiB of keys and values, {one['process_bytes'] / 2**20:,.0f} in all"
        text += f"\n{one['tokens']:,} tokens: {one['tokens_per_second']:,.1f} tokens/s, {sizes}"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "fairseq_alibi"))
    clock = "CPU seconds" if "--cpu-time" in content["command"] else "seconds by the clock"
    load = f"{clock}, load average {content['load_average'][0]:.1f} to {content['load_average'][1]:.1f}"
    return f"{environment['device']}; {versions}; float32; {load}.\n\n{text}\n"


def main() -> None:
    """Measures and writes generation.json and generation.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", type=positive_integer, nargs="*", default=[1000, 10_000], metavar="N", help="tokens of context")
    add("--epsilon", type=float, default=1e-7, help="weight of 1 that may be skipped (default 1e-7)")
    add("--repeats", type=positive_integer, default=7, metavar="N", help="rounds (default 7)")
    add("--cpu-time", action="store_true", help="CPU seconds, not those of the clock, for one thread on a busy machine")
    add("--soak", type=int, default=0, metavar="N", help="also generate so many tokens in one go")
    add("--others", nargs="*", choices=OTHERS, default=["bloom"], help="other libraries' models (default: bloom)")
    add("--longest-others", type=positive_integer, default=10_000, metavar="N", help="their longest context")
    add("--checkpoint", type=Path, help="ALiBi model; default: a small one, trained first")
    add("--data", type=Path, help="fairseq data folder of the checkpoint")
    add("--updates", type=positive_integer, default=300, metavar="N", help="of the small model (default 300)")
    add("--output", type=Path, default=Path("results/generation"), metavar="DIR", help="default results/generation")
    add("--overwrite", action="store_true", help="replace results that are there")
    args = parser.parse_args()
    quiet()
    try:
        results = [args.output / "generation.json", args.output / "generation.md"]
        check_outputs(results, args.overwrite)
        if args.checkpoint is None:
            args.checkpoint, args.data = train_model(args.output, args.updates, cpu=True)
        content: dict[str, Any] = {"command": shlex.join(sys.argv), "environment": describe_environment("cpu")}
        content.update(load_average=[os.getloadavg()[0]] * 2, measurements=[], soak=[])
        for length in args.lengths:
            content["measurements"] += measure_context(length, args)
            content["load_average"][1] = os.getloadavg()[0]
            write_json(results[0], content)
        content["soak"] = soak(args) if args.soak else []
        write_json(results[0], content)
        write_text(results[1], table(content))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark_generation: {error}")
    print(f"{table(content)}\nwritten to {results[0]} and {results[1]}")


if __name__ == "__main__":
    main()
