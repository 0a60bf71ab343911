"""Up to which size attention runs under a mask where it may choose: by what was measured, and by memory."""

import functools
import json
import math
import os
from pathlib import Path

import torch

#: The longest sequence, in keys, that attention on a CPU runs under a mask, by what `scripts/benchmark.sh` measured.
LONGEST_MASK = 256
MASK_SHARE = 0.05  # share of the memory that a mask may take
COMPILED_LIMIT = 2**30  # bytes that a mask may take in compiled code, which cannot look at the memory


def crossover_file() -> Path:
    """Where `fairseq-alibi doctor --gpu` writes, by the name of a GPU, the keys from which on a mask is slower."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fairseq-alibi", "crossover.json")


@functools.cache
def longest_mask(device: torch.device) -> float:
    """Number of keys from which on, exclusive, attention without a mask is faster on a device.

    A GPU that nobody has measured keeps the mask as long as it fits.
    """
    if device.type == "cpu":
        return LONGEST_MASK
    try:
        measured = json.loads(crossover_file().read_text(encoding="utf-8"))
        return float(measured.get(torch.cuda.get_device_name(device), math.inf))
    except Exception:  # no file, another's file, no such GPU
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
