"""Biases by key (FoX, CABLE) against a float64 reference, in every kernel, and what is skipped."""

import math

import pytest
import reference
import torch
from conftest import random_tokens

from fairseq_alibi.core import ALiBi, Fox, Transformer
from fairseq_alibi.core.attention import attend, choose_kernel
from fairseq_alibi.core.attention_inputs import AttentionInputs, FoldedMask, LinearBias
from fairseq_alibi.core.layers import Cache
from fairseq_alibi.core.positions import position_methods
from fairseq_alibi.core.reach import oldest_keys
from fairseq_alibi.core.tiled_attention import recomputed_tiles

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
METHODS = [name for name, method in position_methods().items() if method.bias_kind == "key"]


def made(batch, heads, queries, keys, dtype=torch.float32, decay=(0.5, 0.05, 0.003)):
    """Random q, k, v and decays, with gradients; the decays of the heads differ."""
    torch.manual_seed(0)
    qkv = [torch.randn(batch, heads, n, 16).to(dtype).requires_grad_() for n in (queries, keys, keys)]
    strength = torch.tensor((decay * heads)[:heads], dtype=torch.float64)[:, None]
    return qkv, (-torch.rand(batch, heads, keys, dtype=torch.float64) * strength).requires_grad_()


def run_kernel(kernel, qkv, decay, padding=None, window=None, epsilon=1e-7):
    """Attention with this bias by key through a kernel."""
    queries, keys = qkv[0].size(2), qkv[1].size(2)
    if padding is not None:
        decay = decay.masked_fill(padding[:, None], 0)
    given = AttentionInputs(padding=padding, window=window, epsilon=epsilon)
    if kernel == "mask":
        wide = torch.promote_types(qkv[0].dtype, torch.float32)
        mask = position_methods()["none"](1).future_mask(queries, keys, window).to(wide)
        given = AttentionInputs(bias=FoldedMask(mask), padding=padding, window=window)
    given = given.with_decay(decay.cumsum(2), queries)
    return (recomputed_tiles if kernel == "recomputed" else attend)(*qkv, given)


@pytest.mark.parametrize("kernel", ["mask", "tiled", "recomputed"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("queries", "keys", "side", "window"),
    [
        (20, 20, None, None),
        (1, 40, None, None),
        (700, 700, "left", None),
        (300, 1500, None, None),
        (600, 899, "left", 300),
        (90, 90, "right", 7),
        (700, 700, None, 1),
    ],
)
def test_output_and_gradients_equal_the_reference(kernel, dtype, queries, keys, side, window):
    qkv, decay = made(2, 3, queries, keys, dtype)
    padding = None
    if side:
        padding = torch.zeros(2, keys, dtype=torch.bool)
        padding[1, : 30 if side == "left" else None][-30:] = True
    out = run_kernel(kernel, qkv, decay, padding, window)
    exact, seen = [x.detach().double().requires_grad_() for x in qkv], None
    hidden = decay
    if padding is not None:
        seen, hidden = ~padding, decay.masked_fill(padding[:, None], 0)
    expected = reference.attention(*exact, "fox", seen, window or math.inf, decay=hidden)
    cotangent = torch.randn_like(expected)
    if padding is not None:
        cotangent[padding[:, None, -queries:, None].expand_as(cotangent)] = 0
    real, tolerance = cotangent != 0, TOLERANCE[dtype]
    assert out.isfinite().all()
    torch.testing.assert_close(out[real].double(), expected[real], rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(out, (*qkv, decay), cotangent.to(dtype))
    theirs = torch.autograd.grad(expected, (*exact, decay), cotangent)
    for a, b in zip(ours[:3], theirs):
        torch.testing.assert_close(a.double(), b, rtol=2 * tolerance, atol=2 * tolerance)
    # The gradient of a decay sums those of all keys before it.
    assert (ours[3] - theirs[3]).abs().max() <= 3 * tolerance * max(1, theirs[3].abs().max())


def test_large_sums_lose_no_precision():
    """The sums reach -64,000 before the last queries, where float32 has steps of 0.004."""
    qkv, decay = made(1, 3, 1500, 1500)
    decay = decay - 50.0 * (torch.arange(1500) < 1280)
    out, expected = run_kernel("tiled", qkv, decay), reference.attention(*qkv, "fox", decay=decay)
    torch.testing.assert_close(out[:, :, 1280:].double(), expected[:, :, 1280:], rtol=2e-5, atol=2e-5)


def test_a_constant_gate_is_alibi_with_that_slope():
    qkv, _ = made(1, 4, 1200, 1200)
    slopes = ALiBi(4).slopes()[0]
    decay = -slopes.double()[None, :, None].expand(1, 4, 1200)
    expected = attend(*qkv, AttentionInputs(bias=LinearBias(slopes)))
    torch.testing.assert_close(run_kernel("tiled", qkv, decay), expected, rtol=1e-5, atol=1e-5)
    inputs = AttentionInputs().with_decay(decay.cumsum(2), 1200)
    assert choose_kernel(*qkv[:2], inputs).name == "tiled"


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [1e-7, 1e-3])
def test_keys_older_than_the_oldest_weigh_less_than_epsilon_together(scale, epsilon):
    (q, k, _), decay = made(2, 3, 900, 1500, torch.float64)
    q, k, sums = scale * q.detach(), scale * k.detach(), decay.detach().cumsum(2)
    oldest = oldest_keys(q, k, sums, 256, epsilon)
    position = torch.arange(600, 1500)[:, None]
    scores = q @ k.mT / 4 - sums[:, :, None]
    weights = scores.masked_fill(torch.arange(1500) > position, -math.inf).softmax(-1)
    for head in range(3):
        first = oldest[head].repeat_interleave(256)[:900, None]
        assert weights[:, head].masked_fill(torch.arange(1500) >= first, 0).sum(-1).max() <= epsilon
    assert oldest[0].min() > 300 or scale > 1, "a head that decays fast skips most"
    assert not oldest_keys(q, k, sums, 256, 0.0).any()
    assert not oldest_keys(q * math.nan, k, sums, 256, epsilon).any()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kernel", ["mask", "tiled", "recomputed"])
def test_skipped_keys_do_not_change_the_result(kernel, window):
    qkv, decay = made(1, 3, 2000, 2000, decay=(2.0, 0.4, 0.05))
    expected = run_kernel("tiled", qkv, decay, window=window, epsilon=0.0)
    torch.testing.assert_close(run_kernel(kernel, qkv, decay, window=window), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_reads_a_prefix_then_single_tokens_in_both_paddings_and_windows(build, method):
    """Caches hold the running sums."""
    model = build("alibi_lm_tiny", "--position-method", method)
    tokens, pad = random_tokens(model, 2, 420), model.decoder.padding_idx
    tokens[1, :60] = pad

    def features(tokens, state=None, **options):
        return model.decoder.extract_features_scriptable(tokens, None, state, **options)[0]

    with torch.no_grad():
        for window in (None, 50):
            expected = features(tokens, window=window)
            state, steps, read = {}, [], 0
            for new in (300, 1, 1, 118):
                kept = tokens[:, : read + new] if window is None else tokens[:, max(0, read - 49) : read + new]
                steps.append(features(kept, state, last=new, window=window))
                read += new
            torch.testing.assert_close(torch.cat(steps, dim=1)[0], expected[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.cat(steps, dim=1)[1, 60:], expected[1, 60:], rtol=1e-4, atol=1e-4)
        alone = features(tokens[1:, 60:])
        torch.testing.assert_close(features(tokens)[1:, 60:], alone, rtol=1e-4, atol=1e-4)
        right = torch.cat([tokens[1:, 60:], tokens.new_full((1, 60), pad)], dim=1)
        torch.testing.assert_close(features(right)[:, :360], alone, rtol=1e-4, atol=1e-4)


def test_a_plain_stack_with_a_cache_gives_what_it_gives_at_once():
    decoder = Transformer(2, 96, 12, position_method=Fox(12)).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    x, cache = torch.randn(2, 400, 96), Cache()
    parts = [decoder(part, cache=cache) for part in x.split([300, 1, 99], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder(x), rtol=1e-4, atol=1e-5)
