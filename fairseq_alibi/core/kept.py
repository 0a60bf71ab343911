"""A tensor that is made once and used by later passes: a mask, a table of positions."""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn


def in_transform(x: Tensor) -> bool:
    """Whether torch traces, compiles, exports or transforms the pass that `x` belongs to, or only computes its shapes.

    Then no value of a tensor can be looked at, and no tensor of one pass can be used in another.
    """
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type != "meta"
    return not plain or torch.compiler.is_compiling() or torch.jit.is_tracing() or in_functional_transform()


def in_functional_transform() -> bool:
    """Whether vmap, grad, ... of torch.func is under way; asks a private function, as torch has no public one."""
    return getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)() is not None


class KeptTensor:
    """Holds a tensor for later passes, in whatever mode they run.

    A pass `in_transform` may neither use nor replace it. The tensor is made outside of inference mode and without
    gradients, so that a later pass may train with it. It is no part of a copy, a pickle or a state dict. Threads may
    share it: each reads or replaces the whole tensor.
    """

    def __init__(self) -> None:
        self._tensor: Optional[Tensor] = None

    def get(self, device: torch.device, dtype: Optional[torch.dtype] = None) -> Optional[Tensor]:
        """The kept tensor if it is on this device, and of this dtype where one is named; else None."""
        kept = self._tensor
        if kept is None or kept.device != device or (dtype is not None and kept.dtype != dtype):
            return None
        return kept

    def keep(self, make: Callable[[], Tensor]) -> Tensor:
        """Makes a tensor and keeps it."""
        with torch.inference_mode(False), torch.no_grad():
            self._tensor = made = make()
        return made

    def forget(self) -> None:
        """Drops the tensor, because what it was made of has changed."""
        self._tensor = None

    def __reduce__(self) -> tuple[type, tuple]:
        """Copies and pickles are empty."""
        return KeptTensor, ()
