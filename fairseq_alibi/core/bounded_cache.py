"""A cache of which each head keeps the keys within its reach, so that decoding costs the same at any length.

A head's static reach (`receptive_field`) for half of epsilon tells which keys no later query needs: they are dropped
for good. Of the others a single query reads those within the reach of its own score excess, for the other half; several
queries at once run through the kernels, which do the same. So what a query does not read has at most `epsilon` of its
weight, and what attention returns changes by at most 2 epsilon max|v|, as in `reach`.

Shapes: B batch, H heads, h heads of a group, T new tokens, S kept keys, D head_dim.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from .attention import attend, masked_attention
from .attention_inputs import AttentionInputs, FoldedMask, LinearBias
from .reach import reach_of_excess
from .tiled_attention import merge_padding_into_mask

SHORT = 4096  # up to so many tokens everything is kept and read, because short texts gain nothing
GROUP_COST = 4096  # reading a further group of heads takes as long as reading so many more keys of one head
STATE_KEY = "fairseq_alibi.bounded"  # key under which an incremental state of fairseq holds the cache


class HeadGroup:
    """Keys and values of heads of like reach, in buffers that hold a block of further tokens.

    When a block is full, what is kept moves to a new one, which is a quarter longer: each token is moved a few times.
    """

    def __init__(self, heads: list[int], slopes: Tensor, keep: float = math.inf):
        self.keep = keep  # in tokens before the new ones
        #: The heads, as a slice if they are neighbours, so that picking them copies nothing.
        self.heads: Any = slice(heads[0], heads[-1] + 1)
        if heads != list(range(heads[0], heads[-1] + 1)):
            self.heads = torch.tensor(heads, device=slopes.device)
        self.numbers, self.slopes = heads, slopes[self.heads]  # (h,) float32
        self.buffers: list[Tensor] = []  # keys and values, (B, h, capacity, D)
        self.length = 0  # tokens in the buffers, the last ones of which are kept
        self.bias = slopes  # (1, h, 1, capacity), of the newest query and keys that end with its own

    def append(self, *new: Tensor) -> None:
        """Takes keys and values (B, h, T, D) of the new tokens."""
        added = new[0].size(2)
        if not self.buffers or self.length + added > self.buffers[0].size(2):
            kept = int(min(self.length, self.keep))
            capacity = kept + added + max(256, (kept + added) // 4)
            self.buffers = self.buffers or [x[:, :, :0] for x in new]
            for number, x in enumerate(new):  # one after the other, so that one of the two at most is there twice
                buffer = x.new_empty(*x.shape[:2], capacity, x.size(3))
                buffer[:, :, :kept] = self.buffers[number][:, :, self.length - kept : self.length]
                self.buffers[number] = buffer
            self.length = kept
            distance = torch.arange(capacity - 1, -1, -1, device=self.slopes.device)
            # PyTorch's CPU kernels take a float32 mask in half precision; those of a GPU want the dtype of the queries.
            dtype = torch.promote_types(new[0].dtype, torch.float32) if new[0].device.type == "cpu" else new[0].dtype
            self.bias = (-self.slopes[:, None] * distance)[None, :, None].to(dtype)
        for buffer, x in zip(self.buffers, new):
            buffer[:, :, self.length : self.length + added] = x
        self.length += added

    def last(self, count: float) -> list[Tensor]:
        """Keys and values of the last `count` tokens, or of all that there are: (B, h, S, D)."""
        first = int(max(0, self.length - count))
        return [buffer[:, :, first : self.length] for buffer in self.buffers]


class LayerKeys:
    """The groups of a layer, and what bounds the scores of its next query."""

    def __init__(self, slopes: Tensor):
        self.slopes, self.tokens = slopes, 0
        self.groups = [HeadGroup(list(range(len(slopes))), slopes)]
        self.is_split = False
        self.centre = slopes  # (H, 1, D) any point, here near the keys
        self.farthest = slopes  # (H,) the most that a key was away from it
        self.constants = slopes  # (2, H) float64: of `reach_of_excess`, ln of all but the excess, and the slopes

    def split(self, keep: Tensor, new: int, epsilon: float) -> None:
        """Puts the keys so far into groups by the (H,) numbers of tokens that heads keep before the `new` ones."""
        keys, values = self.groups[0].last(math.inf)
        self.is_split, self.centre = True, keys.float().mean((0, 2)).unsqueeze(1)
        self.farthest = torch.zeros_like(self.slopes)
        self.measure(keys)
        m = self.slopes.double()
        self.constants = torch.stack([-math.log(epsilon) - torch.expm1(m).log(), m])
        self.groups = [HeadGroup(heads, self.slopes, float(keep[heads].max())) for heads in group_heads(keep.tolist())]
        for group in self.groups:
            kept = slice(int(max(0, keys.size(2) - new - group.keep)), None)
            group.append(keys[:, group.heads, kept], values[:, group.heads, kept])

    def measure(self, k: Tensor) -> None:
        """Takes account of new keys (B, H, T, D)."""
        distance = torch.linalg.vector_norm(k.float() - self.centre, dim=-1)
        self.farthest = torch.maximum(self.farthest, distance.amax((0, 2)))

    def query_reach(self, q: Tensor, own: Tensor) -> list[float]:
        """How far each head reaches from a query (B, H, 1, D) with its own key, among all keys that ever were."""
        q = q.float()
        bound = 1.001 * torch.linalg.vector_norm(q, dim=-1)[..., 0] * self.farthest  # 0.1% for rounding
        excess = (bound - (q * (own.float() - self.centre)).sum((-1, -2))).amax(0) * q.size(-1) ** -0.5
        return ((excess + self.constants[0]) / self.constants[1]).nan_to_num(nan=math.inf).clamp(min=0).ceil().tolist()


class BoundedCache:
    """Keys and values of a stack with ALiBi, for decoding without gradients.

    `find_excess` returns the bounds of `stack_excess`, (layers, H); it is called when a text has become long.
    """

    def __init__(self, find_excess: Callable[[], Tensor], epsilon: float):
        self.find_excess, self.epsilon = find_excess, epsilon
        self.kept: dict[int, LayerKeys] = {}
        self.common = torch.zeros(0, 0, dtype=torch.long)  # (B, B) how many first tokens two rows had in common

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens read."""
        return self.kept[min(self.kept)].tokens if self.kept else 0

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], inputs: AttentionInputs, dropout: float = 0.0
    ) -> Tensor:
        """Keeps keys and values (B, H, T, D) of new tokens; attention of the queries, those of the last of them."""
        q, k, v = qkv
        if layer not in self.kept:
            slopes = inputs.bias.before if isinstance(inputs.bias, LinearBias) else q.new_zeros(q.size(1)).float()
            self.kept[layer] = LayerKeys(slopes.to(q.device))
        kept = self.kept[layer]
        kept.tokens += k.size(2)
        if kept.is_split:
            kept.measure(k)
        for group in kept.groups:
            group.append(k[:, group.heads], v[:, group.heads])
        if not kept.is_split and kept.tokens > SHORT:
            excess = self.find_excess()[layer].to(q.device)
            kept.split(reach_of_excess(excess, kept.slopes, self.epsilon / 2), k.size(2), self.epsilon / 2)
        single = q.size(2) == 1
        farthest = [math.inf] * q.size(1)
        if single and kept.is_split and q.device.type == "cpu":  # a GPU would have to wait for the numbers
            farthest = kept.query_reach(q, k[:, :, -1:])
        parts = [self.attend_group(group, q, inputs, dropout, farthest) for group in kept.groups]
        if len(parts) == 1:
            return parts[0]
        out = torch.empty_like(q)
        for group, part in zip(kept.groups, parts):
            out[:, group.heads] = part
        return out

    def attend_group(
        self, group: HeadGroup, q: Tensor, inputs: AttentionInputs, dropout: float, farthest: list[float]
    ) -> Tensor:
        """Attention of a group's heads: (B, H, T, D) queries of all heads -> (B, h, T, D)."""
        keys, values = group.last(1 + max(farthest[head] for head in group.numbers))
        count, q = keys.size(2), q[:, group.heads]
        padding = None if inputs.padding is None else inputs.padding[:, -count:]
        if q.size(2) > 1:
            bias, half = LinearBias(group.slopes), self.epsilon / 2
            inputs = dataclasses.replace(inputs, bias=bias, padding=padding, epsilon=half, cache=None, plain=None)
            return attend(q, keys, values, inputs, dropout)
        mask = merge_padding_into_mask(group.bias[..., -count:], padding)
        if q.device.type != "cpu":
            mask = mask.contiguous()
        return masked_attention(q, keys, values, AttentionInputs(bias=FoldedMask(mask)), dropout)

    def reorder_cache(self, order: Tensor) -> None:
        """Takes the rows of the batch in another order, (B',) numbers of rows.

        The first tokens that rows have in common, as beams do, are not moved.
        """
        rows, tokens = order.tolist(), self.get_seq_length()
        buffers = [buffer for kept in self.kept.values() for group in kept.groups for buffer in group.buffers]
        count = buffers[0].size(0) if buffers else 0
        if rows == list(range(count)):
            return
        if len(self.common) != count:
            self.common = torch.zeros(count, count, dtype=torch.long)
        self.common.fill_diagonal_(tokens)
        first = int(self.common[rows, range(count)].min()) if len(rows) == count else 0
        self.common = self.common[rows][:, rows]
        for kept in self.kept.values():
            for group in kept.groups:
                moved = slice(max(0, first - tokens + group.length), group.length)
                for number, buffer in enumerate(group.buffers):
                    target = buffer if len(rows) == count else buffer.new_empty(len(rows), *buffer.shape[1:])
                    target[:, :, moved] = buffer[:, :, moved].index_select(0, order)
                    group.buffers[number] = target


def group_heads(keep: list[float]) -> list[list[int]]:
    """Heads of like reach together, so that keys kept in vain and `GROUP_COST` for each group add up to the least."""
    order = sorted(range(len(keep)), key=lambda head: keep[head])
    sizes = [min(keep[head], 1e12) for head in order]
    # For the first n heads: the least cost, and where their last group begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(order) + 1):
        costs = [(best[begin][0] + GROUP_COST + (end - begin) * sizes[end - 1], begin) for begin in range(end)]
        best.append(min(costs))
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[best[end][1] : end]))
        end = best[end][1]
    return groups


def bounded_cache_in(cache: Any) -> Optional[BoundedCache]:
    """The bounded cache that a cache is, or that an incremental state of fairseq holds; None for another one."""
    if isinstance(cache, dict):
        cache = cache.get(STATE_KEY)
    return cache if isinstance(cache, BoundedCache) else None
