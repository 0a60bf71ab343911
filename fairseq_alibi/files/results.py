"""Result files: what made them, written whole or not at all. Needs Python's standard library only.

A file that several runs may write is locked while it is written, see `locks`.
"""

import contextlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from .. import __version__


def describe_environment(device: str = "cuda") -> dict[str, Any]:
    """Describes versions and hardware, to stand in every result file.

    Args:
        device: cpu if a GPU that is there is not used.
    """
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
        "device": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else cpu,
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


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written."""
    return isinstance(value, str) and bool(value.encode())


def is_index(value: Any) -> bool:
    """Whether a value is a whole number from 0 on that every library accepts."""
    return type(value) is int and 0 <= value < 2**53


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1 on that every library accepts."""
    return is_index(value) and value > 0


def is_measure(value: Any) -> bool:
    """Whether a value is a number from 0 on; infinity is allowed."""
    return is_index(value) or (type(value) is float and value >= 0)


def check_values(part: dict[str, Any], **checks: Callable[[Any], bool]) -> None:
    """Checks values of a part of a file by name.

    Raises:
        ValueError: a value fails its check.
        KeyError: a value is missing.
    """
    for name, is_valid in checks.items():
        if not is_valid(part[name]):
            raise ValueError(f"{name} is {str(part[name])[:50]!r}")


def check_content(content: Any) -> None:
    """Checks what a result file holds.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: something is missing or of the wrong kind.
    """
    check_values(content, subset=is_text)
    check_values(content["model"], checkpoint=is_text, position_method=is_text, training_length=is_count)
    for result in content["results"]:
        check_values(result, length=is_count, perplexity=is_measure)
        if result["stride"] is not None:
            check_values(result, stride=is_count)
        for name in ("tokens_per_second", "bits_per_byte"):
            if name in result:
                check_values(result, **{name: is_measure})
        for part in result.get("by_position", []):
            check_values(part, first=is_index, last=is_index, tokens=is_count, loss=is_measure)
            if part["last"] < part["first"]:
                raise ValueError(f"a bin of positions ends at {part['last']}, before its first, {part['first']}")


def read_result_file(path: Path) -> dict[str, Any]:
    """Reads a JSON file of `fairseq-alibi evaluate` or `fairseq-alibi eval-lm`.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    if path.exists() and not path.is_file():  # a folder, a device or a pipe, of which some never end
        raise ValueError(f"{path} cannot be read (it is no file): name JSON files of evaluate or the eval scripts")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_content(content)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): name JSON files of evaluate or the eval scripts"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise ValueError(f"{path} is no result of an evaluation ({reason}): name one of their JSON files") from error
    return content
