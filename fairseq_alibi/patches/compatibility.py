"""Repairs of fairseq 0.12.2 under today's numpy, torch and hydra, made when the plugin is imported."""

import argparse
import types
import warnings

import numpy as np
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging.meters import AverageMeter, StopwatchMeter, TimeMeter


def restore_numpy_long() -> None:
    """Gives fairseq the `np.compat.long` that numpy 2 removed (`--sample-break-mode eos`, interactive use)."""
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)


def allow_old_checkpoints() -> None:
    """Lets `torch.load(weights_only=True)`, torch's default, read checkpoints that hold an `argparse.Namespace`.

    Old fairseq checkpoints also carry numpy's scalars (the best loss) and fairseq's meters. None of these classes runs
    code from the file; the loader stays safe and refuses everything else.
    """
    scalar = np._core.multiarray.scalar
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            (scalar, "numpy.core.multiarray.scalar"),
            (scalar, "numpy._core.multiarray.scalar"),
            np.dtype,
            *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
            AverageMeter,
            TimeMeter,
            StopwatchMeter,
        ]
    )


def broadcast_objects() -> None:
    """Lets several processes restart: fairseq sends the first one's checkpoint to the others as a file of torch's, of
    which the safe loader refuses the configuration. torch has a broadcast of objects by now."""

    def broadcast_object(obj, src_rank, group, dist_device):
        box = [obj]
        torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    distributed_utils._broadcast_object_slow = broadcast_object


def hush_fairseqs_old_words() -> None:
    """Silences the warnings that fairseq's calls of 2022 cause and that no user can act on; no others.

    Hydra's, which come before a plugin is imported too, are silenced by `startup/`.
    """
    for message in (
        r"hydra\.experimental\.(initialize|compose)\(\) is no longer experimental",
        r"In 'config': Usage of deprecated keyword in package header",
        r"\s*The strict flag in the compose API is deprecated",
        r"'pin_memory' argument is set as true but no accelerator is found",
        r"`torch\.cuda\.amp\.autocast\(args\.\.\.\)` is deprecated",
        r"Support for mismatched key_padding_mask and attn_mask is deprecated",
        r"overflow encountered in scalar subtract",  # blocks of one token: past targets, which nothing here uses
    ):
        warnings.filterwarnings("ignore", message=message)


restore_numpy_long()
hush_fairseqs_old_words()
allow_old_checkpoints()
broadcast_objects()
