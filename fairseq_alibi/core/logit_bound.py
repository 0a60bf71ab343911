"""What skipped keys change at most in a stack's output: from the weights alone for any text, or closer for a text read.

Two passes over one text: in the exact one every query reads all earlier keys; in the other each head leaves out keys
that have at most epsilon of a query's weight (`BoundedCache`, `reach`). Let each number E bound the length of the
difference between the two, at any token, after the same part of the stack. E is 0 for the token vectors. Then:

- A layer norm makes g * z + b of a vector with the deviation s, z = centred / sqrt(s^2 + eps). Its Jacobian to z has
  the norm 1 / sqrt(s^2 + eps) at most, so z differs by E / sqrt(r^2 + eps) at most, r the least deviation between the
  two vectors: 0 for any text. Of a text that one such pass has read, r >= s - 2 E / sqrt(C), as the exact vector is
  within E of what this pass reads, and everything between the two passes is within E of the exact vector.
- A head writes W v for a mean v of values, W its part of the output projection. With the gain folded into the
  projections its values are V z + a constant, its scores times sqrt(D) are (A z + a) . B z' + what all keys share,
  |z| <= sqrt(C). Let z differ by Z. Then no score differs by more than

      d = (2 sqrt(C) |B^T A| + |B^T a|) Z / sqrt(D),

  because (A z + a) . B z' - (A y + a) . B y' = (A (z - y)) . B z' + (A y + a) . B (z' - y'). Weights that are
  multiplied by numbers from exp(-d) to exp(d), and divided by their sum, change by 2 tanh(d / 2) in all. Left out keys
  change them by 2 epsilon in all. The sum of all changes is 0, so that the head's output differs by

      |W V| (Z + (2 tanh(d / 2) + 2 epsilon) sqrt(C)) at most.

- A feed-forward part differs by |fc2| |fc1| times the greatest slope of its activation, times Z. Residuals add up.

|X| of a matrix is its largest singular value. The bound for any text is a factor times epsilon, which grows by some
powers of ten per layer: far above what is measured, but reaches grow with the logarithm of 1 / epsilon only. So an
epsilon that proves any tolerance costs a number of further keys. It holds in exact arithmetic: rounding comes on top.
Infinite, as nothing is proven: scaled heads or scores, gates, norms within a part, layers that read an encoder.

Shapes: H heads, D head_dim, C width, V types.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .receptive_field import folded, is_linear, norm_before

#: The greatest slope of activations, by the name of their function; that of gelu is 1.1289.
STEEPEST = {"relu": 1.0, "gelu": 1.13, "gelu_accurate": 1.13, "tanh": 1.0}
#: Parts that fairseq's layers may have and for which nothing is proven.
UNBOUNDED = ("c_attn", "attn_ln", "ffn_layernorm", "w_resid", "encoder_attn")


def largest_singular_value(*factors: Tensor) -> Tensor:
    """|X Y ...| of (..., m, n) factors, (...) float64: of products of thin matrices without the large one between."""
    product = factors[0]
    for factor in factors[1:]:
        product = product @ factor
    rows, columns = product.shape[-2:]
    gram = product @ product.mT if rows <= columns else product.mT @ product
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt()


def after_norm(norm: Optional[nn.Module], change: float, least_deviations: Mapping[nn.Module, float]) -> float:
    """The bound Z of z behind a norm whose input differs by `change`; infinite for what is no layer norm."""
    if change == 0 or not isinstance(norm, nn.LayerNorm):
        return math.inf if change else 0.0
    width = norm.normalized_shape[-1]
    deviation = max(0.0, least_deviations.get(norm, 0.0) - 2 * change / math.sqrt(width))
    return change / math.sqrt(deviation**2 + norm.eps)


def attention_change(
    attention: Any, norm: Optional[nn.Module], change: float, epsilon: float, vectors: Optional[Tensor] = None
) -> float:
    """The bound of what attention adds to a residual, when the z that it reads differs by `change`.

    It reads the output of `norm`; with None, for a first layer, one of the (V, C) `vectors`, or any vector.
    """
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    scaled = attention.gate is not None or attention.score_scale is not None
    if scaled or not all(map(is_linear, (*layers, attention.out_proj))):
        return math.inf
    heads, dim = attention.num_heads, attention.head_dim
    (q, offset), (k, _), (v, _) = (folded(layer, norm, heads) for layer in layers)
    width = q.size(2)
    out = attention.out_proj.weight.detach().cpu().double().unflatten(1, (heads, dim)).transpose(0, 1)  # (H, C, D)
    if not isinstance(norm, nn.LayerNorm):
        if change or vectors is None:  # no key is left out where any vector may be read
            return math.inf if change else 0.0
        read = vectors.detach().cpu().double()
        values = (read - read.mean(0)) @ v.mT  # (H, V, D), the constant is that of the mean vector
        root = torch.linalg.qr(out)[1]
        return float(2 * epsilon * torch.linalg.vector_norm(values @ root.mT, dim=-1).amax(1).sum())
    left, right = (torch.linalg.qr(x.mT)[1] for x in (k, q))  # |B^T A| is that of the small factors
    product = largest_singular_value(left, right.mT)
    shared = torch.linalg.vector_norm(k.mT @ offset[..., None], dim=(-2, -1))
    scores = (2 * math.sqrt(width) * product + shared) * change / math.sqrt(dim)
    written = largest_singular_value(torch.linalg.qr(out)[1], torch.linalg.qr(v.mT)[1].mT)
    moved = 2 * torch.tanh(scores / 2) + 2 * epsilon
    return float((written * (change + moved * math.sqrt(width))).sum())


def feed_forward_change(layer: Any, norm: Optional[nn.Module], change: float) -> float:
    """The bound of what the feed-forward part adds to a residual, when the z behind `norm` differs by `change`."""
    activation = getattr(layer, "activation", None) or layer.activation_fn
    steepest = STEEPEST.get(activation.__name__, math.inf)
    if not is_linear(layer.fc1) or not is_linear(layer.fc2):
        return math.inf
    first, second = folded(layer.fc1, norm, 1)[0][0], layer.fc2.weight.detach().cpu().double()
    return change * steepest * float(largest_singular_value(first) * largest_singular_value(second))


@torch.no_grad()
def stack_change(
    layers: Sequence[Any],
    last_norm: Optional[nn.Module],
    epsilon: float,
    vectors: Optional[Tensor] = None,
    least_deviations: Optional[Mapping[nn.Module, float]] = None,
) -> float:
    """The bound of what the output layer reads, z behind `last_norm_of` a stack: see the head of this file.

    `layers` are of `Transformer` or of fairseq's decoder, `last_norm` is the norm behind a pre-norm stack. Left out
    keys may have `epsilon` of 1 of the weight. `vectors` (V, C) are all that the first layer may read, see
    `stack_excess`; `least_deviations` the least standard deviations of what norms read, for the bound of one text.
    """
    deviations = least_deviations or {}
    change, read = 0.0, 0.0  # of the residual, and of the z that the next part reads
    for number, layer in enumerate(layers):
        if any(getattr(layer, name, None) is not None for name in UNBOUNDED):
            return math.inf
        pre, norms = layer.normalize_before, (layer.self_attn_layer_norm, layer.final_layer_norm)
        before = norm_before(layers, number)
        if pre:
            read = after_norm(norms[0], change, deviations)
        change += attention_change(layer.self_attn, before, read, epsilon, None if number else vectors)
        read = after_norm(norms[1 if pre else 0], change, deviations)
        if not pre:
            change = largest_gain(norms[0]) * read
        change += feed_forward_change(layer, norms[1 if pre else 0], read)
        if not pre:
            read = after_norm(norms[1], change, deviations)
            change = largest_gain(norms[1]) * read
    if last_norm is not None:
        return after_norm(last_norm, change, deviations)
    return change if layers[-1].normalize_before else read


def last_norm_of(layers: Sequence[Any], last_norm: Optional[nn.Module]) -> Optional[nn.Module]:
    """The norm behind a stack, None if there is none; the last layer of a post-norm stack has one."""
    return layers[-1].final_layer_norm if last_norm is None and not layers[-1].normalize_before else last_norm


@torch.no_grad()
def longest_row(project: Callable[[Tensor], Tensor], norm: Optional[nn.Module], width: int) -> float:
    """The greatest length of a row of the matrix that leads from z, (C,), to the outputs of an affine `project`."""
    z = torch.eye(width) - (0 if norm is None else 1 / width)
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        z = z * norm.weight.detach().float().cpu()
    return float(torch.linalg.vector_norm(project(z) - project(torch.zeros(1, width)), dim=0).max())


def largest_gain(norm: Any) -> float:
    """The largest factor by which a norm multiplies z."""
    return float(norm.weight.detach().abs().max()) if norm.elementwise_affine else 1.0
