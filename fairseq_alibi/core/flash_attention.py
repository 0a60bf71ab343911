"""Attention with a linear bias through the package flash-attn, where it is installed. Not measured on a GPU.

It is the one fused kernel that drops attention weights and has a bias. This package does not depend on it.
"""

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from .attention_inputs import AttentionInputs, LinearBias
from .tiled_attention import not_compiled


@functools.cache
def installed_flash_attn() -> Optional[Callable[..., Any]]:
    """The function of flash-attn 2.4 or newer that takes slopes of ALiBi; None without it."""
    try:
        from flash_attn import __version__, flash_attn_func  # type: ignore[import-not-found]
    except Exception:  # a build for another torch fails in any way
        return None
    return flash_attn_func if tuple(map(int, __version__.split(".")[:2])) >= (2, 4) else None


def supports_flash_attn(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float) -> bool:
    """What `flash_attn_kernel` supports: ALiBi, causal or symmetric, without padding, in half precision."""
    bias = inputs.bias
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and isinstance(bias, LinearBias)
        and (bias.after is None or bias.after is bias.before)
        and inputs.padding is None
        and q.size(-1) % 8 == 0
        and q.size(-1) <= 256
        and installed_flash_attn() is not None
    )


@not_compiled
def flash_attn_kernel(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """Attention through flash-attn, whose causal mask ends with the last query, so that caches work."""
    function = installed_flash_attn()
    assert function is not None
    assert isinstance(inputs.bias, LinearBias)
    out = function(
        *(x.transpose(1, 2) for x in (q, k, v)),  # (B, T, H, D)
        dropout_p=dropout,
        causal=inputs.causal,
        window_size=(-1, -1) if inputs.window is None else (inputs.window - 1, 0),
        alibi_slopes=inputs.bias.before.float().to(q.device),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.transpose(1, 2)
