"""State of a training run that fairseq leaves out of its checkpoints: saved with them and restored at a restart."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig, FairseqConfig
from fairseq.trainer import Trainer

from ..files.safe_reading import count_updates
from .patch import original

KEY = "fairseq_alibi"  # the key of this state in a checkpoint's `extra_state`

#: Counters of fairseq's loss scaler (`DynamicLossScaler`), which decide when the scale grows.
SCALER_COUNTERS = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")

#: Counters of torch's `ReduceLROnPlateau`, which decide when the learning rate shrinks.
PLATEAU_COUNTERS = ("num_bad_epochs", "cooldown_counter", "last_epoch")

#: Counters of --patience, which fairseq keeps as attributes of its function `should_stop_early`.
PATIENCE_COUNTERS = ("best", "num_runs")

#: Options with which a run that was killed does not end exactly like one that was not, with what is lost.
INEXACT_OPTIONS = {
    "common.fp16": "the float32 copies of the parameters are not in the checkpoint (--memory-efficient-fp16 has none)",
    "common.bf16": "the float32 copies of the parameters are not in the checkpoint (--memory-efficient-bf16 has none)",
    "optimization.use_bmuf": "the block momentum is not in the checkpoint",
    "common.quantization_config_path": "the state of the quantizer is not in the checkpoint",
    "checkpoint.no_save_optimizer_state": "the state of the optimizer is not in the checkpoint",
    "checkpoint.reset_optimizer": "the state of the optimizer is dropped at every start",
    "checkpoint.reset_lr_scheduler": "the state of the learning rate is dropped at every start",
    "checkpoint.reset_dataloader": "the position in the training data is dropped at every start",
    "checkpoint.reset_meters": "the best validation loss is dropped at every start",
}


def training_module() -> ModuleType:
    """Returns the module of fairseq's training loop: fairseq_cli.train, or that file run as a script."""
    main = sys.modules["__main__"]
    return main if hasattr(main, "should_stop_early") else importlib.import_module("fairseq_cli.train")


def holders(trainer: Trainer) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Returns the objects whose counters fairseq does not save, by name, each with the names of the counters."""
    plateau = getattr(trainer.lr_scheduler, "lr_scheduler", None)
    found = {
        "patience": (training_module().should_stop_early, PATIENCE_COUNTERS),  # type: ignore[attr-defined]
        "plateau": (plateau, PLATEAU_COUNTERS),
        "loss_scaler": (getattr(trainer.optimizer, "scaler", None), SCALER_COUNTERS),
        "ema": (trainer.ema if trainer.cfg.ema.store_ema else None, ("update_freq_counter",)),
    }
    return {name: (owner, names) for name, (owner, names) in found.items() if owner is not None}


def collect_state(trainer: Trainer) -> dict[str, Any]:
    """Returns the state that fairseq does not save."""
    state: dict[str, Any] = {
        name: {counter: getattr(owner, counter) for counter in counters if hasattr(owner, counter)}
        for name, (owner, counters) in holders(trainer).items()
    }
    if isinstance(scaler := getattr(trainer.optimizer, "_grad_scaler", None), torch.amp.GradScaler):  # --amp
        state["grad_scaler"] = scaler.state_dict()
    return state


def restore_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restores what `collect_state` returned. The options --reset-... are honoured."""
    reset = trainer.cfg.checkpoint
    dropped = {"patience": reset.reset_meters, "plateau": reset.reset_lr_scheduler or reset.reset_optimizer}
    for name, (owner, _) in holders(trainer).items():
        if not dropped.get(name, reset.reset_optimizer):
            for counter, value in state.get(name, {}).items():
                setattr(owner, counter, value)
    if state.get("grad_scaler") and not reset.reset_optimizer:
        trainer.optimizer._grad_scaler.load_state_dict(state["grad_scaler"])


def forget_earlier_run() -> None:
    """Removes what an earlier run in this process left in attributes of fairseq's functions."""
    for function in (training_module().should_stop_early, checkpoint_utils.save_checkpoint):  # type: ignore[attr-defined]
        for name in PATIENCE_COUNTERS:
            if hasattr(function, name):
                delattr(function, name)


def save_checkpoint(self: Trainer, filename: str, extra_state: dict[str, Any]) -> None:
    """Replaces `fairseq.trainer.Trainer.save_checkpoint`."""
    save = original("fairseq.trainer:Trainer.save_checkpoint")
    save(self, filename, {**extra_state, KEY: collect_state(self)})


def has_lost_patience(cfg: FairseqConfig) -> bool:
    """Returns whether --patience has ended the run already."""
    counter = getattr(training_module().should_stop_early, "num_runs", 0)  # type: ignore[attr-defined]
    return 0 < cfg.checkpoint.patience <= counter


def inexact_options(cfg: FairseqConfig) -> list[str]:
    """Returns the options of a run with which a restart is not exact, each with what is lost."""
    found = []
    sharded = cfg.distributed_training.ddp_backend == "fully_sharded"  # the weights of the checkpoint are float32
    for name, loss in INEXACT_OPTIONS.items():
        group, _, option = name.partition(".")
        exact = option in ("fp16", "bf16") and (sharded or getattr(cfg.common, f"memory_efficient_{option}"))
        if getattr(cfg[group], option) and not exact:
            found.append(f"a restart is not exact with --{option.replace('_', '-')}: {loss}")
    return found


def restart_from_elsewhere(cfg: CheckpointConfig) -> Optional[str]:
    """Returns a line that says how to resume, if --restore-file makes the run start anew beside its own checkpoint."""
    last = Path(cfg.save_dir) / "checkpoint_last.pt"
    if cfg.restore_file == last.name or Path(cfg.restore_file).resolve() == last.resolve() or not last.is_file():
        return None
    try:
        updates = count_updates(last)
    except ValueError:
        return None
    return (
        f"--restore-file {cfg.restore_file}: the run starts from it again; to resume from {last} ({updates} updates) "
        "drop --restore-file and the options --reset-..."
    )
