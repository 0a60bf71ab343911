"""A long run that looks for leaks: training, evaluation at changing lengths and checkpoints, in one process.

Each round trains with fairseq's trainer, saves, reads the checkpoint as a new model and evaluates that, and the model
in training too, at a length drawn at random, with blocks, a sliding window and as one stream. After each round resident
memory, open files and threads are noted. They are flat if the median of the last quarter of the rounds is not above
that of the second (the first, in which caches fill, is left out) by more than `ALLOWED`.
"""

import argparse
import ctypes
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import options, tasks
from fairseq.data.iterators import GroupedIterator
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from torch import Tensor
from tqdm import tqdm

from fairseq_alibi.__main__ import exit_interrupted, interrupt
from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.evaluation.scoring import score_stream, score_windows
from fairseq_alibi.files.checkpoints import load_model, read_checkpoint
from fairseq_alibi.files.data_folders import read_dictionary, read_subset
from fairseq_alibi.files.results import check_writable, describe_environment, write_json, written_whole

#: Lengths are drawn between the first and the last, evenly by their logarithm; there is a mask up to the second.
SHORTEST, LONGEST_MASKED, LONGEST = 64, 2048, 16384

#: How much higher the last quarter of a run may be: memory in MiB, for what the allocator leaves in pieces, and files.
ALLOWED = {"memory_mib": 20, "files": 0, "threads": 0}

#: Fewer rounds tell nothing: at which lengths a quarter of them happens to run weighs more than what leaks.
ENOUGH = 80


def trainer_of(data: str) -> Trainer:
    """fairseq's trainer of a small ALiBi model."""
    arguments = [data, "--task", "language_modeling", "--arch", "alibi_lm_tiny", "--tokens-per-sample", 256, "--cpu"]
    arguments += ["--max-tokens", 2048, "--optimizer", "adam", "--lr", 0.001, "--clip-norm", 0.5, "--seed", 1]
    arguments += ["--distributed-world-size", 1, "--sample-break-mode", "none"]
    cfg = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), list(map(str, arguments)))
    )
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def batches(trainer: Trainer) -> Iterator[list[Any]]:
    """Batches of training, epoch after epoch, of a data set that is opened once, as fairseq-train has it."""
    for epoch in range(1, sys.maxsize):
        iterator = trainer.get_train_iterator(epoch, load_dataset=epoch == 1)
        yield from GroupedIterator(iterator.next_epoch_itr(), 1)


def evaluate(model: torch.nn.Module, text: Tensor, length: int, attention: str) -> float:
    """Mean loss of a text, nats, over the three ways of evaluation."""
    model.decoder.setup.use_kernel(attention)
    ways = (
        score_windows(model, text, length, length, 4096),
        score_windows(model, text, length, max(1, length // 2), 4096),
        score_stream(model, text, length),
    )
    losses = [scored.losses.flatten() for way in ways for scored in way]
    model.decoder.setup.use_kernel("auto")
    return torch.cat(losses).mean().item()


def state_of_process() -> dict[str, float]:
    """Resident memory, MiB, without what is free where the C library can give it back; open files; threads.

    Raises:
        ValueError: there is no /proc to read them from.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what is free but in pieces goes back to the system: it tells nothing of leaks
        libc.malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    except OSError as error:
        raise ValueError("memory and open files are read from Linux's /proc, which is not here") from error
    return {"memory_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "files": files, "threads": threads}


def soak(data: str, seconds: float, updates: int = 10, tokens: int = 4096, seed: int = 1) -> list[dict[str, float]]:
    """Trains and evaluates for so many seconds, with a progress bar; returns what was noted after each round.

    Args:
        data: fairseq data folder with the subsets train and valid.
        seconds: to run, at least one round.
        updates: of training in a round.
        tokens: of text that a round evaluates, drawn at random; at least the length.
        seed: of the lengths and the texts.
    """
    draw, trainer, text, rounds = random.Random(seed), trainer_of(data), read_subset(data, "valid"), []
    training, begun = batches(trainer), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=round(seconds), unit="s", desc="soak", disable=None) as bar,
    ):
        checkpoint = str(Path(folder, "checkpoint_last.pt"))
        while not rounds or time.monotonic() - begun < seconds:
            for _ in range(updates):
                trainer.train_step(next(training))
            trainer.consolidate_optimizer()
            trainer.save_checkpoint(checkpoint, {})
            length = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
            first = draw.randrange(max(1, len(text) - tokens))
            some = text[first : first + max(tokens, length)]
            trainer.model.eval()
            losses = [evaluate(trainer.model, some, length, "auto")]
            model = load_model(checkpoint, read_checkpoint(checkpoint), data)
            losses.append(evaluate(model, some, length, "mask" if length <= LONGEST_MASKED else "auto"))
            trainer.model.train()
            del model
            if abs(losses[1] - losses[0]) > 1e-4:
                raise ValueError(f"the model in training has loss {losses[0]}, its checkpoint {losses[1]}")
            past = {"seconds": time.monotonic() - begun, "updates": trainer.get_num_updates(), "length": length}
            rounds.append({**past, "loss": losses[0], **state_of_process()})
            bar.update(min(round(past["seconds"]), bar.total) - bar.n)
    return rounds


def growth(rounds: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Medians of the second and the last quarter of a run, by what was noted."""
    quarter = max(1, len(rounds) // 4)
    second, last = rounds[quarter : 2 * quarter] or rounds, rounds[-quarter:]
    return {name: tuple(statistics.median(one[name] for one in part) for part in (second, last)) for name in ALLOWED}


def plot(rounds: list[dict[str, float]], path: Path) -> None:
    """Draws memory and open files against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, sharex=True, figsize=(7, 4.5), layout="constrained")
    minutes = [one["seconds"] / 60 for one in rounds]
    for axis, name, label in zip(axes, ("memory_mib", "files"), ("resident memory, MiB", "open files")):
        axis.plot(minutes, [one[name] for one in rounds], ".", markersize=3)
        axis.set(ylabel=label, ylim=(0, 1.15 * max(one[name] for one in rounds)))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Optional[list[str]] = None) -> None:
    """Runs, writes soak.json and soak.png, and says whether memory and files were flat: status 1 if not."""
    parser = argparse.ArgumentParser(prog="soak.sh", description=__doc__.splitlines()[0])
    parser.add_argument("data", help="fairseq data folder")
    parser.add_argument("--minutes", type=float, default=60, help="to run (default 60)")
    parser.add_argument("--updates", type=positive_integer, default=10, help="of training in a round (default 10)")
    parser.add_argument("--output", type=Path, default=Path("results/soak"), help="folder (default results/soak)")
    args = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if not args.minutes > 0:
            raise ValueError(f"--minutes must be more than 0, not {args.minutes:g}")
        read_dictionary(args.data)
        check_writable(args.output / "soak.json")
        rounds = soak(args.data, 60 * args.minutes, args.updates)
    except KeyboardInterrupt as interruption:
        exit_interrupted("soak", interruption)
    except (ValueError, OSError) as error:
        sys.exit(f"soak: {error}")
    found = growth(rounds)
    write_json(args.output / "soak.json", {"environment": describe_environment(), "growth": found, "rounds": rounds})
    with written_whole(args.output / "soak.png") as partial:
        plot(rounds, partial)
    last = rounds[-1]
    print(
        f"{len(rounds)} rounds, {last['updates']:,} updates, {last['seconds'] / 60:.1f} minutes; medians of the second"
    )
    print("and the last quarter of the rounds:")
    for name, (before, after) in found.items():
        print(f"  {name:<11} {before:8,.1f} {after:8,.1f}  {after - before:+.1f}")
    print(f"written to {args.output / 'soak.json'} and soak.png")
    if len(rounds) < ENOUGH:
        sys.exit(f"soak: {len(rounds)} rounds are too few to tell, {ENOUGH} are needed: raise --minutes")
    grown = [name for name, (before, after) in found.items() if after - before > ALLOWED[name]]
    if grown:
        sys.exit(f"soak: not flat: {', '.join(grown)}")


if __name__ == "__main__":
    main()
