"""How far a head can see: the distance beyond which a linear bias leaves keys no weight.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.
"""

import math

import torch
from torch import Tensor

from .attention_inputs import EPSILON


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
