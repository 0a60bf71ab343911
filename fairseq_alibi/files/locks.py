"""Locks on what a command writes, so that two runs cannot mix or lose their results; the system frees them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock

from .results import naming


def lock_path(path: Path) -> Path:
    """Returns the file beside a file or folder whose lock stands for it."""
    path = Path(os.path.realpath(path))  # unlike `resolve`, it has a result for a link to itself
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def locked(path: Path, wait: float = 0) -> Iterator[None]:
    """A context in which no other process can lock this path; ValueError if one does so for `wait` seconds more.

    Folders above it are made, and are removed with it if nothing is written into them.
    """
    file, absolute = lock_path(path), Path(os.path.realpath(path))
    made = [folder for folder in (absolute, *absolute.parents) if not folder.exists()]
    with naming(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()  # filelock takes a file that it cannot make for a lock that another process holds
    number = ""
    with contextlib.suppress(OSError):
        number = file.read_text()  # before the attempt, as some releases of filelock empty the file
    process = f"process {number}" if number.isdecimal() else "another process"
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
        for folder in made:
            with contextlib.suppress(OSError):  # one that holds the result
                folder.rmdir()


def acquire(lock: filelock.BaseFileLock, file: Path, wait: float) -> None:
    """Acquires a lock and writes this process' number into its file; raises filelock.Timeout.

    An owner removes the file before it releases the lock. A process that opened the file just before that acquires a
    lock that nobody else can see, so it tries again.
    """
    while True:
        lock.acquire(timeout=wait)
        if file.exists():
            file.write_text(str(os.getpid()))
            return
        lock.release()
