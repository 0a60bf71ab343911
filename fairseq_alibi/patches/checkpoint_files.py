"""Checkpoint files of fairseq's commands: written whole or not at all, checked for damage before they are read."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.file_io import PathManager
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.trainer import Trainer
from fairseq.utils import safe_getattr

from ..files.errors import one_line
from ..files.safe_reading import checked_reading
from ..files.shard_sets import read_shards
from .patch import CommandError, original


@contextlib.contextmanager
def replaced_when_whole(path: str) -> Iterator[str]:
    """A context with a temporary name, which becomes `path` once its file is whole and on the disk.

    If the file cannot be written, nothing of it is left, an earlier one at `path` stays, and CommandError is raised.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer
        reason, folder = reason_of(error), Path(path).parent
        kept = "earlier checkpoints are kept" if any(folder.glob("checkpoint*.pt")) else "nothing was saved before"
        raise CommandError(
            f"{path} cannot be written ({reason}); {kept}: make room in {folder} and start the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it is there only if it did not become `path`
            os.unlink(temporary)


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


def load_checkpoint_to_cpu(
    path: str, arg_overrides: Optional[dict[str, Any]] = None, load_on_all_ranks: bool = False
) -> dict[str, Any]:
    """Replaces fairseq's function: a file that is damaged or could run code is refused with a CommandError."""
    load = original("fairseq.checkpoint_utils:load_checkpoint_to_cpu")
    if not Path(path).exists():  # missing, or for iopath
        return load(path, arg_overrides, load_on_all_ranks)
    if not Path(path).is_file():
        raise CommandError(f"{path} is a folder, a device or a pipe: name a checkpoint_best.pt or checkpoint_last.pt")
    try:
        with checked_reading(Path(path)):
            state = read_shards(path, load(path, arg_overrides, load_on_all_ranks))
            cfg = state.get("cfg")  # fairseq makes a dictionary of a text, and training does not read it
            if cfg is not None and not ("model" in cfg and "task" in cfg):
                raise ValueError("its 'cfg' does not hold the options of a model and a task")
            return state
    except ValueError as error:
        raise CommandError(str(error)) from error


def load_model_ensemble_and_task(filenames: list[str], *args: Any, **kwargs: Any) -> tuple[list[Any], Any, Any]:
    """Replaces fairseq's function: options and weights that do not fit each other end in a CommandError."""
    try:
        return original("fairseq.checkpoint_utils:load_model_ensemble_and_task")(filenames, *args, **kwargs)
    except CommandError:
        raise
    except Exception as error:  # of any kind, from deep inside torch or fairseq
        raise CommandError(f"{', '.join(filenames)} cannot be loaded: {one_line(error)}") from error


def build_known_model(cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces `fairseq.models.build_model`, which ends with a KeyError for an architecture that it does not know."""
    name = safe_getattr(cfg, "_name") or safe_getattr(cfg, "arch")
    if name and name not in MODEL_REGISTRY and name not in ARCH_MODEL_REGISTRY:
        raise ValueError(
            f"its architecture is '{name}', which neither fairseq nor fairseq_alibi has: name another checkpoint, or "
            "the folder that registers it with --user-dir"
        )
    return original("fairseq.models:build_model")(cfg, *args, **kwargs)


def load_training_checkpoint(self: Trainer, filename: str, *args: Any, **kwargs: Any) -> Optional[dict[str, Any]]:
    """Replaces `Trainer.load_checkpoint`: what does not fit the model or its optimizer ends in a CommandError."""
    try:
        return original("fairseq.trainer:Trainer.load_checkpoint")(self, filename, *args, **kwargs)
    except CommandError:
        raise
    except Exception as error:  # of any kind; fairseq raises one without a reason while it handles the first
        # fairseq takes the model for a missing EMA, but has removed it from the checkpoint by then.
        lacks_ema = self.cfg.ema.store_ema and isinstance(error, KeyError)
        reason = "it holds no EMA for --store-ema" if lacks_ema else one_line(error.__context__ or error)
        raise CommandError(
            f"{filename} does not fit this run ({reason}): pass the options that it was "
            "trained with, or another --save-dir or --restore-file"
        ) from error
