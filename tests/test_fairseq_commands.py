"""fairseq's own commands with the plugin: what cannot work ends with one line before the work; repairs work."""

import os
import re
import shutil
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, training_config
from fairseq.data import Dictionary
from fairseq_cli import eval_lm, generate, interactive, train

from fairseq_alibi.__main__ import main
from fairseq_alibi.patches.data import SKIP, get_whole_word_mask
from fairseq_alibi.patches.option_checks import check_precision

COMMANDS = {"train": train, "eval-lm": eval_lm, "generate": generate, "interactive": interactive}
TRAINING = [
    "--task",
    "language_modeling",
    "--arch",
    "alibi_lm_tiny",
    "--tokens-per-sample",
    "32",
    "--max-tokens",
    "256",
]
TRAINING += ["--optimizer", "adam", "--max-update", "1", "--no-save"]
GENERATION = ["--task", "language_modeling", "--sample-break-mode", "eos", "--max-tokens", "256"]


def refusal(monkeypatch, command, corpus, *arguments):
    """Runs one of fairseq's commands in this process, which has to end with one line and status 1; returns the line."""
    monkeypatch.setattr(
        "sys.argv", ["fairseq", str(corpus), "--user-dir", str(ROOT / "fairseq_alibi"), *map(str, arguments)]
    )
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command].cli_main()
    assert isinstance(stopped.value.code, str), "printed by Python as the only line, with status 1"
    assert "\n" not in stopped.value.code
    return stopped.value.code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bf16"], "--bf16 needs a GPU: drop it, or pass --cpu-bf16"),
        (["--memory-efficient-bf16"], "--bf16 needs a GPU"),
        (["--fp16"], "--fp16 needs a GPU: drop it, or pass --cpu-bf16"),
        (["--memory-efficient-fp16"], "--fp16 needs a GPU"),
        (["--fp16", "--fp16-no-flatten-grads"], "--fp16 needs a GPU"),
        (["--fp16", "--amp"], "--fp16 and --amp exclude each other: pass one of them"),
        (["--fp16", "--bf16"], "--fp16 excludes --bf16 and --tpu: pass one of them"),
        (["--memory-efficient-fp16", "--memory-efficient-bf16"], "--fp16 excludes --bf16"),
        (["--tpu"], "--tpu: torch_xla is not installed; drop --tpu"),
    ],
    ids=str,
)
def test_a_precision_that_cannot_run_is_named_before_the_model_is_built(monkeypatch, corpus, options, message):
    monkeypatch.setattr(train, "main", lambda *_: pytest.fail("that is the work"))
    train.main.__module__ = "fairseq_cli.train"
    assert message in refusal(monkeypatch, "train", corpus, *TRAINING, *options, "--cpu")


def test_bf16_of_an_evaluation_is_said_to_be_ignored(monkeypatch, corpus, checkpoint, caplog):
    arguments = ["--user-dir", str(ROOT / "fairseq_alibi"), "--path", str(checkpoint), "--bf16", "--cpu"]
    arguments += ["--tokens-per-sample", "32", "--gen-subset", "valid"]
    monkeypatch.setattr("sys.argv", ["fairseq-eval-lm", str(corpus), *arguments])
    eval_lm.cli_main()
    assert any("--bf16 is ignored by this command" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("precision", "training"), [("--fp16", False), ("--amp", False), ("--amp", True)])
def test_a_precision_that_changes_nothing_without_a_gpu_is_named(corpus, caplog, precision, training):
    check_precision(training_config(corpus, *TRAINING, precision, "--cpu"), training)
    assert f"{precision} is ignored by this command" in caplog.text


def test_samples_that_a_model_cannot_read_are_left_out_on_request_only(monkeypatch, corpus, train, caplog):
    path = train("--position-method", "learned", "--max-target-positions", "32")
    arguments = ["--path", path, "--gen-subset", "valid", "--cpu", "--tokens-per-sample"]
    message = refusal(monkeypatch, "eval-lm", corpus, *arguments, "33")
    assert re.match(
        r"20 of 21 samples are longer than the longest sequence of the model, 32; sample \d+ has 33", message
    )
    assert message.endswith(SKIP)
    assert "no token was scored" in refusal(monkeypatch, "eval-lm", corpus, *arguments, "9999", SKIP)
    monkeypatch.setattr("sys.argv", [*sys.argv[:-2], "33", SKIP])
    with caplog.at_level("INFO", "fairseq_cli.eval_lm"):
        eval_lm.cli_main()
    assert "Evaluated 26 tokens" in caplog.text


def test_lines_for_validation_that_are_too_long_are_named_before_the_first_update(monkeypatch, corpus):
    monkeypatch.setattr("fairseq.trainer.Trainer.train_step", lambda *_: pytest.fail("an update"))
    short = ["--max-target-positions", "8", "--tokens-per-sample", "8", "--sample-break-mode", "eos", "--cpu"]
    message = refusal(monkeypatch, "train", corpus, *TRAINING, *short)
    assert "samples are longer than the longest sequence of the model, 8" in message


def test_a_run_with_a_metric_that_validation_lacks_is_saved(monkeypatch, corpus, tmp_path):
    options = ["--best-checkpoint-metric", "nll_loss", "--save-dir", tmp_path, "--cpu"]
    message = refusal(monkeypatch, "train", corpus, *TRAINING[:-1], *options)
    assert "--best-checkpoint-metric nll_loss: validation measures no such thing" in message
    assert "resumes after 1 updates" in message
    assert (tmp_path / "checkpoint_last.pt").is_file()


@pytest.mark.parametrize(("folder", "command"), [("nowhere", "train"), ("nowhere", "eval-lm"), ("", "eval-lm")])
def test_missing_data_are_named_in_one_line(monkeypatch, corpus, checkpoint, tmp_path, folder, command):
    arguments = {"train": [*TRAINING, "--save-dir", tmp_path], "eval-lm": ["--path", checkpoint, "--gen-subset", "dev"]}
    message = refusal(monkeypatch, command, folder or corpus, *arguments[command], "--cpu")
    assert (folder or "Dataset not found: dev") in message
    assert message.endswith(": name folders, files and subsets that exist")


def offsets_past_the_end(index):
    """Gives all sentences of an .idx but the last an offset that its .bin does not have."""
    sentences = int.from_bytes(index[18:26], "little")
    first, last = 26 + 4 * sentences, 26 + 12 * sentences - 8
    return index[:first] + (10**6).to_bytes(8, "little") * (sentences - 1) + index[last:]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.idx", offsets_past_the_end, "an .idx points to places that its .bin does not have"),
        (
            "train.bin",
            lambda text: text[:100],
            "train.bin does not hold the 20,813 tokens of its .idx: prepare the folder",
        ),
        ("valid.bin", lambda text: b"", "valid.bin is missing or empty: prepare the folder anew"),
        ("valid.idx", lambda index: b"no index", "valid.bin and .idx cannot be read"),
    ],
)
def test_files_of_a_data_folder_that_do_not_fit_are_named(monkeypatch, corpus, tmp_path, name, change, message):
    data = shutil.copytree(corpus, tmp_path / "data")
    (data / name).write_bytes(change((data / name).read_bytes()))
    assert message in refusal(monkeypatch, "train", data, *TRAINING, "--cpu")


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("generate", "{'atention': 'mask'}", "no model or task has an option 'atention': did you mean 'attention'?"),
        ("eval-lm", "{'zzzzzzzzzz': 1}", "no model or task has an option 'zzzzzzzzzz': drop it"),
        ("eval-lm", "__import__('os').getpid()", "is no dictionary"),
        ("eval-lm", "[1]", "is no dictionary"),
        ("eval-lm", "{'no_scale_embedding': 'False'}", "no_scale_embedding 'False': pass a value as False is"),
        ("interactive", "{'dropout': 'x'}", "--model-overrides: dropout 'x': pass a value as 0.1 is"),
        ("eval-lm", "{'max_target_positions': 'N'}", "--max-target-positions 'N': pass a whole number"),
    ],
)
def test_overrides_that_cannot_be_are_named(monkeypatch, corpus, checkpoint, command, overrides, message):
    arguments = [*READERS[command][1], checkpoint, "--cpu", "--model-overrides", overrides]
    assert message in refusal(monkeypatch, command, corpus, *arguments)


@pytest.mark.parametrize("command", ["train", "generate"])
def test_an_interrupt_is_one_line(monkeypatch, corpus, checkpoint, tmp_path, caplog, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fairseq.trainer.Trainer.train_step", interrupted)
    monkeypatch.setattr("fairseq.checkpoint_utils.load_model_ensemble", interrupted)
    arguments = {
        "train": [*TRAINING[:-1], "--save-dir", str(tmp_path)],
        "generate": [*READERS["generate"][1], checkpoint],
    }
    common = ["fairseq", str(corpus), "--user-dir", str(ROOT / "fairseq_alibi"), "--cpu"]
    monkeypatch.setattr("sys.argv", [*common, *map(str, arguments[command])])
    with pytest.raises(SystemExit, match="130"):
        COMMANDS[command].cli_main()
    assert (
        caplog.records[-1].getMessage()
        == {"train": "interrupted; the same command resumes from its last checkpoint", "generate": "interrupted"}[
            command
        ]
    )


class Malicious:
    """Pickled it is a call that makes a file."""

    def __reduce__(self):
        return __import__("os").system, ("touch owned",)


def flip_a_byte(path, target):
    """Damages the largest record of a checkpoint, in its middle."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content[content.index(record.filename.encode()) + len(record.filename) + record.file_size // 2] ^= 0xFF
    target.write_bytes(content)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() == record.filename
    return record.filename


READERS = {
    "train --restore-file": ("train", [*TRAINING, "--restore-file"]),
    "train --finetune-from-model": ("train", [*TRAINING, "--finetune-from-model"]),
    "eval-lm": ("eval-lm", ["--path"]),
    "generate": ("generate", [*GENERATION, "--path"]),
    "interactive": ("interactive", [*GENERATION[:2], "--path"]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["damaged", "malicious"])
def test_fairseqs_readers_refuse_in_one_line(monkeypatch, corpus, checkpoint, tmp_path, reader, kind):
    """Whatever the environment says, no code of a checkpoint is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "file.pt"
    if kind == "damaged":
        message = f"its record {flip_a_byte(checkpoint, path)} is damaged"
    else:
        state = torch.load(checkpoint, weights_only=True)
        torch.save({**state, "extra_state": Malicious()}, path)
        message = "it calls posix.system"
    command, arguments = READERS[reader]
    line = refusal(
        monkeypatch, command, corpus, *arguments, path, "--cpu", *["--save-dir", "new"] * (command == "train")
    )
    assert message in line
    assert str(path) in line
    assert not (tmp_path / "owned").exists()


#: Content of a checkpoint that does not fit, or what stands in its place; the reader, and what it has to say.
MISFITS = {
    "architecture": ("eval-lm", "file.pt cannot be loaded: its architecture is 'abacus', which neither"),
    "layers": ("eval-lm", "file.pt cannot be loaded: --decoder-layers 10000000: a model has at most 10,000"),
    "weights": ("eval-lm", "file.pt cannot be loaded: .*decoder.twist"),
    "more weights": ("train --restore-file", "file.pt does not fit this run .*decoder.twist"),
    "optimizer": ("train --restore-file", "file.pt does not fit this run .*--reset-optimizer"),
    "no EMA": ("train --restore-file", "file.pt does not fit this run .it holds no EMA for --store-ema"),
    "place": ("train --restore-file", "the training data end before the place .* pass --reset-dataloader"),
    "pipe": ("eval-lm", "file.pt is a folder, a device or a pipe"),
    "folder": ("train --restore-file", "--restore-file .*file.pt is no file, and training would start anew"),
    "reset": ("train --finetune-from-model", "--finetune-from-model can not be set together with .*dataloader$"),
    "missing": ("train --finetune-from-model", "--finetune-from-model .*file.pt is no file"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_named_in_one_line(monkeypatch, corpus, checkpoint, tmp_path, kind):
    path, (reader, message) = tmp_path / "file.pt", MISFITS[kind]
    state = torch.load(checkpoint)
    if kind == "architecture":
        state["cfg"]["model"]["_name"] = state["cfg"]["model"]["arch"] = "abacus"
    elif kind == "layers":
        state["cfg"]["model"]["decoder_layers"] = 10**7
    elif kind == "optimizer":
        state["optimizer_history"][-1]["optimizer_name"] = "FairseqNAG"
    elif kind == "place":
        state["extra_state"]["train_iterator"]["iterations_in_epoch"] = 10**6
    elif kind != "no EMA":
        state["model"]["decoder.twist"] = torch.zeros(1)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        torch.save(state, path)
    command, arguments = READERS[reader]
    folder = [
        "--save-dir",
        tmp_path / "new",
        *{"no EMA": ["--store-ema"], "reset": ["--reset-optimizer"]}.get(kind, []),
    ] * (command == "train")
    assert re.search(message, refusal(monkeypatch, command, corpus, *arguments, path, "--cpu", *folder))


@pytest.mark.parametrize(
    "command", [["evaluate", "DATA", "PATH"], ["generate", "DATA", "PATH", "x"], ["export-hf", "PATH", "out"]]
)
def test_our_readers_name_the_damaged_record(monkeypatch, corpus, checkpoint, tmp_path, command):
    record = flip_a_byte(checkpoint, tmp_path / "file.pt")
    monkeypatch.chdir(tmp_path)
    arguments = [{"DATA": str(corpus), "PATH": "file.pt"}.get(word, word) for word in command]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *["--cpu"] * (command[0] != "export-hf")])
    assert f"file.pt is damaged (its record {record} is damaged): get it again" in str(stopped.value.code)


def test_words_are_masked_whole_by_the_marks_of_subwords():
    """Each row: tokens of a line, with 1 where a word begins."""
    for symbols, expected in (
        (["lo@@", "we@@", "st", "man"], [1, 1, 0, 0, 1]),
        (["\u2581lo", "west", "\u2581man"], [1, 1, 0, 1]),
        (["low", "est", "man"], [1, 1, 1, 1]),
    ):
        dictionary = Dictionary()
        numbers = [dictionary.bos(), *map(dictionary.add_symbol, symbols)]
        dictionary.add_symbol("<mask>")
        mask = get_whole_word_mask(None, dictionary)
        assert mask.gather(0, torch.tensor(numbers)).tolist() == expected


def test_whole_words_of_numbers_are_refused():
    dictionary = Dictionary()
    for number in range(20):
        dictionary.add_symbol(str(number))
    with pytest.raises(SystemExit, match="numbers of GPT-2's BPE"):
        get_whole_word_mask(None, dictionary)


@pytest.mark.parametrize("arch", ["alibi_masked_lm_tiny", "roberta_base"])
def test_mask_whole_words_trains(monkeypatch, corpus, tmp_path, arch):
    arguments = ["--task", "masked_lm", "--criterion", "masked_lm", "--arch", arch, "--tokens-per-sample", "32"]
    arguments += ["--max-tokens", "256", "--optimizer", "adam", "--max-update", "1", "--no-save", "--cpu"]
    arguments += ["--mask-whole-words", "--save-dir", str(tmp_path)]
    if arch == "roberta_base":
        arguments += ["--encoder-layers", "1", "--encoder-embed-dim", "8", "--encoder-ffn-embed-dim", "8"]
        arguments += ["--encoder-attention-heads", "2"]
    monkeypatch.setattr(
        sys, "argv", ["fairseq-train", str(corpus), "--user-dir", str(ROOT / "fairseq_alibi"), *arguments]
    )
    train.cli_main()
    shutil.rmtree(tmp_path)
