"""Decoding with a cache, step by step and from a prefix, against the float64 reference model."""

import pytest
import reference
import torch
from conftest import random_tokens


@pytest.mark.parametrize("attention", ["auto", "mask", "fused"])
def test_step_by_step_equals_the_reference_past_the_training_length(build, method, attention):
    model = build("alibi_lm_tiny", "--position-method", method, "--attention", attention, "--tokens-per-sample", 8)
    tokens = random_tokens(model, 2, 20)
    expected = torch.stack([reference.logits(model, row) for row in tokens])
    with torch.no_grad():
        state = {}
        steps = [model.decoder(tokens[:, : n + 1], incremental_state=state)[0] for n in range(tokens.size(1))]
    torch.testing.assert_close(torch.cat(steps, dim=1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [(24,), (13, 1, 1, 1, 8), (1, 22, 1)])
@pytest.mark.parametrize(("attention", "padded"), [("auto", 0), ("auto", 5), ("fused", 5)])
def test_a_prefix_is_read_in_one_pass_and_gone_on_from(build, method, attention, pieces, padded):
    """Pieces of any length, the first row padded on the left; the training length is 8."""
    model = build("alibi_lm_tiny", "--position-method", method, "--attention", attention, "--tokens-per-sample", 8)
    tokens = random_tokens(model, 3, 24)
    tokens[0, :padded] = model.decoder.padding_idx
    passes = []
    model.decoder.layers[0].register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].size(0)))
    expected = [reference.logits(model, row[row.ne(model.decoder.padding_idx)]) for row in tokens]
    with torch.no_grad():
        state, read = {}, 0
        for piece in pieces:
            read += piece
            logits, _ = model.decoder(tokens[:, :read], incremental_state=state)
            assert logits.shape[:2] == (3, 1)
            for row, all_logits in zip(logits[:, 0].double(), expected):
                position = read - 1 - (24 - len(all_logits))
                if position >= 0:
                    torch.testing.assert_close(row, all_logits[position], rtol=1e-5, atol=1e-5)
    assert passes == list(pieces)


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
    expected = torch.stack([reference.logits(model, row)[-1] for row in reordered])
    torch.testing.assert_close(step[:, 0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "fused"])
def test_a_step_costs_one_row_of_scores(build, attention):
    """Once the prompt is read, a layer gets one token, and attention one query for all keys; see test_bounded_cache."""
    model = build("alibi_lm_tiny", "--attention", attention, "--tokens-per-sample", 8, "--attention-epsilon", 0)
    tokens, state, masks = random_tokens(model, 1, 700), {}, []
    model.decoder.layers[0].register_forward_pre_hook(
        lambda module, arguments: masks.append(getattr(arguments[1].bias, "mask", None))
    )
    with torch.no_grad():
        for read in (600, 601, 700):
            model.decoder(tokens[:, :read], incremental_state=state)
    assert [mask if mask is None else mask.shape for mask in masks] == [None, (8, 1, 601), None]
