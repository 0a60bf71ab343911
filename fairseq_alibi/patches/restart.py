"""Restarts: a run resumes from its newest good checkpoint."""

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from fairseq.dataclass.configs import CheckpointConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from ..files.safe_reading import count_updates, find_damage
from .batching import check_validation_sizes
from .patch import original
from .saving import remove_temporary_files
from .termination import handle_sigterm
from .training_state import (
    KEY,
    forget_earlier_run,
    has_lost_patience,
    inexact_options,
    restart_from_elsewhere,
    restore_state,
)

logger = logging.getLogger(__name__)


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
    """Replaces a checkpoint_last.pt that is damaged, or missing beside others, by the newest good checkpoint.

    The damaged file is kept under another name.

    Raises:
        ValueError: There is no good checkpoint, or the damaged file is one that the user named.
    """
    folder = Path(cfg.save_dir)
    last = folder / "checkpoint_last.pt"
    remove_temporary_files(folder)
    for option, name in (("--restore-file", cfg.restore_file), ("--finetune-from-model", cfg.finetune_from_model)):
        named = Path(name or "")
        if name and name != last.name and named.is_file() and (damage := find_damage(named)):
            raise ValueError(f"{option} {named} is broken ({damage}): name another checkpoint")
    if cfg.restore_file != last.name and Path(cfg.restore_file).resolve() != last.resolve():
        return
    exists = last.is_file()
    damage = find_damage(last) if exists else "missing"
    if not damage or (not exists and (cfg.finetune_from_model or cfg.continue_once)):
        return
    good, faults = order_by_updates(path for path in folder.glob("checkpoint*.pt") if path != last)
    if not good:
        if exists or faults:
            others = f"no other checkpoint of {folder} can be resumed from ({faults[0]})" if faults else ""
            state = f"{last} is broken ({damage})" if exists else f"{last} is missing"
            raise ValueError(
                f"{state} and {others or f'{folder} holds no good checkpoint'}: move "
                f"{'it' if exists else 'them'} away to start anew"
            )
        return
    updates, path = good[0]
    kept = ""
    if exists:
        aside = last.with_name(f"{last.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
        last.rename(aside)
        kept = f"; the broken file is now {aside.name}"
    PathManager.copy(str(path), str(last))
    state = f"is broken ({damage})" if exists else "is missing"
    logger.warning("%s %s: training resumes from %s, %s updates%s", last, state, path.name, updates, kept)


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
    forget_earlier_run()
    restore_for_all_processes(cfg, trainer)
    handle_sigterm()
    elsewhere = restart_from_elsewhere(cfg)
    load = original("fairseq.checkpoint_utils:load_checkpoint")
    extra_state, epoch_itr = load(cfg, trainer, **passthrough_args)
    if extra_state is not None:
        restore_state(trainer, extra_state.get(KEY, {}))
        notes = [elsewhere] if elsewhere else inexact_options(trainer.cfg)
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
    if has_lost_patience(cfg):
        logger.info("nothing to do: the last %s validations brought no better loss, --patience is %s", *[patience] * 2)
        return [None], True
    return original("fairseq_cli.train:train")(cfg, trainer, task, epoch_itr)
