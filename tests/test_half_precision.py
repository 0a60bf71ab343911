"""Half precision: the bias adds no error of its own, against float64."""

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import fairseqs_own, random_tokens

from fairseq_alibi.core import ALiBi
from fairseq_alibi.core.attention import attend
from fairseq_alibi.core.attention_inputs import AttentionInputs, FoldedMask, LinearBias
from fairseq_alibi.models import layers


def relative_error(out, expected):
    """Root mean square of the error over that of the value, per head."""
    return ((out.double() - expected).square().mean((0, 2, 3)) / expected.square().mean((0, 2, 3))).sqrt()


def errors(heads, keys, dtype, queries=32):
    """Errors per head of the last queries: without any bias, with a mask, without one, and in the authors' way."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 64).to(dtype) for n in (queries, keys, keys))
    method = ALiBi(heads)
    mask = method.future_mask(queries, keys)
    future = torch.zeros_like(mask[:1]).masked_fill_(mask[:1].isneginf(), -torch.inf)
    expected = reference.attention(q, k, v)
    slopes, _ = method.slopes()
    biases = {"mask": FoldedMask(mask), "fused": LinearBias(slopes)}
    found = {name: attend(q, k, v, AttentionInputs(bias=bias)) for name, bias in biases.items()}
    authors = (slopes[:, None, None] * torch.arange(keys) + future).to(dtype)
    found["authors"] = F.scaled_dot_product_attention(q, k, v, attn_mask=authors[None])
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=future[None].to(dtype))
    no_bias = relative_error(plain, reference.attention(q, k, v, "none"))
    return no_bias, {name: relative_error(out, expected) for name, out in found.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("keys", "heads"),
    [
        *((keys, heads) for keys in (64, 1024, 8192) for heads in (8, 12)),
        pytest.param(65536, 12, marks=pytest.mark.slow),
    ],
)
def test_the_bias_adds_no_error_at_any_length(dtype, heads, keys):
    no_bias, found = errors(heads, keys, dtype)
    for name in ("mask", "fused"):
        assert (found[name] <= 1.2 * no_bias).all(), f"{name}: {found[name] / no_bias}"


@pytest.mark.parametrize(
    ("dtype", "keys"),
    [
        (torch.bfloat16, 1024),
        (torch.float16, 8192),
        pytest.param(torch.bfloat16, 65536, marks=pytest.mark.slow),
    ],
)
def test_one_vector_of_slope_times_position_loses_whole_positions(dtype, keys):
    """The counter-example: the authors' bias m * j, in half precision. Equal in exact arithmetic, wrong here."""
    no_bias, found = errors(8, keys, dtype)
    assert (found["authors"] > 50 * no_bias).any()


@pytest.mark.parametrize("attention", ["mask", "fused"])
@pytest.mark.parametrize("length", [33, 600])
def test_autocast_is_within_the_error_of_a_model_without_bias(build, attention, length):
    """A whole model, in which most of the error is that of the other layers."""
    error = {}
    for method in ("alibi", "none"):
        model = build("alibi_lm_tiny", "--attention", attention, "--position-method", method)
        torch.manual_seed(0)
        tokens = random_tokens(model, 1, length)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out, _ = model(tokens)
        expected = reference.logits(model, tokens[0])
        error[method] = ((out[0].double() - expected).square().mean() / expected.square().mean()).sqrt()
    assert error["alibi"] < 1.5 * error["none"] < 0.1


@pytest.mark.parametrize("attention", ["mask", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_decodes_as_it_reads(build, method, attention, dtype):
    model = build("alibi_lm_tiny", "--attention", attention, "--position-method", method).to(dtype)
    tokens = random_tokens(model, 2, 40)
    if method == "xpos" and dtype == torch.float16:
        with pytest.raises(ValueError, match="float16 cannot hold its factors; use another precision"):
            model(tokens)
        return
    state = {}
    with torch.no_grad():
        expected, _ = model(tokens)
        logits = [model.decoder(tokens[:, :read], incremental_state=state)[0] for read in (30, 31, 40)]
    for got, position in zip(logits, (29, 30, 39)):
        torch.testing.assert_close(got[:, 0].float(), expected[:, position].float(), rtol=0.05, atol=0.1)


ADAPTIVE = ["--adaptive-input", "--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20"]


@pytest.mark.parametrize(
    "more", [[], ["--checkpoint-activations"], ADAPTIVE], ids=["plain", "checkpointed", "adaptive"]
)
def test_bf16_products_on_a_cpu_change_little_and_train(build, monkeypatch, more):
    monkeypatch.setattr(layers, "bf16_gain", lambda: 2.5)
    sizes = ["--decoder-layers", 2, "--decoder-embed-dim", 64, "--decoder-input-dim", 64, "--decoder-output-dim", 64]
    plain, fast = (build("alibi_lm", *sizes, *more, *flag) for flag in ([], ["--cpu-bf16"]))
    tokens = random_tokens(plain, 2, 300)
    out, expected = fast.train(False)(tokens)[0], plain(tokens)[0]
    assert out.dtype == torch.float32
    assert 1e-5 < relative_error(out[:, None], expected[:, None]).max() < 0.02
    losses = [model(tokens)[0].logsumexp(-1).mean() for model in (fast, plain)]
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters()):
        assert ours.dtype == torch.float32
        if theirs.grad is not None and theirs.grad.norm() > 1e-4:
            assert (ours.grad - theirs.grad).norm() < 0.1 * theirs.grad.norm(), name
    state = {}
    steps = [fast.decoder(tokens[:, :read], incremental_state=state)[0] for read in (290, 291, 300)]
    assert relative_error(steps[2][:, None], out[:, None, -1:]) < 0.03


def test_bf16_products_are_refused_where_they_are_slower(build, monkeypatch):
    model = build("alibi_lm_tiny", "--cpu-bf16")
    monkeypatch.setattr(layers, "bf16_gain", lambda: 0.4)
    with pytest.raises(ValueError, match=r"--cpu-bf16: .* 0.40 times"):
        model(random_tokens(model, 1, 5))


def test_bf16_gain_is_a_ratio_of_speeds():
    assert 0.001 < layers.bf16_gain() < 100


def test_evaluation_in_fp16_gives_the_same_loss(corpus, train):
    checkpoint = train(updates=3)
    losses = []
    for flags in ([], ["--fp16"]):
        losses.append(fairseqs_own(corpus, checkpoint, "--tokens-per-sample", 512, *flags)[0])
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
