"""Result files: what made them, written whole or not at all. Needs Python's standard library only.

A file that several runs may write is locked while it is written, see `locks`.
"""

import contextlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from .. import __version__


def describe_environment() -> dict[str, Any]:
    """Describes versions and hardware, to stand in every result file."""
    import fairseq  # here, as a result is read and written without them
    import numpy
    import torch

    cpu = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "date": now(),
        "fairseq_alibi": __version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "platform": platform.platform(),
    }


def now() -> str:
    """Returns the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_commit() -> Optional[str]:
    """Returns the commit of this package's source; None for an installed copy or without git."""
    try:
        command = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which a file is written, and whose errors name it.

    Raises:
        OSError: Names the file, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}): make room for it, or name another place") from error


def temporary_path(path: Path) -> Path:
    """Returns a name beside `path` with the same suffix, one for each process, as libraries go by the suffix."""
    return path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A context with a path to write to, which becomes `path` when the context ends without an error.

    A reader never sees half a file, and an earlier file is lost only when the new one is whole. The folder is made if
    it is missing.

    Raises:
        OSError: See `naming`.
    """
    with naming(path):
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary_path(path)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Checks that a path is a regular file or nothing: a device or a pipe would be lost if a file took its name.

    Raises:
        OSError: It is something else.
    """
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    if path.exists() and not path.is_file():
        raise OSError("it is a device or a pipe, not a file")


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before the work whose result it will hold; makes its folder.

    Raises:
        OSError: See `naming`.
    """
    with naming(path):
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
