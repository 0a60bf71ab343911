"""SIGTERM ends a training run in order: after the update under way it is saved, and then it ends."""

import logging
import multiprocessing.util
import os
import signal
import threading
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from .patch import original

logger = logging.getLogger(__name__)

#: Set by SIGTERM: training ends after the update, or validation, that is under way.
stop_requested = threading.Event()


def request_stop(*_: Any) -> None:
    """The handler of SIGTERM."""
    stop_requested.set()


def handle_sigterm() -> None:
    """Makes SIGTERM end the run after the update under way. A handler that somebody else has set stays in its place."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, request_stop)
        if hasattr(signal, "sigwaitinfo"):  # macOS has none, and does not fork its workers
            multiprocessing.util.register_after_fork(request_stop, ignore_all_but_parent)


def ignore_all_but_parent(_: Any) -> None:
    """Keeps a data loader's worker alive when a cluster or torchrun sends SIGTERM to all processes.

    Without its worker the training process could not finish its update. torch ends a worker by SIGTERM too, as a last
    resort; that signal comes from the parent.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def any_process_must_stop(trainer: Trainer) -> bool:
    """Returns whether any process of the run got SIGTERM, which may reach them in different updates."""
    if not torch.distributed.is_initialized():
        return stop_requested.is_set()
    requested = torch.tensor(int(stop_requested.is_set()), device=trainer.device)
    torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX)
    return bool(requested)


def validate_and_save(
    cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, valid_subsets: list[str], end_of_epoch: bool
) -> tuple[list[Optional[float]], bool]:
    """Replaces `fairseq_cli.train.validate_and_save`, which is called after every update and says whether to stop."""
    # A validation that is due takes place, as the best checkpoint or the learning rate may depend on it.
    valid_losses, should_stop = original("fairseq_cli.train:validate_and_save")(
        cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch
    )
    if not should_stop and any_process_must_stop(trainer):
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, valid_losses[0])
        unsaved = [name for name in ("no_save", "no_last_checkpoints") if getattr(cfg.checkpoint, name)]
        saved = f"but not saved (--{unsaved[0].replace('_', '-')})" if unsaved else "saved"
        logger.info("stopped by SIGTERM after %s updates, %s", trainer.get_num_updates(), saved)
        should_stop = True
    return valid_losses, should_stop
