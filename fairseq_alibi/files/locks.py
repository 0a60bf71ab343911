"""Locks on what a command writes, so that two runs cannot mix or lose their results.

    with locked(output):  # before the work; `output` is the file or folder that it will write
        ...

The lock belongs to the system: when its process ends, however that happens, it is free again.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock

from .results import naming


def lock_path(path: Path) -> Path:
    """Returns the file beside a file or folder whose lock stands for it."""
    path = path.resolve()
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def locked(path: Path, wait: float = 0) -> Iterator[None]:
    """A context in which no other process can lock the same file or folder.

    Args:
        path: The output; it need not exist. The folder that holds it is made if it is missing.
        wait: Seconds to wait for another process that holds the lock.

    Raises:
        ValueError: Another process holds the lock; its number is named.
        OSError: The lock cannot be made; see `results.naming`.
    """
    file = lock_path(path)
    with naming(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()  # filelock takes a file that it cannot make for a lock that another process holds
    process = owner(file)  # before the attempt, as some releases of filelock empty the file
    lock = filelock.FileLock(file)
    try:
        with naming(path):
            try:
                acquire(lock, file, 0)
            except filelock.Timeout:
                if not wait:
                    raise
                print(f"waiting up to {wait:g} seconds for {process}, which writes {path}", file=sys.stderr, flush=True)
                acquire(lock, file, wait)
    except OSError as error:
        if not isinstance(error.__cause__, filelock.Timeout):
            raise
        raise ValueError(f"{path} is being written by {process}: wait for it, or name another place") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def acquire(lock: filelock.BaseFileLock, file: Path, wait: float) -> None:
    """Acquires a lock and writes this process' number into its file.

    An owner removes the file before it releases the lock. A process that opened the file just before that acquires a
    lock that nobody else can see, so it tries again.

    Raises:
        filelock.Timeout: Another process holds the lock.
    """
    while True:
        lock.acquire(timeout=wait)
        if file.exists():
            file.write_text(str(os.getpid()))
            return
        lock.release()


def owner(file: Path) -> str:
    """Returns the process that wrote its number into the file of a lock."""
    with contextlib.suppress(OSError):
        number = file.read_text()
        if number.isdecimal():
            return f"process {number}"
    return "another process"
