"""Slopes, bias and future mask against the formulas of the paper's section 3, in float64."""

import math

import pytest
import reference
import torch

from fairseq_alibi.core import T5, ALiBi, Rotary, position_methods
from fairseq_alibi.core.alibi import alibi_slopes
from fairseq_alibi.core.attention_inputs import TokenSpan
from fairseq_alibi.core.attention_setup import AttentionSettings, AttentionSetup
from fairseq_alibi.core.distance_biases import Kerple
from fairseq_alibi.core.rotary import XPos, rotate

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
    mask = ALiBi(num_heads).future_mask(length, length).double()
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
    ours = ALiBi(num_heads).future_mask(length, length).double()
    torch.testing.assert_close((scores + ours).softmax(-1), (scores + authors).softmax(-1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", position_methods())
def test_last_rows_of_a_mask_are_the_mask_of_the_last_queries(method):
    position_method = position_methods()[method](12)
    for parameter in position_method.parameters():
        torch.nn.init.normal_(parameter)
    whole = position_method.future_mask(50, 50)
    for queries in (1, 7, 50):
        torch.testing.assert_close(position_method.future_mask(queries, 50), whole[:, -queries:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["sinusoidal", "rotary", "learned", "none"])
def test_methods_without_bias_have_the_plain_future_mask(method):
    mask = position_methods()[method](12).future_mask(5, 5)
    assert torch.equal(mask, torch.full((1, 5, 5), -math.inf).triu(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_near_tokens_are_exact_in_half_precision_at_any_position(dtype):
    """With powers of two as slopes the nearest 256 distances are whole numbers that even bfloat16 holds exactly."""
    far = ALiBi(8).future_mask(1, 20000).to(dtype)[:, 0, -256:].double()
    expected = -alibi_slopes(8)[:, None] * torch.arange(255, -1, -1)
    assert torch.equal(far, expected)


def test_only_learned_biases_are_in_a_checkpoint():
    found = {name: list(method(8).state_dict()) for name, method in position_methods().items()}
    assert {name: keys for name, keys in found.items() if keys} == {
        "t5": ["bucket_bias"],
        "fire": ["hidden_weight", "out_weight", "hidden_bias", "c", "m"],
        "kerple": ["parameters_of_heads"],
        "kerple_power": ["parameters_of_heads"],
    }


def test_buckets_of_t5():
    """Listed from the formula, and the last one for all distances from 128 on."""
    method = T5(4)
    assert method.bucket(torch.arange(-3, 16)).tolist() == [0, 0, 0, *range(16)]
    firsts = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    found = method.bucket(torch.arange(10_000)).tolist()
    assert found == [reference.t5_bucket(distance) for distance in range(10_000)]
    assert [found.index(bucket) for bucket in range(16, 32)] == firsts
    assert found[-1] == 31


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (150, 150), (3, 200), (1, 40)])
def test_bias_of_t5_and_its_gradient(queries, keys):
    method = T5(3)
    torch.nn.init.normal_(method.bucket_bias)
    bias = method.pair_bias(queries, keys)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    buckets = torch.tensor([[reference.t5_bucket(max(0, d)) for d in row] for row in distance.tolist()])
    expected = method.bucket_bias[buckets].permute(2, 0, 1)
    assert torch.equal(bias, expected)
    cotangent = torch.randn_like(bias)
    ours, theirs = (torch.autograd.grad(x, method.bucket_bias, cotangent)[0] for x in (bias, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


BY_DISTANCE = {
    **{name: method for name, method in position_methods().items() if method.bias_kind == "distance"},
    "alibi": lambda heads: ALiBi(heads, learned=True),
}


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_bias_by_distance_and_its_gradient_follow_the_formula(name):
    """Far distances too; parameters outside of their range count as its end, and have a gradient all the same."""
    method = BY_DISTANCE[name](3)
    if name.startswith("kerple"):
        with torch.no_grad():
            method.parameters_of_heads[:, 1] = torch.tensor([5.0, -1.0])
    distance = torch.cat([torch.arange(300), torch.tensor([5_000, 70_000])])
    bias = method.distance_bias(distance)
    parameters = {key: value.detach().requires_grad_() for key, value in method.named_parameters()}
    expected = reference.bias_by_distance(name, 3, distance, parameters)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-5, atol=1e-5)
    for key, parameter in method.named_parameters():
        (ours,) = torch.autograd.grad(bias[:, :300].sum(), parameter, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected[:, :300].sum(), parameters[key], retain_graph=True)
        assert ours.isfinite().all()
        assert (ours != 0).all()
        inside = theirs != 0  # the formula's derivative ends with the range
        torch.testing.assert_close(ours[inside], theirs[inside], rtol=1e-4, atol=1e-3)


def test_parameters_of_kerple_start_uniform_by_the_seed_and_leave_the_generator_as_it_was():
    torch.manual_seed(5)
    first, drawn = Kerple(4000).parameters_of_heads, torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(Kerple(4000).parameters_of_heads, first)
    torch.testing.assert_close(first.amax(1), torch.tensor([2.0, 1.0]), rtol=0.01, atol=0)
    torch.testing.assert_close(first.mean(1), torch.tensor([1.0, 0.5]), rtol=0.05, atol=0)
    torch.manual_seed(6)
    assert not torch.equal(Kerple(4000).parameters_of_heads, first)


def test_learned_slopes_of_a_decoder_start_from_the_fixed_ones():
    for heads in (None, 5):
        learned, fixed = ALiBi(8, heads=heads, learned=True), ALiBi(8, heads=heads)
        torch.testing.assert_close(learned.slopes()[0], fixed.slopes()[0])
    assert list(learned.state_dict()) == ["log_slopes"]


def test_rotary_turns_pairs_of_dimensions_and_scores_depend_on_distance():
    method = Rotary(2, 8)
    x = torch.randn(2, 3, 20, 8)
    torch.testing.assert_close(rotate(x, method.rotation(0, 20)).double(), reference.turned(x), rtol=1e-5, atol=1e-5)
    q, k = torch.randn(2, 1, 8).double()

    def score(i, j):
        return float(rotate(q, method.rotation(i, i + 1).double()) @ rotate(k, method.rotation(j, j + 1).double()).T)

    assert score(5, 3) == pytest.approx(score(100_005, 100_003), rel=1e-5), "far positions are as exact as near ones"
    assert score(5, 3) != pytest.approx(score(5, 2), rel=1e-2)
    assert rotate(x.bfloat16(), method.rotation(0, 20)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="head_dim must be even, not 7"):
        Rotary(2, 7)


SCALED = {
    "linear": ("linear", 4.0, 4096),
    "ntk": ("ntk", 4.0, 4096),
    "dynamic_ntk": ("dynamic_ntk", 2.0, 4096),
    "dynamic_ntk, short": ("dynamic_ntk", 2.0, 300),
    "yarn": ("yarn", 8.0, 4096),
    "yarn, auto": ("yarn", "auto", 4096),
}


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_scaled_frequencies_are_those_of_transformers(case, dim):
    transformers = pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS as rope  # noqa: N811

    scaling, factor, length = SCALED[case]
    method = Rotary(2, dim, 10000.0, scaling, factor, 512)
    unscaled = Rotary(2, dim).frequencies
    assert torch.equal(method.frequencies, unscaled) == (factor == "auto" or scaling == "dynamic_ntk")
    method.set_evaluation_length(length)
    factor = length / 512 if factor == "auto" else factor
    if scaling == "ntk":  # transformers has it for a growing length alone
        expected, amplitude = (10000 * factor ** (dim / (dim - 2))) ** -(torch.arange(0, dim, 2) / dim), 1.0
    else:
        parameters = {"rope_type": scaling.split("_")[0], "factor": factor, "rope_theta": 10000.0}
        if scaling == "yarn":
            parameters["original_max_position_embeddings"] = 512
        name = "rope_parameters" if transformers.__version__.startswith("5") else "rope_scaling"
        config = LlamaConfig(head_dim=dim, max_position_embeddings=512, **{name: parameters})
        expected, amplitude = rope[parameters["rope_type"]](config, device="cpu", seq_len=length)
    torch.testing.assert_close(method.frequencies, expected.double(), rtol=1e-6, atol=1e-9)
    assert method.amplitude == pytest.approx(amplitude, rel=1e-9)
    position_1000 = method.rotation(1000, 1001)[:, 0].double()
    torch.testing.assert_close(position_1000[0], amplitude * (1000 * method.frequencies).cos(), rtol=0, atol=1e-6)


def test_p_rope_turns_the_highest_frequencies_alone():
    method = Rotary(2, 16, share=0.75)
    assert torch.equal(method.frequencies[:6], Rotary(2, 16).frequencies[:6])
    assert method.frequencies[6:].tolist() == [0, 0]


def test_scores_of_xpos_follow_its_formula_at_any_position():
    method = XPos(2, 8)
    x = torch.randn(2, 3, 20, 8)
    q, k = (rotate(x, part) for part in method.rotation(0, 20).double().split(2))
    expected = reference.turned(x, 1) @ reference.turned(x, -1).mT
    torch.testing.assert_close((q @ k.mT).double(), expected, rtol=1e-4, atol=1e-4)
    far = [rotate(x, part) for part in method.rotation(49_000, 49_020).double().split(2)]
    torch.testing.assert_close((far[0] @ far[1].mT).double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="overflow at 49,153 tokens"):
        method.rotation(49_152, 49_153)
    setup = AttentionSetup(method, AttentionSettings())
    with pytest.raises(ValueError, match="float16 cannot hold"):
        setup.inputs(x.half(), TokenSpan(20, 20, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "cubic"}, "none, linear, ntk, dynamic_ntk, yarn, not cubic"),
        ({"scaling": "yarn", "factor": "0.5"}, "at least 1 or auto, not 0.5"),
        ({"scaling": "yarn", "factor": "two"}, "at least 1 or auto, not two"),
        ({"factor": 2}, "rotary_scaling_factor 2 needs rotary_scaling"),
        ({"share": 0.0}, "p_rope must be above 0 and at most 1, not 0.0"),
        ({"scaling": "ntk", "head_dim": 2}, "rotary_scaling ntk needs a head_dim of at least 4, not 2"),
    ],
)
def test_impossible_options_of_rotary_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Rotary(2, **options)


def test_bias_on_part_of_the_heads():
    method = ALiBi(8, heads=4)
    assert method.slopes()[0].tolist() == [*alibi_slopes(4).tolist(), 0, 0, 0, 0]
    assert not method.future_mask(5, 5)[4:].tril().any()
    for heads in (0, 9):
        with pytest.raises(ValueError, match=f"alibi_heads.*{heads}"):
            ALiBi(8, heads=heads)
