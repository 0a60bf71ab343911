"""The tables of `fairseq-alibi plan`, and the command that trains the run that was planned."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from .planned_run import PlannedRun
from .run_memory import memory_by_part

#: Share of a GPU's memory that a run may take by these formulas.
USABLE = 0.9

GIB = 2**30


def plan_tables(run: PlannedRun, gpus: int, gpu_memory: float) -> tuple[str, Optional[tuple[int, int]]]:
    """Returns the tables of a run, and the largest batch that fits, see `PlannedRun.batches`; None where none does.

    Args:
        run: The run.
        gpus: Number of GPUs.
        gpu_memory: Memory of each, in GiB.

    Raises:
        ValueError: See `PlannedRun.batches`.
    """
    batches = run.batches(gpus)
    peaks = {rows: memory_by_part(run, gpus, rows)["peak"] / GIB for rows, _ in batches}
    fits = {rows: peak <= USABLE * gpu_memory for rows, peak in peaks.items()}
    best = next((batch for batch in batches if fits[batch[0]]), None)
    rows = (best or batches[-1])[0]
    tokens = run.blocks_per_update() * run.length
    flops = run.flops(tokens)
    counts: list[list[Any]] = [*map(list, run.parameters.items()), ["all", sum(run.parameters.values())]]
    memory = [[part, size / GIB] for part, size in memory_by_part(run, gpus, rows).items() if size]
    per_update: list[list[Any]] = [["tokens", f"{tokens:,}"], ["FLOPs", f"{flops['model']:.3g}"]]
    if flops["recomputed"]:
        per_update.append(["FLOPs of checkpointing", f"{flops['recomputed']:.3g}"])
    choices = [[rows * run.length, freq, peaks[rows], "yes" if fits[rows] else "no"] for rows, freq in batches]
    tables = [
        tabulate(counts, ["parameters of", ""], intfmt=","),
        tabulate(memory, [f"GiB per GPU, {rows * run.length:,} tokens", ""], floatfmt=".3f"),
        tabulate(per_update, ["an update", ""], colalign=("left", "right")),
        tabulate(choices, ["max-tokens", "update-freq", "GiB", "fits"], intfmt=",", floatfmt=".3f"),
    ]
    return "\n\n".join(tables), best


def training_command(config: Path, overrides: Sequence[str], settings: dict[str, Any]) -> str:
    """Returns the command that trains the run that was planned.

    Args:
        config: YAML file.
        overrides: `KEY=VALUE` with which the run was planned.
        settings: What the plan decides, by key; it takes the place of overrides of the same key.
    """
    kept = [override for override in overrides if override.lstrip("+~").partition("=")[0] not in settings]
    command = ["fairseq-hydra-train", "--config-dir", str(config.parent), "--config-name", config.stem, *kept]
    return shlex.join([*command, *(f"{key}={value}" for key, value in settings.items())])
