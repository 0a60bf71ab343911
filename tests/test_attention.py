"""Attention under the folded mask against a float64 reference written from the formula: outputs and gradients."""

import math

import pytest
import torch

from fairseq_alibi.attention import attention_weights, masked_attention
from fairseq_alibi.positions import POSITION_METHODS

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def reference(q, k, v, method, seen):
    """softmax over the seen keys of q_i . k_j / sqrt(D) - m_h (i - j), one query after the other, in float64.

    `seen` (B, S) tells which keys are no padding.
    """
    batch, heads, queries, dim = q.shape
    keys = k.size(2)
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                i = keys - queries + t
                js = [j for j in range(i + 1) if seen[b, j]]
                if not js:
                    rows.append(torch.zeros(dim, dtype=torch.float64))
                    continue
                scores = k[b, h, js].double() @ q[b, h, t].double() / math.sqrt(dim)
                if method == "alibi":
                    scores = scores - slopes[h] * torch.tensor([i - j for j in js], dtype=torch.float64)
                rows.append(scores.softmax(0) @ v[b, h, js].double())
    return torch.stack(rows).view(batch, heads, queries, dim)


def inputs(batch, heads, queries, keys, dtype, dim=16, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(batch, heads, n, dim).to(dtype).requires_grad_() for n in (queries, keys, keys)]


@pytest.mark.parametrize("method", POSITION_METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "queries", "keys"), [(12, 20, 20), (8, 1, 1), (1, 33, 33), (12, 1, 40), (3, 5, 40)])
def test_output_and_gradients_equal_the_reference(method, dtype, heads, queries, keys):
    qkv = inputs(2, heads, queries, keys, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    mask = POSITION_METHODS[method](heads).future_mask(queries, keys, dtype)
    out = masked_attention(*qkv, mask)
    expected = reference(*exact, method, torch.ones(2, keys, dtype=torch.bool))
    assert out.dtype == dtype
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(out, qkv, cotangent.to(dtype))
    theirs = torch.autograd.grad(expected, exact, cotangent)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


PADDINGS = {
    "right": [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]],
    "left": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]],
    "both": [[1, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 1]],
}


@pytest.mark.parametrize("method", POSITION_METHODS)
@pytest.mark.parametrize("side", PADDINGS)
def test_padded_keys_are_not_seen(method, side):
    padding = torch.tensor(PADDINGS[side]).bool()
    qkv = inputs(2, 12, 7, 7, torch.float32)
    mask = POSITION_METHODS[method](12).future_mask(7, 7)
    out = masked_attention(*qkv, mask, padding)
    expected = reference(*qkv, method, ~padding)
    real = ~padding[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real].double(), expected[real], rtol=2e-5, atol=2e-5)
    assert out.isfinite().all(), "a NaN on padding would reach real tokens through the next layer"
    weights = attention_weights(*qkv[:2], mask, padding)
    assert weights.isfinite().all()
    torch.testing.assert_close((weights @ qkv[2])[real].double(), expected[real], rtol=2e-5, atol=2e-5)


def test_dropout_drops_weights_and_keeps_the_mean():
    q, k, v = inputs(1, 2, 64, 64, torch.float32)
    mask = POSITION_METHODS["alibi"](2).future_mask(64, 64)
    mean = torch.stack([masked_attention(q, k, v, mask, dropout=0.3) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, masked_attention(q, k, v, mask), rtol=0, atol=0.3)
    assert not torch.equal(masked_attention(q, k, v, mask, dropout=0.3), masked_attention(q, k, v, mask))
