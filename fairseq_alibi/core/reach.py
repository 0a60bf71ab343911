"""How far a head can see: the distance beyond which its bias leaves keys no weight.

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

    Of (B, H, T, D) `q`, (B, H, S, D) `k` and (H,) `slopes`, 0 for a head without bias, infinite for one that sees no
    key but the query's own; `epsilon` is the weight of 1 that may be skipped, 0 for none. Returns (H,) float64: whole
    distances in tokens, at least 0, infinite where there is no end.
    """
    e = torch.zeros(()) if epsilon <= 0 else score_excess(q, k).amax((0, 2))
    return reach_of_excess(e, slopes, epsilon)


def reach_of_excess(e: Tensor, slopes: Tensor, epsilon: float) -> Tensor:
    """The whole distances x of `reach` for e and m of any shape, in float64."""
    m = slopes.detach().double()
    if epsilon <= 0:
        return torch.full_like(m, math.inf).masked_fill(m.isinf(), 0)
    x = (e.double() - math.log(epsilon) - torch.expm1(m).log()) / m
    return x.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(m.isinf(), 0).clamp(min=0).ceil()


def distance_reach(q: Tensor, k: Tensor, bias: Tensor, own: Tensor, epsilon: float = EPSILON) -> Tensor:
    """`reach` for a bias that is any function b of the distance: (H,) float64 whole distances, N at most.

    With e as in `reach`, key j at distance d weighs against key i itself w_j / w_i <= exp(e + b(d) - b(0)). So the keys
    beyond x weigh together at most the sum of exp(e + b(d) - b(0)) over the given distances d > x. That sum is computed
    as it stands: nothing is assumed of b, which need not fall. `bias` is (H, N), b at the distances 1, ..., N, `own`
    (H,) b at 0. The result is infinite if nothing may be skipped.
    """
    if epsilon <= 0 or bias.size(1) == 0:
        return torch.full_like(own, math.inf, dtype=torch.float64)
    e = score_excess(q, k).amax((0, 2)).double()
    tails = (bias - own[:, None]).double().flip(1).logcumsumexp(1).flip(1)
    return (~(e[:, None] + tails <= math.log(epsilon))).sum(1).double()


def oldest_keys(q: Tensor, k: Tensor, sums: Tensor, chunk: int, epsilon: float = EPSILON) -> Tensor:
    """The oldest key that each chunk of queries needs under a bias by key c_i - c_j, where c does not rise.

    With e as in `reach`, here the most over a chunk's queries, key l weighs against key i itself w_l / w_i <= exp(e +
    c_i - c_l). So all keys up to j weigh together at most exp(e + c_i) times the sum of exp(-c_l) over l <= j. As c
    does not rise, c_i of the chunk's first query bounds the others'. The sum grows with j: the keys up to the last j
    where the bound is at most epsilon are skipped. `sums` is c, (B, H, S) float64; the result (H, chunks) int64, for
    all batch rows.
    """
    heads, queries = q.size(1), q.size(2)
    count = -(-queries // chunk)
    if epsilon <= 0:
        return torch.zeros(heads, count, dtype=torch.int64, device=q.device)
    own = sums[:, :, -queries:]
    excess = torch.nn.functional.pad(score_excess(q, k).double(), (0, count * chunk - queries), value=-math.inf)
    excess = excess.unflatten(2, (count, chunk)).amax(3) + own[:, :, ::chunk]
    tails = (-sums).logcumsumexp(2)
    threshold = (math.log(epsilon) - excess).nan_to_num(nan=-math.inf)
    return torch.searchsorted(tails.contiguous(), threshold.contiguous(), right=True).amin(0)


def score_excess(q: Tensor, k: Tensor) -> Tensor:
    """Most by which a query's score against any key exceeds that against its own: (B, H, T) float32, see `reach`."""
    q, k = q.float(), k.float()
    k = k - k.mean(dim=2, keepdim=True)
    largest = torch.linalg.vector_norm(k, dim=-1).amax(2, keepdim=True)
    bound = 1.001 * torch.linalg.vector_norm(q, dim=-1) * largest  # 0.1% for rounding
    return (bound - (q * k[:, :, -q.size(2) :]).sum(-1)) * q.size(-1) ** -0.5
