"""Several processes on one evaluation, started by torchrun: the first leads, the others follow.

The first does all that a process alone would do: it reads the command line, says what is wrong, prints and writes. The
others do as it tells them (`tell`, `told`) and end when it ends, however that is; one that dies ends all, through
torchrun. They exchange orders and losses, which lie in the computer's memory, so gloo serves GPUs as well.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..files.inputs import one_line


def join() -> None:
    """Joins the processes that torchrun started, if it did, each with a GPU of its own where there are enough."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # A process that is gone is noticed at once; the time is for one that waits for a slower one.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        atexit.register(dist.destroy_process_group)  # or its threads may abort a process that has done its work
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def rank() -> int:
    """Number of this process, 0 for the first and for one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def tell(order: Any) -> None:
    """Tells the other processes what to do; the first calls it."""
    if count() > 1:
        dist.broadcast_object_list([order])


def told() -> Any:
    """What the first process tells; the others call it, and end here when the first has ended."""
    order = [None]
    try:
        dist.broadcast_object_list(order)
    except RuntimeError:  # the connection is closed; the first process' status is that of all
        sys.exit()
    return order[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context that all processes enter; what fails in one of them fails in all, so that none waits for it.

    Raises:
        ValueError: what failed in another process.
    """
    failed = None
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        failed = error
    said = everyones(failed and one_line(failed))
    if failed:
        raise failed
    for number, error in enumerate(said):
        if error:
            raise ValueError(f"process {number}: {error}")


def everyones(value: Any) -> list[Any]:
    """The values of all processes, by their numbers."""
    values = [value]
    if count() > 1:
        values *= count()
        dist.all_gather_object(values, value)
    return values


def minimum(values: Tensor) -> None:
    """Puts the least of all processes' values in the place of each value."""
    if count() > 1:
        dist.all_reduce(values, dist.ReduceOp.MIN)
