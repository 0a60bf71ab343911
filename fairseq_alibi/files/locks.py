"""Locks on what a command writes, so that two runs cannot mix or lose their results.

    with locked(output):  # before the work; `output` is the file or folder that it will write
        ...

The lock belongs to the system: when its process ends, however that happens, it is free again.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from .results import naming


def lock_path(path: Path) -> Path:
    """Returns the file beside a file or folder whose lock stands for it."""
    path = path.resolve()
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context in which no other process can lock the same file or folder. It does not wait.

    Args:
        path: The output; it need not exist. The folder that holds it is made if it is missing.

    Raises:
        ValueError: Another process holds the lock; its number is named.
        OSError: The lock cannot be made; see `results.naming`.
    """
    file = lock_path(path)
    with naming(path):
        file.parent.mkdir(parents=True, exist_ok=True)
    owner = ""
    with contextlib.suppress(OSError):
        owner = file.read_text()  # before the attempt, as some releases of filelock empty the file
    lock = filelock.FileLock(file)
    try:
        with naming(path):
            lock.acquire(blocking=False)
    except OSError as error:
        if not isinstance(error.__cause__, filelock.Timeout):
            raise
        process = f"process {owner}" if owner.isdecimal() else "another process"
        raise ValueError(f"{path} is being written by {process}: wait for it, or name another place") from error
    try:
        file.write_text(str(os.getpid()))
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
