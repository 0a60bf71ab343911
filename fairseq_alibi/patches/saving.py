"""Checkpoint files that are whole or absent: written under a temporary name, on the disk before they are renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.file_io import PathManager

from ..files.errors import one_line
from .patch import CommandError, original


def temporary_name(path: str) -> str:
    """Returns the name under which this process writes a checkpoint, one for each process."""
    return f"{path}.{os.getpid()}.tmp"


@contextlib.contextmanager
def replaced_when_whole(path: str) -> Iterator[str]:
    """A context with a temporary name, which becomes `path` once its file is whole and on the disk.

    Raises:
        CommandError: The file cannot be written. Nothing of it is left, and an earlier file at `path` stays.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer
        reason = reason_of(error)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        folder = Path(path).parent
        kept = "earlier checkpoints are kept" if any(folder.glob("checkpoint*.pt")) else "nothing was saved before"
        raise CommandError(
            f"{path} cannot be written ({reason}); {kept}: make room in {folder} and start the same command again"
        ) from error


def reason_of(error: BaseException) -> str:
    """Returns the message of the system's error, in whose handling torch's writer raises errors of its own."""
    current: Optional[BaseException] = error
    while current is not None:
        if isinstance(current, OSError) and current.strerror:
            return current.strerror
        current = current.__context__
    return one_line(error)


def torch_persistent_save(obj: Any, filename: Any, async_write: bool = False) -> None:
    """Replaces `fairseq.checkpoint_utils.torch_persistent_save`."""
    if async_write or not isinstance(filename, str) or not PathManager.supports_rename(filename):
        original("fairseq.checkpoint_utils:torch_persistent_save")(obj, filename, async_write)
        return
    with replaced_when_whole(filename) as temporary, open(temporary, "wb") as file:
        torch.save(obj, file)


def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Replaces `PathManager.copy`, which makes checkpoint_last.pt and checkpoint_best.pt of the file just written."""
    if any(map(PathManager.path_requires_pathmanager, (src_path, dst_path))):
        return original("fairseq.file_io:PathManager.copy")(src_path, dst_path, overwrite=overwrite)
    with replaced_when_whole(dst_path) as temporary:
        shutil.copyfile(src_path, temporary)
    return True


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files of runs that were killed while they wrote a checkpoint."""
    for path in folder.glob("checkpoint*.pt*.tmp"):
        path.unlink(missing_ok=True)
