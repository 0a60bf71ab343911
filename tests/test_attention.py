"""Attention with and without a mask against a float64 reference written from the formula: outputs and gradients."""

import dataclasses
import functools
import math
import sys
import warnings

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_alibi.core import attention, position_methods, tiled_attention
from fairseq_alibi.core.alibi import ENCODER_FORMS, EncoderALiBi, alibi_slopes
from fairseq_alibi.core.attention_inputs import AttentionInputs, DistanceBias, FoldedMask, LinearBias, NoBias, TokenSpan
from fairseq_alibi.core.attention_setup import AttentionSettings, AttentionSetup
from fairseq_alibi.core.reach import distance_reach, reach
from fairseq_alibi.core.tiled_attention import tiles

#: Those with a bias that needs no mask, and without one.
BIASES = ("alibi", "none")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def by_mask(q, k, v, method, padding=None, dropout=0.0, window=None):
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = position_methods()[method](q.size(1)).future_mask(q.size(2), k.size(2), window).to(wide)
    inputs = AttentionInputs(bias=FoldedMask(mask), padding=padding, window=window)
    return attention.masked_attention(q, k, v, inputs, dropout)


def bias_of(method, heads):
    position_method = position_methods()[method](heads)
    return LinearBias(*position_method.slopes()) if position_method.has_distance_bias else NoBias()


def without_mask(q, k, v, method, padding=None, dropout=0.0, window=None):
    inputs = AttentionInputs(bias=bias_of(method, q.size(1)), padding=padding, window=window)
    return attention.attend(q, k, v, inputs, dropout)


def recomputed(q, k, v, method, padding=None, dropout=0.0, window=None):
    """The public kernel: with dropout, and on devices without a kernel of their own."""
    inputs = AttentionInputs(bias=bias_of(method, q.size(1)), padding=padding, window=window)
    return tiled_attention.recomputed_tiles(q, k, v, inputs, dropout)


def by_distance(q, k, v, method, padding=None, dropout=0.0, window=None, trained=False):
    """A bias that is not linear; `trained` for one with gradients."""
    distance = torch.arange(1 - q.size(2), k.size(2))
    position_method = position_methods()[method](q.size(1))
    bias = (
        position_method.distance_bias(distance) if position_method.has_distance_bias else torch.zeros(1, len(distance))
    )
    bias = bias.masked_fill(distance < 0, -math.inf).requires_grad_(trained)
    inputs = AttentionInputs(bias=DistanceBias(bias), padding=padding, window=window)
    return attention.attend(q, k, v, inputs, dropout)


KERNELS = {
    "mask": by_mask,
    "fused": without_mask,
    "recomputed": recomputed,
    "by distance": by_distance,
    "by distance, trained": functools.partial(by_distance, trained=True),
}


def alibi_inputs(heads, **options):
    """Inputs of attention without a mask, with the slopes of ALiBi."""
    return AttentionInputs(bias=LinearBias(alibi_slopes(heads).float()), **options)


def inputs(batch, heads, queries, keys, dtype, dim=16, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(batch, heads, n, dim).to(dtype).requires_grad_() for n in (queries, keys, keys)]


def assert_equals_reference(kernel, qkv, method, tolerance, padding=None, **window):
    """Output and all gradients, at the queries that are no padding."""
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = KERNELS[kernel](*qkv, method, padding, **window)
    expected = reference.attention(*exact, method, None if padding is None else ~padding, **window)
    assert out.dtype == qkv[0].dtype
    assert out.isfinite().all(), "a NaN on padding would reach real tokens through the next layer"
    cotangent = torch.randn_like(expected)
    if padding is not None:
        cotangent[padding[:, None, -out.size(2) :, None].expand_as(out)] = 0
    real = cotangent != 0
    torch.testing.assert_close(out[real].double(), expected[real], rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(out, qkv, cotangent.to(out.dtype))
    for a, b in zip(ours, torch.autograd.grad(expected, exact, cotangent)):
        torch.testing.assert_close(a.double(), b, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", BIASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "queries", "keys"), [(12, 20, 20), (8, 1, 1), (1, 33, 33), (12, 1, 40), (3, 5, 40)])
def test_output_and_gradients_equal_the_reference(kernel, method, dtype, heads, queries, keys):
    assert_equals_reference(kernel, inputs(2, heads, queries, keys, dtype), method, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "mask"])
@pytest.mark.parametrize("method", ["alibi", "none"])
@pytest.mark.parametrize(("heads", "queries", "keys"), [(12, 700, 700), (8, 300, 1500), (3, 2, 900), (1, 1100, 1100)])
def test_many_tiles_equal_the_reference(kernel, method, heads, queries, keys):
    """Chunks that do not divide the length, a prefix before the queries, heads of different reach."""
    assert_equals_reference(kernel, inputs(1, heads, queries, keys, torch.float32), method, 2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", BIASES)
@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [(700, 700, 7), (700, 700, 300), (600, 899, 1), (600, 899, 256), (1, 300, 7), (1, 300, 256), (300, 450, 5000)],
)
def test_queries_see_a_window_of_keys(kernel, method, queries, keys, window):
    qkv = inputs(2, 3, queries, keys, torch.float32)
    assert_equals_reference(kernel, qkv, method, 5e-5, window=window)


PADDINGS = {
    "right": [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]],
    "left": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]],
    "both": [[1, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 1]],
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", BIASES)
@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize("times", [1, 45])
def test_padded_keys_are_not_seen(kernel, method, side, times):
    padding = torch.tensor(PADDINGS[side]).bool().repeat_interleave(times, dim=1)
    qkv = inputs(2, 12, 7 * times, 7 * times, torch.float32)
    assert_equals_reference(kernel, qkv, method, 5e-5, padding)
    if times == 1:
        mask = FoldedMask(position_methods()[method](12).future_mask(7, 7))
        weights = attention.attention_weights(*qkv[:2], AttentionInputs(bias=mask, padding=padding))
        expected = reference.attention(*qkv, method, ~padding)
        real = ~padding[:, None, :, None].expand_as(expected)
        assert weights.isfinite().all()
        torch.testing.assert_close((weights @ qkv[2])[real].double(), expected[real], rtol=2e-5, atol=2e-5)


def test_padding_counts_only_before_tokens():
    setup = attention_setup("alibi")
    x = torch.zeros(2, 7, 8)
    needed = {side: setup.visible_padding(x, torch.tensor(rows).bool()) for side, rows in PADDINGS.items()}
    assert needed["right"] is None
    assert needed["left"].tolist() == torch.tensor(PADDINGS["left"]).bool().tolist()
    assert needed["both"] is not None
    assert setup.visible_padding(x, torch.zeros(2, 7, dtype=torch.bool)) is None


def attention_setup(method, heads=2, **settings):
    return AttentionSetup(position_methods()[method](heads), AttentionSettings(**settings))


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_drops_weights_and_keeps_the_mean(kernel):
    q, k, v = inputs(1, 2, 64, 64, torch.float32)
    attend = KERNELS[kernel]
    mean = torch.stack([attend(q, k, v, "alibi", dropout=0.3) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v, "alibi"), rtol=0, atol=0.3)
    assert not torch.equal(attend(q, k, v, "alibi", dropout=0.3), attend(q, k, v, "alibi"))


def test_dropped_weights_are_the_same_in_the_backward_pass():
    """The output is linear in v, and the weights that were kept are its gradient."""
    q, k, v = inputs(1, 2, 600, 600, torch.float32)
    out = attention.attend(q, k, v, alibi_inputs(2), dropout=0.5)
    (v_grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((v_grad * v).sum(), out.sum(), rtol=1e-4, atol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= x.numel():  # a view makes nothing
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_of_length_times_length_is_made_without_a_mask(dropout, padded):
    length = 4096
    q, k, v = inputs(1, 2, length, length, torch.float32, dim=8)
    padding = torch.zeros(1, length, dtype=torch.bool)
    padding[:, :5] = True
    inputs_of_pass = alibi_inputs(2, padding=padding if padded else None)
    with LargestTensor() as largest:
        attention.attend(q, k, v, inputs_of_pass, dropout).sum().backward()
    assert largest.elements < length * length / 2
    with LargestTensor() as largest:
        by_mask(q, k, v, "alibi")
    assert largest.elements >= 2 * length * length, "or this test sees nothing"


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 30.0])
def test_keys_beyond_the_reach_weigh_less_than_epsilon_together(scale):
    """The largest weight that a row really gives the keys beyond; with small queries and keys it comes close."""
    q, k, _ = (scale * x.detach() for x in inputs(1, 8, 600, 600, torch.float64))
    slopes = alibi_slopes(8)
    for epsilon in (1e-2, 1e-7):
        distances = reach(q, k, slopes, epsilon)
        distance = torch.arange(600)[:, None] - torch.arange(600)
        scores = q @ k.transpose(2, 3) / 4 - slopes[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
        beyond = weights.masked_fill(distance <= distances[:, None, None], 0.0).sum(-1).amax((0, 2))
        assert (beyond <= epsilon).all()
        if scale <= 0.1:
            assert (beyond[:4] > epsilon / 20).all(), "a reach much longer than needed"


@pytest.mark.parametrize("own", [0.0, -4.0, 4.0])
def test_reach_is_no_longer_than_the_worst_keys_need(own):
    """The worst case: keys within the reach that the query avoids, and beyond it only keys that it wants most."""
    largest, slope, epsilon = 8.0, 1 / 64, 1e-3
    near = math.ceil((largest - own - math.log(epsilon) - math.log(math.expm1(slope))) / slope)
    scores = torch.tensor([largest] * near + [-largest] * near + [own], dtype=torch.float64)
    q, k = torch.ones(1, 1, 1, 1, dtype=torch.float64), scores[None, None, :, None]
    (distance,) = reach(q, k, torch.tensor([slope]), epsilon).tolist()
    assert near - 1 <= distance <= 1.01 * near
    weights = (scores - slope * torch.arange(2 * near, -1, -1)).softmax(0)
    assert epsilon / 3 < weights[:near].sum() < epsilon


def test_large_queries_and_keys_are_not_skipped():
    """A far key that all queries want, against a slope of 1/2: it gets nearly all weight, so it must be read."""
    q, k, v = (x.detach() for x in inputs(1, 8, 900, 900, torch.float32))
    q, k = q / 100, k / 100
    q[..., 0], k[:, :, 3, 0] = 60.0, 60.0
    expected = reference.attention(q, k, v)
    assert (expected[0, 0, -1] - v[0, 0, 3]).abs().max() < 1e-3
    torch.testing.assert_close(without_mask(q, k, v, "alibi").double(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_skipped_depends_on_the_keys_around_their_mean():
    """A component that all keys of a head have in common changes no weight, and must not make it read more."""
    q, k, _ = (x.detach() for x in inputs(1, 8, 300, 300, torch.float32))
    plain = reach(q, k, alibi_slopes(8))
    torch.testing.assert_close(reach(q, k + 50, alibi_slopes(8)), plain, rtol=1e-3, atol=1)
    assert (reach(q, k + 50 * torch.randn_like(k), alibi_slopes(8)) > 5 * plain).all()


@pytest.mark.parametrize("name", ["kerple", "kerple_power", "sandwich", "t5", "alibi"])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_keys_beyond_the_reach_of_any_bias_weigh_less_than_epsilon(name, scale):
    """In float64, for each head; where nothing may be skipped the reach holds all keys."""
    torch.manual_seed(2)
    length, epsilon, method = 1500, 1e-5, position_methods()[name](4)
    for parameter in method.parameters():
        torch.nn.init.uniform_(parameter, 1, 6)
    q, k = (scale * torch.randn(1, 4, length, 16) for _ in range(2))
    bias = method.distance_bias(torch.arange(length)).detach()
    reaches = distance_reach(q, k, bias[:, 1:], bias[:, 0], epsilon)
    assert torch.equal(distance_reach(q, k, bias[:, 1:] - 40, bias[:, 0] - 40, epsilon), reaches), "differences count"
    if name == "alibi":
        torch.testing.assert_close(
            reaches, reach(q, k, method.slopes()[0], epsilon).clamp(max=length - 1), rtol=1e-6, atol=1
        )
    distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
    scores = (q.double() @ k.double().transpose(2, 3) / 4 + bias.double()[:, distance])[0]
    weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
    for head, farthest in enumerate(reaches.tolist()):
        beyond = weights[head].masked_fill(distance <= farthest, 0).sum(-1)
        assert beyond.max() <= epsilon
    assert reaches.min() < length / 2 or name in ("sandwich", "t5"), "something is skipped"


def test_skipping_is_turned_off_by_an_epsilon_of_0():
    q, k, _ = (x.detach() for x in inputs(1, 4, 30, 30, torch.float32))
    assert reach(q, k, alibi_slopes(4), 0.0).tolist() == [math.inf] * 4
    assert reach(q, k, torch.zeros(4)).tolist() == [math.inf] * 4, "without a bias there is no end"
    assert reach(q, k * math.nan, alibi_slopes(4)).tolist() == [math.inf] * 4


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (256, 256), (3000, 3000), (257, 5000), (1025, 1025)])
@pytest.mark.parametrize("reaches", [[0, 3, 100, 2000], [math.inf] * 4, [700, math.inf, 10, 10]])
def test_tiles_hold_every_visible_key_once(queries, keys, reaches):
    read = torch.zeros(4, queries, keys, dtype=torch.int8)
    for heads, rows, reversed_keys in tiles(queries, keys, reaches, [0] * 4):
        assert rows.stop - rows.start <= 1024
        longest = min(max(reaches[heads]), keys)
        assert reversed_keys.stop - reversed_keys.start <= rows.stop - rows.start + longest, "reads more than it needs"
        read[heads, rows, keys - reversed_keys.stop : keys - reversed_keys.start] += 1
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    for head, longest in enumerate(reaches):
        assert (read[head][(distance >= 0) & (distance <= longest)] == 1).all()
    assert read.max() == 1


@pytest.mark.parametrize("reaches", [[0, 3, 100, 2000], [5, math.inf, 600, 0]])
def test_tiles_of_encoders_hold_the_keys_on_both_sides_once(reaches):
    length, ahead = 2100, reaches[::-1]
    read = torch.zeros(4, length, length, dtype=torch.int8)
    for heads, rows, reversed_keys in tiles(length, length, reaches, ahead):
        read[heads, rows, length - reversed_keys.stop : length - reversed_keys.start] += 1
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for head, (before, after) in enumerate(zip(reaches, ahead)):
        assert (read[head][(distance >= -after) & (distance <= before)] == 1).all()
    assert read.max() == 1


@pytest.mark.parametrize("form", ENCODER_FORMS)
@pytest.mark.parametrize("kernel", ["tiled", "recomputed"])
def test_encoders_skip_what_no_query_sees_and_equal_the_reference(form, kernel):
    method, (q, k, v) = EncoderALiBi(12, form), inputs(1, 12, 1000, 1000, torch.float32)
    of_pass = AttentionInputs(bias=LinearBias(*method.slopes()), causal=False)
    run = {"tiled": tiled_attention.flash_tiles, "recomputed": tiled_attention.recomputed_tiles}[kernel]
    found = run(q, k, v, of_pass)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(2, 3) / 4 + reference.encoder_bias(12, 1000, form)
    expected = scores.softmax(-1) @ exact[2]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(found, (q, k, v), cotangent.float())
    for gradient, wanted in zip(ours, torch.autograd.grad(expected, exact, cotangent)):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-4)
    _, cut = tiled_attention.plan_tiles(q, k, of_pass)
    read = sum((h.stop - h.start) * (t.stop - t.start) * (s.stop - s.start) for h, t, s in cut)
    assert read < 0.8 * 12 * 1000**2


@pytest.mark.parametrize(
    ("method", "length", "training", "dropout", "kernel"),
    [
        ("alibi", 256, False, 0.1, "mask"),
        ("alibi", 257, False, 0.1, "tiled"),
        ("alibi", 257, True, 0.1, "recomputed"),
        ("none", 5, False, 0.1, "causal"),
        ("none", 5, True, 0.1, "mask"),
        ("sinusoidal", 5, True, 0.0, "causal"),
        ("t5", 256, True, 0.0, "mask"),
        ("t5", 257, True, 0.0, "recomputed"),
        ("t5", 257, False, 0.0, "tiled"),
    ],
)
def test_auto_takes_the_faster_kernel(method, length, training, dropout, kernel):
    setup = attention_setup(method, dropout=dropout)
    q, k, _ = inputs(1, 2, length, length, torch.float32)
    with torch.set_grad_enabled(training):
        of_pass = setup.inputs(q, TokenSpan(length, length, 0), training=training)
        assert attention.choose_kernel(q, k, of_pass, dropout if training else 0.0).name == kernel


def test_without_the_private_kernel_the_public_one_runs_after_one_warning(monkeypatch):
    """A torch whose private function is another one, or gone."""
    monkeypatch.setattr(attention, "TRIALS", {})
    monkeypatch.setattr(tiled_attention.FlashTiles, "apply", lambda q, *rest: torch.zeros_like(q))
    q, k, v = inputs(1, 2, 300, 300, torch.float32)
    with pytest.warns(UserWarning, match="kernel tiled fails on cpu in torch.float32 with head_dim 16"):
        chosen = attention.choose_kernel(q, k, alibi_inputs(2))
    assert chosen.name == "recomputed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equals_reference("fused", (q, k, v), "alibi", 2e-5)


CONTRADICTIONS = {
    "window needs causal=True": {"window": 3, "causal": False},
    "cache needs causal=True": {"cache": {}, "causal": False},
    "a linear bias then has none": {"bias": LinearBias(torch.ones(2), torch.ones(2))},
    "a linear bias then needs one": {"bias": LinearBias(torch.ones(2)), "causal": False},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_inputs_that_contradict_each_other_are_errors(message):
    with pytest.raises(ValueError, match=message):
        AttentionInputs(**CONTRADICTIONS[message])


def test_inputs_of_another_shape_are_errors():
    q, k, v = inputs(2, 2, 5, 5, torch.float32)
    wrong = {
        r"slopes must be \(H,\) = \(2,\), not \(3,\)": {"bias": LinearBias(torch.ones(3))},
        r"\(2 or 1, 9\), not \(2, 8\)": {"bias": DistanceBias(torch.ones(2, 8))},
        r"padding must be \(B, S\) = \(2, 5\), not \(2, 4\)": {"padding": torch.zeros(2, 4, dtype=torch.bool)},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            attention.attend(q, k, v, AttentionInputs(**options))
    with pytest.raises(ValueError, match="no kernel supports attention to both sides without a bias"):
        attention.attend(q, k, v, AttentionInputs(causal=False))
    with pytest.raises(ValueError, match="auto, mask, fused, not quick"):
        AttentionSettings(kernel="quick")


def test_inputs_cannot_be_changed_and_are_given_by_name():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionInputs().window = 3
    if sys.version_info >= (3, 10):  # dataclasses cannot demand names before
        with pytest.raises(TypeError):
            AttentionInputs(NoBias(), True)
