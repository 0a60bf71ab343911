"""Self-attention with a position bias: one function, `attend`, that chooses between kernels of one signature.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.

`masked_attention` is the reference: the bias is folded into the future mask and everything is one call of PyTorch's
scaled_dot_product_attention. The other kernels compute the same without a tensor of T x S elements. A kernel takes

    q: (B, H, T, D), not yet scaled.
    k, v: (B, H, S, D), in the dtype of q.
    inputs: the bias, the padding and the rest, see `AttentionInputs`.
    dropout: probability that an attention weight is dropped; 0 outside training.

and returns (B, H, T, D). Rows of queries on padding are finite and without meaning.

A kernel that may fail or be wrong on some device is tried once, on a small input, before it is used: for each device,
dtype, head_dim, kind of bias, and with gradients or without, which decide whether it can run. The trial compares output
and gradients with attention written out in float32.
"""

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_inputs import AttentionInputs, Bias, DistanceBias, FoldedMask, KeyBias, LinearBias, NoBias
from .flash_attention import flash_attn_kernel, supports_flash_attn
from .flex_attention import flex_blocks, supports_flex
from .kept import in_functional_transform
from .positions import distances, linear_bias
from .tiled_attention import (
    flash_tiles,
    merge_padding_into_mask,
    not_compiled,
    recomputed_tiles,
    supports_flash,
    supports_recomputed,
)

QUERIES, KEYS = 260, 390  # queries and keys of a trial: more than one chunk, and no whole number of blocks

#: Largest error that passes, for values of about 1: an error of the kind that is looked for is larger.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 8e-2}
TRIALS: dict[tuple[Any, ...], Optional[str]] = {}  # why a kernel is refused, or None, by its name and the kind of input


class Kernel(NamedTuple):
    """A way to compute attention."""

    name: str  # for messages and tests
    supports: Callable[[Tensor, Tensor, AttentionInputs, float], bool]  # for q, k, inputs and dropout
    run: Callable[[Tensor, Tensor, Tensor, AttentionInputs, float], Tensor]
    tried: bool = False  # first, see `refusal`; another one takes its place where it fails


def backends(q: Tensor, *chosen: SDPBackend) -> AbstractContextManager[Any]:
    """On a GPU the kernels of PyTorch that may run.

    cuDNN's is not among them: it plans for a large part of a second for each new shape, and with a mask its gradients
    can be NaN.
    """
    return sdpa_kernel([*chosen, SDPBackend.MATH]) if q.device.type == "cuda" else contextlib.nullcontext()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v under a `FoldedMask`, through PyTorch's fused kernels."""
    mask = folded_mask_of(q, inputs)
    with backends(q, SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attention_weights(q: Tensor, k: Tensor, inputs: AttentionInputs) -> Tensor:
    """The weights that attention under a mask gives the keys, (B, H, T, S) float32; ValueError without a mask."""
    if not isinstance(inputs.bias, FoldedMask):
        raise ValueError("attention weights exist under a mask only: pass --attention mask")
    scores = (q @ k.transpose(-2, -1) * q.size(-1) ** -0.5).float()
    return torch.softmax(scores + folded_mask_of(q, inputs), dim=-1)


def folded_mask_of(q: Tensor, inputs: AttentionInputs) -> Tensor:
    """The folded mask of the queries with the padding in it: (1, H, T, S), or (B, H, T, S) with padding."""
    assert isinstance(inputs.bias, FoldedMask)
    # Four dimensions, or PyTorch's fused CPU kernel declines the mask and attention takes five times as long.
    mask = inputs.bias.mask if inputs.bias.mask.dim() == 4 else inputs.bias.mask[None]
    return merge_padding_into_mask(mask[:, :, -q.size(2) :], inputs.padding)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """`masked_attention` written out, for torch.func, whose transforms PyTorch's fused kernels do not all support."""
    return F.dropout(attention_weights(q, k, inputs), dropout).to(v.dtype) @ v


def has_folded_mask(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float) -> bool:
    """What `masked_attention` supports: a bias that is folded into a mask."""
    return isinstance(inputs.bias, FoldedMask)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """Causal attention without a bias, through PyTorch's fused kernels."""
    with backends(q, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def is_plainly_causal(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float) -> bool:
    """What `causal_attention` supports: whole sequences without a bias, padding or a window that hides anything."""
    whole = q.size(2) == k.size(2) and (inputs.window is None or inputs.window >= k.size(2))
    return (
        isinstance(inputs.bias, NoBias)
        and inputs.causal
        and whole
        and inputs.padding is None
        and not (dropout and q.device.type == "cpu")  # PyTorch's CPU kernel with dropout makes all scores
    )


#: In the order in which `attend` asks them; the last one supports whatever has no mask.
KERNELS = (
    Kernel("empty", lambda q, *_: 0 in q.shape, lambda q, *_: q * 1),
    Kernel("explicit", lambda *given: has_folded_mask(*given) and in_functional_transform(), explicit_attention),
    Kernel("mask", has_folded_mask, masked_attention),
    Kernel("causal", is_plainly_causal, causal_attention),
    Kernel("flash-attn", supports_flash_attn, flash_attn_kernel, tried=True),
    Kernel("flex", supports_flex, flex_blocks, tried=True),
    Kernel("tiled", supports_flash, flash_tiles, tried=True),
    Kernel("recomputed", supports_recomputed, recomputed_tiles),
)


def attend(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """Attention through the first kernel that supports it, see the head of this file; ValueError for wrong shapes."""
    check_shapes(q, k, inputs)
    kernel = choose_kernel(q, k, inputs, dropout)
    if not kernel.tried or q.device.type == "cpu":
        return kernel.run(q, k, v, inputs, dropout)
    try:
        return kernel.run(q, k, v, inputs, dropout)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what the trial did not see
        TRIALS[kind_of(kernel.name, q, inputs)] = shortened(error)
        following = choose_kernel(q, k, inputs, dropout)
        warn_of(kernel, shortened(error), following, q)
        return following.run(q, k, v, inputs, dropout)


def choose_kernel(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Kernel:
    """The first of `KERNELS` that supports these inputs and is right; ValueError if none; one warning of failures."""
    failed = []
    for kernel in KERNELS:
        if not kernel.supports(q, k, inputs, dropout):
            continue
        if kernel.tried:
            new, reason = refusal(kernel, q, inputs)
            if reason is not None:
                failed += [(kernel, reason)] if new else []
                continue
        for other, reason in failed:
            warn_of(other, reason, kernel, q)
        return kernel
    raise ValueError("no kernel supports attention to both sides without a bias and a mask: give a FoldedMask")


def warn_of(failed: Kernel, reason: str, following: Kernel, q: Tensor) -> None:
    """Warns of a kernel that is not used again for this kind of input."""
    warnings.warn(
        f"attention kernel {failed.name} fails on {place_of(q)} ({reason}): {following.name} runs in its place, which "
        "is slower",
        stacklevel=4,
    )


def check_shapes(q: Tensor, k: Tensor, inputs: AttentionInputs) -> None:
    """Raises ValueError for shapes of the attention inputs that do not fit those of queries and keys."""
    batch, heads, queries, keys = *q.shape[:3], k.size(2)
    bias, padding = inputs.bias, inputs.padding
    if isinstance(bias, LinearBias) and bias.before.shape != (heads,):
        raise ValueError(f"the slopes must be (H,) = ({heads},), not {tuple(bias.before.shape)}")
    if isinstance(bias, DistanceBias):
        count, given = queries + keys - 1, tuple(bias.values.shape)
        if given[0] not in (1, heads) or given[1] < count:
            raise ValueError(f"the bias by distance must be (H or 1, T + S - 1) = ({heads} or 1, {count}), not {given}")
    if isinstance(bias, KeyBias) and bias.sums.shape != (batch, heads, keys):
        raise ValueError(f"the sums must be (B, H, S) = ({batch}, {heads}, {keys}), not {tuple(bias.sums.shape)}")
    if padding is not None and padding.shape != (batch, keys):
        raise ValueError(f"padding must be (B, S) = ({batch}, {keys}), not {tuple(padding.shape)}")


@not_compiled
def refusal(kernel: Kernel, q: Tensor, inputs: AttentionInputs) -> tuple[bool, Optional[str]]:
    """Whether a kernel is tried by this call, and why it is refused for this kind of input, or None."""
    kind = kind_of(kernel.name, q, inputs)
    new = kind not in TRIALS
    if new:
        try:
            TRIALS[kind] = None
            try_kernel(kernel.run, q, inputs, kind[-1])
        except Exception as error:  # compilers and drivers raise many kinds
            TRIALS[kind] = shortened(error)
    return new, TRIALS[kind]


def kind_of(name: str, q: Tensor, inputs: AttentionInputs) -> tuple[Any, ...]:
    """What decides whether a kernel can run."""
    gradients = q.requires_grad and torch.is_grad_enabled()
    return name, q.device, q.dtype, q.size(-1), type(inputs.bias), inputs.causal, gradients


def shortened(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def place_of(q: Tensor) -> str:
    """Device, dtype and head_dim for a warning: `NVIDIA L4 (cuda:0) in torch.float16 with head_dim 64`."""
    name = f"{torch.cuda.get_device_name(q.device)} ({q.device})" if q.device.type == "cuda" else str(q.device)
    return f"{name} in {q.dtype} with head_dim {q.size(-1)}"


def try_kernel(run: Callable[..., Tensor], like: Tensor, inputs: AttentionInputs, gradients: bool) -> None:
    """Runs a kernel on random numbers, for queries and inputs like these; AssertionError if its result is wrong."""
    device, dtype, generator = like.device, like.dtype, torch.Generator().manual_seed(1)
    tolerance = TOLERANCE.get(dtype, 1e-2)
    exactly = torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda", "xpu") else torch.no_grad()
    # Not the caller's hooks: activation checkpointing counts what is kept, which is less in a pass without the trial.
    kept = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), exactly, torch.set_grad_enabled(gradients), kept:
        drawn = (torch.randn(2, 2, n, like.size(-1), generator=generator) for n in (QUERIES, KEYS, KEYS))
        q, k, v = (x.to(device, dtype).requires_grad_(gradients) for x in drawn)
        bias, added = example_of_bias(inputs.bias, inputs.causal, device)
        out = run(q, k, v, AttentionInputs(bias=bias, causal=inputs.causal), 0.0)
        exact = [x.detach().float().requires_grad_(gradients) for x in (q, k, v)]
        scores = exact[0] @ exact[1].transpose(2, 3) * q.size(-1) ** -0.5 + added
        expected = scores.softmax(-1) @ exact[2]
        pairs = [(out, expected)]
        if gradients:
            pairs += zip(*(torch.autograd.grad(x.square().sum(), y) for x, y in ((out, (q, k, v)), (expected, exact))))
        for found, wanted in pairs:
            torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


def example_of_bias(bias: Bias, causal: bool, device: torch.device) -> tuple[Bias, Tensor]:
    """A small bias of the same kind, for two heads, and what it adds to the scores, -inf at hidden keys."""
    slopes = torch.tensor([0.5, 0.01], device=device)
    distance = distances(QUERIES, KEYS, device)
    sided = linear_bias(slopes, None if causal else slopes, distance.flatten()).unflatten(1, distance.shape)
    if isinstance(bias, NoBias):
        return bias, sided.masked_fill(sided.isfinite(), 0.0)
    if isinstance(bias, KeyBias):
        sums = -(slopes[:, None] * torch.arange(KEYS, device=device)).double().expand(2, -1, -1)
        return KeyBias(sums), sided
    if isinstance(bias, DistanceBias):
        all_distances = torch.arange(1 - QUERIES, KEYS, device=device)
        return DistanceBias(linear_bias(slopes, None if causal else slopes, all_distances)), sided
    return LinearBias(slopes, None if causal else slopes), sided
