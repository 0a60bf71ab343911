"""Attention through PyTorch's FlexAttention, which compiles one kernel with the bias in it. Not measured on a GPU.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim; N = B * H rows
of heads, R and C blocks of queries and keys.

One graph serves every length, batch, window and padding: lengths are filled up to whole blocks, at least two of each,
and whatever differs between passes is in a tensor. Else each kind of shape would be compiled anew, until PyTorch gives
up compiling and makes all scores. Nothing waits for the GPU: the reach stays on it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_inputs import AttentionInputs, DistanceBias, LinearBias, NoBias
from .reach import distance_reach, reach
from .tiled_attention import CHUNKS, not_compiled

BLOCK = 128  # queries, and keys, in a block
STEEPEST = 1e4  # a slope that leaves other keys no weight: an infinite one would give 0 * infinity


def supports_flex(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float) -> bool:
    """What `flex_blocks` supports: a bias by distance without gradients or none, without dropout, on a GPU."""
    bias = inputs.bias
    fixed = isinstance(bias, DistanceBias) and not (bias.values.requires_grad and torch.is_grad_enabled())
    return (
        q.device.type in ("cuda", "xpu")
        and q.size(-1) >= 16
        and not dropout
        and (isinstance(bias, LinearBias) or (isinstance(bias, NoBias) and inputs.causal) or fixed)
    )


@not_compiled
def flex_blocks(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """Attention through FlexAttention; arguments: see `attention.py`. Blocks of keys beyond the reach are not read."""
    batch, heads, queries = q.shape[:3]
    keys, padding = k.size(2), inputs.padding
    window = keys if inputs.window is None else min(inputs.window, keys)
    slopes, table, reaches = distance_inputs(q, k, inputs)
    reaches = torch.stack([reaches[0].clamp(max=window - 1), reaches[1].clamp(max=keys)])
    hidden = torch.zeros(batch, keys, dtype=torch.bool, device=q.device) if padding is None else padding
    hidden = in_blocks(hidden, keys, fill=True)
    missing = hidden.size(1) - keys
    numbers = torch.tensor([keys - queries, keys - 1, window, queries - 1 + missing], dtype=torch.int32)
    out = flex_function()(
        *(in_blocks(x.flatten(0, 1), n).unflatten(1, (-1, BLOCK)) for x, n in ((q, queries), (k, keys), (v, keys))),
        PassTensors(
            slopes.repeat(1, batch),
            None if table is None else F.pad(table, (missing, 0)).repeat(batch, 1),
            numbers.to(q.device, non_blocking=True),
            reaches.int().repeat(1, batch),
            hidden.repeat_interleave(heads, 0).clone(),  # a view would have guards of its own
        ),
        inputs.causal,
    )
    return out[:, 0, :queries].unflatten(0, (batch, heads))


def in_blocks(x: Tensor, length: int, fill: bool = False) -> Tensor:
    """(N, length, ...) filled up to whole blocks, two at least, because a size of 1 would be compiled anew."""
    missing = max(2 * BLOCK, length + -length % BLOCK) - length
    return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing), value=fill).contiguous()


def distance_inputs(q: Tensor, k: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Optional[Tensor], Tensor]:
    """(2, H) slopes before and after a query, or zeros and (H, T + S - 1) values by distance; (2, H) reaches."""
    heads, bias, q, k = q.size(1), inputs.bias, q.detach(), k.detach()
    epsilon = inputs.epsilon if k.size(2) > CHUNKS[0] else 0.0
    epsilon = epsilon if inputs.causal else epsilon / 2
    none = q.new_zeros(heads, dtype=torch.float32)
    if isinstance(bias, DistanceBias):
        values = bias.values.detach().expand(heads, -1)[:, : q.size(2) + k.size(2) - 1].float()
        parts = values.split([q.size(2) - 1, 1, k.size(2) - 1], dim=1)
        reaches = [distance_reach(q, k, part, parts[1][:, 0], epsilon) for part in (parts[2], parts[0].flip(1))]
        return torch.stack([none, none]), values.clamp(min=-1e9), torch.stack(reaches).nan_to_num(posinf=2**30)
    before, after = (bias.before, bias.after) if isinstance(bias, LinearBias) else (none, None)
    slopes = torch.stack([before.to(q.device), none if after is None else after.to(q.device)])
    reaches = [reach(q, k, slope, epsilon) for slope in slopes[: 1 if after is None else 2]]
    return slopes.clamp(max=STEEPEST), None, torch.stack([*reaches, none.double()][:2]).nan_to_num(posinf=2**30)


class PassTensors(NamedTuple):
    """What differs between passes, beside queries, keys and values."""

    slopes: Tensor  # (2, N) for keys before and after a query
    table: Optional[Tensor]  # (N, ...) bias by distance; None for slopes alone
    numbers: Tensor  # (4,) int32: keys before the first query; last key; window; where distance 0 is in the table
    reaches: Tensor  # (2, N) int32, how far a head reaches back and ahead
    hidden: Tensor  # (N, C * BLOCK) bool, True at padding


def flex_pass(q: Tensor, k: Tensor, v: Tensor, of_pass: PassTensors, causal: bool) -> Tensor:
    """What is compiled: (N, R, BLOCK, D), (N, C, BLOCK, D) twice -> (N, 1, R * BLOCK, D)."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    (before, after), table, _, reaches, hidden = of_pass
    earlier, last, window, own_place = of_pass.numbers.unbind()

    def position(i: Tensor) -> Tensor:  # queries that fill the last block are copies of the last one
        return torch.minimum(i + earlier, last)

    def add_bias(score: Tensor, n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = position(i) - j
        if table is not None:
            return score + table[n, distance + own_place]
        return score - torch.where(distance > 0, before[n] * distance, -after[n] * distance)

    def is_seen(n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # A query on padding sees itself, or its row would have no weights at all.
        seen = ~hidden[n, j] | (j == position(i))
        return seen & (j <= position(i)) & (position(i) - j < window) if causal else seen

    visible, whole = blocks((q.size(1), k.size(1)), (earlier, last, window), reaches, hidden, causal)
    partial = visible & ~whole
    lists: list[Any] = [*listed(partial), *listed(whole), *[None] * 4]
    if torch.is_grad_enabled():
        lists[4:] = [*listed(partial.transpose(1, 2)), *listed(whole.transpose(1, 2))]
    q, k, v = (x.flatten(1, 2)[:, None] for x in (q, k, v))
    lists = [(q.size(2), k.size(2)), *lists, (BLOCK, BLOCK), is_seen]
    options: Any = kernel_options(q.dtype, q.size(-1))
    return flex_attention(q, k, v, add_bias, BlockMask(*lists), kernel_options=options)


def kernel_options(dtype: torch.dtype, dim: int) -> dict[str, Any]:
    """Tiles that fit the shared memory of every GPU: PyTorch's own do not for wide float32 on sm_86, sm_89 and sm_120.

    The kernel for few queries is ruled out, because it is another graph.
    """
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if dtype.itemsize >= 4 and dim > 64:
        options.update(fwd_BLOCK_M=64 if dim <= 128 else 32, fwd_BLOCK_N=32, fwd_num_stages=1, fwd_num_warps=4)
    return options


def blocks(
    counts: tuple[int, int], numbers: tuple[Tensor, Tensor, Tensor], reaches: Tensor, hidden: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Which blocks of keys each block of queries reads, and those in which every query sees every key: (N, R, C) bool.

    `counts` are R and C; `numbers` are the keys before the first query, the last key and the window.
    """
    earlier, last, window = numbers
    first_query = torch.minimum(earlier + BLOCK * torch.arange(counts[0], device=hidden.device), last)[:, None]
    last_query = torch.minimum(first_query + BLOCK - 1, last)
    first_key = BLOCK * torch.arange(counts[1], device=hidden.device)
    last_key = first_key + BLOCK - 1
    back, ahead = (of_head[:, None, None] for of_head in reaches)
    newest = last_query if causal else torch.minimum(last_query + ahead, last)
    visible = (first_key <= newest) & (last_key >= first_query - back)
    whole = visible & ~hidden.unflatten(1, (-1, BLOCK)).any(2)[:, None]
    if causal:
        whole = whole & (last_key <= first_query) & (first_key > last_query - window)
    return visible, whole


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(N, R, C) bool as FlexAttention takes it: (N, 1, R) int32 how many blocks, (N, 1, R, C) int32 these first."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def compiled_pass(*arguments: Any) -> Tensor:
    """`flex_pass`, in compiled code alone: elsewhere FlexAttention would make all scores."""
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is turned off")
    return flex_pass(*arguments)


@functools.cache
def flex_function() -> Callable[..., Tensor]:
    """`flex_pass`, compiled."""
    import torch._dynamo.config as dynamo  # these take a second
    import torch.fx.experimental._config as symbols

    compiled = torch.compile(compiled_pass, dynamic=True, fullgraph=True)

    def call(q: Tensor, *arguments: Any) -> Tensor:
        # Sizes that happen to be equal are not taken for the same one, and autocast is no reason to compile anew.
        options: Any = dynamo.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)  # type: ignore[attr-defined]
        with symbols.patch(use_duck_shape=False), options, torch.autocast(q.device.type, enabled=False):  # type: ignore[attr-defined]
            return compiled(q, *arguments)

    return call
