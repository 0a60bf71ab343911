"""What tasks, criterions and metrics of fairseq put into a checkpoint is read back by the safe loader."""

import argparse
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from fairseq import checkpoint_utils, options
from fairseq.logging import meters, metrics
from fairseq_cli import generate, preprocess, train

import fairseq_alibi  # noqa: F401
from fairseq_alibi.files.checkpoints import read_checkpoint

VALUES = {
    "number": 1.5,
    **{f"numpy scalar {code}": np.ones(3, code)[0] for code in "?bhilqBHILQefdgFD"},
    **{f"numpy array {code}": np.arange(4).astype(code) for code in "?bhilqBHILQefdgFD"},
    "empty array": np.zeros(0),
    "array of one number": np.array(2.0),
    "transposed array": np.ones((2, 3)).T,
    "array of text": np.array(["a", "bc"]),
    "tensor": torch.ones(2),
    "tensor of integers": torch.arange(3),
}


@pytest.mark.parametrize("name", VALUES)
def test_metrics_of_every_type_are_read_back(tmp_path, name):
    """As values of meters in the state of metrics, as best loss, and in old checkpoints as meters themselves."""
    value = VALUES[name]
    average = meters.AverageMeter()
    average.val = value
    with metrics.aggregate(new_root=True) as aggregator:
        metrics.log_scalar("value", 1.0)
        aggregator["value"].sum = value
        state = {
            "metrics": metrics.state_dict(),
            "best": value,
            "args": argparse.Namespace(value=value),
            "meter": average,
        }
        torch.save({**state, "aggregator": aggregator.state_dict()}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    for found in (loaded["best"], loaded["args"].value, loaded["meter"].val, loaded["aggregator"][0][3]["sum"]):
        assert np.asarray(found).dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(value))


def test_an_array_of_objects_cannot_smuggle_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return print, ("owned",)

    torch.save({"best": np.array([Malicious()], dtype=object)}, tmp_path / "file.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "file.pt", weights_only=True)


@pytest.mark.slow
def test_a_model_trained_with_eval_bleu_is_read_resumed_and_generated_from(tmp_path, monkeypatch, capsys):
    """fairseq's own translation recipe: the counts of n-grams are numpy arrays."""
    for split in ("train", "valid"):
        for side in ("src", "tgt"):
            (tmp_path / f"{split}.{side}").write_text("a b c d e\nc d a\n" * 20)
    arguments = ["-s", "src", "-t", "tgt", "--destdir", tmp_path / "data"]
    arguments += ["--trainpref", tmp_path / "train", "--validpref", tmp_path / "valid"]
    preprocess.main(options.get_preprocessing_parser().parse_args(list(map(str, arguments))))
    common = [str(tmp_path / "data"), "--user-dir", str(ROOT / "fairseq_alibi"), "--cpu"]
    training = [
        "--task",
        "translation",
        "--arch",
        "alibi_transformer_tiny",
        "--optimizer",
        "adam",
        "--max-tokens",
        "256",
    ]
    training += ["--save-dir", str(tmp_path / "new"), "--eval-bleu", "--best-checkpoint-metric", "bleu"]
    for epochs in ("1", "2"):
        monkeypatch.setattr("sys.argv", ["fairseq-train", *common, *training, "--max-epoch", epochs])
        train.cli_main()
    last = tmp_path / "new" / "checkpoint_last.pt"
    assert read_checkpoint(str(last))["optimizer_history"][-1]["num_updates"] == 2
    monkeypatch.setattr("sys.argv", ["fairseq-generate", *common, "--path", str(last), "--gen-subset", "valid"])
    generate.cli_main()
    assert "BLEU4" in capsys.readouterr().out


FAULTS = {
    "cfg is a text": (lambda state: {**state, "cfg": "some text"}, "is no fairseq checkpoint"),
    "cfg.model is a number": (lambda state: {**state, "cfg": {**state["cfg"], "model": 1}}, "is no fairseq checkpoint"),
    "cfg.task is missing": (
        lambda state: {**state, "cfg": {"model": state["cfg"]["model"]}},
        "is no fairseq checkpoint",
    ),
    "model is a list": (lambda state: {**state, "model": [1, 2]}, "its 'model' does not hold tensors by name"),
    "model holds numbers": (lambda state: {**state, "model": {"weight": 1}}, "its 'model' does not hold tensors"),
    "model is missing": (lambda state: {"cfg": state["cfg"], "optimizer_history": []}, "is missing, empty or of"),
    "extra_state is a text": (lambda state: {**state, "extra_state": "x"}, "is missing, empty or of another type"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_content_of_another_type_is_named(checkpoint, tmp_path, fault):
    change, message = FAULTS[fault]
    torch.save(change(torch.load(checkpoint)), tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message) as raised:
        read_checkpoint(str(tmp_path / "file.pt"))
    assert "file.pt is no fairseq checkpoint (" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", ["cfg is a text", "cfg.task is missing"])
def test_training_refuses_options_of_another_type(checkpoint, tmp_path, fault):
    torch.save(FAULTS[fault][0](torch.load(checkpoint)), tmp_path / "file.pt")
    with pytest.raises(SystemExit, match="'cfg' does not hold the options of a model and a task"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "file.pt"))


def test_damage_in_the_middle_of_any_record_is_found(checkpoint, tmp_path):
    with zipfile.ZipFile(checkpoint) as archive:
        records = [info for info in archive.infolist() if info.file_size > 8][::5]
        content = checkpoint.read_bytes()
    for info in records:
        damaged = bytearray(content)
        start = content.index(info.filename.encode(), info.header_offset) + len(info.filename)
        damaged[start + info.file_size // 2 + 64] ^= 1
        (tmp_path / "file.pt").write_bytes(damaged)
        with zipfile.ZipFile(tmp_path / "file.pt") as archive:
            if archive.testzip() is None:
                continue  # the byte lies between two records
        with pytest.raises(ValueError, match=r"file.pt is damaged \(its record"):
            read_checkpoint(str(tmp_path / "file.pt"))


#: What a flipped bit says of a record, in its entry of the archive's directory: byte and bit.
ENTRY_BITS = {"encrypted": (8, 1), "compressed": (10, 8), "a folder": (38, 16), "a name": (46, 128)}


@pytest.mark.parametrize("said", ENTRY_BITS)
def test_damage_in_the_directory_of_the_archive_is_found(checkpoint, tmp_path, said):
    damaged = bytearray(checkpoint.read_bytes())
    byte, bit = ENTRY_BITS[said]
    damaged[damaged.rindex(b"PK\x01\x02", 0, damaged.rindex(b"/data/7")) + byte] ^= bit
    (tmp_path / "file.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"file.pt is damaged \(it"):
        read_checkpoint(str(tmp_path / "file.pt"))
