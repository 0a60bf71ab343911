"""The model `alibi_lm` against a float64 reference model, against `transformer_lm`, and its options."""

import math

import pytest
import torch
from conftest import BIN, run

from fairseq_alibi.positions import POSITION_METHODS


def reference_logits(state, tokens, method, heads):
    """Logits of a pre-norm transformer language model in float64, straight from the paper's formulas.

    `state` is the model's state dict, `tokens` one sequence (L,).
    """
    p = {name.replace("decoder.", ""): value.double() for name, value in state.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("layers."))
    width, length = p["embed_tokens.weight"].size(1), len(tokens)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = p["embed_tokens.weight"][tokens] * math.sqrt(width)
    i = torch.arange(length, dtype=torch.float64)
    if method == "sinusoidal":  # fairseq: sines, then cosines; the first token is at position 2 (padding index + 1)
        frequency = torch.exp(torch.arange(width // 2) * -(math.log(10000) / (width // 2 - 1))).double()
        angle = (i[:, None] + 2) * frequency
        x = x + torch.cat([angle.sin(), angle.cos()], dim=1)
    distance = i[:, None] - i[None, :]
    slopes = [2 ** (-8 * h / heads) for h in range(1, heads + 1)]  # a power of two
    for n in range(layers):
        at = f"layers.{n}"
        h = norm(x, f"{at}.self_attn_layer_norm")
        q, k, v = (linear(h, f"{at}.self_attn.{name}_proj").view(length, heads, -1) for name in "qkv")
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(width // heads)
        if method == "alibi":
            scores = scores - torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, -math.inf)
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(length, width)
        x = x + linear(out, f"{at}.self_attn.out_proj")
        h = norm(x, f"{at}.final_layer_norm")
        x = x + linear(linear(h, f"{at}.fc1").relu(), f"{at}.fc2")
    return norm(x, "layer_norm") @ p["embed_tokens.weight"].T


def random_tokens(model, *shape):
    return torch.randint(4, len(model.decoder.dictionary), shape)


@pytest.fixture(params=POSITION_METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("length", [1, 64, 32 * 64])
def test_logits_equal_a_float64_reference_model(build, method, length):
    model = build("alibi_lm_tiny", "--position-method", method, "--tokens-per-sample", 64)
    tokens = random_tokens(model, 1, length)
    with torch.no_grad():
        logits, _ = model(tokens)
    expected = reference_logits(model.state_dict(), tokens[0], method, heads=8)
    torch.testing.assert_close(logits[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_step_by_step_equals_the_full_pass_past_the_training_length(build, method):
    model = build("alibi_lm_tiny", "--position-method", method, "--tokens-per-sample", 8)
    tokens = random_tokens(model, 3, 24)
    with torch.no_grad():
        expected, _ = model(tokens)
        state = {}
        steps = [model.decoder(tokens[:, : n + 1], incremental_state=state)[0] for n in range(tokens.size(1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [(24,), (13, 1, 1, 1, 8), (1, 22, 1), (2, 2, 20)])
@pytest.mark.parametrize("padded", [0, 5])
def test_a_prefix_is_read_in_one_pass_and_gone_on_from(build, method, pieces, padded):
    """Pieces of any length, the first row padded on the left; the training length is 8."""
    model = build("alibi_lm_tiny", "--position-method", method, "--tokens-per-sample", 8)
    tokens = random_tokens(model, 3, 24)
    tokens[0, :padded] = model.decoder.padding_idx
    passes = []
    model.decoder.layers[0].register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].size(0)))
    with torch.no_grad():
        expected, _ = model(tokens)
        alone, _ = model(tokens[:1, padded:])
        passes.clear()
        state, read = {}, 0
        for piece in pieces:
            read += piece
            logits, _ = model.decoder(tokens[:, :read], incremental_state=state)
            assert logits.shape[:2] == (3, 1)
            torch.testing.assert_close(logits[:, 0], expected[:, read - 1], rtol=1e-5, atol=1e-5)
    assert passes == list(pieces)
    torch.testing.assert_close(logits[:1, 0], alone[:, -1], rtol=1e-5, atol=1e-5)


def test_beam_reordering_keeps_keys_and_bias_together(build):
    model = build("alibi_lm_tiny")
    tokens = random_tokens(model, 3, 9)
    order = torch.tensor([2, 0, 0])
    state = {}
    with torch.no_grad():
        for n in range(8):
            model.decoder(tokens[:, : n + 1], incremental_state=state)
        model.decoder.reorder_incremental_state_scripting(state, order)
        reordered = torch.cat([tokens[order, :8], tokens[:, 8:]], dim=1)
        step, _ = model.decoder(reordered, incremental_state=state)
        expected, _ = model(reordered)
    torch.testing.assert_close(step[:, 0], expected[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["full", "step by step"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(build, method, side, way):
    model = build("alibi_lm_tiny", "--position-method", method)
    alone = [random_tokens(model, 1, n) for n in (11, 7, 1)]
    batch = torch.full((3, 11), model.decoder.padding_idx)
    for row, tokens in zip(batch, alone):
        row[slice(11 - tokens.size(1), None) if side == "left" else slice(tokens.size(1))] = tokens[0]
    with torch.no_grad():
        logits, _ = model(batch)
        if way == "step by step":
            state = {}
            logits = torch.cat([model.decoder(batch[:, : n + 1], incremental_state=state)[0] for n in range(11)], dim=1)
        for row, got, tokens in zip(batch, logits, alone):
            expected, _ = model(tokens)
            torch.testing.assert_close(got[row.ne(model.decoder.padding_idx)], expected[0], rtol=1e-5, atol=1e-5)


def test_no_position_embedding_unless_the_method_adds_one(build, method):
    model = build("alibi_lm_tiny", "--position-method", method)
    names = [name for name in model.state_dict() if "position" in name]
    assert names == (["decoder.embed_positions._float_tensor"] if method == "sinusoidal" else [])
    assert (model.decoder.embed_positions is None) == (method != "sinusoidal")


def test_mask_is_made_once_shared_by_the_batch_and_grown_on_demand(build, monkeypatch):
    model = build("alibi_lm_tiny", "--tokens-per-sample", 512, "--decoder-layers", 4)
    made = []
    position_method = model.decoder.position_method
    model.decoder.attention = "mask"
    original = position_method.future_mask
    monkeypatch.setattr(position_method, "future_mask", lambda *a: made.append(a[0]) or original(*a))
    for length in (5, 3, 9, 9):
        model(random_tokens(model, 6, length))
        assert model.decoder._future_mask.shape == (8, max(made), max(made))
    assert made == [5, 9], "once per new longest sequence, however many layers and rows there are"


def test_same_seed_gives_the_parameters_of_transformer_lm(build, method):
    sizes = ["--decoder-layers", 2, "--decoder-embed-dim", 64, "--decoder-ffn-embed-dim", 128]
    sizes += ["--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20", "--criterion", "adaptive_loss"]
    ours = build("alibi_lm_wiki103", "--position-method", method, *sizes)
    fairseqs = build("transformer_lm_wiki103", *sizes)
    theirs = dict(fairseqs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(theirs)
    for name, parameter in ours.named_parameters():
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
    "attention dropout": ["--attention-dropout", 0.3, "--activation-dropout", 0.1],
    "12 heads": [
        *("--decoder-attention-heads", 12, "--decoder-embed-dim", 96),
        *("--decoder-input-dim", 96, "--decoder-output-dim", 96),
    ],
    "slope range": ["--alibi-max-bias", 16],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_transformer_lm_work(build, option):
    """One forward, one backward, one incremental step, and the same answer with and without the cache."""
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


REFUSED = {
    "--decoder-learned-pos": ["--decoder-learned-pos"],
    "--no-token-positional-embeddings": ["--no-token-positional-embeddings", "--position-method", "sinusoidal"],
    "--decoder-xformers-att-config": ["--decoder-xformers-att-config", "{}"],
    "--base-layers": ["--base-layers", 1],
    "alibi_max_bias": ["--alibi-max-bias", -1],
    "alibi_length_scale must be .* not -2": ["--alibi-length-scale", -2],
    "alibi_length_scale must be .* not long": ["--alibi-length-scale", "long"],
    "--quant-noise-scalar": ["--quant-noise-scalar", 0.5],
    "--adaptive-input-cutoff": ["--adaptive-input"],
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
    plain.decoder.position_method.slopes /= 4
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


def test_length_scale_is_overridden_at_evaluation(corpus, train):
    """The same loss with the number as with auto, another one without."""
    checkpoint = train(updates=3)
    losses = []
    for scale in ("'auto'", 4, 1):
        arguments = [corpus, "--user-dir", "fairseq_alibi", "--path", checkpoint, "--cpu", "--gen-subset", "valid"]
        arguments += ["--tokens-per-sample", 128, "--model-overrides", f"{{'alibi_length_scale': {scale}}}"]
        losses.append(run(BIN / "fairseq-eval-lm", *arguments).output.split("Loss (base 2): ")[1].split()[0])
    assert losses[0] == losses[1] != losses[2]


def test_longest_sequence_is_unlimited_unless_asked_for(build):
    assert build("alibi_lm_tiny", "--tokens-per-sample", 16).max_positions() > 10**9
    assert build("alibi_lm_tiny", "--max-target-positions", 48).max_positions() == 48


def test_autocast_runs_attention_in_its_dtype(build):
    model = build("alibi_lm_tiny")
    tokens = random_tokens(model, 2, 33)
    with torch.no_grad():
        expected, _ = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            half, _ = model(tokens)
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("break_mode", ["none", "complete", "complete_doc", "eos"])
def test_trains_and_evaluates_far_past_its_length_without_overrides(corpus, train, break_mode):
    checkpoint = train("--sample-break-mode", break_mode, updates=3)
    arguments = [corpus, "--user-dir", "fairseq_alibi", "--path", checkpoint, "--cpu", "--max-tokens", 2048]
    arguments += ["--sample-break-mode", break_mode, "--gen-subset", "valid", "--tokens-per-sample", 1024]
    output = run(BIN / "fairseq-eval-lm", *arguments).output
    scored = int(output.split("Evaluated ")[1].split(" tokens")[0].replace(",", ""))
    from fairseq.data.data_utils import load_indexed_dataset

    dataset = load_indexed_dataset(str(corpus / "valid"))
    sizes = dataset.sizes  # a view into memory of the dataset's, which has to live as long
    blank = (sizes == 1).sum() if break_mode == "complete_doc" else 0  # blank lines separate its documents
    assert scored == sizes.sum() - blank
