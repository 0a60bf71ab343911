"""Padding: each sequence of a batch has the logits that it has alone, by the float64 reference model."""

import pytest
import reference
import torch
from conftest import fairseqs_own, random_tokens


@pytest.mark.parametrize("attention", ["mask", "fused"])
@pytest.mark.parametrize("way", ["full", "step by step"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(build, method, attention, side, way):
    model = build("alibi_lm_tiny", "--position-method", method, "--attention", attention)
    alone = [random_tokens(model, 1, n) for n in (11, 7, 1)]
    batch = torch.full((3, 11), model.decoder.padding_idx)
    for row, tokens in zip(batch, alone):
        row[slice(11 - tokens.size(1), None) if side == "left" else slice(tokens.size(1))] = tokens[0]
    with torch.no_grad():
        logits, _ = model(batch)
        if way == "step by step":
            state = {}
            logits = torch.cat([model.decoder(batch[:, : n + 1], incremental_state=state)[0] for n in range(11)], dim=1)
    for row, got, tokens in zip(batch, logits.double(), alone):
        expected = reference.logits(model, tokens[0])
        torch.testing.assert_close(got[row.ne(model.decoder.padding_idx)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("break_mode", ["none", "complete", "complete_doc", "eos"])
def test_trains_and_evaluates_far_past_its_length_without_overrides(corpus, train, break_mode):
    checkpoint = train("--sample-break-mode", break_mode, updates=3)
    arguments = ["--sample-break-mode", break_mode, "--tokens-per-sample", 1024, "--max-tokens", 2048]
    _, scored = fairseqs_own(corpus, checkpoint, *arguments)
    from fairseq.data.data_utils import load_indexed_dataset

    dataset = load_indexed_dataset(str(corpus / "valid"))
    sizes = dataset.sizes  # a view into memory of the dataset's, which has to live as long
    blank = (sizes == 1).sum() if break_mode == "complete_doc" else 0  # blank lines separate its documents
    assert scored == sizes.sum() - blank
