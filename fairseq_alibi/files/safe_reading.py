"""Checkpoint files: damage is found before they are read, and reading them runs no code. Needs torch only."""

import contextlib
import itertools
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch

from .errors import one_line
from .shard_sets import KEY, find_shard_damage

LONGEST_PICKLE = 10**6  # operations that are searched for the name of a function


@contextlib.contextmanager
def safe_loader() -> Iterator[None]:
    """A context in which `torch.load` is safe, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says, and does not warn."""
    forced = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol|'torch.load' received a zip file")
            yield
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = forced


def code_called(path: Path, refusal: str) -> Optional[str]:
    """Returns the class or function that a pickle calls and the safe loader refused; None for another refusal."""
    if match := re.search(r"GLOBAL (\S+)", refusal):
        return match[1]
    with contextlib.suppress(Exception), contextlib.ExitStack() as files:
        if zipfile.is_zipfile(path):
            archive = files.enter_context(zipfile.ZipFile(path))
            file = archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            file = files.enter_context(path.open("rb"))
        strings: list[str] = []
        for opcode, argument, _ in itertools.islice(pickletools.genops(file), LONGEST_PICKLE):
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            strings += [argument] if isinstance(argument, str) else []
    return None


def explain_refusal(path: Path, error: BaseException) -> str:
    """Returns one line that says why a checkpoint could not be read, and the remedy."""
    if code := code_called(path, str(error)):
        return f"{path} is refused, as it could run code: it calls {code}; get the checkpoint from a source you trust"
    reason = one_line(error).partition(". ")[0]  # torch then advises to load it without the safe loader
    if isinstance(error, (AttributeError, LookupError, TypeError)):  # deep inside of fairseq
        reason = "its cfg, model, optimizer_history or extra_state is missing, empty or of another type"
    return f"{path} is no fairseq checkpoint ({reason}): name a checkpoint_best.pt or checkpoint_last.pt"


def find_damage(path: Path) -> Optional[str]:
    """Returns what its checksums, or reading a file without any, say is wrong with a checkpoint; None for nothing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        try:
            with zipfile.ZipFile(path) as archive:
                # torch takes a record that is marked as a folder for an empty one, and its tensor for anything.
                folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
                record = next(folders, None) or archive.testzip()
                pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
                sharded = not record and any(KEY.encode() in archive.read(name) for name in pickles)
            torch._C.PyTorchFileReader(str(path))  # its reader of archives refuses some that Python's reads
        except Exception:  # of many kinds, by the place of the damage
            return f"it is cut off after {size:,} bytes or damaged"
        if record:
            return f"its record {record} is damaged"
        with safe_loader():
            return find_shard_damage(path) if sharded else None
    try:
        with safe_loader():
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever garbage raises in pickle
        code = code_called(path, str(error))
        return f"it calls {code}, which could run anything" if code else f"it holds {size:,} bytes of something else"
    return None


@contextlib.contextmanager
def checked_reading(path: Path) -> Iterator[None]:
    """A context in which a checkpoint's checksums are compared and reading runs no code; ValueError in one line."""
    if zipfile.is_zipfile(path) and (damage := find_damage(path)):
        raise ValueError(f"{path} is damaged ({damage}): get it again, or name another checkpoint")
    try:
        with safe_loader():
            yield
    except SystemExit:  # an option that does not fit the file
        raise
    except Exception as error:  # whatever a broken file raises deep inside pickle, zipfile or fairseq
        raise ValueError(explain_refusal(path, error)) from error


def count_updates(path: Path) -> int:
    """Returns the updates of a checkpoint without reading its weights; ValueError if no run can resume from it."""
    if damage := find_damage(path):
        raise ValueError(f"{path} is damaged ({damage})")
    try:
        with safe_loader():
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state["last_optimizer_state"], state["extra_state"]["train_iterator"]
        return state["optimizer_history"][-1]["num_updates"]
    except Exception as error:  # whatever a broken file raises
        raise ValueError(explain_refusal(path, error)) from error
