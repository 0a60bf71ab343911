"""Our layer loops against those of fairseq: with the same weights and random numbers the same outputs and gradients."""

import copy
import threading

import pytest
import torch
from conftest import random_tokens
from fairseq.modules import MultiheadAttention

LANGUAGE_MODEL = ["--decoder-layers", 4, "--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64]
LANGUAGE_MODEL += ["--decoder-attention-heads", 4, "--decoder-input-dim", 32, "--decoder-output-dim", 32]

OPTIONS = {
    "plain": [],
    "pre-norm": ["--decoder-normalize-before"],
    "dropout": ["--dropout", 0.3, "--activation-dropout", 0.2],
    "LayerDrop": ["--decoder-layerdrop", 0.5],
    "activation checkpointing": ["--checkpoint-activations", "--dropout", 0.3],
    "activations offloaded": ["--checkpoint-activations", "--offload-activations"],
    # Every block is dropped, so that the order in which the projections draw random numbers does not matter.
    "quantization noise": ["--quant-noise-pq", 0.9999999, "--quant-noise-pq-block-size", 8],
    "NormFormer": ["--scale-attn", "--scale-fc", "--scale-heads", "--scale-resids"],
    "embedding norm": ["--layernorm-embedding"],
}


def outputs_and_gradients(model, run):
    """What a pass in training mode returns, with seeded random numbers, and the gradients of all parameters."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    outputs = run(model)
    sum(x.float().square().mean() for x in outputs).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_pass(ours, theirs, run):
    """The same weights give the same outputs and gradients."""
    for module in theirs.modules():
        if isinstance(module, MultiheadAttention):  # its fused path would skip the quantization noise of projections
            module.skip_embed_dim_check = True
    for parameter in theirs.parameters():  # or a factor of 1 would be no test
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {name: value for name, value in theirs.state_dict().items() if "_float_tensor" not in name}
    ours.load_state_dict(weights, strict=False)
    found, expected = (outputs_and_gradients(model, run) for model in (ours, theirs))
    assert len(found[0]) == len(expected[0])
    for ours_x, theirs_x in zip(found[0], expected[0]):
        torch.testing.assert_close(ours_x, theirs_x, rtol=1e-4, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("option", "padded"), [*((option, False) for option in OPTIONS), ("plain", True)])
def test_decoder_loop_is_that_of_fairseq(build, option, padded):
    sizes = [*LANGUAGE_MODEL, *OPTIONS[option]]
    ours = build("alibi_lm", *sizes, "--position-method", "none", "--attention", "mask")
    theirs = build("transformer_lm", *sizes, "--no-token-positional-embeddings")
    tokens = random_tokens(ours, 3, 11)
    if padded:
        tokens[1, 7:] = ours.decoder.padding_idx
    real = tokens != ours.decoder.padding_idx

    def run(model):
        x, extra = model.decoder.extract_features(tokens, None)
        return [x[real], *(state.transpose(0, 1)[real] for state in extra["inner_states"])]

    assert_same_pass(ours, theirs, run)


SIDES = [f"--{side}-{size}" for side in ("encoder", "decoder") for size in ("layers=3", "embed-dim=32")]
SIDES += ["--encoder-ffn-embed-dim=64", "--decoder-ffn-embed-dim=64"]
SIDES += ["--encoder-attention-heads=4", "--decoder-attention-heads=4"]

BOTH = {
    "plain": [],
    "pre-norm": ["--encoder-normalize-before", "--decoder-normalize-before"],
    "LayerDrop": ["--encoder-layerdrop=0.5", "--decoder-layerdrop=0.5"],
    "activation checkpointing": ["--checkpoint-activations", "--dropout=0.3"],
    "quantization noise": ["--quant-noise-pq=0.9999999"],
}


@pytest.fixture(scope="module")
def build_translation():
    """Builds a model from its options, without data: a dictionary of 16 types on both sides."""
    from argparse import SUPPRESS, ArgumentParser, Namespace

    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    dictionary = Dictionary()
    for number in range(12):
        dictionary.add_symbol(f"type{number}")
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary, cfg=Namespace())

    def build_model(arch, *arguments):
        parser = ArgumentParser(argument_default=SUPPRESS)
        ARCH_MODEL_REGISTRY[arch].add_args(parser)
        args = parser.parse_args(list(arguments))
        ARCH_CONFIG_REGISTRY[arch](args)
        torch.manual_seed(1)
        return ARCH_MODEL_REGISTRY[arch].build_model(args, task)

    return build_model


@pytest.mark.parametrize("option", BOTH)
@pytest.mark.parametrize("alignment", [None, (1, 2)])
def test_encoder_and_decoder_loops_are_those_of_fairseq(build_translation, option, alignment):
    """Inner states of both, and the attention to the source of a layer and of its first heads."""
    ours = build_translation("alibi_transformer", *SIDES, *BOTH[option], "--position-method=none", "--attention=mask")
    theirs = build_translation("transformer", *SIDES, *BOTH[option], "--no-token-positional-embeddings")
    source, target = torch.randint(4, 12, (2, 9)), torch.randint(4, 12, (2, 7))
    source[0, 6:] = ours.encoder.padding_idx
    layer, heads = alignment or (None, None)

    def run(model):
        encoded = model.encoder(source, return_all_hiddens=True)
        x, extra = model.decoder.extract_features(target, encoded, alignment_layer=layer, alignment_heads=heads)
        attention = [a for a in extra["attn"] if a is not None]
        return [x, *attention, *extra["inner_states"], *encoded["encoder_states"], *encoded["encoder_out"]]

    assert_same_pass(ours, theirs, run)


@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_a_decoder_runs_in_two_threads_at_once(build, method, attention):
    """With different lengths, against models that each ran alone."""
    model = build("alibi_lm_tiny", "--position-method", method, "--attention", attention, "--decoder-layers", 1)
    texts = [random_tokens(model, 1, length) for length in (19, 273)]
    expected = [copy.deepcopy(model) for _ in texts]
    expected = [alone(tokens)[0].detach() for alone, tokens in zip(expected, texts)]
    results = [[], []]

    def work(number):
        with torch.no_grad():
            results[number].extend(model(texts[number])[0] for _ in range(4))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, wanted in zip(results, expected):
        assert len(found) == 4
        for logits in found:
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "mask", "fused"])
def test_a_decoder_runs_inside_its_own_forward_hook(build, attention):
    """A hook of a layer starts another pass, of another length and with a cache, before the first one ends."""
    model = build("alibi_lm_tiny", "--attention", attention)
    tokens, other = random_tokens(model, 1, 40), random_tokens(model, 3, 300)
    with torch.no_grad():
        expected, expected_inner = model(tokens)[0], model(other)[0][:, -1:]
        inner = []

        def hook(*_):
            handle.remove()
            inner.append(model.decoder(other, incremental_state={})[0])

        handle = model.decoder.layers[0].register_forward_hook(hook)
        torch.testing.assert_close(model(tokens)[0], expected)
    torch.testing.assert_close(inner[0], expected_inner, rtol=1e-4, atol=1e-5)


def test_an_encoder_runs_inside_its_own_forward_hook(build):
    model = build("alibi_masked_lm_tiny", task="masked_lm")
    stack = model.encoder.sentence_encoder
    tokens, other = torch.randint(4, 40, (2, 20)), torch.randint(4, 40, (1, 300))
    with torch.no_grad():
        expected, expected_inner = (stack(x)["encoder_out"][0] for x in (tokens, other))
        inner = []

        def hook(*_):
            handle.remove()
            inner.append(stack(other)["encoder_out"][0])

        handle = stack.layers[0].register_forward_hook(hook)
        torch.testing.assert_close(stack(tokens)["encoder_out"][0], expected)
    torch.testing.assert_close(inner[0], expected_inner)


def test_a_pass_leaves_nothing_in_the_modules(build):
    """After a pass with a cache, a window and padding every module has the attributes that it had before."""
    model = build("alibi_lm_tiny", "--attention", "fused")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    values = {name: {k: id(v) for k, v in vars(module).items()} for name, module in model.named_modules()}
    with torch.no_grad():
        model.decoder.extract_features(random_tokens(model, 2, 30), None)
        model.decoder.extract_features_scriptable(random_tokens(model, 2, 30), None, {}, last=30, window=7)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert {name: {k: id(v) for k, v in vars(module).items()} for name, module in model.named_modules()} == values
