"""Restarts and stops: a run resumes from its newest good checkpoint; SIGTERM ends it in order, after it is saved."""

import logging
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from ..files.safe_reading import count_updates, find_damage
from . import training_state
from .data import check_validation_sizes
from .patch import CommandError, original

logger = logging.getLogger(__name__)
stop_requested = threading.Event()  # set by SIGTERM: training ends after the update, or validation, that is under way


def order_by_updates(paths: Iterator[Path]) -> tuple[list[tuple[int, Path]], list[str]]:
    """Returns the checkpoints from which training can resume, most updates first, and what is wrong with the others."""
    good, faults = [], []
    for path in paths:
        try:
            good.append((count_updates(path), path))
        except ValueError as error:
            faults.append(str(error))
    return sorted(good, reverse=True), faults


def restore_last_checkpoint(cfg: CheckpointConfig) -> None:
    """Replaces a damaged or missing checkpoint_last.pt by the newest good checkpoint; ValueError if there is none."""
    folder = Path(cfg.save_dir)
    last = folder / "checkpoint_last.pt"
    for temporary in folder.glob("checkpoint*.pt*.tmp"):  # of runs that were killed while they wrote
        temporary.unlink(missing_ok=True)
    named = {"--restore-file": cfg.restore_file}
    if not last.is_file():  # else training resumes from that
        named["--finetune-from-model"] = cfg.finetune_from_model
    for option, name in named.items():
        if not name or name == last.name or PathManager.path_requires_pathmanager(name):
            continue
        path = Path(name)
        if path.is_file() and (damage := find_damage(path)):
            raise ValueError(f"{option} {path} is broken ({damage}): name another checkpoint")
        if not path.is_file() and path.absolute() != last.absolute():
            raise ValueError(f"{option} {path} is no file, and training would start anew: name a checkpoint")
    if cfg.restore_file != last.name and Path(cfg.restore_file).resolve() != last.resolve():
        return
    exists = last.is_file()
    damage = find_damage(last) if exists else "missing"
    if not damage or (not exists and (cfg.finetune_from_model or cfg.continue_once)):
        return
    good, faults = order_by_updates(path for path in folder.glob("checkpoint*.pt") if path != last)
    state = f"{last} is broken ({damage})" if exists else f"{last} is missing"
    if not good:
        if exists or faults:
            others = f"no other checkpoint of {folder} can be resumed from ({faults[0]})" if faults else ""
            others = others or f"{folder} holds no good checkpoint"
            raise ValueError(f"{state} and {others}: move {'it' if exists else 'them'} away to start anew")
        return
    updates, path = good[0]
    kept = ""
    if exists:
        aside = last.with_name(f"{last.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
        last.rename(aside)
        kept = f"; the broken file is now {aside.name}"
    PathManager.copy(str(path), str(last))
    logger.warning("%s: training resumes from %s, %s updates%s", state, path.name, updates, kept)


def restore_for_all_processes(cfg: CheckpointConfig, trainer: Trainer) -> None:
    """Calls `restore_last_checkpoint` in the first process; the others wait. A failure ends all with one line."""
    if trainer.checkpoint_suffix:  # a file for each process: they would have to agree, and fairseq names the broken one
        return
    failure = None
    if trainer.data_parallel_rank == 0:
        try:
            restore_last_checkpoint(cfg)
        except ValueError as error:
            failure = str(error)
    if trainer.data_parallel_world_size > 1:
        group, device = trainer.data_parallel_process_group, trainer.device
        failure = distributed_utils.broadcast_object(failure, src_rank=0, group=group, dist_device=device)
    if failure:
        sys.exit(failure if trainer.data_parallel_rank == 0 else 1)


def load_checkpoint(cfg: CheckpointConfig, trainer: Trainer, **passthrough_args: Any) -> tuple[Optional[dict], Any]:
    """Replaces `fairseq.checkpoint_utils.load_checkpoint`, with which every training run begins."""
    from .catalogue import apply  # the catalogue imports this file

    apply(in_command=True)
    check_validation_sizes(trainer)
    training_state.forget_earlier_run()
    restore_for_all_processes(cfg, trainer)
    handle_sigterm()
    elsewhere = training_state.restart_from_elsewhere(cfg)
    load = original("fairseq.checkpoint_utils:load_checkpoint")
    try:
        extra_state, epoch_itr = load(cfg, trainer, **passthrough_args)
    except ValueError as error:  # options that exclude each other, followed by all options
        raise CommandError(str(error).partition(": {")[0]) from error
    except RuntimeError as error:
        if "dataloader mismatch" not in str(error):
            raise
        raise CommandError(
            "the training data end before the place in them where the checkpoint was written: name the same data, or "
            "pass --reset-dataloader to begin an epoch anew"
        ) from error
    if extra_state is not None:
        training_state.restore_state(trainer, extra_state.get(training_state.KEY, {}))
        notes = [elsewhere] if elsewhere else training_state.inexact_options(trainer.cfg)
        for note in notes if trainer.data_parallel_rank == 0 else ():
            logger.warning(note)
    position = (extra_state or {}).get("train_iterator", {})
    if position.get("iterations_in_epoch") == 0 and position["epoch"] == epoch_itr.epoch and not cfg.reset_meters:
        # The last checkpoint of an epoch is written before its validation loss reaches the learning rate.
        trainer.lr_step(position["epoch"] - 1, extra_state.get("val_loss"))
        # fairseq drops all averages at the start of an epoch, but a log interval may reach across it.
        averages = extra_state.get("metrics", {})
        metrics.load_state_dict({name: averages[name] for name in ("train_inner",) if name in averages})
    return extra_state, epoch_itr


def train(cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any) -> tuple[list[Optional[float]], bool]:
    """Replaces `fairseq_cli.train.train`, one epoch. fairseq makes one more update in a run that has ended."""
    updates, limit, patience = trainer.get_num_updates(), cfg.optimization.max_update, cfg.checkpoint.patience
    if limit and updates >= limit:
        logger.info("nothing to do: the checkpoint has %s updates, --max-update is %s", updates, limit)
        return [None], True
    if training_state.has_lost_patience(cfg):
        logger.info("nothing to do: the last %s validations brought no better loss, --patience is %s", *[patience] * 2)
        return [None], True
    hours, before = cfg.optimization.stop_time_hours, trainer._previous_training_time / 3600
    if 0 < hours < before:
        logger.info("nothing to do: the checkpoint was trained for %.3g hours, --stop-time-hours is %s", before, hours)
        return [None], True
    if cfg.dataset.curriculum:  # fairseq keeps the loader of the first epoch, which is not shuffled, for all epochs
        epoch_itr.dataloader = None
    return original("fairseq_cli.train:train")(cfg, trainer, task, epoch_itr)


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
    try:
        valid_losses, should_stop = original("fairseq_cli.train:validate_and_save")(
            cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch
        )
    except KeyError as error:
        metric = cfg.checkpoint.best_checkpoint_metric
        if error.args != (metric,):
            raise
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        raise CommandError(
            f"--best-checkpoint-metric {metric}: validation measures no such thing; pass another, such as loss or ppl, "
            f"and the run resumes after {trainer.get_num_updates()} updates"
        ) from None
    if not should_stop and any_process_must_stop(trainer):
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, valid_losses[0])
        unsaved = [name for name in ("no_save", "no_last_checkpoints") if getattr(cfg.checkpoint, name)]
        saved = f"but not saved (--{unsaved[0].replace('_', '-')})" if unsaved else "saved"
        logger.info("stopped by SIGTERM after %s updates, %s", trainer.get_num_updates(), saved)
        should_stop = True
    return valid_losses, should_stop
