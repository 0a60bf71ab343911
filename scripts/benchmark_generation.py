"""Speed and memory of generation at long contexts: the bounded cache beside one of all keys, and BLOOM in transformers.

    python scripts/benchmark_generation.py --lengths 1000 10000 100000
    python scripts/benchmark_generation.py --soak 200000

Contenders take turns, `STEPS` tokens each; medians are compared. Memory is that of keys and values after
the context; with --soak also that of the process, every tenth of the run. Without --checkpoint a small model is trained
once on Python's own source and kept in the output folder. BLOOM has random weights and the same sizes.
"""

import argparse
import dataclasses
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_measure import quiet
from benchmark_models import train_model
from tabulate import tabulate
from torch import Tensor

from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.core.bounded_cache import bounded_cache_in
from fairseq_alibi.files.checkpoints import load_model, read_checkpoint
from fairseq_alibi.files.results import check_outputs, describe_environment, write_json, write_text
from fairseq_alibi.models.decoder import PROGRESS

STEPS = 8  # tokens in a step that is timed


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


class Bloom:
    """The same with BLOOM, 4 layers, width 256, 8 heads, in transformers."""

    def __init__(self, args: argparse.Namespace, context: int):
        from transformers import BloomConfig, BloomForCausalLM

        torch.manual_seed(1)
        self.model = BloomForCausalLM(BloomConfig(vocab_size=8000, hidden_size=256, n_layer=4, n_head=8)).eval()
        prompt = torch.randint(4, 8000, (1, context))
        self.state = None
        with torch.no_grad():
            for part in prompt.split(1024, dim=1):
                output = self.model(part, past_key_values=self.state, use_cache=True, logits_to_keep=1)
                self.state = output.past_key_values
        self.token = output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def step(self, count: int = STEPS) -> None:
        """Adds `count` tokens."""
        for _ in range(count):
            output = self.model(self.token, past_key_values=self.state, use_cache=True)
            self.state, self.token = output.past_key_values, output.logits[:, -1:].argmax(-1)


def measure_context(context: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second and bytes of the cache of all contenders after a context."""
    makers: dict[str, Callable[[], Any]] = {
        "bounded": partial(Ours, args, True, context),
        "all keys": partial(Ours, args, False, context),
    }
    if not args.no_bloom and context <= args.longest_bloom:
        makers["BLOOM"] = partial(Bloom, args, context)
    made = {name: make() for name, make in makers.items()}
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(1 + args.repeats):
        for name, contender in made.items():
            started = clock()
            contender.step()
            if number:  # the first round warms up
                seconds[name].append(clock() - started)
    found = []
    for name, contender in made.items():
        median, spread = statistics.median(seconds[name]), (max(seconds[name]) - min(seconds[name])) / 2
        speed = {"tokens_per_second": STEPS / median, "spread": spread / median, "rounds": args.repeats}
        found.append({"context": context, "contender": name, **speed, "cache_bytes": cache_bytes(contender.state)})
    return found


def soak(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Generates `args.soak` tokens; speed and memory after every tenth."""
    ours, found = Ours(args, True, 1), []
    for _ in range(10):
        started = time.perf_counter()
        ours.step(args.soak // 10)
        seconds = time.perf_counter() - started
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        memory = {"cache_bytes": cache_bytes(bounded_cache_in(ours.state)), "process_bytes": resident}
        found.append({"tokens": ours.length, "tokens_per_second": args.soak // 10 / seconds, **memory})
        print(found[-1], file=sys.stderr)
    return found


def table(content: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    rows, environment = [], content["environment"]
    for one in content["measurements"]:
        base = next(
            x for x in content["measurements"] if (x["context"], x["contender"]) == (one["context"], "all keys")
        )
        ratio = one["tokens_per_second"] / base["tokens_per_second"]
        speed = f"{one['tokens_per_second']:,.1f} ±{one['spread']:.0%}"
        rows.append(
            [f"{one['context']:,}", one["contender"], speed, f"{ratio:.2f}", f"{one['cache_bytes'] / 2**20:,.1f}"]
        )
    text = tabulate(
        rows,
        ["context", "cache", "tokens/s", "times all keys", "keys and values, MiB"],
        tablefmt="github",
        colalign=("right", "left", "right", "right", "right"),
    )
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
    add("--no-bloom", action="store_true", help="leave out BLOOM")
    add("--longest-bloom", type=positive_integer, default=10_000, metavar="N", help="longest context for BLOOM")
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
