"""Repairs of fairseq 0.12.2 under numpy 2 and torch's safe checkpoint loader, made when the plugin is imported."""

import argparse
import types

import numpy as np
import torch
from fairseq.logging.meters import AverageMeter, StopwatchMeter, TimeMeter


def restore_numpy_long() -> None:
    """fairseq's datasets ask for `np.compat.long`, which numpy 2 removed: `--sample-break-mode eos`, interactive use."""
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


restore_numpy_long()
allow_old_checkpoints()
