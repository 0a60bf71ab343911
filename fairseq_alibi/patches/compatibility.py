"""Repairs of fairseq 0.12.2 under today's numpy, torch and hydra."""

import argparse
import datetime
import importlib
import logging
import types
import warnings
from typing import Any

import numpy as np
import torch
from fairseq.dataclass.configs import DistributedTrainingConfig
from fairseq.logging.meters import AverageMeter, StopwatchMeter, TimeMeter
from torch import nn
from torch.distributed import distributed_c10d

from ..models.decoder import AlibiDecoder
from ..models.encoder import AlibiEncoder
from .patch import original

logger = logging.getLogger(__name__)

NUMPY_COMPAT = types.SimpleNamespace(long=int)  # what numpy 1 had as `numpy.compat`, as far as fairseq uses it

NO_FAST_PATH = property(lambda _: False, lambda *_: None)  # fairseq sets it in each layer

GROUP_TIMEOUT = 600  # seconds; a checkpoint that the first process writes has to be written in that time

#: Warnings that fairseq's calls of 2022 cause and that no user can act on, as regular expressions, with their origin.
#: Those that hydra gives before a plugin is imported are silenced by `startup/`.
SILENCED_WARNINGS = {
    r"hydra\.experimental\.(initialize|compose)\(\) is no longer experimental": "fairseq/dataclass/utils.py",
    r"In 'config': Usage of deprecated keyword in package header": "fairseq/config/config.yaml",
    r"\s*The strict flag in the compose API is deprecated": "fairseq/dataclass/utils.py",
    r"'pin_memory' argument is set as true but no accelerator is found": "fairseq/data/iterators.py",
    r"`torch\.cuda\.amp\.autocast\(args\.\.\.\)` is deprecated": "fairseq/tasks/fairseq_task.py",
    r"Support for mismatched key_padding_mask and attn_mask is deprecated": "fairseq/modules/multihead_attention.py",
    r"overflow encountered in scalar subtract": "fairseq/data/token_block_dataset.py: blocks of one token",
}

#: numpy's codes for the element types of the arrays and scalars that metrics hold: all numbers, and text.
ARRAY_TYPES = "?bhilqBHILQefdgFDGSU"


def silence_known_warnings() -> None:
    """Silences the warnings of `SILENCED_WARNINGS` and no others."""
    for message in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def allow_fairseq_checkpoints() -> None:
    """Lets torch's safe loader (`weights_only=True`) read everything that fairseq writes to a checkpoint.

    Old checkpoints hold an `argparse.Namespace`, numpy scalars (the best loss) and meters; today's hold numpy arrays
    where a metric is an array (the n-gram counts of `--eval-bleu`). None of these classes runs code from the file.
    """
    multiarray: Any = importlib.import_module("numpy._core.multiarray")  # typed stubs do not have it
    modules = ("numpy.core", "numpy._core")
    functions = {"scalar": multiarray.scalar, "_reconstruct": multiarray._reconstruct}
    named = [(it, f"{module}.multiarray.{name}") for module in modules for name, it in functions.items()]
    classes: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ARRAY_TYPES)]
    classes += [argparse.Namespace, AverageMeter, TimeMeter, StopwatchMeter, bytes]  # bytes: of an empty array
    torch.serialization.add_safe_globals([*named, *classes])


def broadcast_object(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
    """Replaces `fairseq.distributed.utils._broadcast_object_slow`."""
    objects = [obj]
    torch.distributed.broadcast_object_list(objects, src=src_rank, group=group, device=dist_device)
    return objects[0]


def limit_waiting(cfg: DistributedTrainingConfig) -> None:
    """Makes all groups of processes wait --heartbeat-timeout or `GROUP_TIMEOUT` seconds for a process that is gone."""
    seconds = cfg.heartbeat_timeout if cfg.heartbeat_timeout > 0 else GROUP_TIMEOUT
    wait = datetime.timedelta(seconds=seconds)  # fairseq passes no timeout to torch
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = wait


def is_ours(model: nn.Module) -> bool:
    """Returns whether a model has an encoder or decoder of this package."""
    return any(isinstance(module, (AlibiDecoder, AlibiEncoder)) for module in model.modules())


def wrap_model(
    args: DistributedTrainingConfig, model: nn.Module, process_group: Any, device: torch.device
) -> nn.Module:
    """Replaces `DistributedFairseqModel`; sets --find-unused-parameters for models of this package.

    A band of an adaptive input or softmax, a dropped layer or a masked model's output layer may be unused in a batch.
    torch's DistributedDataParallel ends with an error then, unless it looks for such parameters.
    """
    if is_ours(model) and args.ddp_backend in ("c10d", "pytorch_ddp") and not args.find_unused_parameters:
        logger.info("--find-unused-parameters is set, because not every batch uses all parameters of this model")
        args.find_unused_parameters = True
    return original("fairseq.models:DistributedFairseqModel")(args, model, process_group, device)
