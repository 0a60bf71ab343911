"""Losses of scored tokens alone, by windows and streaming, against the model that computes everything in float64."""

import copy
import math

import pytest
import reference
import torch
from conftest import random_tokens

from fairseq_alibi.core import adaptive, bounded_cache
from fairseq_alibi.evaluation import scoring
from fairseq_alibi.models.decoder import PROGRESS

SIZES = (
    "--decoder-layers",
    2,
    "--decoder-embed-dim",
    32,
    "--decoder-attention-heads",
    4,
    "--decoder-ffn-embed-dim",
    64,
)
#: Options of a model of its output layer; of `alibi_lm`, which is untied unless told otherwise.
OUTPUTS = {
    "untied": (),
    "tied": ("--share-decoder-input-output-embed",),
    "adaptive": ("--adaptive-softmax-cutoff", "10,20"),
    "tied adaptive": (
        *("--adaptive-input", "--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20"),
        *(
            "--adaptive-input-factor",
            4,
            "--adaptive-softmax-factor",
            4,
            "--tie-adaptive-weights",
            "--tie-adaptive-proj",
        ),
    ),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
def test_output_losses_equal_the_log_probabilities_of_all_types(build, output, at_once, monkeypatch):
    monkeypatch.setattr(adaptive, "SCORES", at_once)
    model = build("alibi_lm", *OUTPUTS[output], *SIZES, "--decoder-input-dim", 32, "--decoder-output-dim", 32)
    targets = torch.arange(len(model.decoder.dictionary))
    features = torch.randn(1, len(targets), model.decoder.output_embed_dim)
    losses = scoring.output_losses(model.decoder, features[0], targets)
    exact = copy.deepcopy(model).double()
    logits = exact.decoder.output_layer(features.double())
    expected = exact.get_normalized_probs((logits, None), log_probs=True)[0].gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(losses.double(), -expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["mask", "fused"])
@pytest.mark.parametrize(("last", "post_norm"), [(1, False), (3, True), (40, False)])
def test_features_of_the_last_tokens_are_those_of_the_full_pass(build, method, attention, last, post_norm):
    model = build("alibi_lm_tiny", "--position-method", method, "--attention", attention)
    for layer in model.decoder.layers:
        layer.normalize_before = not post_norm
    tokens = random_tokens(model, 2, 40)
    tokens[0, :4] = model.decoder.padding_idx
    rows = []
    model.decoder.layers[-1].fc1.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    with torch.no_grad():
        full = model.decoder.extract_features(tokens, None)[0]
        features = model.decoder.extract_features_scriptable(tokens, None, last=last)[0]
    real = tokens[:, -last:] != model.decoder.padding_idx
    torch.testing.assert_close(features[real], full[:, -last:][real], rtol=1e-5, atol=1e-5)
    assert features.shape == (2, last, full.size(2))
    assert rows == [40, last], "the last layer computes nothing for the others"


def losses_of(scored, tokens):
    """One after the other, checking that the pieces join."""
    found = []
    for first, losses in scored:
        assert first == len(found)
        found += losses.flatten().tolist()
    assert len(found) == tokens
    return torch.tensor(found, dtype=torch.float64)


def expected_losses(model, stream, window=math.inf):
    """By the reference, all tokens in one window."""
    source = scoring.source_of(stream, model.decoder.dictionary)
    log_probs = reference.logits(model, source, window).log_softmax(-1)
    return -log_probs.gather(1, stream[:, None])[:, 0]


@pytest.mark.parametrize(("length", "stride"), [(24, 24), (24, 7), (24, 1), (100, 30), (1, 1)])
def test_windows_are_scored_as_the_reference_scores_each_block_with_its_context(build, method, length, stride):
    model = build("alibi_lm_tiny", "--position-method", method)
    stream = random_tokens(model, 50)
    source = scoring.source_of(stream, model.decoder.dictionary)
    losses = losses_of(scoring.score_windows(model, stream, length, stride, 100), len(stream))
    for start in range(0, len(stream), stride):
        end = min(start + stride, len(stream))
        begin = max(0, start - (length - stride))
        log_probs = reference.logits(model, source[begin:end]).log_softmax(-1)[start - begin :]
        expected = -log_probs.gather(1, stream[start:end, None])[:, 0]
        torch.testing.assert_close(losses[start:end], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["alibi", "none", "rotary", "t5", "kerple", "xpos", "fox"])
@pytest.mark.parametrize(
    ("attention", "window"),
    [("auto", 1), ("auto", 5), ("auto", 24), ("auto", 500), ("mask", 2), ("mask", 64), ("fused", 24), ("fused", 64)],
)
def test_stream_equals_banded_attention(build, method, attention, window, monkeypatch):
    """Each token sees the last `window` tokens in every layer, whatever the pieces in which it is read."""
    monkeypatch.setattr(scoring, "CHUNK", (16, 32))
    model = build("alibi_lm_tiny", "--position-method", method, "--attention", attention, "--tokens-per-sample", 8)
    for parameter in model.parameters():  # so that distant tokens matter
        parameter.data *= 2
    stream = random_tokens(model, 100)
    losses = losses_of(scoring.score_stream(model, stream, window), len(stream))
    torch.testing.assert_close(losses, expected_losses(model, stream, window), rtol=2e-5, atol=2e-5)
    if window < 60:
        assert not torch.allclose(losses, expected_losses(model, stream), rtol=1e-3), "the window matters"


def test_stream_with_a_window_over_all_is_one_window(build):
    model = build("alibi_lm_tiny")
    stream = random_tokens(model, 700)
    whole = losses_of(scoring.score_windows(model, stream, 700, 700, 1), 700)
    torch.testing.assert_close(losses_of(scoring.score_stream(model, stream, 700), 700), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_endless_stream_equals_full_attention_at_constant_memory(build, monkeypatch):
    """In float64, where the reach is far shorter than the text."""
    monkeypatch.setattr(bounded_cache, "SHORT", 64)
    model, kept = build("alibi_lm_tiny", "--alibi-max-bias", 1).double(), []
    stream = random_tokens(model, 3000)
    whole = losses_of(scoring.score_windows(model, stream, 3000, 3000, 1), 3000)
    attend = bounded_cache.BoundedCache.attend

    def recorded(cache, layer, *arguments):
        result = attend(cache, layer, *arguments)
        kept.append(max(group.buffers[0].size(2) for group in cache.kept[layer].groups))
        return result

    monkeypatch.setattr(bounded_cache.BoundedCache, "attend", recorded)
    monkeypatch.setattr(scoring, "CHUNK", (16, 200))
    losses = losses_of(scoring.score_stream(model, stream, 3000), 3000)
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-6)
    assert max(kept) < 1000


def test_stream_keeps_no_more_than_its_window(build, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", (16, 32))
    model = build("alibi_lm_tiny")
    states, original = [], model.decoder.extract_features_scriptable

    def recorded(tokens, encoder_out, state, **kwargs):
        result = original(tokens, encoder_out, state, **kwargs)
        states.append({name: value for name, value in state.items() if name != PROGRESS})
        assert tokens.size(1) <= 16 + 9
        return result

    monkeypatch.setattr(model.decoder, "extract_features_scriptable", recorded)
    losses_of(scoring.score_stream(model, random_tokens(model, 100), 10), 100)
    assert {cached.size(2) for state in states for layer in state.values() for cached in layer.values()} == {9}
    assert len(states[-1]) == len(model.decoder.layers)


def test_stream_is_refused_where_positions_are_absolute(build):
    for method in ("sinusoidal", "learned"):
        model = build("alibi_lm_tiny", "--position-method", method)
        with pytest.raises(ValueError, match="adds a position"):
            next(scoring.score_stream(model, random_tokens(model, 10), 4))
    with pytest.raises(ValueError, match="alibi_lm"):
        next(scoring.score_stream(build("transformer_lm"), random_tokens(model, 10), 4))


def test_a_longest_sequence_is_named(build):
    model = build("alibi_lm_tiny", "--max-target-positions", 16)
    list(scoring.score_windows(model, random_tokens(model, 50), 16, 4, 100))
    with pytest.raises(ValueError, match="length 17 is longer than the model's longest sequence, 16"):
        next(scoring.score_windows(model, random_tokens(model, 50), 17, 4, 100))


def test_fairseqs_own_models_are_scored_too(build):
    model = build("transformer_lm", *SIZES)
    stream = random_tokens(model, 60)
    losses = losses_of(scoring.score_windows(model, stream, 20, 5, 100), 60)
    source = scoring.source_of(stream, model.decoder.dictionary)
    with torch.no_grad():
        log_probs = model.get_normalized_probs(model(source[None, 5:25]), log_probs=True)[0, -5:]
    expected = -log_probs.gather(1, stream[20:25, None])[:, 0].double()
    torch.testing.assert_close(losses[20:25], expected, rtol=1e-5, atol=1e-5)


def test_automatic_length_scale_is_for_the_window(build):
    model = build("alibi_lm_tiny", "--alibi-length-scale", "auto", "--tokens-per-sample", 10)
    next(scoring.score_windows(model, random_tokens(model, 50), 20, 5, 100))
    assert model.decoder.position_method.slopes()[0][0] == pytest.approx(0.25)
    next(scoring.score_stream(model, random_tokens(model, 50), 40))
    assert model.decoder.position_method.slopes()[0][0] == pytest.approx(0.125)
