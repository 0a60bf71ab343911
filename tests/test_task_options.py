"""Task options that change what a model reads or predicts: evaluate and eval-lm honour those of the checkpoint."""

import json
import math

import pytest
import torch
from conftest import failure, fairseqs_own

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation import scoring

#: A small model with an output layer of its own, which --output-dictionary-size makes smaller.
UNTIED = ("--decoder-layers", 1, *(f"--decoder-{part}-dim=64" for part in ("embed", "input", "output")))
#: Options of fairseq-train, with the architecture.
OPTIONS = {
    "bos": ("alibi_lm_tiny", "--add-bos-token"),
    "fewer outputs, tied": ("alibi_lm_tiny", "--output-dictionary-size", 20),
    "fewer outputs": ("alibi_lm", *UNTIED, "--output-dictionary-size", 20),
    "bos, fewer outputs, adaptive": (
        *("alibi_lm_tiny", "--add-bos-token", "--output-dictionary-size", 20, "--ddp-backend", "legacy_ddp"),
        *("--adaptive-softmax-cutoff", "6,12", "--criterion", "adaptive_loss"),
    ),
}
#: Those that fairseq-eval-lm has to be given.
TASK_OPTIONS = {
    "bos": ["--add-bos-token"],
    "fewer outputs, tied": ["--output-dictionary-size", 20],
    "fewer outputs": ["--output-dictionary-size", 20],
    "bos, fewer outputs, adaptive": ["--add-bos-token", "--output-dictionary-size", 20],
}


@pytest.fixture(scope="module", params=OPTIONS)
def trained(request, sharpened):
    """A checkpoint trained with task options, and what fairseq-eval-lm has to be given for it."""
    arch, *options = OPTIONS[request.param]
    return sharpened(*options, arch=arch), TASK_OPTIONS[request.param]


@pytest.fixture(scope="module")
def with_bos(sharpened):
    """A checkpoint trained with --add-bos-token."""
    return sharpened("--add-bos-token")


def result_of(folder):
    """The one result in the one JSON file of a folder, and all of the file."""
    (path,) = folder.glob("*.json")
    content = json.loads(path.read_text())
    (result,) = content["results"]
    return result, content


def evaluate(*arguments):
    """Runs `fairseq-alibi evaluate` in this process."""
    main(["evaluate", *map(str, arguments), "--cpu"])


def test_evaluate_and_eval_lm_score_as_fairseq_does_with_the_options_of_the_training(corpus, trained, tmp_path, capsys):
    checkpoint, options = trained
    loss, _ = fairseqs_own(corpus, checkpoint, "--tokens-per-sample", 48, *options)
    if 20 in options:
        main(["generate", str(corpus), str(checkpoint), "word1 word39", "--cpu", "--beam", "2", "--tokens", "3"])
        assert "<unk>" in capsys.readouterr().out, "rare types are unknown"
        line = failure(capsys, main, "export-hf", checkpoint, tmp_path / "hf", "--data", corpus)
        assert "--output-dictionary-size 20: an exported model" in line
    if len(torch.load(checkpoint)["model"].get("decoder.output_projection.weight", ())) == 48:  # else no other loads
        without, _ = fairseqs_own(corpus, checkpoint, "--tokens-per-sample", 48)
        assert loss != pytest.approx(without, abs=1e-3), "the options matter"
    sliding = ("--tokens-per-sample", 48, "--context-window", 32, "--max-tokens", 64)
    if "--add-bos-token" not in options:  # else fairseq's windows hold <s> in the middle
        evaluate(corpus, checkpoint, "--lengths", 48, "--stride", 16, "--output", tmp_path / "sliding")
        assert result_of(tmp_path / "sliding")[0]["loss"] == pytest.approx(
            fairseqs_own(corpus, checkpoint, *sliding, *options)[0], abs=1e-4
        )
    evaluate(corpus, checkpoint, "--lengths", 48, "--output", tmp_path / "ours")
    result, content = result_of(tmp_path / "ours")
    assert result["loss"] == pytest.approx(loss, abs=1e-4)
    assert content["model"].get("add_bos_token", False) == ("--add-bos-token" in options)
    assert content["model"].get("output_dictionary_size", 0) == (20 if 20 in options else 0)
    for given in ([], options):  # of itself, and when it is told
        output = tmp_path / f"{len(given)}" / "results.json"
        main(
            ["eval-lm", "nonoverlapping", str(corpus), str(checkpoint), "48", "--output", str(output), "--", "--cpu"]
            + [str(option) for option in given]
        )
        lm_result, lm_content = result_of(output.parent)
        assert lm_result["loss"] == pytest.approx(loss, abs=1e-4)
        assert lm_result["tokens"] == result["tokens"]
        assert lm_content["model"].get("add_bos_token") == content["model"].get("add_bos_token")


def expected_losses(model, stream, length, stride):
    """By whole passes over each window with <s> in front."""
    dictionary = model.decoder.dictionary
    source = torch.cat([torch.tensor([dictionary.eos()]), stream[:-1]])
    losses = torch.zeros(len(stream))
    for start in range(0, len(stream), stride):
        end = min(start + stride, len(stream))
        begin = max(0, start - (length - stride))
        inputs = torch.cat([torch.tensor([dictionary.bos()]), source[begin:end]])
        with torch.no_grad():
            log_probs = model.get_normalized_probs(model(inputs[None]), log_probs=True)[0, 1 + start - begin :]
        losses[start:end] = -log_probs.gather(1, stream[start:end, None])[:, 0]
    return losses


@pytest.mark.parametrize(("length", "stride"), [(20, 20), (20, 6), (20, 1)])
def test_every_window_begins_with_the_first_token(build, length, stride):
    model = build("alibi_lm_tiny", "--add-bos-token")
    stream = torch.randint(4, 40, (90,))
    scored = scoring.score_windows(model, stream, length, stride, 100, first_token=model.decoder.dictionary.bos())
    losses = torch.cat([piece.losses.flatten() for piece in scored])
    torch.testing.assert_close(losses, expected_losses(model, stream, length, stride), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3, 30, 200])
def test_a_stream_begins_with_the_first_token(build, window, monkeypatch):
    """As long as the window holds it, it is seen: with a window over all, the losses are those of one window."""
    monkeypatch.setattr(scoring, "CHUNK", (16, 32))
    model = build("alibi_lm_tiny")
    stream = torch.randint(4, 40, (90,))
    pieces = scoring.score_stream(model, stream, window, first_token=model.decoder.dictionary.bos())
    losses = torch.cat([piece.losses.flatten() for piece in pieces])
    assert len(losses) == 90
    if window == 200:
        torch.testing.assert_close(losses, expected_losses(model, stream, 90, 90), rtol=1e-5, atol=1e-5)
    layers = len(model.decoder.layers)
    without = torch.cat([piece.losses.flatten() for piece in scoring.score_stream(model, stream, window)])
    reached = min(90, layers * (window - 1))  # input n + 1 predicts token n, and sees <s> through all layers
    torch.testing.assert_close(losses[reached:], without[reached:], rtol=1e-5, atol=1e-5)
    assert window == 1 or not torch.allclose(losses[:1], without[:1], atol=1e-6)


def test_streams_and_sliding_windows_of_such_a_model_are_evaluated(corpus, with_bos, tmp_path, capsys):
    """The remedy that eval-lm names for sliding windows."""
    arguments = ("eval-lm", "sliding", corpus, with_bos, 48, 16, "--output", tmp_path / "r.json", "--", "--cpu")
    assert "use fairseq-alibi evaluate with --stride" in failure(capsys, main, *arguments)
    for name, option in (("sliding", ("--stride", 16)), ("stream", ("--streaming",)), ("blocks", ())):
        evaluate(corpus, with_bos, "--lengths", 48, *option, "--output", tmp_path / name)
    losses = {name: result_of(tmp_path / name)[0]["loss"] for name in ("sliding", "stream", "blocks")}
    assert losses["sliding"] == pytest.approx(losses["blocks"], abs=0.5)
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("option", [["--add-bos-token"], ["--output-dictionary-size", "20"]])
def test_options_that_the_training_did_not_have_are_refused(corpus, checkpoint, tmp_path, capsys, option):
    arguments = ("eval-lm", "nonoverlapping", corpus, checkpoint, 48, "--output", tmp_path / "r.json", "--", *option)
    assert f"was not trained with {option[0]}: drop it" in failure(capsys, main, *arguments)


def test_a_model_of_lines_is_evaluated_by_lines_as_the_note_says(corpus, train, tmp_path, capsys):
    checkpoint = train("--sample-break-mode", "eos", "--add-bos-token", updates=3)
    evaluate(corpus, checkpoint, "--lengths", 48, "--output", tmp_path)
    note = capsys.readouterr().err
    assert "windows cross line ends" in note
    command = note.split("By lines: fairseq-alibi ")[1].split("\n")[0]
    command = command.replace("DATA", str(corpus)).replace("CHECKPOINT", str(checkpoint)).replace("LENGTH", "48")
    before, _, after = command.partition(" -- ")
    main([*before.split(), "--output", str(tmp_path / "lines" / "r.json"), "--", *after.split(), "--cpu"])
    loss, _ = fairseqs_own(corpus, checkpoint, "--sample-break-mode", "eos", "--add-bos-token")
    result, _ = result_of(tmp_path / "lines")
    assert result["loss"] == pytest.approx(loss, abs=1e-4)
    assert math.isfinite(result["loss"])


def test_of_sharded_data_the_first_folder_is_evaluated_as_fairseq_does(corpus, checkpoint, tmp_path):
    data = f"{corpus}:{tmp_path / 'other'}"
    loss, _ = fairseqs_own(data, checkpoint, "--tokens-per-sample", 32)
    evaluate(data, checkpoint, "--lengths", 32, "--output", tmp_path)
    assert result_of(tmp_path)[0]["loss"] == pytest.approx(loss, abs=1e-4)
    main(
        ["eval-lm", "nonoverlapping", data, str(checkpoint), "32", "--output", str(tmp_path / "x" / "r"), "--", "--cpu"]
    )
    assert json.loads((tmp_path / "x" / "r").read_text())["results"][0]["loss"] == pytest.approx(loss, abs=1e-4)
