"""The evaluation scripts against fairseq-eval-lm itself, and the traps that they close."""

import json
import math

import pytest
import torch
from conftest import ROOT, failure, fairseqs_own, run

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation import fairseq_eval_lm
from fairseq_alibi.evaluation.fairseq_eval_lm import EvalLmSettings


def script(name, *arguments, check=True):
    return run("bash", ROOT / "scripts" / name, *arguments, check=check)


@pytest.mark.slow
def test_nonoverlapping_script_gives_what_fairseq_eval_lm_gives(corpus, checkpoint, tmp_path):
    output = tmp_path / "new" / "results.json"
    done = script("eval_nonoverlapping.sh", corpus, checkpoint, 16, 256, "--output", output, "--", "--cpu")
    content = json.loads(output.read_text())
    assert [result["length"] for result in content["results"]] == [16, 256]
    for result in content["results"]:
        loss, tokens = fairseqs_own(corpus, checkpoint, "--tokens-per-sample", result["length"])
        assert result["loss"] == pytest.approx(loss, abs=1e-4)
        assert result["perplexity"] == pytest.approx(2 ** result["loss"])
        assert (result["tokens"], result["context_window"]) == (tokens, 0)
    assert content["model"]["position_method"] == "alibi"
    assert content["model"]["training_length"] == 32
    assert content["model"]["updates"] == 20
    assert f"{content['results'][1]['perplexity']:.2f}" in done.output
    assert "Warning" not in done.output, "a calm console"
    assert not list(tmp_path.glob("**/*.partial"))


@pytest.mark.slow
def test_sliding_window_script_gives_what_fairseq_eval_lm_gives(corpus, checkpoint, tmp_path):
    output = tmp_path / "results.json"
    script(
        "eval_sliding_window.sh",
        corpus,
        checkpoint,
        64,
        64,
        48,
        1,
        "--output",
        output,
        "--subset",
        "test",
        "--",
        "--cpu",
    )
    content = json.loads(output.read_text())
    for result, context in zip(content["results"], (0, 16, 63)):
        assert result["context_window"] == context
        arguments = ("--gen-subset", "test", "--tokens-per-sample", 64, "--context-window", context, "--max-tokens", 64)
        loss, tokens = fairseqs_own(corpus, checkpoint, *arguments)
        assert result["loss"] == pytest.approx(loss, abs=1e-4)
        assert result["tokens"] == tokens


def test_sliding_window_equals_scoring_each_token_with_its_own_context(corpus, checkpoint, tmp_path):
    """Stride s by hand: token n is scored by the window that ends at the next multiple of s."""
    from fairseq import checkpoint_utils
    from fairseq.data.data_utils import load_indexed_dataset

    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": str(corpus)}
    )
    model.eval()
    stream = torch.cat(list(load_indexed_dataset(str(corpus / "valid"))))
    source = torch.cat([torch.tensor([task.source_dictionary.eos()]), stream[:-1]])
    length, stride, loss = 24, 8, 0.0
    with torch.no_grad():
        for start in range(0, len(stream), stride):
            end = min(start + stride, len(stream))
            begin = max(0, start - (length - stride))
            log_probs = model.get_normalized_probs(model(source[None, begin:end]), log_probs=True)[0]
            loss -= log_probs[start - begin :].gather(1, stream[start:end, None]).sum().item()
    output = tmp_path / "results.json"
    main(["eval-lm", "sliding", str(corpus), str(checkpoint), "24", "8", "--output", str(output), "--", "--cpu"])
    result = json.loads(output.read_text())["results"][0]
    assert result["loss"] == pytest.approx(loss / len(stream) / math.log(2), rel=1e-5)


def test_a_batch_holds_no_more_positions_than_asked_for():
    arguments = EvalLmSettings("data", "checkpoint", [], positions=1024).arguments(128, 1)
    assert arguments[arguments.index("--max-tokens") + 1] == "8", "eight windows of 128, one new token each"
    arguments = EvalLmSettings("data", "checkpoint", [], positions=1024).arguments(4096, 4096)
    assert arguments[arguments.index("--max-tokens") + 1] == "4096", "never less than one window"


def fails(capsys, *argv):
    """Runs the command in this process; returns its one line."""
    return failure(capsys, main, "eval-lm", *argv)


def test_tokens_left_out_are_an_error_not_a_perplexity(corpus, train, tmp_path, capsys):
    """fairseq-eval-lm itself reports perplexity 1.00 and status 0 here without this package."""
    limited = train("--max-target-positions", 32, updates=1)
    with pytest.raises(SystemExit, match="samples are longer than the longest sequence"):
        fairseqs_own(corpus, limited, "--tokens-per-sample", 64)
    message = fails(capsys, "nonoverlapping", corpus, limited, 64, "--output", tmp_path / "r.json", "--", "--cpu")
    assert "tokens of 'valid' at length 64" in message
    assert "max_target_positions" in message
    assert not (tmp_path / "r.json").exists()


def test_one_process_of_several_is_refused(corpus, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in fails(capsys, "nonoverlapping", corpus, checkpoint, 64)


def test_results_so_far_are_kept(corpus, checkpoint, tmp_path, capsys, monkeypatch):
    original = fairseq_eval_lm.run_eval_lm
    calls = []

    def fail_second(arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory\nwith details")
        return original(arguments)

    monkeypatch.setattr(fairseq_eval_lm, "run_eval_lm", fail_second)
    output = tmp_path / "results.json"
    message = fails(capsys, "nonoverlapping", corpus, checkpoint, 32, 64, "--output", output, "--", "--cpu")
    assert message.endswith("failed at length 64, stride 64: out of memory with details")
    assert [result["length"] for result in json.loads(output.read_text())["results"]] == [32]


def test_a_loss_beyond_every_perplexity_is_reported(monkeypatch):
    monkeypatch.setattr(fairseq_eval_lm, "run_eval_lm", lambda arguments: (5000.0, 10))
    settings = EvalLmSettings("data", "checkpoint", [(4, 4)])
    assert fairseq_eval_lm.evaluate_windowing(settings, 4, 4, 10)["perplexity"] == math.inf


def test_the_remedies_for_a_longest_sequence_and_for_other_models_work(corpus, train, tmp_path, capsys):
    """What evaluate and eval-lm name, run as it stands."""
    limited = train("--max-target-positions", 32, updates=1)
    arguments = ("evaluate", corpus, limited, "--lengths", 64, "--output", tmp_path / "ours", "--cpu")
    remedy = failure(capsys, main, *arguments).split("pass ")[1]
    option, _, overrides = remedy.replace('"', "").replace("N}", "64}").partition(" ")
    main([*map(str, arguments), option, overrides])
    arguments = ("eval-lm", "nonoverlapping", corpus, limited, 64, "--output", tmp_path / "r.json", "--", "--cpu")
    remedy = fails(capsys, *arguments[1:]).split("pass -- ")[1].split(")")[0]
    option, _, overrides = remedy.replace('"', "").replace("N}", "64}").partition(" ")
    main([*map(str, arguments), option, overrides])
    (path,) = (tmp_path / "ours").iterdir()
    losses = [json.loads(file.read_text())["results"][0]["loss"] for file in (path, tmp_path / "r.json")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    lstm = train(arch="lstm_lm", updates=1)
    message = failure(capsys, main, "evaluate", corpus, lstm, "--lengths", 32, "--cpu")
    assert "is no transformer: evaluate it with fairseq-alibi eval-lm" in message
    output = tmp_path / "lstm.json"
    main(["eval-lm", "nonoverlapping", str(corpus), str(lstm), "32", "--output", str(output), "--", "--cpu"])
    assert json.loads(output.read_text())["results"][0]["length"] == 32
