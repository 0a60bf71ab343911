"""Causal attention with a linear bias through PyTorch's FlexAttention, for GPUs. Not yet measured on a GPU.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from .attention_inputs import AttentionInputs, LinearBias
from .reach import reach
from .tiled_attention import CHUNKS, not_compiled, recomputed_tiles

#: Queries, and keys, in a block.
BLOCK = 128

#: Kinds of input, (device, dtype, head_dim), for which FlexAttention has failed in this process.
FAILED: set[tuple[str, torch.dtype, int]] = set()


def kind_of(q: Tensor) -> tuple[str, torch.dtype, int]:
    """What decides whether FlexAttention can run."""
    return q.device.type, q.dtype, q.size(-1)


def supports_flex(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float) -> bool:
    """What `block_attention` supports: a causal linear bias on a GPU, without dropout."""
    return (
        q.device.type == "cuda"
        and isinstance(inputs.bias, LinearBias)
        and inputs.causal
        and not dropout
        and kind_of(q) not in FAILED
    )


def visible_blocks(query_length: int, key_length: int, reaches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of keys that each block of queries reads: from the reach of its first query to its last query.

    Args:
        query_length, key_length: T and S.
        reaches: (H,), see `reach`.

    Returns:
        For every head and block of queries, int32: the first block of keys (H, T / BLOCK), the first in which some key
        is in the future of some query (T / BLOCK), and the last (T / BLOCK).
    """
    start = torch.arange(key_length - query_length, key_length, BLOCK, device=reaches.device)
    farthest = (start - reaches[:, None]).clamp(min=0)
    last = (start + BLOCK - 1).clamp(max=key_length - 1)
    first_block, diagonal, last_block = (
        torch.div(x, BLOCK, rounding_mode="floor").int() for x in (farthest, start, last)
    )
    return first_block, diagonal, last_block


@not_compiled
def block_attention(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """Attention through FlexAttention; arguments: see `attention.py`. Where it fails, tiles are computed instead.

    Scores get their bias inside the kernel, in float32. Blocks of keys beyond the reach are not read. It is compiled on
    a GPU, once per kind of shape.
    """
    try:
        return flex_blocks(q, k, v, inputs)
    except Exception as error:  # the compiler and the GPU's driver raise many kinds
        FAILED.add(kind_of(q))
        warnings.warn(
            f"FlexAttention cannot run on {q.device} in {q.dtype} with head_dim {q.size(-1)} "
            f"({' '.join(str(error).split())[:200]}): attention runs tile by tile, which is slower",
            stacklevel=2,
        )
        return recomputed_tiles(q, k, v, inputs, dropout)


def flex_blocks(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
    """`block_attention` without a way out."""
    assert isinstance(inputs.bias, LinearBias)
    query_length, key_length, padding = q.size(2), k.size(2), inputs.padding
    slopes, earlier = inputs.bias.before.to(q.device), key_length - query_length
    window = key_length if inputs.window is None else min(inputs.window, key_length)
    epsilon = inputs.epsilon if key_length > CHUNKS[0] else 0.0
    reaches = reach(q.detach(), k.detach(), slopes, epsilon).clamp(max=window - 1).to(q.device)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i + earlier - j)

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        past = (i + earlier >= j) & (i + earlier - j < window)
        # A query on padding sees itself, or its row would have no weights at all.
        return past if padding is None else past & (~padding[b, j] | (i + earlier == j))

    mask_everywhere = padding is not None or window < key_length  # then any block may hold a key that is not seen
    blocks = block_mask((query_length, key_length), reaches, is_seen, mask_everywhere)
    return flex_function(q.device.type)(q, k, v, score_mod=add_bias, block_mask=blocks)


def block_mask(lengths: tuple[int, int], reaches: Tensor, is_seen: Callable[..., Tensor], mask_everywhere: bool) -> Any:
    """FlexAttention's list of the blocks that are read, see `visible_blocks`.

    Args:
        lengths: T and S.
        reaches: (H,).
        is_seen: FlexAttention's `mask_mod`.
        mask_everywhere: whether it has to be asked in all blocks, not only in those on the diagonal.
    """
    from torch.nn.attention.flex_attention import BlockMask  # it imports TorchDynamo, which takes a second

    first, diagonal, last = visible_blocks(*lengths, reaches)
    whole = first if mask_everywhere else torch.maximum(first, diagonal.expand_as(first))
    every = torch.arange(-(-lengths[1] // BLOCK), device=reaches.device, dtype=torch.int32)

    def listed(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:  # `count` blocks from `start` on, (1, H, ...)
        indices = (start[..., None] + every).clamp(max=len(every) - 1)
        return count.contiguous()[None], indices.contiguous()[None]

    return BlockMask.from_kv_blocks(
        *listed(whole, last - whole + 1),
        *listed(first, whole - first),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_seen,
        seq_lengths=lengths,
    )


@functools.cache
def flex_function(device: str) -> Callable[..., Any]:
    """FlexAttention, compiled as one kernel on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Optional[Callable[..., Any]] = torch.compile(flex_attention, dynamic=True) if device == "cuda" else None
    return compiled or flex_attention
