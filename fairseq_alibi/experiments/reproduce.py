"""The paper's comparison in one go: trains every position method alike, evaluates at many lengths, writes one page.

All models of a training length have the same seed, the same order of the data and, where shapes agree, the same initial
weights. Every step that is done is noted in its model's folder and not done again.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tabulate import tabulate
from tqdm import tqdm

from ..commands.arguments import positive_integer
from ..core.positions import POSITION_METHODS
from ..evaluation.curves import Curve, pool_positions, read_curves
from ..evaluation.plots import plot_lengths, plot_positions
from ..evaluation.tables import length_table, position_table
from ..files.inputs import one_line, read_dictionary, subset_tokens
from ..files.results import describe_environment, now, write_json, write_text, written_whole
from ..patches.training import updates_of

ROOT = Path(__file__).parents[2]

#: Data made of text that every machine has.
BUILTIN = "data-bin/builtin"

#: Best first, at lengths past the training length (Press et al. 2022, figures 1 and 4).
PAPER_ORDER = ("alibi", "t5", "rotary", "sinusoidal")


def small_model(data: str, method: str, length: int, save_dir: Path, updates: int, more: list[str]) -> list[str]:
    """fairseq-train for a model that a CPU trains: 2 layers of width 128."""
    warmup = max(1, updates // 10)
    command = [
        data,
        "--user-dir",
        Path(__file__).parents[1],
        "--task",
        "language_modeling",
        "--position-method",
        method,
    ]
    command += ["--tokens-per-sample", length, "--max-tokens", max(2048, length), "--required-batch-size-multiple", 1]
    command += ["--optimizer", "adam", "--lr", 0.004, "--clip-norm", 0.5, "--lr-scheduler", "cosine"]
    command += ["--warmup-updates", warmup, "--lr-period-updates", updates - warmup, "--max-update", updates]
    command += ["--seed", 1, "--disable-validation", "--no-epoch-checkpoints", "--save-interval-updates", 200]
    command += ["--keep-interval-updates", 1, "--save-dir", save_dir, "--cpu", *more]
    return ["fairseq-train", *map(str, command)]


def laptop(data: str, method: str, length: int, save_dir: Path, updates: int) -> list[str]:
    """The model of scripts/quickstart.sh."""
    return small_model(data, method, length, save_dir, updates, ["--arch", "alibi_lm_tiny"])


def slice_of_wikitext(data: str, method: str, length: int, save_dir: Path, updates: int) -> list[str]:
    """The same with the word-level vocabulary of some ten thousand types that part of WikiText-103 has."""
    sizes = [f"--decoder-{name}-dim=128" for name in ("embed", "input", "output")]
    sizes += ["--decoder-ffn-embed-dim=512", "--decoder-layers=2", "--decoder-attention-heads=8"]
    adaptive = ["--adaptive-input", "--adaptive-input-cutoff=4000,8000", "--adaptive-softmax-cutoff=4000,8000"]
    adaptive += ["--tie-adaptive-weights", "--criterion=adaptive_loss", "--ddp-backend=legacy_ddp"]
    more = ["--arch=alibi_lm", "--decoder-normalize-before", *sizes, *adaptive]
    return small_model(data, method, length, save_dir, updates, more)


def paper(data: str, method: str, length: int, save_dir: Path, updates: int) -> list[str]:
    """The paper's WikiText-103 model and settings."""
    script = str(ROOT / "scripts" / "train_wikitext103.sh")
    command = ["bash", script, data, str(save_dir), str(length), "--position-method", method]
    return [*command, "--max-update", str(updates)]


class Preset(NamedTuple):
    """What is trained and evaluated.

    Args:
        train: makes the training command of data, method, length, folder and number of updates.
        data: fairseq data folder; None where the user has to name it.
        training_lengths, evaluation_lengths: in tokens.
        updates: of training.
        at_once: models that are trained or evaluated at the same time, each with one thread if more than one.
    """

    train: Callable[[str, str, int, Path, int], list[str]]
    data: Optional[str]
    training_lengths: tuple[int, ...]
    evaluation_lengths: tuple[int, ...]
    updates: int
    at_once: int


PRESETS = {
    "laptop": Preset(laptop, BUILTIN, (128, 512), (128, 256, 512, 1024, 2048), 300, 2),
    "slice": Preset(slice_of_wikitext, None, (256,), (256, 512, 1024, 2048, 4096), 1200, 2),
    "paper": Preset(paper, "data-bin/wikitext-103", (512, 3072), (512, 1024, 2048, 3072, 6144, 12288), 286000, 1),
}


class Run(NamedTuple):
    """One model: its method, training length and folder."""

    method: str
    length: int
    folder: Path

    @property
    def checkpoint(self) -> Path:
        """What is evaluated."""
        return self.folder / "checkpoint_last.pt"


def steps(run: Run, preset: Preset, args: argparse.Namespace) -> dict[str, list[str]]:
    """The commands for a model, by name, in their order."""
    lengths = list(preset.evaluation_lengths)
    if run.method == "learned":  # its table ends there
        lengths = [length for length in lengths if length <= run.length]
    evaluate = ["fairseq-alibi", "evaluate", args.data, str(run.checkpoint), "--lengths", ",".join(map(str, lengths))]
    evaluate += ["--subset", args.subset, "--by-position", "--output", str(args.output / "results")]
    evaluate += ["--cpu"] if args.cpu or preset.at_once > 1 else []
    train = preset.train(args.data, run.method, run.length, run.folder, args.updates)
    logging = ["--log-format", "json", "--log-interval", "20", "--log-file", str(run.folder / "train.json.log")]
    return {
        "training": [*train, *logging],
        "evaluation": evaluate,
        "sliding window": [*evaluate, "--stride-fraction", "1/2"],
    }


class Running:
    """Commands that run side by side, so that all can be ended together."""

    def __init__(self, one_thread: bool):
        self.environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if one_thread else {})}
        self.processes: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, command: list[str], log: Path) -> int:
        """Runs a command, its output into a log; returns its peak memory in bytes.

        Raises:
            ValueError: it failed; names the log and its last line.
        """
        with log.open("w", encoding="utf-8") as output:
            with self.lock:
                if self.stopped:
                    raise KeyboardInterrupt
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=self.environment)
                self.processes.add(process)
            _, status, usage = os.wait4(process.pid, 0)  # as Popen.wait, and with the memory of this process alone
            process.returncode = os.waitstatus_to_exitcode(status)
            self.processes.discard(process)
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise ValueError(
                f"{shlex.join(command[:2])} ended with status {process.returncode}, see {log}: {lines[-1]}"
            )
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def stop(self) -> None:
        """Ends what runs and starts nothing more."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()


def training_speed(log: Path) -> Optional[float]:
    """Median of the tokens per second that fairseq-train logged, without the first ones; None if it logged too few."""
    speeds = []
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("{") and '"wps"' in line:
            speeds.append(float(json.loads(line)["wps"]))
    return statistics.median(speeds[1:]) if len(speeds) > 1 else None


def read_note(path: Path) -> dict[str, Any]:
    """What an earlier run noted of itself.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not ours ({one_line(error)}): name another --output, or remove it") from error


def carry_out(run: Run, preset: Preset, args: argparse.Namespace, running: Running, bar: tqdm) -> None:
    """Does for a model what is not done yet; `run.json` in its folder says what is."""
    run.folder.mkdir(parents=True, exist_ok=True)
    marker = run.folder / "run.json"
    done = read_note(marker) if marker.exists() else {}
    for name, command in steps(run, preset, args).items():
        if name not in done:
            bar.set_postfix_str(f"{run.method}, trained on {run.length:,}: {name}")
            memory = running.run(command, run.folder / f"{name.replace(' ', '-')}.log")
            if name == "training" and (updates := updates_of(run.checkpoint)) < args.updates:  # SIGTERM ends it well
                raise ValueError(f"{run.folder}: training was stopped after {updates:,} updates; start this again")
            done[name] = {"command": shlex.join(command), "finished": now(), "peak_memory_bytes": memory}
            write_json(marker, done)
        bar.update()


def check_settings(args: argparse.Namespace, preset: Preset) -> None:
    """Refuses to go on in a folder of other settings; notes those of a new one.

    Raises:
        ValueError: names what differs.
    """
    settings = {
        "preset": args.preset,
        "data": args.data,
        "subset": args.subset,
        "updates": args.updates,
        "training_lengths": list(preset.training_lengths),
        "evaluation_lengths": list(preset.evaluation_lengths),
    }
    path = args.output / "settings.json"
    if path.exists():
        before = read_note(path).get("settings", {})
        differ = [name for name, value in settings.items() if before.get(name) != value]
        if differ:
            raise ValueError(
                f"{args.output} was begun with another {', '.join(differ)}: name another --output, or drop the option"
            )
    else:
        write_json(path, {"settings": settings, "environment": describe_environment()})


def order_of(curves: list[Curve], length: int) -> list[str]:
    """Methods by perplexity at an evaluation length, best first."""
    there = [curve for curve in curves if length in curve.perplexity]
    return [curve.label for curve in sorted(there, key=lambda curve: curve.perplexity[length])]


def compare_with_paper(curves: list[Curve], length: int) -> str:
    """Whether the order of the methods that the paper compares is the paper's."""
    found = order_of(curves, length)
    here, theirs = ([name for name in order if name in found and name in PAPER_ORDER] for order in (found, PAPER_ORDER))
    verdict = "as in the paper" if here == theirs else f"**not as in the paper**, where it is {', '.join(theirs)}"
    return f"At {length:,} tokens the order is {', '.join(found)} (best first); among the paper's methods, {verdict}."


def cost_table(runs: list[Run]) -> str:
    """Speed and memory of every model, in Markdown."""
    rows = []
    for run in runs:
        done = read_note(run.folder / "run.json")
        rows.append(
            [
                run.length,
                run.method,
                training_speed(run.folder / "train.json.log"),
                done["training"]["peak_memory_bytes"] / 2**20,
                done["evaluation"]["peak_memory_bytes"] / 2**20,
            ]
        )
    headers = ["trained on", "method", "training, tokens/s", "training, MiB", "evaluation, MiB"]
    return tabulate(rows, headers, tablefmt="github", intfmt=",", floatfmt=",.0f")


def write_page(runs: list[Run], preset: Preset, args: argparse.Namespace) -> str:
    """Writes results.md and its plots into the output folder, from what the runs left; returns the Markdown."""
    order = {name: n for n, name in enumerate(POSITION_METHODS)}
    files = sorted((args.output / "results").glob("*.json"))
    every = read_curves(files)
    begun = read_note(args.output / "settings.json")["environment"]
    versions = ", ".join(f"{name} {begun[name]}" for name in ("python", "torch", "fairseq", "fairseq_alibi"))
    first = steps(runs[0], preset, args)
    alone = "" if preset.at_once == 1 else f" {preset.at_once} models at a time, one thread each."
    text = [
        f"# Position methods, trained on {' and '.join(map(str, preset.training_lengths))} tokens",
        f"Made by `bash scripts/reproduce.sh --preset {args.preset}`: {args.data}, {args.updates:,} updates, evaluated "
        f"on {args.subset}; the same seed, data order and, where shapes agree, initial weights. {begun['device']}; "
        f"{versions}.{alone} The first model's commands; the others differ in method and length:",
        "```sh\n" + "\n".join(shlex.join(command) for command in first.values()).replace(f"{ROOT}/", "") + "\n```",
    ]
    longest = max(preset.evaluation_lengths)
    for length in preset.training_lengths:
        models = [replace(one, label=one.position_method) for one in every if one.training_length == length]
        models.sort(key=lambda one: order[one.position_method])
        blocks = [one for one in models if one.windows == "non-overlapping"]
        sliding = [one for one in models if one.windows.startswith("stride")]
        text.append(f"## Trained on {length:,} tokens")
        for title, suffix, some in (
            ("Non-overlapping blocks:", "", blocks),
            ("Sliding window, stride half of the length:", "-sliding", sliding),
        ):
            name = f"perplexity-{length}{suffix}.png"
            with written_whole(args.output / name) as partial:
                plot_lengths(some, partial)
            text += [title, f"![Perplexity against evaluation length]({name})", length_table(some, "github")]
            if length < longest:
                text.append(compare_with_paper(some, longest))
        pooled, name = pool_positions(blocks), f"positions-{length}.png"
        with written_whole(args.output / name) as partial:
            plot_positions(pooled, partial)
        text += ["Loss, bits per token, by position in the block:", f"![Loss by position]({name})"]
        text += [position_table(pooled), "Evaluation, tokens per second, non-overlapping:"]
        text.append(length_table(blocks, "github", "tokens_per_second"))
    text += ["## Speed and memory", cost_table(runs)]
    page = "\n\n".join(text) + "\n"
    write_text(args.output / "results.md", page)
    return page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi reproduce`."""
    add = parser.add_argument
    add(
        "--preset",
        choices=list(PRESETS),
        default="laptop",
        help="laptop (default), slice or paper: see the walk-through",
    )
    add("--data", help="fairseq data folder (default of laptop: Python's own source; slice has none)")
    add("--subset", default="valid", help="valid (default), test, ...")
    add("--updates", type=positive_integer, metavar="N", help="of training, in the place of the preset's")
    add("--methods", nargs="+", choices=list(POSITION_METHODS), default=list(POSITION_METHODS), metavar="METHOD")
    add("--output", type=Path, metavar="DIR", help="default: results/reproduce-PRESET; what is done there is kept")
    add("--launch", action="store_true", help="run the commands of the preset paper, which else are printed")
    add("--cpu", action="store_true", help="do not use the GPU")


def main(args: argparse.Namespace) -> None:
    """`fairseq-alibi reproduce`: says where the page is."""
    preset = PRESETS[args.preset]
    args.data, args.updates = args.data or preset.data, args.updates or preset.updates
    args.output = args.output or Path("results") / f"reproduce-{args.preset}"
    if args.data is None:
        raise ValueError("--preset slice needs --data, a folder that scripts/prepare_wikitext103.sh made")
    runs = [Run(name, n, args.output / f"{name}-{n}") for n in preset.training_lengths for name in args.methods]
    if args.preset == "paper" and not args.launch:
        for run in runs:
            print("\n".join(shlex.join(command) for command in steps(run, preset, args).values()))
        return
    if args.data == BUILTIN:
        command = [sys.executable, "-m", "fairseq_alibi", "prepare-text", args.data, "--builtin"]
        if status := subprocess.run(command).returncode:
            raise ValueError(f"{shlex.join(command[1:])} ended with status {status}, see above")
    read_dictionary(args.data)
    subset_tokens(args.data, args.subset)
    check_settings(args, preset)
    running = Running(preset.at_once > 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which else would leave the models' training behind
    try:
        with (
            tqdm(total=3 * len(runs), desc="reproduce", unit="step") as bar,
            ThreadPoolExecutor(preset.at_once) as pool,
        ):
            waiting = [pool.submit(carry_out, run, preset, args, running, bar) for run in runs]
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                running.stop()
                raise
    except KeyboardInterrupt:
        sys.exit("fairseq-alibi reproduce: interrupted; the same command goes on where it was")
    write_page(runs, preset, args)
    print(f"written to {args.output / 'results.md'}")
