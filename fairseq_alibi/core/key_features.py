"""A bias by key in the place of further dimensions of queries and keys, for kernels that take no such bias.

c_i - c_j, the bias of query i and key j, differs by a constant per row from o - c_j, whatever the number o, and softmax
ignores the difference. So a dimension that is 1 in queries and o - c_j, times sqrt(D), in keys carries the bias through
any kernel, its gradient included. o is c in the middle of a tile's queries, so that the numbers of near keys are small
and exact. In half precision three numbers add up to o - c_j. Shapes: B batch, H heads, T queries, S keys, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 8  # further dimensions, a multiple of what kernels compute at once


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
