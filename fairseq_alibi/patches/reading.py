"""Checkpoints that fairseq's commands read: checked for damage, without running code, refused in one line."""

from pathlib import Path
from typing import Any, Optional

from ..files.safe_reading import checked_reading
from .patch import CommandError, original


def load_checkpoint_to_cpu(
    path: str, arg_overrides: Optional[dict[str, Any]] = None, load_on_all_ranks: bool = False
) -> dict[str, Any]:
    """Replaces `fairseq.checkpoint_utils.load_checkpoint_to_cpu`.

    Raises:
        CommandError: The file is damaged, no checkpoint, or could run code.
    """
    load = original("fairseq.checkpoint_utils:load_checkpoint_to_cpu")
    if not Path(path).is_file():  # missing, or for iopath
        return load(path, arg_overrides, load_on_all_ranks)
    try:
        with checked_reading(Path(path)):
            return load(path, arg_overrides, load_on_all_ranks)
    except ValueError as error:
        raise CommandError(str(error)) from error
