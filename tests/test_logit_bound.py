"""What skipped keys change in logits: no input exceeds the bound of a part, some input comes near it."""

import json
import math

import pytest
import torch
from conftest import failure
from test_receptive_field import a_stack

from fairseq_alibi.__main__ import main
from fairseq_alibi.core import ALiBi, LayerOptions, Transformer, bounded_cache
from fairseq_alibi.core.bounded_cache import BoundedCache
from fairseq_alibi.core.layers import Cache
from fairseq_alibi.core.logit_bound import after_norm, attention_change, feed_forward_change, stack_change
from fairseq_alibi.core.receptive_field import stack_excess
from fairseq_alibi.evaluation.reach_measurement import logits_change, measured_deviations


def ascend(size, *shapes, rounds=150):
    """The largest `size` of tensors of these shapes that gradient ascent finds from random ones."""
    torch.manual_seed(2)
    given = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    optimizer = torch.optim.Adam(given, lr=0.05)
    for _ in range(rounds):
        found = size(*given)
        optimizer.zero_grad()
        (-found.log().sum()).backward()
        optimizer.step()
    return float(found.detach().max())


def in_ball(x, radius):
    """Vectors of the sum 0 and of this length."""
    return torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1) * radius


@pytest.mark.parametrize(("changing", "dropped"), [("all", 0.0), ("all", 0.1), ("keys", 0.0), ("values", 0.0)])
def test_attention_changes_by_no_more_than_the_bound_and_comes_near_it(changing, dropped):
    """One head; what it reads changes by Z in the ball of the norm, and the first key is left out.

    Without weights of the query only its bias makes scores, of keys that change; without that bias only values change.
    """
    torch.manual_seed(0)
    layer = Transformer(1, 16, 1, options=LayerOptions()).double().layers[0]
    attention, norm, change = layer.self_attn, layer.self_attn_layer_norm, 0.02
    for parameter in (norm.weight, norm.bias, attention.q_proj.bias, attention.v_proj.bias):
        torch.nn.init.normal_(parameter, std=0.7)
    if changing != "all":
        attention.q_proj.weight.data.zero_()
        attention.q_proj.bias.data *= 20 * (changing == "keys")
    bound = attention_change(attention, norm, change, dropped)

    def output(z, bias, seen):
        x = z * norm.weight + norm.bias
        q, k, v = attention.q_proj(x[:, -1:]), attention.k_proj(x), attention.v_proj(x)
        weights = (q @ k.mT / 4 + bias[:, None]).masked_fill(~seen, -math.inf).softmax(-1)
        return attention.out_proj(weights @ v)[:, 0], weights

    def difference(z, step, bias):  # the bias makes weights of any kind
        z = in_ball(z, 4 - change)
        other, everything = z + in_ball(step, change), torch.ones(5, dtype=torch.bool)
        exact, _ = output(z, bias, everything)
        _, weights = output(other, bias, everything)
        far = torch.log(dropped / (1 - dropped) * (1 / weights[:, 0, 0] - 1)) if dropped else 0 * bias[:, 0]
        shifted = torch.cat([bias[:, :1] + far[:, None], bias[:, 1:]], dim=1)  # the first key has what may be dropped
        exact, seen = output(z, shifted, everything)[0], everything.clone()
        seen[0] = not dropped
        return torch.linalg.vector_norm(exact - output(other, shifted, seen)[0], dim=-1)

    found = ascend(difference, (10, 5, 16), (10, 5, 16), (10, 5))
    assert 0.4 * bound < found < bound


def test_norms_and_feed_forward_parts_come_near_their_bounds():
    for activation in ("relu", "gelu"):
        layer = a_stack(activation=activation).layers[0]
        norm = layer.final_layer_norm

        def difference(z, step, layer=layer, norm=norm):
            parts = [layer.feed_forward(x * norm.weight + norm.bias) for x in (z, z + in_ball(step, 0.01))]
            return torch.linalg.vector_norm(parts[1] - parts[0], dim=-1)

        found, bound = ascend(difference, (10, 32), (10, 32)), feed_forward_change(layer, norm, 0.01)
        assert 0.25 * bound < found < bound
    norm = torch.nn.LayerNorm(32, elementwise_affine=False).double()
    for deviation, least in ((1e-9, 0.0), (0.5, 0.5 + 2 * 1e-6 / math.sqrt(32))):
        x, step = in_ball(torch.randn(1000, 32).double(), deviation * math.sqrt(32)), torch.randn(1000, 32).double()
        moved = (norm(x + in_ball(step, 1e-6)) - norm(x)).norm(dim=-1).max()
        bound = after_norm(norm, 1e-6, {norm: least})
        assert 0.9 * bound < moved < bound
    assert feed_forward_change(a_stack(activation="silu").layers[0], norm, 0.01) == math.inf


@pytest.mark.parametrize("feed_forward", [30, 0.01])
@pytest.mark.parametrize("normalize_before", [True, False])
def test_a_change_grows_through_a_stack_as_the_bound_says(normalize_before, feed_forward):
    """Of one token: a change of what the first attention writes, and the largest singular value of what follows."""
    stack, x = a_stack(normalize_before), torch.randn(1, 1, 32, dtype=torch.float64)
    for layer in stack.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):  # scores play no part in one token
            projection.weight.data.zero_()
        for weight in (layer.self_attn.v_proj.weight, layer.self_attn.out_proj.weight):
            weight.data *= 3
        layer.fc2.weight.data *= feed_forward
    norms = [module for module in stack.modules() if isinstance(module, torch.nn.LayerNorm)]
    last, written = stack.layer_norm if normalize_before else norms[-1], torch.zeros(32, dtype=torch.float64)

    def output(added):
        handle = stack.layers[0].self_attn.register_forward_hook(lambda module, x, out: out + added)
        y = stack(x)
        handle.remove()
        return (y - last.bias) / last.weight

    with measured_deviations(stack) as read:
        jacobian = torch.autograd.functional.jacobian(output, written)[0, 0]
    vectors, tiny = x[0], 1e-12
    first = norms[0] if normalize_before else None
    change = attention_change(stack.layers[0].self_attn, first, 0.0, tiny, torch.cat([vectors, -vectors]))
    bound = stack_change(stack.layers, stack.layer_norm, tiny, torch.cat([vectors, -vectors]), read)
    found = torch.linalg.matrix_norm(jacobian, 2) * change
    assert 0.005 * bound < found < bound


@pytest.mark.parametrize("normalize_before", [True, False])
@pytest.mark.parametrize("epsilon", [0.1, 1e-9])
@torch.no_grad()
def test_a_stack_that_drops_keys_stays_within_the_bound_of_the_text(normalize_before, epsilon, monkeypatch):
    monkeypatch.setattr(bounded_cache, "SHORT", 20)
    torch.manual_seed(1)
    options = LayerOptions(normalize_before=normalize_before)
    stack = Transformer(2, 48, 6, position_method=ALiBi(6, 1.0), options=options).double().eval()
    types = torch.randn(40, 48).double()
    text, outputs = types[torch.randint(40, (1, 120))], []
    with measured_deviations(stack) as least:
        for cache in (Cache(), BoundedCache(lambda: stack_excess(stack.layers, types), epsilon)):
            outputs.append(torch.cat([stack(text[:, [i]], cache=cache) for i in range(120)], dim=1))
    last = stack.layer_norm if normalize_before else stack.layers[-1].final_layer_norm
    difference = ((outputs[0] - outputs[1]) / last.weight).norm(dim=-1).max()
    bound = stack_change(stack.layers, stack.layer_norm, epsilon, types, least)
    assert 0 < difference <= bound <= stack_change(stack.layers, stack.layer_norm, epsilon, types)


@pytest.mark.parametrize("arguments", [(), ("--adaptive-softmax-cutoff", "10,20", "--decoder-output-dim", "16")])
@torch.no_grad()
def test_logits_follow_from_what_the_output_layer_reads(build, arguments, monkeypatch):
    decoder = build(
        "alibi_lm_tiny", "--criterion", "adaptive_loss" if arguments else "cross_entropy", *arguments
    ).decoder
    torch.nn.init.normal_(decoder.layer_norm.weight)
    monkeypatch.setattr("fairseq_alibi.evaluation.reach_measurement.stack_change", lambda *_: 0.01)
    bound, z = logits_change(decoder, 1e-7), in_ball(torch.randn(2000, 1, decoder.layers[0].embed_dim), 3.0)

    def logits(z):
        x = decoder.layer_norm.weight * z
        x = x if decoder.project_out_dim is None else decoder.project_out_dim(x)
        scored = (decoder.output_layer(x), None)
        return decoder.get_normalized_probs(scored, True, None) if arguments else scored[0]

    found = (logits(z + in_ball(torch.randn_like(z), 0.01)) - logits(z)).abs().max()
    assert 0.1 * bound < found < bound


def test_reach_takes_the_epsilon_that_a_tolerance_needs(corpus, checkpoint, tmp_path, capsys):
    main(["reach", str(checkpoint), "--data", str(corpus), "--tokens", "300", "--output", str(tmp_path)])
    default = json.loads((tmp_path / "reach.json").read_text())
    main(["reach", str(checkpoint), "--logits", "0.001", "--output", str(tmp_path / "proven")])
    proven = json.loads((tmp_path / "proven" / "reach.json").read_text())
    assert "logits change by at most 0.001 in any text\n" in capsys.readouterr().out
    assert default["logits_in_text"] < default["logits"]
    assert 0.00099 < proven["logits"] <= 0.001
    assert proven["epsilon"] < default["epsilon"]
    assert all(new["reach"] > old["reach"] for new, old in zip(proven["heads"], default["heads"]))
    assert "not allowed with" in failure(capsys, main, "reach", checkpoint, "--logits", 1, "--epsilon", 1)
