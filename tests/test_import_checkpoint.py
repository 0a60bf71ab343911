"""Stand-ins for the authors' checkpoints become alibi_lm checkpoints that compute what the authors' code computed."""

import argparse
import math

import pytest
import torch
from conftest import BIN, fairseqs_own, run
from fairseq.models.transformer import TransformerDecoder

import fairseq_alibi  # noqa: F401

SMALL = ["--decoder-layers", 2, "--decoder-ffn-embed-dim", 64, "--criterion", "adaptive_loss"]
SMALL += ["--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20", "--ddp-backend", "legacy_ddp"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Checkpoints of fairseq's own transformer_lm_wiki103, small, with 8 and 12 heads."""
    paths = {}
    for heads, width in ((8, 64), (12, 96)):
        save_dir = tmp_path_factory.mktemp("transformer_lm")
        sizes = [f"--decoder-{part}" for part in ("embed-dim", "input-dim", "output-dim")]
        run(
            BIN / "fairseq-train",
            *(corpus, "--task", "language_modeling", "--arch", "transformer_lm_wiki103", *SMALL),
            *("--decoder-attention-heads", heads, *(word for size in sizes for word in (size, width))),
            *("--tokens-per-sample", 32, "--max-tokens", 256, "--optimizer", "adam", "--lr", 0.003),
            *("--max-update", 10, "--save-dir", save_dir, "--no-epoch-checkpoints", "--cpu"),
        )
        paths[heads] = save_dir / "checkpoint_last.pt"
    return paths


@pytest.fixture(scope="module")
def theirs_loss(trained, corpus):
    """Loss of the one with 8 heads as fairseq without the plugin prints it."""
    evaluation = [corpus, "--path", trained[8], "--gen-subset", "valid", "--tokens-per-sample", 32, "--cpu"]
    return float(run(BIN / "fairseq-eval-lm", *evaluation).output.split("Loss (base 2): ")[1].split(",")[0])


@pytest.fixture
def theirs(trained, tmp_path):
    """Writes a stand-in as the fork did: `theirs(heads, form)`, form `cfg` or `args`; `change` may spoil it."""

    def write(heads=8, form="cfg", change=lambda state: None):
        state = torch.load(trained[heads])
        state["model"]["decoder.embed_positions._float_tensor"] = torch.zeros(1)
        model = state["cfg"]["model"]
        model["max_tokens"] = 9216
        for name in ("decoder_xformers_att_config", "base_layers", "base_sublayers", "base_shuffle"):
            model.pop(name, None)  # which the fairseq of 2021 did not have
        if form == "args":
            flat = {**state["cfg"]["task"], **state["cfg"]["optimization"], **model, "lr_scheduler": "cosine"}
            flat.update(arch="transformer_lm_wiki103", task="language_modeling", criterion="adaptive_loss")
            state["args"], state["cfg"] = argparse.Namespace(**flat), None
        change(state)
        path = tmp_path / f"alibi_wt103_{heads}_{form}.pt"
        torch.save(state, path)
        return path

    return write


def authors_model(path, corpus, monkeypatch):
    """fairseq's own decoder, run as the fork ran it: no position embeddings, a mask of m * j per head and batch row."""
    from fairseq import checkpoint_utils

    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides={"data": str(corpus)})
    heads = model.decoder.layers[0].nh
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]

    def mask(self, x):
        length, batch, _ = x.shape
        bias = torch.tensor(slopes[:heads])[:, None, None] * torch.arange(length)
        return (bias + torch.full((length, length), -math.inf).triu(1)).repeat(batch, 1, 1)

    monkeypatch.setattr(TransformerDecoder, "buffered_future_mask", mask)
    model.decoder.embed_positions = None
    return model.eval()


def import_checkpoint(*arguments, check=True):
    return run(BIN / "fairseq-alibi", "import-checkpoint", *arguments, check=check)


@pytest.mark.parametrize("heads", [8, 12])
@pytest.mark.parametrize("form", ["cfg", "args"])
def test_imported_model_computes_what_the_authors_computed(theirs, trained, corpus, tmp_path, monkeypatch, heads, form):
    from fairseq import checkpoint_utils

    out = tmp_path / "new folder" / "imported.pt"
    done = import_checkpoint(theirs(heads, form), out, "--dict", corpus / "dict.txt")
    assert "dropped: decoder.embed_positions._float_tensor" in done.output
    assert "dropped: max_tokens" in done.output or form == "args"
    overrides = {"data": str(corpus)}
    (ours,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(out)], arg_overrides=overrides)
    ours.eval()
    authors = authors_model(trained[heads], corpus, monkeypatch)
    tokens = torch.randint(4, 40, (3, 200))
    with torch.no_grad():
        expected = authors.get_normalized_probs(authors(tokens), log_probs=True)
        got = ours.get_normalized_probs(ours(tokens), log_probs=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["cfg", "args"])
def test_result_evaluates_and_trains_on_without_overrides(theirs, theirs_loss, corpus, tmp_path, form):
    out = tmp_path / "imported.pt"
    import_checkpoint(theirs(8, form), out, "--position-method", "sinusoidal")  # as the stand-in was trained
    loss, tokens = fairseqs_own(corpus, out, "--tokens-per-sample", 32)
    assert loss == theirs_loss
    assert fairseqs_own(corpus, out, "--tokens-per-sample", 512)[1] == tokens
    heads = ["--decoder-attention-heads", 8, "--decoder-embed-dim", 64, "--decoder-input-dim", 64]
    training = ["--task", "language_modeling", "--arch", "alibi_lm_wiki103", *SMALL, *heads, "--decoder-output-dim", 64]
    training += ["--position-method", "sinusoidal"]
    training += ["--optimizer", "adam", "--lr", 1e-4, "--max-tokens", 256, "--tokens-per-sample", 32, "--max-update", 3]
    training += ["--finetune-from-model", out, "--save-dir", tmp_path / "tuned", "--log-interval", 1]
    output = run(BIN / "fairseq-train", corpus, "--cpu", "--user-dir", "fairseq_alibi", *training).output
    first = float(output.split(" ppl=")[1].split(",")[0])
    assert first < 1.3 * 2**loss, "it starts from what was learned, not from chance"


def test_nothing_is_overwritten_silently(theirs, tmp_path):
    out = tmp_path / "out.pt"
    out.write_text("mine")
    assert "--overwrite" in import_checkpoint(theirs(), out, check=False).output
    assert out.read_text() == "mine"
    import_checkpoint(theirs(), out, "--overwrite")
