"""Self-attention with a position bias: under a mask that carries it, or without any mask. Pure torch.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.

`masked_attention` is the reference: the bias is folded into the future mask and everything is one call of PyTorch's
scaled_dot_product_attention. `fused_attention` computes the same for a bias that depends on distance alone, and never
makes a tensor of T x S elements: queries go in chunks, and one vector, with a number for each distance, serves as the
bias of all chunks; where the bias is linear, each head reads only the keys that can matter to it. Both are causal or
not: the queries of an encoder see keys after them too, with slopes of their own.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .positions import linear_bias

#: Queries in a tile of `fused_attention`, by how far its heads reach.
CHUNKS = (256, 512, 1024)

#: Weight that the keys which `fused_attention` skips may have together, of 1 for all keys of a query.
EPSILON = 1e-7


def mask_padding(mask: Tensor, padding: Optional[Tensor]) -> Tensor:
    """Adds padded keys to a future mask.

    A padded key gets a very negative number, not -inf: a query on padding that sees nothing but padding then stays
    finite, so that no NaN can reach the real tokens through the next layer. A real query sees at least itself, and
    against any real score the weight of a padded key underflows to exactly 0.

    Args:
        mask: (1, H, T, S), or 1 for H where the heads have one mask.
        padding: (B, S) bool, True at padded keys; None where there are none.

    Returns:
        (B, H, T, S) in the mask's dtype, or the mask itself where there is no padding.
    """
    if padding is None:
        return mask
    return mask.masked_fill(padding[:, None, None, :], torch.finfo(mask.dtype).min / 2)


def padding_before_tokens(padding: Optional[Tensor]) -> Optional[Tensor]:
    """The padding that attention has to know of, (B, S), or None: what follows the last token lies in its future."""
    if padding is None or not (padding[:, :-1] & ~padding[:, 1:]).any():
        return None
    return padding


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padding: Optional[Tensor] = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, through PyTorch's fused kernels.

    Args:
        q: (B, H, T, D), not yet scaled.
        k, v: (B, H, S, D), in the dtype of q.
        mask: (H, T, S) or (1, T, S), see `PositionMethod.future_mask`; shared by the batch. float32, or q's dtype.
        padding: (B, S) bool, True at padded keys, see `padding_before_tokens`; None where there are none.
        dropout: probability that an attention weight is dropped; 0 outside training.

    Returns:
        (B, H, T, D). Rows of queries on padding are finite and without meaning.
    """
    # Four dimensions, or PyTorch's fused CPU kernel declines the mask and attention takes five times as long.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_padding(mask[None], padding), dropout_p=dropout)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor, padding: Optional[Tensor] = None) -> Tensor:
    """The weights that attention gives the keys, for looking at them: (B, H, T, S) float32. Arguments as above."""
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
    return torch.softmax(scores.float() + mask_padding(mask[None], padding), dim=-1)


def reach(q: Tensor, k: Tensor, slopes: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Distance per head beyond which all keys together have less than `epsilon` of a query's weight.

    Let c be any vector, here the mean key of a sequence and head, and K = max|k_j - c| over all its keys. From
    q_i . (k_j - k_i) = q_i . (k_j - c) - q_i . (k_i - c) follows, with

        e = max over i of (|q_i| K - q_i . (k_i - c)) / sqrt(D),

    that key j at distance d = i - j weighs, against key i itself, whose bias is 0, w_j / w_i <= exp(e - m d). w_i is at
    most 1. So the keys beyond a whole distance x, those at x + 1, x + 2, ..., weigh together at most

        sum_{d > x} exp(e - m d) = exp(e - m x) / (exp(m) - 1),

    which is at most epsilon from x = (e - ln(epsilon) - ln(exp(m) - 1)) / m on, rounded up. What attention returns
    changes by at most 2 epsilon max|v|, its gradients in proportion. Nothing is assumed of the model: with large
    queries and keys the reach is large.

    Args:
        q: (B, H, T, D).
        k: (B, H, S, D).
        slopes: (H,), 0 for a head without bias, infinite for one that sees no key but the query's own.
        epsilon: weight of 1 that may be skipped; 0 skips nothing.

    Returns:
        (H,) float64 on the CPU: whole distances in tokens, at least 0, infinite where there is no end.
    """
    m = slopes.cpu().double()
    if epsilon <= 0:
        return torch.full_like(m, math.inf).masked_fill(m.isinf(), 0)
    q, k = q.float(), k.float()
    k = k - k.mean(dim=2, keepdim=True)
    largest = torch.linalg.vector_norm(k, dim=-1).amax(2, keepdim=True)
    bound = 1.001 * torch.linalg.vector_norm(q, dim=-1) * largest  # 0.1% for rounding
    own = (q * k[:, :, -q.size(2) :]).sum(-1)
    e = (bound - own).amax((0, 2)).cpu().double() * q.size(-1) ** -0.5
    x = (e - math.log(epsilon) - torch.expm1(m).log()) / m
    return x.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(m.isinf(), 0).clamp(min=0).ceil()


class Tile(NamedTuple):
    """One call of the kernel: some heads, some queries, and the keys that these read, in reversed order."""

    heads: slice
    queries: slice
    keys: slice


def tiles(
    query_length: int, key_length: int, reaches: Sequence[float], ahead: Optional[Sequence[float]] = None
) -> list[Tile]:
    """Cuts attention into tiles: heads of like reach together, queries in chunks, keys as far as the reach goes.

    Chunks are short where the reach is, so that few keys are read for nothing, and long where the reach is long, so
    that reading the keys and adding up their gradients does not outweigh the matrix products.

    Args:
        query_length, key_length: T and S; no tile has more than 1,024 queries.
        reaches: per head, see `reach`.
        ahead: the same for the keys after a query; None where it sees none.

    Returns:
        Tiles in which every query finds every key at a distance up to the head's reach, at least.
    """
    back, ahead = ([int(min(x, key_length)) for x in of] for of in (reaches, ahead or [0] * len(reaches)))

    def alike(one: int, other: int) -> bool:
        return abs(other - one) < 0.25 * one + CHUNKS[0] / 4

    earlier, cut, first = key_length - query_length, [], 0
    while first < len(back):
        last = first + 1
        while last < len(back) and alike(back[first], back[last]) and alike(ahead[first], ahead[last]):
            last += 1
        before, after = max(back[first:last]), max(ahead[first:last])
        chunk = min(CHUNKS, key=lambda size: abs(size - (before + after) / 8))
        for start in range(0, query_length, chunk):
            stop = min(start + chunk, query_length)
            farthest, latest = max(0, earlier + start - before), min(key_length, earlier + stop + after)
            cut.append(Tile(slice(first, last), slice(start, stop), slice(key_length - latest, key_length - farthest)))
        first = last
    return cut


class TileBias(NamedTuple):
    """The bias of every tile.

    Args:
        vector: (H, S - first), by distance from `first` on; -inf where a head sees nothing.
        first: the lowest distance that a tile has.
        query_length: T.
        padding: (B, S) bool, True at padded keys, in reversed order; or None.
    """

    vector: Tensor
    first: int
    query_length: int
    padding: Optional[Tensor]

    def of(self, tile: Tile) -> Tensor:
        """The bias of a tile, a view of the vector: (1, H, T, S); (B, H, T, S), a copy, with padding.

        With the keys reversed the distance is t + s plus a constant, so that both strides are 1 and no element is
        copied.
        """
        queries, keys = (part.stop - part.start for part in (tile.queries, tile.keys))
        lowest = tile.queries.start + tile.keys.start + 1 - self.query_length  # first query, last key
        vector = self.vector[tile.heads]
        start = vector.storage_offset() + lowest - self.first
        bias = vector.as_strided((1, vector.size(0), queries, keys), (0, vector.stride(0), 1, 1), start)
        return mask_padding(bias, None if self.padding is None else self.padding[:, tile.keys])


class TiledAttention(torch.autograd.Function):
    """Attention tile by tile through PyTorch's CPU flash kernel, forward and backward.

    It calls the kernel itself, because autograd through slices would make gradients of all keys for every tile.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, cut):
        """q (B, H, T, D); k, v (B, H, S, D) in reversed order; a `TileBias`; a list of `Tile`. Returns (B, H, T, D)."""
        batch, heads, queries, dim = q.shape
        out = q.new_empty(queries, batch, heads, dim).permute(1, 2, 0, 3)  # lies as the output projection reads it
        logsumexp = bias.vector.new_empty(batch, heads, queries)
        for tile in cut:
            h, t, s = tile
            out[:, h, t], logsumexp[:, h, t] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, h, t], k[:, h, s], v[:, h, s], attn_mask=bias.of(tile)
            )
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.bias, ctx.cut = bias, cut
        return out

    @staticmethod
    def backward(ctx, grad):
        """Gradients of q, k and v; those of keys and values are summed in float32 at least."""
        q, k, v, out, logsumexp = ctx.saved_tensors
        q_grad = torch.empty_like(q)
        k_grad, v_grad = (torch.zeros_like(x, dtype=ctx.bias.vector.dtype) for x in (k, v))
        for tile in ctx.cut:
            h, t, s = tile
            q_grad[:, h, t], k_part, v_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(grad[:, h, t], q[:, h, t], k[:, h, s], v[:, h, s], out[:, h, t], logsumexp[:, h, t], 0.0, False),
                attn_mask=ctx.bias.of(tile),
            )
            k_grad[:, h, s] += k_part
            v_grad[:, h, s] += v_part
        return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype), None, None


def checkpointed_tiles(q: Tensor, k: Tensor, v: Tensor, bias: TileBias, cut: list[Tile], dropout: float) -> Tensor:
    """`TiledAttention` with dropout and on any device; what a tile needs for its gradients is computed again there."""

    def attend(tile: Tile) -> Tensor:
        h, t, s = tile
        mask = bias.of(tile)
        if q.device.type != "cpu":  # whose kernels want their own dtype, and rows that lie apart
            mask = mask.to(q.dtype).contiguous()
        return F.scaled_dot_product_attention(q[:, h, t], k[:, h, s], v[:, h, s], attn_mask=mask, dropout_p=dropout)

    out = torch.empty_like(q)
    for tile in cut:
        out[:, tile.heads, tile.queries] = checkpoint(attend, tile, use_reentrant=False)
    return out


#: Queries, and keys, in a block of FlexAttention.
BLOCK = 128


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
    return tuple(torch.div(x, BLOCK, rounding_mode="floor").int() for x in (farthest, start, last))


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, padding: Optional[Tensor], reaches: Tensor, window: int
) -> Tensor:
    """`fused_attention` through PyTorch's FlexAttention: scores get their bias inside the kernel, in float32.

    Blocks of keys beyond the reach are not read. Compiled on a GPU, once per kind of shape. Not yet measured on a GPU.

    Args:
        q, k, v, slopes, padding, window: see `fused_attention`.
        reaches: (H,), see `reach`.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention  # as in `not_compiled`

    query_length, key_length = q.size(2), k.size(2)
    earlier = key_length - query_length

    def biased(score, b, h, i, j):
        return score - slopes[h] * (i + earlier - j)

    def seen(b, h, i, j):
        past = (i + earlier >= j) & (i + earlier - j < window)
        # a query on padding sees itself, or its row would have no weights at all
        return past if padding is None else past & (~padding[b, j] | (i + earlier == j))

    first, diagonal, last = visible_blocks(query_length, key_length, reaches)
    everywhere = padding is not None or window < key_length  # then any block may hold a key that is not seen
    whole = first if everywhere else torch.maximum(first, diagonal.expand_as(first))
    every = torch.arange(-(-key_length // BLOCK), device=q.device, dtype=torch.int32)

    def listed(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:  # as many blocks from `start` on, (1, H, ...)
        indices = (start[..., None] + every).clamp(max=len(every) - 1)
        return count.contiguous()[None], indices.contiguous()[None]

    blocks = BlockMask.from_kv_blocks(
        *listed(whole, last - whole + 1),
        *listed(first, whole - first),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(query_length, key_length),
    )
    attend = compiled_flex_attention() if q.device.type == "cuda" else flex_attention
    return attend(q, k, v, score_mod=biased, block_mask=blocks)


@functools.cache
def compiled_flex_attention():
    """FlexAttention as one GPU kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def fused_is_faster(device: torch.device, query_length: int, key_length: int) -> bool:
    """Whether `fused_attention` is the faster one for a bias, by what `scripts/benchmark.sh` measured.

    On a CPU from more than one chunk on. On a GPU it has not been measured, and so is not what is taken unasked.
    """
    return device.type == "cpu" and query_length > 1 and key_length > CHUNKS[0]


def not_compiled(function: Callable) -> Callable:
    """`torch.compiler.disable`, but only where something is compiled: it imports TorchDynamo, which takes a second."""

    @functools.wraps(function)
    def wrapper(*args, **options):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return wrapper


@not_compiled
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Optional[Tensor] = None,
    padding: Optional[Tensor] = None,
    dropout: float = 0.0,
    epsilon: float = EPSILON,
    window: Optional[int] = None,
    bias: Optional[Tensor] = None,
) -> Tensor:
    """Attention with the bias -slopes * (i - j), another one by distance, or none, without a tensor of T x S elements.

    On the CPU through PyTorch's flash kernel, tile by tile. On a GPU, if causal with slopes, through FlexAttention (not
    yet measured on a GPU). With dropout, for gradients of the bias, and else, through scaled_dot_product_attention,
    tile by tile, each computed again in the backward pass.

    Args:
        q: (B, H, T, D), not yet scaled.
        k, v: (B, H, S, D), in the dtype of q.
        slopes: (H,), at least 0, causal; or (2, H) for keys before and after a query, infinite where a head sees
            nothing; None for no bias, causal.
        padding: (B, S) bool, True at padded keys, see `padding_before_tokens`; None where there are none.
        dropout: probability that an attention weight is dropped; 0 outside training.
        epsilon: weight of 1 that keys skipped for their distance may have together, see `reach`; 0 skips none.
        window: number of keys that a query sees, the last ones, itself included; None for all.
        bias: (H, N) or (1, N), N at least T + S - 1, in the place of slopes: of the distances up to S - 1, -inf where a
            head sees nothing. No key that is seen is skipped.

    Returns:
        (B, H, T, D). Rows of queries on padding are finite and without meaning.
    """
    heads, query_length, key_length = q.size(1), q.size(2), k.size(2)
    on_cpu = q.device.type == "cpu"
    window = key_length if window is None else min(window, key_length)
    if slopes is None and bias is None:
        if padding is None and window == query_length == key_length and not (on_cpu and dropout):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        slopes = q.new_zeros(heads, dtype=torch.float32)
    # Over short sequences the least reach is most of the past.
    epsilon = epsilon if key_length > CHUNKS[0] else 0.0
    dtype = torch.promote_types(q.dtype, torch.float32)
    if bias is not None:
        first = 1 - query_length
        vector = bias.expand(heads, -1)[:, first - key_length :].to(dtype)
        before = torch.full((heads,), window - 1)
        after = torch.where(vector[:, : query_length - 1].isneginf().all(1), 0.0, math.inf)
    elif slopes.dim() == 1:
        before = reach(q.detach(), k.detach(), slopes, epsilon).clamp(max=window - 1)
        if q.device.type == "cuda" and not dropout:
            return block_attention(q, k, v, slopes.to(q.device), padding, before.to(q.device), window)
        slopes, after = torch.stack([slopes, torch.full_like(slopes, math.inf)]), torch.zeros_like(before)
        first = 1 - min(query_length, CHUNKS[-1])
    else:  # what is skipped may be half on either side
        before, after = (reach(q.detach(), k.detach(), one, epsilon / 2) for one in slopes)
        first = 1 - key_length
    distance = torch.arange(first, key_length, device=q.device)
    if bias is None:
        vector = linear_bias(*slopes.to(q.device, dtype), distance)
    if window < key_length:
        vector = vector.masked_fill(distance >= window, -math.inf)
    cut = tiles(query_length, key_length, before.tolist(), after.tolist())
    tile_bias = TileBias(vector, first, query_length, None if padding is None else padding.flip(1))
    k, v = k.flip(2), v.flip(2)
    if on_cpu and not dropout and not vector.requires_grad:
        return TiledAttention.apply(q, k, v, tile_bias, cut)
    return checkpointed_tiles(q, k, v, tile_bias, cut, dropout)
