"""Slopes, bias and future mask against the formulas of the paper's section 3, in float64."""

import math

import pytest
import torch

from fairseq_alibi.positions import POSITION_METHODS, ALiBi, alibi_slopes

HEADS = range(1, 65)


def formula_slopes(num_heads, max_bias=8):
    if math.log2(num_heads).is_integer():
        return [2 ** (-max_bias * h / num_heads) for h in range(1, num_heads + 1)]
    lower = 2 ** math.floor(math.log2(num_heads))
    odd_numbered = formula_slopes(2 * lower, max_bias)[0::2]
    return formula_slopes(lower, max_bias) + odd_numbered[: num_heads - lower]


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("max_bias", [8, 16, 3.5])
def test_slopes_follow_the_formula(num_heads, max_bias):
    assert alibi_slopes(num_heads, max_bias).tolist() == formula_slopes(num_heads, max_bias)


def test_slopes_of_8_and_12_heads_are_the_published_ones():
    eighths = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8).tolist() == eighths
    assert alibi_slopes(12)[:8].tolist() == eighths
    torch.testing.assert_close(alibi_slopes(12)[8:], torch.tensor([-0.5, -1.5, -2.5, -3.5], dtype=torch.float64).exp2())


@pytest.mark.parametrize(("heads", "max_bias"), [(0, 8), (-1, 8), (8, 0), (8, -8), (8, math.nan), (8, math.inf)])
def test_impossible_slopes_are_refused_by_name(heads, max_bias):
    with pytest.raises(ValueError, match=str(heads) if heads < 1 else str(max_bias)):
        alibi_slopes(heads, max_bias)


@pytest.mark.parametrize("num_heads", HEADS)
def test_folded_mask_is_bias_plus_future_mask(num_heads):
    length = 9
    mask = ALiBi(num_heads).future_mask(length, length, torch.float64)
    assert mask.shape == (num_heads, length, length)
    for head, slope in enumerate(formula_slopes(num_heads)):
        for i in range(length):
            for j in range(length):
                expected = -slope * (i - j) if j <= i else -math.inf
                assert mask[head, i, j].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("num_heads", [1, 8, 12])
def test_folded_mask_gives_the_authors_attention(num_heads):
    """They add one vector m_h * j per head to every row; rows differ by a constant, which softmax ignores."""
    length = 300
    scores = torch.randn(2, num_heads, length, length, dtype=torch.float64)
    slopes = torch.tensor(formula_slopes(num_heads), dtype=torch.float64)
    future = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
    authors = slopes[:, None, None] * torch.arange(length) + future
    ours = ALiBi(num_heads).future_mask(length, length, torch.float64)
    torch.testing.assert_close((scores + ours).softmax(-1), (scores + authors).softmax(-1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", POSITION_METHODS)
def test_last_rows_of_a_mask_are_the_mask_of_the_last_queries(method):
    position_method = POSITION_METHODS[method](12)
    whole = position_method.future_mask(50, 50)
    for queries in (1, 7, 50):
        assert torch.equal(position_method.future_mask(queries, 50), whole[:, -queries:])


@pytest.mark.parametrize("method", ["sinusoidal", "none"])
def test_methods_without_bias_have_the_plain_future_mask(method):
    mask = POSITION_METHODS[method](12).future_mask(5, 5)
    assert torch.equal(mask, torch.full((1, 5, 5), -math.inf).triu(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_near_tokens_are_exact_in_half_precision_at_any_position(dtype):
    """With powers of two as slopes the nearest 256 distances are whole numbers that even bfloat16 holds exactly."""
    far = ALiBi(8).future_mask(1, 20000, dtype)[:, 0, -256:].double()
    expected = -alibi_slopes(8)[:, None] * torch.arange(255, -1, -1)
    assert torch.equal(far, expected)


def test_no_method_leaves_anything_in_a_checkpoint():
    for method in POSITION_METHODS.values():
        assert not method(8).state_dict()
