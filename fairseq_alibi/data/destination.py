"""The data folder that a preparation makes: it is complete, or it does not exist.

It is made and checked in DEST.partial, and renamed to DEST at the end. A file in it, `prepared.json`, says what it was
made from.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .. import __version__
from ..files.locks import locked
from ..files.results import naming, now, write_json

MARKER = "prepared.json"
#: What a killed preparation leaves in DEST.partial; earlier releases had a lock file there.
OWN_NAMES = {"work", "prepare_data.lock"}


def is_prepared(destination: Path, identity: dict[str, Any]) -> bool:
    """Whether a data folder was made from the inputs and settings `identity`; ValueError if it holds something else."""
    if os.pathsep in str(destination):
        raise ValueError(f"{destination} has a colon, at which fairseq would cut it: choose another DEST")
    if os.path.ismount(destination):
        raise ValueError(f"{destination} is a mount point, which nothing can be renamed to: choose a folder inside it")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    content: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads((destination / MARKER).read_text(encoding="utf-8"))
    made_from = content if isinstance(content, dict) else {}
    if all(made_from.get(key) == value for key, value in identity.items()):
        print(f"{destination} is already prepared (see {MARKER} in it)")
        return True
    made = "made from other inputs or settings" if made_from else "not made by this script"
    raise ValueError(f"{destination} exists and was {made}: choose another DEST or move it away")


@contextlib.contextmanager
def work_folder(destination: Path, resumes: bool = False) -> Iterator[Path]:
    """Yields an empty folder in DEST.partial and removes it at the end, however the preparation ends.

    What a killed preparation left there is removed first. One that `resumes` gets it, and leaves the folder unless it
    ends well. ValueError: another process prepares DEST, or DEST.partial was not made here. OSError: the disk is full,
    or the folder cannot be made; names the destination.
    """
    partial = destination.with_name(destination.name + ".partial")
    with locked(destination), naming(destination):
        if partial.exists() and {path.name for path in partial.iterdir()} - OWN_NAMES:
            raise ValueError(f"{partial} is in the way and not ours: move it away or choose another DEST")
        if not resumes:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            work = partial / "work"
            work.mkdir(parents=True, exist_ok=True)
            yield work
            resumes = False
        finally:
            if not resumes:
                shutil.rmtree(partial, ignore_errors=True)


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Writes `prepared.json`, which says what a folder was made from and with which versions."""
    versions = {"python": platform.python_version(), "fairseq-alibi": __version__}
    versions.update({name: importlib.metadata.version(name) for name in ("fairseq", "sacremoses", "subword-nmt")})
    write_json(folder / MARKER, {**description, "versions": versions, "date": now()})


def publish(data: Path, destination: Path, description: dict[str, Any]) -> None:
    """Renames a checked data folder, in which `prepared.json` records its description."""
    write_description(data, description)
    os.rename(data, destination)


def print_counts(destination: Path, counts: dict[str, Any]) -> None:
    """Prints what a data folder holds."""
    rows = [{"split": split, **count} for split, count in counts.items() if isinstance(count, dict)]
    print(tabulate(rows, headers="keys", intfmt=",", floatfmt=".1%"))
    print(f"{destination} is ready: {counts['types']:,} types")
