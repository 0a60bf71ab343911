"""How far the heads of a trained stack can see at most, whatever they read: the reach that the weights alone prove.

`reach` bounds a head's reach from the queries and keys of one pass, by the most e by which a query's score against any
key exceeds that against its own. Here e is bounded for all inputs. Then keys beyond the reach of e can be dropped for
good: no later query needs them.

Attention reads a layer norm's output g * z + b. Whatever the norm reads, z has the sum 0 and |z| <= sqrt(C). With the
gain g and b folded into the projections the query is A z + a, and keys are B z' + a constant. With M = B^T A and m =
B^T a, the scores times sqrt(D) of a query at z against a key at z', less those against its own key, are

    (A z + a) . (B z' - B z) <= f(z) = sqrt(C) |M z + m| - z . (M z + m),

and for any number l > 0, since 2 x y <= x^2 + y^2 with x = sqrt(C l) and y = |M z + m| / (2 sqrt(l)),

    f(z) <= C l + |M z + m|^2 / (4 l) - z . (M z + m),

a quadratic z . S z + g . z + constant, S symmetric. For any number t >= 0 above the eigenvalues of S it is at most

    constant + t C + sum over eigenvectors u of S of (u . g)^2 / (4 (t - its eigenvalue))

in the ball, because t (C - |z|^2) >= 0 may be added first. Every l and t gives a bound. Those that are used come close
to the least one. The tests find a z that attains 99% of it.

This covers all layers of a pre-norm stack and, in a post-norm stack, all but the first: they read the norm of the layer
before. Biases and gains may have any values; learned slopes and tied layers change nothing. The first layer of a
language model without position embeddings reads one of V vectors. Its largest excess is found among all pairs of them,
or bounded if V is large. Infinite here, as nothing bounds it: the first layer of a post-norm stack that may read any
vector, projections that are no linear layers, and scores times the logarithm of a count. Numbers are 0.1% above what is
proven in exact arithmetic, for rounding, and more in half precision.

Shapes: H heads, V types, D head_dim, C width.
"""

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

PAIRS = 2**31  # products of numbers after which the search among all pairs of types ends with a bound, for one head


def ball_excess(a: Tensor, offset: Tensor, b: Tensor, radius: float, rounds: int = 6) -> Tensor:
    """A bound of f(z) for |z| <= radius, see the head of this file: (H,) float64.

    `a` and `b` are (H, D, C) float64, `offset` (H, D), the query at z = 0.
    """
    basis = torch.linalg.qr(torch.cat([a, b], dim=1).mT)[0]  # z matters only in the span of the rows
    a, b = a @ basis, b @ basis
    m, shift = b.mT @ a, (b.mT @ offset[..., None])[..., 0]
    symmetric, square, cross = (m + m.mT) / 2, m.mT @ m, (m.mT @ shift[..., None])[..., 0]
    smallest = torch.finfo(torch.float64).tiny ** 0.5
    weight = torch.linalg.matrix_norm(m).clamp(min=smallest) / 2  # l
    best = torch.full_like(weight, math.inf)
    for _ in range(rounds):
        values, vectors = torch.linalg.eigh(square / (4 * weight[:, None, None]) - symmetric)
        linear = (vectors.mT @ (cross / (2 * weight[:, None]) - shift)[..., None])[..., 0]
        low = values[:, -1:].clamp(min=0)
        high = low + torch.linalg.vector_norm(linear, dim=-1, keepdim=True) / (2 * radius) + 1e-12 * (1 + low)
        for _ in range(50):  # halves the interval that holds the best t
            middle = (low + high) / 2
            outside = (linear / (2 * (middle - values))).square().sum(-1, keepdim=True) > radius**2
            low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
        high = high.maximum(values[:, -1:] + 1e-13 * (1 + values[:, -1:].abs()))
        bound = high[:, 0] * radius**2 + (linear.square() / (4 * (high - values))).sum(-1)
        bound = bound + shift.square().sum(-1) / (4 * weight) + radius**2 * weight
        best = best.minimum(bound.nan_to_num(nan=math.inf))
        z = linear / (2 * (high - values))  # where the bound is attained, in the basis of the eigenvectors
        rest = (radius**2 - z.square().sum(-1)).clamp(min=0).sqrt()
        z[:, -1] += torch.where(z[:, -1] < 0, -rest, rest)
        z = (vectors @ z[..., None])[..., 0]
        weight = torch.linalg.vector_norm((m @ z[..., None])[..., 0] + shift, dim=-1) / (2 * radius)
        weight = weight.clamp(min=smallest)
    return best


def finite_excess(q: Tensor, k: Tensor) -> Tensor:
    """The most by which q_t . k_u exceeds q_t . k_t among (H, V, D) queries and keys of V types: (H,), or a bound.

    Queries are tried in the order of a bound of theirs, until no other can have more, or for so long that it stands in.
    """
    k = k - k.mean(1, keepdim=True)
    own, heads, types, dim = (q * k).sum(-1), *k.shape
    spread = k.mT @ k / types
    spread = spread + 1e-6 * torch.diag_embed(spread.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, dim))
    root = torch.linalg.cholesky_ex(spread)[0]  # keys divided by it are spread alike in all directions
    far = torch.linalg.vector_norm(torch.linalg.solve_triangular(root, k.mT, upper=False), dim=1).amax(1, keepdim=True)
    far_in_space = torch.linalg.vector_norm(k, dim=-1).amax(1, keepdim=True)
    plain = torch.linalg.vector_norm(q, dim=-1) * far_in_space
    bounds = torch.fmin(torch.linalg.vector_norm(q @ root, dim=-1) * far, plain) - own
    most = torch.zeros(heads, dtype=q.dtype)
    for head in range(heads):
        order = bounds[head].argsort(descending=True)
        for first in range(0, types, 128):
            if bounds[head, order[first]] <= most[head]:
                break
            if first * types * dim > PAIRS:
                most[head] = bounds[head, order[first]]
                break
            rows = order[first : first + 128]
            excess = (q[head, rows] @ k[head].T).amax(1) - own[head, rows]
            most[head] = most[head].maximum(excess.amax())
    return most


def is_linear(layer: Any) -> bool:
    """Whether a projection is a linear layer; nothing is known of another one."""
    return type(layer).forward is nn.Linear.forward


def folded(layer: Any, norm: Optional[nn.Module], heads: int) -> tuple[Tensor, Tensor]:
    """A projection of z, when it reads the output g * z + b of a layer norm: weight (H, D, C), offset (H, D), float64.

    Without a norm it is the projection itself.
    """
    weight = layer.weight.detach().cpu().double()
    offset = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double()
    if isinstance(norm, nn.LayerNorm):
        if norm.elementwise_affine:
            if norm.bias is not None:
                offset = offset + weight @ norm.bias.detach().cpu().double()
            weight = weight * norm.weight.detach().cpu().double()
        weight = weight - weight.mean(-1, keepdim=True)  # the sum of z is 0
    return weight.view(heads, -1, weight.size(1)), offset.view(heads, -1)


@torch.no_grad()
def layer_excess(attention: Any, norm: Optional[nn.Module], vectors: Optional[Tensor] = None) -> Tensor:
    """The bound of the excess of scores in one layer, after the division by sqrt(D): (H,) float64, infinite for none.

    Its attention reads the output of `norm`, None for no norm. What the norm, or else the layer, reads is one of the
    (V, C) `vectors` if they are given.
    """
    heads, layers = attention.num_heads, (attention.q_proj, attention.k_proj)
    excess = torch.full((heads,), math.inf, dtype=torch.float64)
    if not all(map(is_linear, layers)) or attention.score_scale is not None:
        return excess
    if vectors is not None:
        read = (vectors if norm is None else norm(vectors)).detach().cpu()
        read = read.to(torch.promote_types(read.dtype, torch.float32))
        (q, offset), (k, _) = (folded(layer, None, heads) for layer in layers)
        queries, keys = ((weight.to(read.dtype) @ read.T).mT for weight in (q, k))
        excess = excess.fmin(finite_excess(queries + offset[:, None].to(read.dtype), keys).double())
    if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (attention.q_proj.weight.size(1),):
        (q, offset), (k, _) = (folded(layer, norm, heads) for layer in layers)
        excess = excess.fmin(ball_excess(q, offset, k, math.sqrt(q.size(2))))
    margin = max(1e-3, 4 * torch.finfo(layers[0].weight.dtype).eps)
    return excess.clamp(min=0) * (1 + margin) / math.sqrt(attention.head_dim)


def stack_excess(layers: Sequence[Any], vectors: Optional[Tensor] = None) -> Tensor:
    """`layer_excess` of all layers: (layers, H) float64; `vectors` (V, C) are all that the first layer may read."""
    of_layers = [(layer.self_attn, norm_before(layers, number)) for number, layer in enumerate(layers)]
    return torch.stack([layer_excess(*parts, None if n else vectors) for n, parts in enumerate(of_layers)])


def norm_before(layers: Sequence[Any], number: int) -> Optional[nn.Module]:
    """The norm whose output the attention of a layer reads; None for the first layer of a post-norm stack."""
    if layers[number].normalize_before:
        return layers[number].self_attn_layer_norm
    return layers[number - 1].final_layer_norm if number else None


@torch.no_grad()
def least_slopes(gate: Any, norm: Optional[nn.Module]) -> Tensor:
    """The least decay per token that a bias by key (`forgetting.Gate`) has, whatever it reads: (H,) float64.

    A gate reads g * z + b like the projections, so its logit is at most sqrt(C) |w * g - mean| + w . b + its bias.
    """
    weight, shift = (part[:, 0] * gate.sign for part in folded(gate, norm, len(gate.weight)))
    if not isinstance(norm, nn.LayerNorm):
        return torch.zeros_like(shift)
    return nn.functional.softplus(-shift - math.sqrt(weight.size(1)) * torch.linalg.vector_norm(weight, dim=-1))
