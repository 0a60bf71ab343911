"""The plain modules, which need no fairseq: against formulas in float64, and against this package's fairseq models."""

import math

import pytest
import reference
import torch
from conftest import random_tokens

from fairseq_alibi.core import Attention, EncoderALiBi, LayerOptions, Sinusoidal, Transformer, position_methods
from fairseq_alibi.core.alibi import ENCODER_FORMS
from fairseq_alibi.core.layers import Cache


def bias(heads, length, form):
    """(H, L, L) float64 bias of causal ALiBi or an encoder form."""
    if form != "causal":
        return reference.encoder_bias(heads, length, form)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    slopes = torch.tensor(reference.slopes(heads), dtype=torch.float64)[:, None, None]
    return (-slopes * distance).masked_fill(distance < 0, -math.inf)


def expected(layer, x, form, padding=None):
    """softmax(q k^T / sqrt(D) + bias) v between the layer's projections, in float64: (B, T, C) -> (B, T, C)."""
    p = {name: value.double() for name, value in layer.named_parameters()}
    batch, length, width = x.shape
    heads = layer.num_heads
    q, k, v = (
        (x.double() @ p[f"{name}_proj.weight"].T + p[f"{name}_proj.bias"])
        .view(batch, length, heads, -1)
        .transpose(1, 2)
        for name in "qkv"
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(width // heads) + bias(heads, length, form)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    out = torch.nan_to_num(scores.softmax(-1)) @ v
    return out.transpose(1, 2).reshape(batch, length, width) @ p["out_proj.weight"].T + p["out_proj.bias"]


def attention(form, heads, **options):
    """A layer for 8 dimensions per head."""
    method = None if form in ("causal", "symmetric") else EncoderALiBi(heads, form)
    return Attention(8 * heads, heads, causal=form == "causal", position_method=method, **options)


@pytest.mark.parametrize("heads", [8, 12])
@pytest.mark.parametrize("length", [1, 9, 300])
@pytest.mark.parametrize("form", ["causal", *ENCODER_FORMS])
def test_attention_and_its_gradients_equal_the_formula(form, length, heads):
    layer = attention(form, heads)
    x = torch.randn(2, length, 8 * heads, requires_grad=True)
    weights = torch.randn(2, length, 8 * heads)
    found, wanted = layer(x), expected(layer, x, form)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad((y * weights).sum(), [x, layer.k_proj.weight]) for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("form", ["causal", *ENCODER_FORMS])
def test_padding_changes_no_token(form, length, side):
    layer = attention(form, 12)
    x, padding = torch.randn(2, length, 96), torch.zeros(2, length, dtype=torch.bool)
    tokens = slice(7, None) if side == "left" else slice(None, -7)
    padding[1] = True
    padding[1, tokens] = False
    found = layer(x, padding)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1, tokens], layer(x[1:, tokens])[0], rtol=1e-4, atol=1e-5)
    real = (~padding)[..., None]
    torch.testing.assert_close(found * real, expected(layer, x, form, padding).float() * real, rtol=1e-4, atol=1e-5)


def test_learned_slopes_start_from_the_fixed_ones_and_learn():
    method = EncoderALiBi(12, "two_slopes", learned=True)
    torch.testing.assert_close(method.full_mask(9), EncoderALiBi(12, "two_slopes").full_mask(9))
    layer = Attention(96, 12, causal=False, position_method=method)
    layer(torch.randn(1, 9, 96)).sum().backward()
    assert method.slope_logits.grad.abs().sum(1).gt(0).all(), "of both sides"
    before = layer(torch.ones(1, 9, 96).cumsum(1) / 9)
    with torch.no_grad():
        method.slope_logits.add_(3)
    assert not torch.allclose(layer(torch.ones(1, 9, 96).cumsum(1) / 9), before), "the mask is not kept"
    assert all((slopes > 0).all() for slopes in method.slopes())


@pytest.mark.parametrize("normalize_before", [True, False])
def test_a_decoder_with_a_cache_gives_what_it_gives_at_once(normalize_before):
    decoder = Transformer(2, 96, 12, options=LayerOptions(normalize_before=normalize_before)).eval()
    x, cache = torch.randn(2, 400, 96), Cache()
    parts = [decoder(part, cache=cache) for part in x.split([300, 1, 99], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder(x), rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 400


@pytest.mark.parametrize("method", [name for name, kind in position_methods().items() if not kind.adds_embedding])
def test_fairseqs_decoder_and_the_plain_one_are_the_same(build, method):
    """With the same weights, under the names that fairseq has for them."""
    model = build("alibi_lm_tiny", "--position-method", method)
    plain = Transformer(2, 128, 8, position_method=model.decoder.position_method).eval()
    weights = {name: value for name, value in model.decoder.state_dict().items() if name in plain.state_dict()}
    assert plain.load_state_dict(weights)
    tokens = random_tokens(model, 2, 300)
    x = model.decoder.embed_scale * model.decoder.embed_tokens(tokens)
    features = model.decoder.extract_features(tokens, None)[0]
    torch.testing.assert_close(plain(x), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [50, 300])
def test_bf16_runs_in_bf16(length):
    layer = attention("symmetric", 12).bfloat16()
    x = torch.randn(1, length, 96).bfloat16()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected(layer, x, "symmetric"), rtol=0.05, atol=0.02)


def test_memory_of_masks_follows_what_is_run():
    layer = attention("symmetric", 1, attention="mask")
    sizes = []
    for length in (1500, 1400, 600, 10):
        layer(torch.randn(1, length, 8))
        sizes.append(layer.setup.kept_mask.get(torch.device("cpu")).size(-1))
    assert sizes == [1500, 1500, 600, 600]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim, 10, and 3 does not"):
        Transformer(1, 10, 3)
    with pytest.raises(TypeError, match=r"position_method is 'alibi': pass an object, such as ALiBi\(2\)"):
        Transformer(1, 16, 2, position_method="alibi")
    with pytest.raises(ValueError, match="Sinusoidal has 1 heads, not 2"):
        Transformer(1, 16, 2, position_method=Sinusoidal(1))
    with pytest.raises(ValueError, match="Sinusoidal adds embeddings"):
        Transformer(1, 16, 2, position_method=Sinusoidal(2))
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        attention("symmetric", 2)(torch.randn(1, 3, 16), cache=Cache())
    with pytest.raises(ValueError, match=r"padding must be \(B, S\) = \(1, 3\), not \(1, 2\)"):
        attention("causal", 2)(torch.randn(1, 3, 16), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="symmetric, one_sided, two_slopes, not both"):
        EncoderALiBi(2, "both")
    with pytest.raises(ValueError, match="one_sided needs an even number of heads, not 3"):
        EncoderALiBi(3, "one_sided")
    with pytest.raises(ValueError, match="learned slopes are for alibi_encoder_bias two_slopes, not symmetric"):
        EncoderALiBi(2, learned=True)
