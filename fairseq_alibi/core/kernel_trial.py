"""Kernels that may fail or be wrong on some device: each is tried once, on a small input, before it is used.

What is tried is the kind of input that decides whether a kernel can run: device, dtype, head_dim, kind of bias, and
whether there are gradients. The trial compares output and gradients with attention written out in float32.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from .attention_inputs import AttentionInputs, Bias, DistanceBias, KeyBias, LinearBias, NoBias
from .positions import distances, linear_bias
from .tiled_attention import not_compiled

QUERIES, KEYS = 260, 390  # queries and keys of a trial: more than one chunk, and no whole number of blocks

#: Largest error that passes, for values of about 1: an error of the kind that is looked for is larger.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 8e-2}
TRIALS: dict[tuple[Any, ...], Optional[str]] = {}  # why a kernel is refused, or None, by its name and the kind of input


@not_compiled
def refusal(kernel: Any, q: Tensor, inputs: AttentionInputs) -> tuple[bool, Optional[str]]:
    """Whether a kernel is tried by this call, and why it is refused for this kind of input, or None."""
    kind = kind_of(kernel.name, q, inputs)
    new = kind not in TRIALS
    if new:
        try:
            TRIALS[kind] = None
            compare(kernel.run, q, inputs, kind[-1])
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


def compare(run: Callable[..., Tensor], like: Tensor, inputs: AttentionInputs, gradients: bool) -> None:
    """Runs a kernel on random numbers, for queries and inputs like these; AssertionError if its result is wrong."""
    device, dtype, generator = like.device, like.dtype, torch.Generator().manual_seed(1)
    tolerance = TOLERANCE.get(dtype, 1e-2)
    exactly = torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda", "xpu") else torch.no_grad()
    # Not the caller's hooks: activation checkpointing counts what is kept, which is less in a pass without the trial.
    kept = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), exactly, torch.set_grad_enabled(gradients), kept:
        drawn = (torch.randn(2, 2, n, like.size(-1), generator=generator) for n in (QUERIES, KEYS, KEYS))
        q, k, v = (x.to(device, dtype).requires_grad_(gradients) for x in drawn)
        bias, added = example(inputs.bias, inputs.causal, device)
        out = run(q, k, v, AttentionInputs(bias=bias, causal=inputs.causal), 0.0)
        exact = [x.detach().float().requires_grad_(gradients) for x in (q, k, v)]
        scores = exact[0] @ exact[1].transpose(2, 3) * q.size(-1) ** -0.5 + added
        expected = scores.softmax(-1) @ exact[2]
        pairs = [(out, expected)]
        if gradients:
            pairs += zip(*(torch.autograd.grad(x.square().sum(), y) for x, y in ((out, (q, k, v)), (expected, exact))))
        for found, wanted in pairs:
            torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


def example(bias: Bias, causal: bool, device: torch.device) -> tuple[Bias, Tensor]:
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
