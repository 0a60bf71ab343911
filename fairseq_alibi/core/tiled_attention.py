"""Attention tile by tile, without a tensor of T x S elements: two kernels for a bias by distance or by key.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.

Queries go in chunks, and one vector, with a number for each distance, serves as the bias of all chunks. Each head reads
only the keys that can matter to it, see `reach`. `flash_tiles` calls PyTorch's CPU flash kernel, a private function.
`recomputed_tiles` is the public way: it serves dropout, gradients of the bias, other devices, and a PyTorch whose
private function is gone or has changed.

A bias by key c_i - c_j, of query i and key j, is carried by further dimensions of queries and keys through any kernel,
its gradient included. It differs by a constant per row from o - c_j, whatever the number o, and softmax ignores the
difference. So a dimension is 1 in queries and o - c_j, times sqrt(D), in keys. o is c in the middle of a tile's
queries, so that the numbers of near keys are small and exact. In half precision three numbers add up to o - c_j.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention_inputs import AttentionInputs, DistanceBias, FoldedMask, KeyBias, LinearBias, PairBias
from .positions import aligned, linear_bias
from .reach import distance_reach, oldest_keys, reach

CHUNKS = (256, 512, 1024)  # queries in a tile, by how far its heads reach
FEATURES = 8  # further dimensions for a bias by key, a multiple of what kernels compute at once
Function = TypeVar("Function", bound=Callable[..., Any])


def merge_padding_into_mask(mask: Tensor, padding: Optional[Tensor]) -> Tensor:
    """Adds padded keys, (B, S) bool, to a future mask (1, H or 1, T, S), in its dtype.

    A padded key gets a very negative number, not -inf: a query on padding that sees nothing but padding then stays
    finite, so that no NaN can reach the real tokens through the next layer. A real query sees at least itself, and
    against any real score the weight of a padded key underflows to exactly 0.
    """
    if padding is None:
        return mask
    return mask.masked_fill(padding[:, None, None, :], torch.finfo(mask.dtype).min / 2)


def widen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies with `FEATURES` further dimensions, 1 in queries where keys have features and 0 elsewhere."""
    wide_q, wide_k, wide_v = (F.pad(x, (0, FEATURES)) for x in (q, k, v))
    wide_q[..., q.size(-1) : q.size(-1) + feature_count(q.dtype)] = 1
    return wide_q, wide_k, wide_v


def feature_count(dtype: torch.dtype) -> int:
    """Number of dimensions with features."""
    return 1 if dtype.itemsize >= 4 else 3


def features_of_keys(sums: Tensor, queries: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The features of a tile's keys, of dimension `dim`: (B, H, S, 1), or (B, H, S, 3) in half precision.

    `sums` (B, H, S) is c of the keys, the newest one, which is the last query, first.
    """
    middle = min(queries // 2, sums.size(2) - 1)
    whole = (sums[:, :, middle, None] - sums) * math.sqrt(dim)
    if feature_count(dtype) == 1:
        return whole[..., None].to(dtype)
    rest, parts = whole.clamp(-6e4, 6e4), []  # float16 ends at 65,504, and keys that are so far weigh nothing
    for _ in range(feature_count(dtype)):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1]
    return torch.stack(parts, dim=-1)


def write_features(keys: Tensor, sums: Tensor, queries: int, dim: int) -> None:
    """Writes the features of a tile's keys into the widened keys (B, H, S, D + FEATURES)."""
    features = features_of_keys(sums, queries, dim, keys.dtype)
    keys[..., dim : dim + features.size(-1)] = features


class Tile(NamedTuple):
    """One call of the kernel: some heads, some queries, and the keys that these read, in reversed order."""

    heads: slice
    queries: slice
    keys: slice


def tiles(
    query_length: int,
    key_length: int,
    back: Sequence[float],
    ahead: Sequence[float],
    oldest_keys: Optional[Tensor] = None,
) -> list[Tile]:
    """Cuts attention into tiles: heads of like reach together, queries in chunks, keys at least as far as the reach.

    Chunks, of at most 1,024 queries, are short where the reach is, so that few keys are read in vain, and long where
    the reach is long, so that reading the keys and adding up their gradients does not outweigh the matrix products.
    `back` and `ahead` are the reach of each head, 0 ahead where it sees none; `oldest_keys` (H, chunks) what each chunk
    of the shortest size reads, where `back` says only how far a head reaches on average.
    """
    behind, before = ([int(min(x, key_length)) for x in reaches] for reaches in (back, ahead))

    def alike(reach_a: int, reach_b: int) -> bool:
        return abs(reach_b - reach_a) < 0.25 * reach_a + CHUNKS[0] / 4

    earlier, cut, first = key_length - query_length, [], 0
    while first < len(behind):
        last = first + 1
        while last < len(behind) and alike(behind[first], behind[last]) and alike(before[first], before[last]):
            last += 1
        farthest_back, farthest_ahead = max(behind[first:last]), max(before[first:last])
        chunk = min(CHUNKS, key=lambda size: abs(size - (farthest_back + farthest_ahead) / 8))
        for start in range(0, query_length, chunk):
            stop = min(start + chunk, query_length)
            oldest, newest = max(0, earlier + start - farthest_back), min(key_length, earlier + stop + farthest_ahead)
            if oldest_keys is not None:
                oldest = int(oldest_keys[first:last, start // CHUNKS[0] : -(-stop // CHUNKS[0])].min())
            cut.append(Tile(slice(first, last), slice(start, stop), slice(key_length - newest, key_length - oldest)))
        first = last
    return cut


class TileBias(NamedTuple):
    """The bias of every tile."""

    vector: Tensor  # (H, S - first), by distance from `first` on; -inf where a head sees nothing
    first: int  # the lowest distance that a tile has
    query_length: int  # T
    padding: Optional[Tensor]  # (B, S) bool, True at padded keys, in reversed order

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
        return merge_padding_into_mask(bias, None if self.padding is None else self.padding[:, tile.keys])


def plan_tiles(q: Tensor, k: Tensor, inputs: AttentionInputs) -> tuple[TileBias, list[Tile]]:
    """The bias and the tiles for queries (B, H, T, D) and keys (B, H, S, D).

    What a head reaches decides the tiles, and so has to be known on the host. On a GPU that would have to be waited
    for, so nothing is skipped there.
    """
    heads, query_length, key_length = q.size(1), q.size(2), k.size(2)
    window = key_length if inputs.window is None else min(inputs.window, key_length)
    dtype = torch.promote_types(q.dtype, torch.float32)
    # Over short sequences the least reach is most of the past, so nothing is skipped.
    epsilon = inputs.epsilon if key_length > CHUNKS[0] and q.device.type == "cpu" else 0.0
    bias, oldest = inputs.bias, None
    if isinstance(bias, DistanceBias):
        first = 1 - query_length
        vector = bias.values.expand(heads, -1)[:, first - key_length :].to(dtype)
        parts = vector.detach().split([query_length - 1, 1, key_length - 1], dim=1)
        back, ahead = (
            distance_reach(q.detach(), k.detach(), part, parts[1][:, 0], epsilon if inputs.causal else epsilon / 2)
            if epsilon
            else torch.full((heads,), math.inf)
            for part in (parts[2], parts[0].flip(1))
        )
        back, ahead = back.clamp(max=window - 1), torch.zeros_like(ahead) if inputs.causal else ahead
    elif isinstance(bias, PairBias):  # nothing is skipped, and tiles are small, because a tile's bias is computed
        oldest, first = torch.zeros(heads, -(-query_length // CHUNKS[0]), dtype=torch.int64), 1 - CHUNKS[0]
        back, ahead = torch.full((heads,), 8.0 * CHUNKS[0]), torch.zeros(heads)
        vector = linear_bias(q.new_zeros(heads, dtype=dtype), None, torch.arange(first, key_length, device=q.device))
    elif isinstance(bias, KeyBias):
        oldest = torch.zeros(heads, -(-query_length // CHUNKS[0]), dtype=torch.int64)
        if epsilon:
            oldest = oldest_keys(q.detach(), k.detach(), bias.sums.detach(), CHUNKS[0], epsilon)
        starts = key_length - query_length + torch.arange(0, query_length, CHUNKS[0])
        oldest = oldest.maximum(starts - window + 1)
        back, ahead, first = (starts - oldest).double().mean(1), torch.zeros(heads), 1 - min(query_length, CHUNKS[-1])
        vector = linear_bias(q.new_zeros(heads, dtype=dtype), None, torch.arange(first, key_length, device=q.device))
    else:
        before = bias.before.to(q.device) if isinstance(bias, LinearBias) else q.new_zeros(heads, dtype=torch.float32)
        after = bias.after.to(q.device) if isinstance(bias, LinearBias) and bias.after is not None else None
        back, ahead, first = torch.full((heads,), math.inf), torch.zeros(heads), 1 - min(query_length, CHUNKS[-1])
        if after is None:
            back = reach(q.detach(), k.detach(), before, epsilon) if epsilon else back
        else:  # what is skipped may be half on either side
            ahead, first = back, 1 - key_length
            if q.device.type == "cpu":  # slopes alone tell which side a head does not see
                back, ahead = (reach(q.detach(), k.detach(), slopes, epsilon / 2) for slopes in (before, after))
            after = after.to(dtype)
        back = back.clamp(max=window - 1)
        vector = linear_bias(before.to(dtype), after, torch.arange(first, key_length, device=q.device))
    if window < key_length:
        vector = vector.masked_fill(torch.arange(first, key_length, device=q.device) >= window, -math.inf)
    padding = None if inputs.padding is None else inputs.padding.flip(1)
    cut = tiles(query_length, key_length, back.tolist(), ahead.tolist(), oldest)
    return TileBias(vector, first, query_length, padding), cut


class FlashTiles(torch.autograd.Function):
    """Attention tile by tile through PyTorch's CPU flash kernel, forward and backward.

    It calls the kernel itself, because autograd through slices would make gradients of all keys for every tile.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sums: Optional[Tensor], bias: TileBias, cut: list[Tile]
    ) -> Tensor:
        """q (B, H, T, D); k, v (B, H, S, D), sums (B, H, S) of a bias by key or None, in reversed order; the tiles."""
        batch, heads, queries, dim = q.shape
        out = q.new_empty(queries, batch, heads, dim).permute(1, 2, 0, 3)  # lies as the output projection reads it
        logsumexp = bias.vector.new_empty(batch, heads, queries)
        wide_q, wide_k, wide_v = (q, k, v) if sums is None else widen(q, k, v)
        for tile in cut:
            h, t, s = tile
            if sums is not None:
                write_features(wide_k[:, h, s], sums[:, h, s], t.stop - t.start, dim)
            part, logsumexp[:, h, t] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(wide_q[:, h, t], wide_k[:, h, s], wide_v[:, h, s]),
                attn_mask=bias.of(tile),
                scale=1 / math.sqrt(dim),
            )
            out[:, h, t] = part[..., :dim]
        ctx.save_for_backward(q, k, v, sums, out, logsumexp)
        ctx.bias, ctx.cut = bias, cut
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        """Gradients of q, k, v and the sums; those of keys and values are summed in float32 at least."""
        q, k, v, sums, out, logsumexp = ctx.saved_tensors
        dim, q_grad = q.size(-1), torch.empty_like(q)
        k_grad, v_grad = (torch.zeros_like(x, dtype=ctx.bias.vector.dtype) for x in (k, v))
        sums_grad = None if sums is None else torch.zeros_like(sums)
        if sums is not None:
            grad, out = F.pad(grad, (0, FEATURES)), F.pad(out, (0, FEATURES))
            q, k, v = widen(q, k, v)
        for tile in ctx.cut:
            h, t, s = tile
            if sums is not None:
                write_features(k[:, h, s], sums[:, h, s], t.stop - t.start, dim)
            q_part, k_part, v_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(grad[:, h, t], q[:, h, t], k[:, h, s], v[:, h, s]),
                *(out[:, h, t], logsumexp[:, h, t], 0.0, False),
                attn_mask=ctx.bias.of(tile),
                scale=1 / math.sqrt(dim),
            )
            q_grad[:, h, t] = q_part[..., :dim]
            k_grad[:, h, s] += k_part[..., :dim]
            v_grad[:, h, s] += v_part[..., :dim]
            if sums_grad is not None:
                sums_grad[:, h, s] -= k_part[..., dim] * math.sqrt(dim)
        return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype), sums_grad, None, None


def not_compiled(function: Function) -> Function:
    """`torch.compiler.disable`, but only where something is compiled: it imports TorchDynamo, which takes a second."""

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return wrapper  # type: ignore[return-value]


def reversed_sums(inputs: AttentionInputs) -> Optional[Tensor]:
    """The sums of a bias by key in the order of the tiles' keys, (B, H, S); None for another bias."""
    return inputs.bias.sums.flip(2) if isinstance(inputs.bias, KeyBias) else None


def supports_recomputed(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float) -> bool:
    """What `recomputed_tiles` supports: all but a folded mask, and both sides without a bias."""
    by_distance = isinstance(inputs.bias, (LinearBias, DistanceBias))
    return by_distance or (inputs.causal and not isinstance(inputs.bias, FoldedMask))


def supports_flash(q: Tensor, k: Tensor, inputs: AttentionInputs, dropout: float) -> bool:
    """What `flash_tiles` supports: the same on a CPU, without dropout and without gradients of the bias."""
    learned = isinstance(inputs.bias, DistanceBias) and inputs.bias.values.requires_grad
    learned = learned or isinstance(inputs.bias, PairBias)
    return supports_recomputed(q, k, inputs, dropout) and q.device.type == "cpu" and not dropout and not learned


@not_compiled
def flash_tiles(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """Attention without a mask through PyTorch's private CPU flash kernel. Arguments: see `attention.py`."""
    bias, cut = plan_tiles(q, k, inputs)
    return FlashTiles.apply(q, k.flip(2), v.flip(2), reversed_sums(inputs), bias, cut)


@not_compiled
def recomputed_tiles(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, dropout: float = 0.0) -> Tensor:
    """Attention without a mask through the public function of PyTorch. Arguments: see `attention.py`.

    What a tile needs for its gradients is computed again in the backward pass.
    """
    bias, cut = plan_tiles(q, k, inputs)
    k, v, sums, dim = k.flip(2), v.flip(2), reversed_sums(inputs), q.size(-1)

    def attend_tile(tile: Tile) -> Tensor:
        h, t, s = tile
        queries, keys = q[:, h, t], k[:, h, s]
        mask = bias.of(tile)
        if isinstance(inputs.bias, PairBias):
            places = torch.arange(k.size(2), device=q.device)
            positions = inputs.bias.positions[..., -q.size(2) :][..., t]
            distance = places[-q.size(2) :][t, None] - places.flip(0)[s]
            mask = mask + inputs.bias.of_tile(positions, distance)[..., h, :, :].to(mask.dtype)
        if q.device.type != "cpu":  # kernels of a GPU want their own dtype
            mask = aligned(mask.to(q.dtype).contiguous())
        if sums is not None:
            features = features_of_keys(sums[:, h, s], t.stop - t.start, dim, k.dtype)
            queries = torch.cat([queries, torch.ones_like(queries[..., : features.size(-1)])], dim=-1)
            keys = torch.cat([keys, features], dim=-1)
        return F.scaled_dot_product_attention(
            queries, keys, v[:, h, s], attn_mask=mask, dropout_p=dropout, scale=1 / math.sqrt(dim)
        )

    out = torch.empty_like(q)
    for tile in cut:
        out[:, tile.heads, tile.queries] = checkpoint(attend_tile, tile, use_reentrant=False)
    return out
