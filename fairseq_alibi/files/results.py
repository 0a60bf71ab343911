"""Result files: what made them, written whole or not at all."""

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

import fairseq
import numpy
import torch

from .. import __version__


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, to lie beside every result."""
    cuda = torch.cuda.is_available()
    return {
        "date": now(),
        "fairseq_alibi": __version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name()
        if cuda
        else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
    }


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_commit() -> Optional[str]:
    """The commit of this package's source, None for an installed copy or without git."""
    try:
        command = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which a file is written, whose errors then name it.

    Raises:
        OSError: names the file, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}): make room for it, or name another place") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A context with a path to write to, which becomes `path` when the context ends without an error.

    So that a file is never seen half-written, and one that is there is lost only when the new one is whole. The folder
    is made if it is missing.

    Raises:
        OSError: see `naming`.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")  # many a library goes by the suffix
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before the work that is to end in it; makes its folder.

    Raises:
        OSError: see `naming`.
    """
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is never seen half-written."""
    write_text(path, json.dumps(content, indent=2) + "\n")
