"""The model `alibi_lm` against a float64 reference model, against `transformer_lm`, and its options."""

import logging
import re

import pytest
import reference
import torch
from conftest import BIN, fairseqs_own, random_tokens, run

from fairseq_alibi.core import positions
from fairseq_alibi.core.attention_inputs import AttentionInputs, FoldedMask, LinearBias, TokenSpan
from fairseq_alibi.models.language_model import refresh_config


@pytest.mark.parametrize("length", [1, 64, 12 * 64])
def test_logits_equal_a_float64_reference_model(build, method, length):
    expected = None
    for attention in ("mask", "fused", "auto"):
        arguments = ["--position-method", method, "--attention", attention, "--tokens-per-sample", 64]
        model = build("alibi_lm_tiny", *arguments)  # the same parameters each time
        torch.manual_seed(1)
        tokens = random_tokens(model, 1, length)
        with torch.no_grad():
            logits, _ = model(tokens)
        if expected is None:
            expected = reference.logits(model, tokens[0])
        torch.testing.assert_close(logits[0].double(), expected, rtol=1e-4, atol=1e-4, msg=attention)


def test_12_heads_equal_a_float64_reference_model(build):
    model = build("alibi_lm_tiny", *OPTIONS["12 heads"])
    tokens = random_tokens(model, 1, 500)
    with torch.no_grad():
        logits, _ = model(tokens)
    torch.testing.assert_close(logits[0].double(), reference.logits(model, tokens[0]), rtol=1e-4, atol=1e-4)


def test_fire_makes_no_mask_and_needs_none_up_to_its_limit(build):
    """Up to |m| L0 its bias goes by distance, past it tile by tile; windows are refused by name."""
    model = build("alibi_lm_tiny", "--position-method", "fire", "--tokens-per-sample", 500)
    method, kinds = model.decoder.position_method, []
    with torch.no_grad():
        method.m.fill_(-1.0)
    for length in (400, 501, 502):
        x = torch.randn(1, length, 128)
        kinds.append(type(model.decoder.setup.inputs(x, TokenSpan(length, length, 0)).bias).__name__)
    assert kinds == ["DistanceBias", "DistanceBias", "PairBias"]
    with pytest.raises(ValueError, match="--position-method fire has no windows"):
        model.decoder.extract_features_scriptable(random_tokens(model, 1, 9), None, window=4)


CHOICES = {
    "ssmax": ["--score-scale", "ssmax", "--position-method", "alibi"],
    "log_n": ["--score-scale", "log_n", "--position-method", "rotary"],
    "iRoPE": ["--score-scale", "log_n", "--position-method", "rotary", "--position-layers", "10"],
    "some layers of ALiBi": ["--position-layers", "011", "--decoder-layers", 4],
    "some layers of FoX": ["--position-layers", "01", "--position-method", "fox", "--score-scale", "ssmax"],
}


@pytest.mark.parametrize("attention", ["mask", "auto"])
@pytest.mark.parametrize("choice", CHOICES)
def test_scales_and_layers_equal_the_reference_at_once_and_in_steps(build, choice, attention):
    model = build("alibi_lm_tiny", *CHOICES[choice], "--tokens-per-sample", 64, "--attention", attention)
    tokens, pad = random_tokens(model, 1, 400), model.decoder.padding_idx
    expected, state = reference.logits(model, tokens[0]), {}
    with torch.no_grad():
        steps = [model.decoder(tokens[:, :n], incremental_state=state)[0][0, -1] for n in (398, 399, 400)]
        torch.testing.assert_close(torch.stack(steps).double(), expected[-3:], rtol=1e-4, atol=1e-4)
        padded = torch.cat([tokens.new_full((1, 30), pad), tokens], dim=1)
        torch.testing.assert_close(model(padded)[0][0, 30:].double(), expected, rtol=1e-4, atol=1e-4)
    for options in ([], ["--checkpoint-activations"]):
        model = build("alibi_lm_tiny", *CHOICES[choice], *options, "--tokens-per-sample", 64, "--attention", attention)
        model.train()(tokens)[0].logsumexp(-1).sum().backward()
        scales = {name: p.grad for name, p in model.named_parameters() if "score_scale" in name or "gate" in name}
        assert bool(scales) == ("ssmax" in CHOICES[choice])
        assert all(grad.abs().sum() > 0 for grad in scales.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--position-layers", "12"], "position_layers must be ones and zeros, for example 1110, not '12'"),
        (["--position-layers", "10", "--position-method", "sinusoidal"], "sinusoidal adds an embedding"),
        (["--score-scale", "ssmax", "--tokens-per-sample", 1], "score_scale ssmax needs more than 1 tokens"),
    ],
)
def test_impossible_scales_and_layers_are_refused_by_name(build, options, message):
    with pytest.raises(ValueError, match=message):
        build("alibi_lm_tiny", *options)


def test_pruned_layers_keep_their_positions(build):
    model = build(
        "alibi_lm_tiny", "--decoder-layers", 4, "--position-layers", "10", "--decoder-layers-to-keep", "3,0,1"
    )
    assert [layer.self_attn.has_positions for layer in model.decoder.layers] == [True, False, False]


def test_gradients_are_the_same_with_and_without_a_mask(build, method, monkeypatch):
    gradients = []
    for options in (["mask"], ["fused"], ["fused", "--checkpoint-activations"]):
        monkeypatch.setattr("fairseq_alibi.core.attention.TRIALS", {})  # a kernel's trial is in the first pass
        model = build("alibi_lm_tiny", "--position-method", method, "--attention", *options)
        torch.manual_seed(1)
        tokens = random_tokens(model, 2, 600)
        tokens[1, :50] = model.decoder.padding_idx
        model(tokens)[0][tokens != model.decoder.padding_idx].logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        for others in gradients[1:]:
            # Strong decays make large scores, which float32 rounds differently forward and backward.
            by_key = positions.position_methods()[method].bias_kind == "key"
            absolute = max(1e-4, 3e-4 * float(expected.abs().max())) if by_key else 1e-4
            torch.testing.assert_close(others[name], expected, rtol=1e-4, atol=absolute, msg=name)


@pytest.fixture
def squares():
    """A method whose bias is given by pairs of query and key, and so needs a mask; gone after the test."""
    registered = {stack: dict(methods) for stack, methods in positions._METHODS.items()}

    @positions.register_position_method("squares")
    class Squares(positions.PositionMethod):
        bias_kind = "pair"

        def pair_bias(self, query_length, key_length, device=None):
            return -0.01 * positions.distances(query_length, key_length, device)[None].float() ** 2

    yield "squares"
    positions._METHODS.update(registered)
    refresh_config()


def test_a_bias_that_needs_a_mask_gets_one_with_a_warning_or_is_refused(build, squares, caplog):
    with caplog.at_level(logging.WARNING, "fairseq_alibi.models.language_model"):
        model = build("alibi_lm_tiny", "--position-method", squares)
    assert [record.message.split(":")[0] for record in caplog.records] == ["--position-method squares needs a mask"]
    assert model(random_tokens(model, 1, 500))[0].isfinite().all()
    assert kept_mask(model).shape == (1, 500, 500)
    with pytest.raises(ValueError, match=r"--attention fused.*needs a mask"):
        build("alibi_lm_tiny", "--position-method", squares, "--attention", "fused")


def kept_mask(model):
    """The mask that the decoder keeps for later passes."""
    return model.decoder.setup.kept_mask.get(torch.device("cpu"))


def with_mask(model):
    """The model, whose attention runs under a mask from now on."""
    model.decoder.setup.use_kernel("mask")
    return model


def test_attention_weights_are_there_with_a_mask_only(build):
    model = build("alibi_lm_tiny")
    x, method = torch.randn(9, 2, 128), model.decoder.position_method
    layer = model.decoder.layers[0].self_attn
    weights = layer(x, AttentionInputs(bias=FoldedMask(method.future_mask(9, 9))), need_weights=True)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8, 9))
    with pytest.raises(ValueError, match="--attention mask"):
        layer(x, AttentionInputs(bias=LinearBias(*method.slopes())), need_weights=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("attention", ["mask", "fused"])
def test_a_compiled_model_gives_the_same_numbers(build, attention):
    model = build("alibi_lm_tiny", "--attention", attention, "--decoder-layers", 1)
    compiled = torch.compile(model)
    for length in (40, 300) if attention == "fused" else (300,):
        tokens = random_tokens(model, 1, length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-4)


def test_no_position_embedding_unless_the_method_adds_one(build, method):
    model = build("alibi_lm_tiny", "--position-method", method)
    added = {"learned": ["weight"]}.get(method, [])
    names = [name for name in model.state_dict() if "embed_positions" in name]
    assert names == [f"decoder.embed_positions.{name}" for name in added]
    assert (model.decoder.embed_positions is None) == (method not in ("learned", "sinusoidal"))


def test_learned_positions_end_with_their_table(build):
    model = build("alibi_lm_tiny", "--position-method", "learned", "--max-target-positions", 8)
    assert model.max_positions() == 8
    assert model.decoder.embed_positions.weight.shape == (10, 128), "fairseq's positions start at 2"
    model(random_tokens(model, 1, 8))


def test_bias_on_some_heads_leaves_the_others_without(build):
    """A model with one biased head of eight differs from those with all and with none; a mask gives the same."""
    models = [build("alibi_lm_tiny", "--alibi-heads", heads) for heads in (1, 8)]
    models.append(build("alibi_lm_tiny", "--position-method", "none"))
    assert models[0].decoder.position_method.slopes()[0].tolist() == [2**-8, *[0] * 7]
    tokens = random_tokens(models[0], 1, 600)
    some, every, no = (model(tokens)[0] for model in models)
    assert not torch.allclose(some, every, atol=1e-4)
    assert not torch.allclose(some, no, atol=1e-4)
    torch.testing.assert_close(with_mask(models[0])(tokens)[0], some, rtol=1e-4, atol=1e-4)


def test_mask_is_made_once_shared_by_the_batch_and_grown_on_demand(build):
    model = with_mask(build("alibi_lm_tiny", "--tokens-per-sample", 512, "--decoder-layers", 4))
    kept = []
    for length in (5, 3, 9, 9):
        model(random_tokens(model, 6, length))
        kept.append(kept_mask(model))
    assert [mask.shape for mask in kept] == [(8, 5, 5), (8, 5, 5), (8, 9, 9), (8, 9, 9)]
    assert kept[0] is kept[1], "a shorter sequence takes the mask that is there"
    assert kept[2] is kept[3]


def test_same_seed_gives_the_parameters_of_transformer_lm(build, method):
    sizes = ["--decoder-layers", 2, "--decoder-embed-dim", 64, "--decoder-ffn-embed-dim", 128]
    sizes += ["--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20", "--criterion", "adaptive_loss"]
    ours = build("alibi_lm_wiki103", "--position-method", method, *sizes)
    fairseqs = build("transformer_lm_wiki103", *sizes)
    theirs = dict(fairseqs.named_parameters())
    of_the_method = {name for name, _ in ours.named_parameters() if re.search("position_method|embed_pos|gate", name)}
    assert bool(of_the_method) == (method in ("t5", "learned", "kerple", "kerple_power", "fire", "fox", "cable"))
    assert {name for name, _ in ours.named_parameters()} == set(theirs) | of_the_method
    for name, parameter in ((name, parameter) for name, parameter in ours.named_parameters() if name in theirs):
        assert torch.equal(parameter, theirs[name]), name
    if method == "sinusoidal":
        tokens = random_tokens(ours, 2, 50)
        torch.testing.assert_close(ours(tokens)[0], fairseqs(tokens)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["wiki103", "big", "gpt"])
def test_architectures_have_every_value_of_fairseqs(size):
    from argparse import Namespace

    from fairseq.models import ARCH_CONFIG_REGISTRY

    ours, theirs = Namespace(), Namespace()
    ARCH_CONFIG_REGISTRY[f"alibi_lm_{size}"](ours)
    ARCH_CONFIG_REGISTRY[f"transformer_lm_{size}"](theirs)
    assert ours == theirs


ADAPTIVE = ["--adaptive-input", "--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20"]

OPTIONS = {
    "activation checkpointing": ["--checkpoint-activations"],
    "activations offloaded": ["--checkpoint-activations", "--offload-activations"],
    "LayerDrop": ["--decoder-layerdrop", 0.5],
    "layers to keep": ["--decoder-layers-to-keep", "0,1"],
    "quantization noise": ["--quant-noise-pq", 0.5, "--quant-noise-pq-block-size", 8],
    "NormFormer": ["--scale-attn", "--scale-fc", "--scale-heads", "--scale-resids"],
    "untied": ["--decoder-output-dim", 64],
    "input projection": ["--decoder-input-dim", 64, "--decoder-output-dim", 64],
    "embedding norm": ["--layernorm-embedding", "--no-scale-embedding"],
    "character embeddings": ["--character-embeddings", "--character-filters", "[(1, 8), (2, 8)]"],
    "adaptive": ADAPTIVE,
    "adaptive, tied": [*ADAPTIVE, "--tie-adaptive-weights", "--tie-adaptive-proj"],
    "adaptive softmax beside shared embeddings": ["--adaptive-softmax-cutoff", "10,20"],
    "attention dropout": ["--attention-dropout", 0.3, "--activation-dropout", 0.1],
    "12 heads": [
        *("--decoder-attention-heads", 12, "--decoder-embed-dim", 96),
        *("--decoder-input-dim", 96, "--decoder-output-dim", 96),
    ],
    "slope range": ["--alibi-max-bias", 16],
    "attention without a mask": ["--attention", "fused"],
    "fused, activation checkpointing": ["--attention", "fused", "--checkpoint-activations"],
    "fused, attention dropout": ["--attention", "fused", "--attention-dropout", 0.3],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_transformer_lm_work(build, option):
    """One forward, one backward, the same answer with and without the cache, and weights that can be read again."""
    arguments = OPTIONS[option]
    arch = "alibi_lm_tiny"
    if {"untied", "input projection", "character embeddings", "adaptive", "adaptive, tied"} & {option}:
        arch, arguments = "alibi_lm", ["--decoder-layers", 2, "--decoder-embed-dim", 64, *arguments]
        arguments += [] if "--decoder-input-dim" in arguments else ["--decoder-input-dim", 64]
        arguments += [] if "--decoder-output-dim" in arguments else ["--decoder-output-dim", 64]
    model = build(arch, *arguments).train()
    tokens = random_tokens(model, 2, 10)
    model(tokens)[0].square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.layers.parameters())
    model.eval()
    with torch.no_grad():
        expected, _ = model(tokens)
        state = {}
        steps = [model.decoder(tokens[:, : n + 1], incremental_state=state)[0] for n in range(tokens.size(1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-5, atol=1e-5)
    model.load_state_dict(model.state_dict(), model_cfg=model.built_from.model)


REFUSED = {
    "--decoder-learned-pos": ["--decoder-learned-pos"],
    "--no-token-positional-embeddings": ["--no-token-positional-embeddings", "--position-method", "sinusoidal"],
    "--decoder-xformers-att-config": ["--decoder-xformers-att-config", "{}"],
    "--base-layers": ["--base-layers", 1],
    "alibi_max_bias": ["--alibi-max-bias", -1],
    "alibi_length_scale must be .* not -2": ["--alibi-length-scale", -2],
    "alibi_length_scale must be .* not long": ["--alibi-length-scale", "long"],
    "--attention-epsilon": ["--attention-epsilon", 1.5],
    "--quant-noise-scalar": ["--quant-noise-scalar", 0.5],
    "--adaptive-input has several": ["--adaptive-input"],
    "adaptive_input_factor": [*ADAPTIVE, "--adaptive-input-factor", 2, "--tie-adaptive-weights"],
    "--tie-adaptive-weights": ["--tie-adaptive-weights"],
}


@pytest.mark.parametrize("named", REFUSED)
def test_contradicting_options_are_refused_with_a_reason(build, named):
    if named == "--quant-noise-scalar" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=named):
        build("alibi_lm_tiny", *REFUSED[named])


def test_slope_range_changes_the_model(build):
    tokens = torch.arange(4, 30)[None]
    paper, wide = (build("alibi_lm_tiny", "--alibi-max-bias", bias) for bias in (8, 16))
    assert not torch.allclose(paper(tokens)[0], wide(tokens)[0], atol=1e-3)


def test_length_scale_divides_the_slopes(build):
    tokens = torch.arange(4, 30)[None]
    plain, stretched = (build("alibi_lm_tiny", "--alibi-length-scale", scale) for scale in (1, 4))
    plain.decoder.position_method.fixed.scale = 4
    torch.testing.assert_close(stretched(tokens)[0], plain(tokens)[0])


@pytest.mark.parametrize(("stride", "length", "scale"), [(64, 64, 2), (16, 64, 2), (32, 32, 1), (8, 8, 1)])
def test_automatic_length_scale_is_evaluation_over_training_length(corpus, build, stride, length, scale):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    model = build("alibi_lm_tiny", "--alibi-length-scale", "auto", "--tokens-per-sample", 32)
    tokens = random_tokens(model, 1, 20)
    expected = build("alibi_lm_tiny", "--alibi-length-scale", scale)(tokens)[0]
    torch.testing.assert_close(model(tokens)[0], build("alibi_lm_tiny")(tokens)[0])  # as trained until told otherwise
    arguments = [
        str(corpus),
        "--path",
        "x",
        "--tokens-per-sample",
        str(stride),
        "--context-window",
        str(length - stride),
    ]
    model.prepare_for_inference_(
        convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_eval_lm_parser(), arguments))
    )
    torch.testing.assert_close(model(tokens)[0], expected)


def test_checkpoints_older_than_an_option_load(corpus, train, tmp_path):
    state = torch.load(train(updates=1))
    for name in ("position_method", "alibi_max_bias", "alibi_length_scale", "attention", "attention_epsilon"):
        del state["cfg"]["model"][name]
    torch.save(state, tmp_path / "old.pt")
    arguments = [corpus, "--user-dir", "fairseq_alibi", "--path", tmp_path / "old.pt", "--cpu", "--gen-subset", "valid"]
    output = run(BIN / "fairseq-eval-lm", *arguments, "--tokens-per-sample", 64).output
    assert "Perplexity" in output
    assert "Warning" not in output, "a calm console"


OVERRIDES = {
    "alibi": [{"alibi_length_scale": scale} for scale in ("auto", 4, 1)],
    "rotary": [{"rotary_scaling": "yarn"}, {"rotary_scaling": "yarn", "rotary_scaling_factor": 4}, {}],
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_length_scale_is_overridden_at_evaluation(corpus, train, name):
    """The same loss with the number as with auto, another one without."""
    checkpoint = train("--position-method", name, updates=3)
    losses = []
    for overrides in map(str, OVERRIDES[name]):
        loss, _ = fairseqs_own(corpus, checkpoint, "--tokens-per-sample", 128, "--model-overrides", overrides)
        losses.append(loss)
    assert losses[0] == losses[1] != losses[2]


def test_longest_sequence_is_unlimited_unless_asked_for(build):
    assert build("alibi_lm_tiny", "--tokens-per-sample", 16).max_positions() > 10**9
    assert build("alibi_lm_tiny", "--max-target-positions", 48).max_positions() == 48
