"""A cache that drops what no later query needs: the same tokens, outputs within the proven bound, constant memory."""

import math
from functools import partial

import pytest
import torch
from conftest import random_tokens

from fairseq_alibi.core import ALiBi, LayerOptions, Transformer, bounded_cache
from fairseq_alibi.core.attention_inputs import EPSILON, AttentionInputs, LinearBias, TokenSpan
from fairseq_alibi.core.bounded_cache import BoundedCache, bounded_cache_in, group_heads
from fairseq_alibi.core.layers import Cache
from fairseq_alibi.core.receptive_field import stack_excess
from fairseq_alibi.models import decoder, generator

#: Steep slopes, so that texts of a test are longer than the reach.
STEEP = ("--alibi-max-bias", 2)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bounded_cache, "SHORT", 60)
    monkeypatch.setattr(bounded_cache, "GROUP_COST", 8)


def stack(normalize_before=True, max_bias=2.0):
    """A float64 stack whose scores differ much."""
    torch.manual_seed(1)
    options = LayerOptions(normalize_before=normalize_before)
    made = Transformer(2, 48, 6, position_method=ALiBi(6, max_bias), options=options).double().eval()
    for name, parameter in made.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 2
    return made


def kept_keys(cache):
    """The most keys that a group of heads has in its buffers, by layer."""
    return [max(group.buffers[0].size(2) for group in layer.groups) for layer in cache.kept.values()]


@pytest.mark.parametrize("normalize_before", [True, False])
@torch.no_grad()
def test_pieces_of_any_length_give_what_the_whole_gives(normalize_before):
    decoder, x = stack(normalize_before), torch.randn(2, 1700, 48).double()
    padding = torch.zeros(2, 1700, dtype=torch.bool)
    padding[0, :20] = True
    cache, read, parts = decoder.make_cache(), 0, []
    for piece in (40, 1, 1, 50, 1, 700, *[1] * 20, 1, 686, *[1] * 200):
        parts.append(decoder(x[:, read : read + piece], padding[:, : read + piece], cache))
        read += piece
    error = (torch.cat(parts, dim=1) - decoder(x, padding)).abs() * ~padding[..., None]
    assert read == cache.get_seq_length() == 1700
    assert error.max() < 1e-6
    reached = kept_keys(cache)
    assert reached[1] < 1500
    assert (reached[0] < 1500) == normalize_before, "without a norm nothing bounds what the first layer reads"


@pytest.mark.parametrize("epsilon", [0.3, 0.01, 1e-7])
@torch.no_grad()
def test_attention_changes_by_no_more_than_is_proven(epsilon):
    """With adversarial scores: keys that far tokens would win, were it not for the bias."""
    decoder = stack(max_bias=1.0)
    layer, slopes = decoder.layers[1], decoder.position_method.slopes()[0]
    attention = layer.self_attn
    x = layer.self_attn_layer_norm(torch.randn(1, 900, 48).double() * 3)
    q, k, v = (
        getattr(attention, f"{name}_proj")(x).unflatten(-1, (6, 8)).transpose(1, 2) * (3 if name == "v" else 1)
        for name in "qkv"
    )
    distance = (torch.arange(900)[:, None] - torch.arange(900)).double()
    scores = q @ k.mT / math.sqrt(8) - slopes[:, None, None].double() * distance
    exact = scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v
    cache = BoundedCache(partial(stack_excess, decoder.layers), epsilon)
    inputs = decoder.setup.inputs(x, TokenSpan(1, 901, 900), cache=cache)
    parts = [cache.attend(1, (q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1]), inputs) for i in range(900)]
    error = (torch.cat(parts, dim=2) - exact).norm(dim=-1).max()
    assert 0 < error <= 2 * epsilon * v.norm(dim=-1).max()
    assert cache.kept[1].groups[0].length < 900, "keys are dropped"


@torch.no_grad()
def test_a_query_reads_as_far_as_the_farthest_key_that_there_was():
    q, k, v = (torch.randn(2, 2, 300, 8).double() for _ in "qkv")
    q[:] = q[:, :, :1]
    k[1, :, 100] = 40 * q[1, :, 0]  # outweighs its distance from every later query
    cache = BoundedCache(lambda: torch.full((1, 2), math.inf), EPSILON)
    inputs = AttentionInputs(bias=LinearBias(torch.tensor([0.25, 0.5])))
    for i in range(300):
        out = cache.attend(0, (q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1]), inputs)
    torch.testing.assert_close(out[1, :, 0], v[1, :, 100], rtol=1e-4, atol=1e-4)


def decoded(model, prompt, steps, state):
    """Greedy tokens after a (B, T) prompt, and the logits of each step."""
    tokens, logits = prompt, []
    for _ in range(steps):
        logits.append(model.decoder(tokens, incremental_state=state)[0][:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return tokens, torch.stack(logits)


@torch.no_grad()
def test_greedy_tokens_and_logits_equal_those_of_all_keys(build, monkeypatch):
    monkeypatch.setattr(decoder, "CHUNK", 64)
    model = build("alibi_lm_tiny", *STEEP)
    prompt = random_tokens(model, 3, 300)
    prompt[0, :9] = model.decoder.padding_idx
    state = {}
    found, logits = decoded(model, prompt, 270, state)
    model.decoder.setup.settings = type(model.decoder.setup.settings)("fused", 0.0)
    expected, wanted = decoded(model, prompt, 270, {})
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert max(kept_keys(bounded_cache_in(state))) < 560


@torch.no_grad()
def test_beams_keep_their_keys(build):
    model = build("alibi_lm_tiny", *STEEP)
    tokens, state = random_tokens(model, 2, 200), {}
    model.decoder(tokens, incremental_state=state)
    among_beams = torch.randint(2, (12, 4), generator=torch.Generator().manual_seed(1)) + torch.tensor([0, 0, 2, 2])
    for order in ([0, 0, 1, 1], [3, 0, 2, 2], *among_beams.tolist(), [0, 1, 2, 3], [1, 3]):
        model.decoder.reorder_incremental_state_scripting(state, torch.tensor(order))
        tokens = torch.cat([tokens[order], random_tokens(model, len(order), 1)], dim=1)
        found = model.decoder(tokens, incremental_state=state)[0]
        torch.testing.assert_close(found, model.decoder(tokens)[0][:, -1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_beams_have_in_common_is_not_moved():
    """What is in the buffers of the first tokens survives orders of rows that had them in common."""
    cache, keys = BoundedCache(lambda: torch.full((1, 1), math.inf), 1e-7), torch.randn(2, 1, 20, 4)
    inputs = AttentionInputs(bias=LinearBias(torch.ones(1)), causal=True)
    cache.attend(0, (keys, keys, keys), inputs)
    cache.reorder_cache(torch.tensor([1, 1]))
    (buffer, _) = cache.kept[0].groups[0].buffers
    buffer[:, :, :20] = torch.tensor([1.0, 2.0])[:, None, None, None]  # as if they differed: to see what is moved
    new = torch.randn(2, 1, 1, 4)
    cache.attend(0, (new, new, new), inputs)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert buffer[:, 0, 0, 0].tolist() == [1, 2]
    assert torch.equal(buffer[:, :, 20:21], new[[1, 0]])


def test_a_long_prompt_is_read_in_chunks(build, monkeypatch):
    """The log-probabilities of its tokens are those of one pass, and no pass reads more than a chunk."""
    model = build("alibi_lm_tiny", *STEEP)
    tokens, passes = random_tokens(model, 2, 300), []
    wanted = torch.stack([tokens.roll(-1, 1), tokens], dim=2)
    model.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    found = []
    for chunk in (4096, 70):
        monkeypatch.setattr(generator, "CHUNK", chunk)
        reader = generator.PromptReader([model], generator.EndingRules(2, 2))
        with torch.no_grad():
            found.append(reader.read(tokens, wanted, [{}], 1.0))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert passes == [300, 70, 70, 70, 70, 20]


@pytest.mark.parametrize(
    "options",
    [
        ("--position-method", "fox"),
        ("--position-method", "none"),
        ("--attention-epsilon", 0),
        ("--attention", "mask"),
        ("--score-scale", "ssmax"),
    ],
)
@torch.no_grad()
def test_nothing_changes_where_nothing_bounds_the_reach(build, options):
    model, state = build("alibi_lm_tiny", *options), {}
    tokens = random_tokens(model, 1, 90)
    for read in (80, 90):
        model.decoder(tokens[:, :read], incremental_state=state)
    assert bounded_cache_in(state) is None
    assert Transformer(1, 8, 2, attention="mask").make_cache().__class__ is Cache


def test_with_gradients_the_cache_keeps_all(build):
    model, state = build("alibi_lm_tiny", *STEEP), {}
    tokens = random_tokens(model, 1, 90)
    for read in (80, 90):
        logits = model.decoder(tokens[:, :read], incremental_state=state)[0]
    logits.sum().backward()
    assert bounded_cache_in(state) is None


@torch.no_grad()
def test_layers_without_positions_keep_all(build):
    model, state = build("alibi_lm_tiny", *STEEP, "--position-layers", "10"), {}
    tokens = random_tokens(model, 1, 800)
    for read in (500, *range(501, 801)):
        found = model.decoder(tokens[:, :read], incremental_state=state)[0]
    torch.testing.assert_close(found, model.decoder(tokens)[0][:, -1:], rtol=1e-4, atol=1e-5)
    lengths = kept_keys(bounded_cache_in(state))
    assert lengths[0] < 700
    assert lengths[1] >= 800


def test_heads_of_like_reach_share_a_group():
    assert group_heads([math.inf, 100, 104, 5000, math.inf]) == [[0, 4], [3], [1, 2]]
    assert group_heads([7]) == [[0]]
