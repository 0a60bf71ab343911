"""What leads `--ddp-backend fully_sharded` to `ShardedTrainer`, and the options that it refuses."""

import contextlib
import importlib.util
from typing import Any

import torch
from fairseq.dataclass.configs import DistributedTrainingConfig, FairseqConfig
from fairseq.trainer import Trainer
from fairseq.utils import safe_getattr
from torch import nn

from .compatibility import is_ours
from .patch import CommandError, original

BACKEND = "--ddp-backend fully_sharded"

#: Options that cannot be met with shares of parameters, with the reason and the remedy.
UNSUPPORTED = {
    "common.amp": "has no float32 copies that could be divided: pass --bf16 or --fp16",
    "common.quantization_config_path": "replaces parameters during training: use --ddp-backend legacy_ddp",
    "distributed_training.pipeline_model_parallel": "places layers itself: drop it",
    "optimization.use_bmuf": "averages whole parameters: drop it",
    "ema.store_ema": "needs whole parameters in every update: use --ddp-backend legacy_ddp",
    "model.decoder_layerdrop": "skips layers that the other processes wait for: drop it",
    "model.encoder_layerdrop": "skips layers that the other processes wait for: drop it",
    "model.quant_noise_pq": "changes whole parameters in place: use --ddp-backend legacy_ddp",
    "model.quant_noise_scalar": "changes whole parameters in place: use --ddp-backend legacy_ddp",
    "task.eval_bleu": "generates texts of unequal length, and processes wait for each other: use fairseq-generate",
    "task.eval_wer": "generates texts of unequal length, and processes wait for each other: use fairseq-generate",
}


def check_sharding(cfg: FairseqConfig) -> None:
    """Checks that a run with fully_sharded can do what its options say, with a CommandError."""
    for name, reason in UNSUPPORTED.items():
        group, _, option = name.partition(".")
        if safe_getattr(cfg[group], option):
            raise CommandError(f"--{option.replace('_', '-')} cannot run with {BACKEND}: it {reason}")
    sharding = cfg.distributed_training.zero_sharding
    if sharding != "none":
        raise CommandError(f"--zero-sharding {sharding} is part of {BACKEND}: drop it")
    on_cpu = cfg.common.cpu or not torch.cuda.is_available()
    if on_cpu and cfg.common.fp16:
        raise CommandError(f"--fp16 needs a GPU: drop it, or pass --bf16, which {BACKEND} can run on a CPU")
    if on_cpu and cfg.distributed_training.cpu_offload:
        raise CommandError("--cpu-offload needs a GPU: a training on CPUs has everything in their memory: drop it")


def fsdp_enable_wrap(cfg: DistributedTrainingConfig) -> contextlib.AbstractContextManager[Any]:
    """Replaces fairseq's function: models of fairseq still use fairscale if it is installed."""
    if importlib.util.find_spec("fairscale") is None:
        return contextlib.nullcontext()
    return original("fairseq_cli.train:fsdp_enable_wrap")(cfg)


def fsdp_wrap(module: nn.Module, **options: Any) -> nn.Module:
    """Replaces fairseq's function: models of this package are divided later, by `ShardedTrainer`."""
    if is_ours(module):
        return module
    if importlib.util.find_spec("fairscale") is None:
        raise CommandError(f"{BACKEND}: {type(module).__name__} is no model of fairseq_alibi: pass legacy_ddp")
    return original("fairseq_cli.train:fsdp_wrap")(module, **options)


def make_trainer(cfg: FairseqConfig, task: Any, model: nn.Module, *more: Any) -> Trainer:
    """Replaces the class `Trainer` in fairseq's training command."""
    if cfg.distributed_training.ddp_backend == "fully_sharded" and is_ours(model):
        check_sharding(cfg)
        from .sharded_trainer import ShardedTrainer  # torch's FSDP takes most of a second to import

        return ShardedTrainer(cfg, task, model, *more)
    return original("fairseq_cli.train:Trainer")(cfg, task, model, *more)
