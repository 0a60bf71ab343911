"""Result files: what made them, written whole or not at all. Needs Python's standard library only."""

import contextlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from .. import __version__


def describe_environment(device: str = "cuda") -> dict[str, Any]:
    """Describes versions and hardware for a result; `device` is cpu if a GPU that is there is not used."""
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
    """A context in which a file is written; its OSErrors name the file, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}): make room for it, or name another place") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A context with a path to write to, which becomes `path` if the context ends without an error."""
    with naming(path):
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")  # libraries go by the suffix
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raises OSError for what would be lost if a file took its name: a folder, a device or a pipe."""
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    if path.exists() and not path.is_file():
        raise OSError("it is a device or a pipe, not a file")


def check_writable(path: Path) -> None:
    """Raises OSError unless a file can be written, before the work whose result it will hold; makes its folder."""
    with naming(path):
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def check_absent(paths: Iterable[Path], overwrite: bool, remedy: str = "another --output") -> None:
    """Raises ValueError for the first output that exists already, unless it is to be replaced; names the `remedy`."""
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: pass --overwrite to replace it, or {remedy}")


def check_outputs(paths: Sequence[Path], overwrite: bool) -> None:
    """Checks before the work that its results can be written and replace nothing, see `check_absent`."""
    check_absent(paths, overwrite)
    for path in paths:
        check_writable(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def is_valid(value: Any, kind: str) -> bool:
    """Whether a value is text that can be written, or an index, a count or a measure that every library accepts."""
    if kind == "text":
        return isinstance(value, str) and bool(value.encode())
    if kind == "measure" and type(value) is float:  # infinity is allowed
        return value >= 0
    return type(value) is int and (1 if kind == "count" else 0) <= value < 2**53


def check_values(part: dict[str, Any], **kinds: str) -> None:
    """Raises ValueError if a value of a part of a file, by name, fails its check, and KeyError if it is missing."""
    for name, kind in kinds.items():
        if not is_valid(part[name], kind):
            raise ValueError(f"{name} is {str(part[name])[:50]!r}")


def check_content(content: Any) -> None:
    """Checks a result; raises ValueError, KeyError, TypeError or AttributeError for what is missing or wrong."""
    check_values(content, subset="text")
    model = content["model"]
    check_values(model, checkpoint="text", position_method="text", training_length="count")
    check_values(model, **{name: "index" for name in ("updates", "parameters") if model.get(name) is not None})
    for result in content["results"]:
        check_values(result, length="count", perplexity="measure")
        if result["stride"] is not None:
            check_values(result, stride="count")
        check_values(result, **{name: "measure" for name in ("tokens_per_second", "bits_per_byte") if name in result})
        for part in result.get("by_position", []):
            check_values(part, first="index", last="index", tokens="count", loss="measure")
            if part["last"] < part["first"]:
                raise ValueError(f"a bin of positions ends at {part['last']}, before its first, {part['first']}")


def read_result_file(path: Path) -> dict[str, Any]:
    """Reads a JSON file of `evaluate` or `eval-lm`; raises ValueError if it is missing or something else."""
    if path.exists() and not path.is_file():  # a folder, a device or a pipe, of which some never end
        raise ValueError(f"{path} cannot be read (it is no file): name JSON files of evaluate or the eval scripts")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_content(content)
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
        raise ValueError(f"{path} {fault}: name JSON files of evaluate or the eval scripts") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise ValueError(f"{path} is no result of an evaluation ({reason}): name one of their JSON files") from error
    return content
