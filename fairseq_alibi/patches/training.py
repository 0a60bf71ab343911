"""Training that survives: whole checkpoints, a way past a broken one, an orderly end on SIGTERM, exact restarts.

Replaces functions that fairseq's training calls, in fairseq-train, fairseq-hydra-train and under torchrun alike. Apart
from whole copies nothing happens before a training run looks for its checkpoint: other commands stay as they are.
"""

import functools
import logging
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Optional

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from ..files.inputs import code_called

logger = logging.getLogger(__name__)

#: Set by SIGTERM: training ends after the update, or validation, that is under way.
asked_to_stop = False


def put_in_place(partial: str, path: str) -> None:
    """Gives a written file its name, once it is on the disk: a name never stands for half a file."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """`PathManager.copy`, which makes checkpoint_last.pt and checkpoint_best.pt of the file that was just written."""
    if any(map(PathManager.path_requires_pathmanager, (src_path, dst_path))):
        return fairseqs_copy(src_path, dst_path, overwrite=overwrite)
    partial = f"{dst_path}.tmp"  # as fairseq calls its own
    shutil.copyfile(src_path, partial)
    put_in_place(partial, dst_path)
    return True


def fault(path: Path) -> Optional[str]:
    """What is wrong with a checkpoint's file, by its directory and checksums; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        return damaged and f"{damaged} is damaged"
    except zipfile.BadZipFile:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                return f"cut off after {size:,} bytes"
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # of a torch before 1.6
        except Exception as error:  # whatever garbage raises in pickle
            code = code_called(str(path), str(error))
            return f"it calls {code}, which could run anything" if code else f"{size:,} bytes that are no checkpoint"
    return None


def updates_of(path: Path) -> int:
    """Number of updates of a checkpoint, without reading its weights; -1 for one that training cannot go on from."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state["last_optimizer_state"], state["extra_state"]["train_iterator"]
        return state["optimizer_history"][-1]["num_updates"]
    except Exception:  # whatever a broken file raises
        return -1


def make_restorable(cfg: CheckpointConfig) -> None:
    """Puts the newest good checkpoint in the place of a checkpoint_last.pt that is broken or, beside others, missing.

    The broken file is kept under another name.

    Raises:
        ValueError: there is no good one, or the broken file is one that the user named.
    """
    folder = Path(cfg.save_dir)
    last = folder / "checkpoint_last.pt"
    for partial in folder.glob("checkpoint*.pt.tmp"):  # of a run that was killed while it wrote
        partial.unlink()
    if cfg.restore_file != last.name and (named := Path(cfg.restore_file)).resolve() != last.resolve():
        if named.is_file() and (reason := fault(named)):
            raise ValueError(f"--restore-file {named} is broken ({reason}): name another checkpoint")
        return
    there = last.is_file()
    reason = fault(last) if there else "missing"
    if not reason or (not there and (cfg.finetune_from_model or cfg.continue_once)):
        return
    others = ((updates_of(path), path) for path in folder.glob("checkpoint*.pt") if path != last)
    for updates, path in sorted(others, reverse=True):
        if updates >= 0 and not fault(path):
            break
    else:
        if there:
            raise ValueError(
                f"{last} is broken ({reason}) and {folder} holds no good checkpoint: move it away to start anew"
            )
        return
    kept = ""
    if there:
        aside = last.with_name(f"{last.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
        last.rename(aside)
        kept = f"; the broken file is now {aside.name}"
    PathManager.copy(str(path), str(last))
    logger.warning(
        "%s %s: training goes on from %s, %s updates%s",
        last,
        f"is broken ({reason})" if there else f"is {reason}",
        path.name,
        updates,
        kept,
    )


def make_restorable_for_all(cfg: CheckpointConfig, trainer: Trainer) -> None:
    """`make_restorable` on the first process, which the others wait for; ends all of them with its one line."""
    if trainer.checkpoint_suffix:  # a file per process: they would have to agree, and fairseq names the broken one
        return
    trouble = None
    if trainer.data_parallel_rank == 0:
        try:
            make_restorable(cfg)
        except ValueError as error:
            trouble = str(error)
    if trainer.data_parallel_world_size > 1:
        group, device = trainer.data_parallel_process_group, trainer.device
        trouble = distributed_utils.broadcast_object(trouble, src_rank=0, group=group, dist_device=device)
    if trouble:
        sys.exit(trouble if trainer.data_parallel_rank == 0 else 1)


def load_checkpoint(cfg: CheckpointConfig, trainer: Trainer, **options):
    """`checkpoint_utils.load_checkpoint`, with which every training run begins."""
    make_restorable_for_all(cfg, trainer)
    stop_on_sigterm()
    for module in (sys.modules.get("fairseq_cli.train"), sys.modules["__main__"]):  # python fairseq_cli/train.py
        if hasattr(module, "validate_and_save") and not hasattr(module.validate_and_save, "__wrapped__"):
            hook_into(module)
    extra_state, epoch_itr = fairseqs_load_checkpoint(cfg, trainer, **options)
    position = (extra_state or {}).get("train_iterator", {})
    if position.get("iterations_in_epoch") == 0 and position["epoch"] == epoch_itr.epoch and not cfg.reset_meters:
        # An epoch's last checkpoint is written before its validation loss gets to the learning rate.
        trainer.lr_step(position["epoch"] - 1, extra_state.get("val_loss"))
        # And fairseq drops all averages at the start of an epoch, but a log interval may reach across it.
        averages = extra_state.get("metrics", {})
        metrics.load_state_dict({name: averages[name] for name in ("train_inner",) if name in averages})
    return extra_state, epoch_itr


def hook_into(module: ModuleType) -> None:
    """Puts our word on when training ends before that of fairseq_cli.train."""
    module.train = unless_finished(module.train)
    module.validate_and_save = stopping(module.validate_and_save)


def unless_finished(train: Callable) -> Callable:
    """`fairseq_cli.train.train`, an epoch; of a run that has all its updates fairseq would make one more."""

    @functools.wraps(train)
    def wrapper(cfg, trainer, task, epoch_itr):
        updates, limit = trainer.get_num_updates(), cfg.optimization.max_update
        if limit and updates >= limit:
            logger.info("nothing to do: the checkpoint has %s updates, --max-update is %s", updates, limit)
            return [None], True
        return train(cfg, trainer, task, epoch_itr)

    return wrapper


def stopping(validate_and_save: Callable) -> Callable:
    """`fairseq_cli.train.validate_and_save`, called after every update, which says whether to stop."""

    @functools.wraps(validate_and_save)
    def wrapper(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
        # A validation that is due is not left out: the best checkpoint or the learning rate may depend on it.
        valid_losses, should_stop = validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        if not should_stop and any_process_asked_to_stop(trainer):
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, valid_losses[0])
            unsaved = [name for name in ("no_save", "no_last_checkpoints") if getattr(cfg.checkpoint, name)]
            saved = f"but not saved (--{unsaved[0].replace('_', '-')})" if unsaved else "saved"
            logger.info("stopped by SIGTERM after %s updates, %s", trainer.get_num_updates(), saved)
            should_stop = True
        return valid_losses, should_stop

    return wrapper


def any_process_asked_to_stop(trainer: Trainer) -> bool:
    """Whether SIGTERM has come to any process of the run, which it does not reach in the same update."""
    if not torch.distributed.is_initialized():
        return asked_to_stop
    asked = torch.tensor(int(asked_to_stop), device=trainer.device)
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    return bool(asked)


def ask_to_stop(*_) -> None:
    """The handler of SIGTERM."""
    global asked_to_stop
    asked_to_stop = True


def stop_on_sigterm() -> None:
    """Makes SIGTERM end the run after the update under way; a handler of somebody else's is left in its place."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, ask_to_stop)
        if hasattr(signal, "sigwaitinfo"):  # macOS has none, and does not fork its workers
            multiprocessing.util.register_after_fork(ask_to_stop, obey_the_parent_only)


def obey_the_parent_only(_: Callable) -> None:
    """Keeps a data loader's worker from ending on the SIGTERM that a cluster or torchrun sends to all processes.

    Without its worker the process could not finish its update. torch ends a worker by SIGTERM too, as a last resort.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


fairseqs_copy, PathManager.copy = PathManager.copy, staticmethod(copy_whole)
PathManager.rename = staticmethod(put_in_place)
fairseqs_load_checkpoint, checkpoint_utils.load_checkpoint = checkpoint_utils.load_checkpoint, load_checkpoint
