"""Up to which size attention runs under a mask where it may choose: by what was measured, and by memory."""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

#: The longest sequence, in keys, that attention on a CPU runs under a mask, by what `scripts/benchmark.sh` measured.
LONGEST_MASK = 256
MASK_SHARE = 0.05  # share of the memory that a mask may take
COMPILED_LIMIT = 2**30  # bytes that a mask may take in compiled code, which cannot look at the memory


def crossover_file() -> Path:
    """Where `fairseq-alibi doctor --gpu` writes, by the name of a GPU, the keys from which on a mask is slower."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fairseq-alibi", "crossover.json")


def measured_crossovers() -> dict[str, Any]:
    """The content of `crossover_file`; empty where there is none or it is damaged."""
    try:
        measured = json.loads(crossover_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return measured if isinstance(measured, dict) else {}


@functools.cache
def longest_mask(device: torch.device) -> float:
    """Number of keys from which on, exclusive, attention without a mask is faster on a device.

    A GPU that nobody has measured keeps the mask as long as it fits.
    """
    if device.type == "cpu":
        return LONGEST_MASK
    try:
        return float(measured_crossovers().get(torch.cuda.get_device_name(device), math.inf))
    except Exception:  # another's file, no such GPU
        return math.inf


def mask_is_slower(device: torch.device, keys: int) -> bool:
    """Whether a mask of so many keys is known to be slower than none; compiled code does not ask."""
    return not torch.compiler.is_compiling() and keys > longest_mask(device)


@functools.cache
def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory; of the machine's for other devices, and where a GPU is only pretended."""
    try:
        return torch.get_device_module(device).get_device_properties(device).total_memory
    except Exception:  # a module without this function, a build without this device
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # Windows
        return 2**34


def mask_fits(device: torch.device, elements: int) -> bool:
    """Whether a mask of so many numbers, float32 while it is made, takes a small share of the memory."""
    if torch.compiler.is_compiling():
        return 4 * elements <= COMPILED_LIMIT
    return 4 * elements <= MASK_SHARE * memory_of(device)


def check_mask_memory(device: torch.device, elements: int, keys: int) -> None:
    """Raises ValueError before a mask of so many numbers, float32 while it is made, is larger than the memory."""
    if device.type != "meta" and not torch.compiler.is_compiling() and 4 * elements > memory_of(device):
        needed, there = (f"{size / 2**30:.1f} GiB" for size in (4 * elements, memory_of(device)))
        raise ValueError(f"a mask of {keys:,} tokens takes {needed} of {there}: pass --attention auto, or fewer tokens")
