"""The reach that weights alone prove: no input exceeds it, some input comes within 1% of it; `fairseq-alibi reach`."""

import json
import math

import pytest
import torch
from conftest import failure

from fairseq_alibi.__main__ import main
from fairseq_alibi.core import LayerOptions, Transformer
from fairseq_alibi.core.receptive_field import stack_excess
from fairseq_alibi.evaluation.reach_measurement import measured_deviations, queries_and_keys, weight_by_distance

EPSILON = 1e-7


def folded(layer, norm):
    """Query and key of a head for (N, C) that the norm reads, (N, H, D) float64, from the layer's own modules."""
    attention = layer.self_attn
    return [
        lambda x, p=p: p(norm(x)).unflatten(-1, (attention.num_heads, -1)) for p in (attention.q_proj, attention.k_proj)
    ]


def excess_of(layer, norm, x, y):
    """How much a query at x scores a key at y above its own, in every head: (N, H)."""
    query, key = folded(layer, norm)
    return (query(x) * (key(y) - key(x))).sum(-1) / math.sqrt(layer.self_attn.head_dim)


def a_stack(normalize_before=True, **options):
    """A float64 stack whose norms and biases matter."""
    torch.manual_seed(3)
    stack = Transformer(2, 32, 4, options=LayerOptions(normalize_before=normalize_before, **options)).double().eval()
    for name, parameter in stack.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.4)
    return stack


def norm_of(stack, number, normalize_before):
    return stack.layers[number].self_attn_layer_norm if normalize_before else stack.layers[number - 1].final_layer_norm


@pytest.mark.parametrize("normalize_before", [True, False])
def test_no_input_exceeds_the_bound_and_one_reaches_it_within_1_percent(normalize_before):
    stack = a_stack(normalize_before)
    layer, norm = stack.layers[1], norm_of(stack, 1, normalize_before)
    bound = stack_excess(stack.layers)[1]
    wild = torch.cat([torch.randn(2000, 32).double() * scale + shift for scale in (1, 1e3) for shift in (0, 50)])
    random = excess_of(layer, norm, wild, wild.flip(0)).amax(0)
    x, y = (torch.randn(4, 12, 32, dtype=torch.float64, requires_grad=True) for _ in "xy")
    optimizer = torch.optim.Adam([x, y], lr=0.1)
    for _ in range(250):  # twelve starts for each head
        found = excess_of(layer, norm, 10 * x, 10 * y).diagonal(dim1=0, dim2=2)
        optimizer.zero_grad()
        (-found.sum()).backward()
        optimizer.step()
    found = found.detach().amax(0)
    assert (random < bound).all()
    assert (found < bound).all()
    assert (found > 0.99 * bound).all()


def test_the_first_layer_is_bounded_by_the_vectors_that_it_may_read():
    for normalize_before in (True, False):
        stack = a_stack(normalize_before)
        layer, vectors = stack.layers[0], torch.randn(300, 32).double()
        norm = layer.self_attn_layer_norm if normalize_before else torch.nn.Identity()
        query, key = (part(vectors) for part in folded(layer, norm))
        scores = torch.einsum("nhd,mhd->hnm", query, key)
        largest = (scores - scores.diagonal(dim1=1, dim2=2)[:, :, None]).amax((1, 2)) / math.sqrt(8)
        torch.testing.assert_close(stack_excess(stack.layers, vectors)[0], 1.001 * largest)
    assert stack_excess(stack.layers)[0].isinf().all(), "a post-norm stack of any vectors"


def test_the_search_among_many_types_ends_with_a_bound(monkeypatch):
    stack, vectors = a_stack(), torch.randn(600, 32).double()
    exact = stack_excess(stack.layers, vectors)[0]
    monkeypatch.setattr("fairseq_alibi.core.receptive_field.PAIRS", -1)
    bound = stack_excess(stack.layers, vectors)[0]
    assert (bound >= exact).all()
    assert (bound < 4 * exact).all()


def test_what_is_no_linear_layer_has_no_bound():
    stack = a_stack()
    stack.layers[1].self_attn.q_proj = torch.nn.Sequential(stack.layers[1].self_attn.q_proj)
    assert stack_excess(stack.layers).isinf().tolist() == [[False] * 4, [True] * 4]


def test_reach_of_a_checkpoint(corpus, checkpoint, tmp_path, capsys):
    """The table, and that no score gap of a text and no weight is beyond what was proven."""
    main(["reach", str(checkpoint), "--data", str(corpus), "--tokens", "300", "--output", str(tmp_path)])
    assert "whatever the text and its length, the heads see at most" in capsys.readouterr().out
    content = json.loads((tmp_path / "reach.json").read_text())
    heads = content["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [(n, h) for n in (1, 2) for h in range(1, 9)]
    for head in heads:
        slope, excess = head["slope"], head["excess"]
        assert math.exp(excess - slope * head["reach"]) / math.expm1(slope) <= EPSILON * 1.0001
        assert head["half_within"] <= head["most_within"] <= head["reach"]
    assert (tmp_path / "reach.png").stat().st_size > 10_000
    assert "pass --overwrite" in failure(capsys, main, "reach", checkpoint, "--output", tmp_path)


def test_what_heads_do_in_a_text_is_computed_from_their_queries_and_keys(build):
    decoder = build("alibi_lm_tiny").decoder
    tokens, attention = torch.randint(4, 40, (1, 20)), decoder.layers[0].self_attn
    with measured_deviations(decoder) as deviations:
        (q, k), _ = queries_and_keys(decoder, tokens)
    x = decoder.layers[0].self_attn_layer_norm(decoder.embed(tokens, 20))
    for found, projection in ((q, attention.q_proj), (k, attention.k_proj)):
        torch.testing.assert_close(found, projection(x).unflatten(-1, (8, -1)).transpose(1, 2))
    least = decoder.embed(tokens, 20).detach().std(-1, correction=0).min()
    assert deviations[decoder.layers[0].self_attn_layer_norm] == pytest.approx(float(least), rel=1e-5)
    slopes = decoder.position_method.slopes()[0]
    scores = q[0] @ k[0].mT / 4 + decoder.position_method.future_mask(20, 20)
    by_distance = [scores.softmax(-1).diagonal(-distance, 1, 2).sum(-1) / 20 for distance in range(20)]
    torch.testing.assert_close(weight_by_distance(q[0], k[0], slopes).float(), torch.stack(by_distance, dim=1))


def test_reach_needs_no_data_and_says_what_has_none(train, tmp_path, capsys):
    def fails(*arguments):
        return failure(capsys, main, "reach", *arguments, "--output", tmp_path / "none")

    main(["reach", str(train("--position-method", "fox")), "--output", str(tmp_path / "fox")])
    out = capsys.readouterr().out
    assert "keys in all layers\nwhat it does to logits is not bounded" in out
    assert "position method none has no bias" in fails(train("--position-method", "none"))
    assert "multiplies scores by the logarithm" in fails(train("--score-scale", "ssmax"))
    assert "--epsilon 0.0: pass a number above 0" in fails(train("--position-method", "none"), "--epsilon", 0)
    assert "--logits 0.0: pass a number above 0" in fails(train("--position-method", "none"), "--logits", 0)
    assert "no epsilon proves that" in fails(train("--position-method", "fox"), "--logits", 0.001)
