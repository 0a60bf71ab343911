"""Several processes that share one evaluation, started by torchrun.

Every process parses the same command line and runs the same code. Each process scores its share of the batches; one
all_reduce merges the losses. Only the first process prints, and only it reads and writes result files. Losses and
Python objects lie in CPU memory, so the gloo backend serves GPUs as well.
"""

import atexit
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from ..files.errors import one_line


def join() -> None:
    """Joins the processes that torchrun started; does nothing without torchrun.

    Each gets a GPU of its own where there are enough. All but the first are silent from here on, except for the
    traceback of an error that no process can report.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    # A dead process is noticed at once, so the timeout matters only for a process that waits for a slower one.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    atexit.register(leave)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, open until the process ends
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def leave() -> None:
    """Leaves the process group after the first process, as torchrun stops all processes as soon as one has failed."""
    with contextlib.suppress(RuntimeError):  # another process is gone: there is nobody to wait for
        dist.monitored_barrier(timeout=timedelta(minutes=1))
    dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """A context that every process enters; an error in any, which ValueError names, becomes one in every process."""
    failure: Optional[Exception] = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = gather(failure and one_line(failure))
    if failure:
        raise failure
    for number, message in enumerate(messages):
        if message:
            raise ValueError(f"process {number}: {message}")


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers."""
    values = [value]
    if dist.is_initialized():
        values *= count()
        dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The first process' value, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def merge_minimum(values: Tensor) -> None:
    """Replaces each element by the smallest value that any process has there."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MIN)
