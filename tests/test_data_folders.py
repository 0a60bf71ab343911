"""Data folders in every format of fairseq-preprocess, sharded, and with files that do not fit each other."""

import shutil

import pytest
import torch
from conftest import ROOT
from fairseq import options
from fairseq_cli import preprocess, train

from fairseq_alibi.__main__ import main
from fairseq_alibi.files.data_folders import read_subset


@pytest.fixture(scope="module")
def formats(corpus, tmp_path_factory):
    """Data folders of one text, by format."""
    folder = tmp_path_factory.mktemp("formats")
    for split in ("train", "valid"):
        (folder / f"{split}.txt").write_text("".join(f"word{n} word{n % 7} word{n % 3}\n" for n in range(40)) + "\n")
    parser = options.get_preprocessing_parser()
    for name in ("mmap", "raw", "lazy", "cached"):
        arguments = [
            "--only-source",
            "--srcdict",
            corpus / "dict.txt",
            "--destdir",
            folder / name,
            "--dataset-impl",
            name,
        ]
        arguments += ["--trainpref", folder / "train.txt", "--validpref", folder / "valid.txt"]
        preprocess.main(parser.parse_args(list(map(str, arguments))))
    return folder


@pytest.mark.parametrize("name", ["raw", "lazy", "cached"])
def test_older_formats_hold_the_same_tokens_and_train(formats, name, monkeypatch, tmp_path):
    assert torch.equal(read_subset(str(formats / name), "valid"), read_subset(str(formats / "mmap"), "valid"))
    arguments = ["--task", "language_modeling", "--arch", "alibi_lm_tiny", "--tokens-per-sample", "32"]
    arguments += [
        "--max-tokens",
        "64",
        "--optimizer",
        "adam",
        "--max-update",
        "2",
        "--save-dir",
        str(tmp_path),
        "--cpu",
    ]
    user_dir = str(ROOT / "fairseq_alibi")
    monkeypatch.setattr("sys.argv", ["fairseq-train", str(formats / name), "--user-dir", user_dir, *arguments])
    train.cli_main()
    updates = torch.load(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]
    assert updates == 2


def test_sharded_data_are_evaluated_as_fairseq_eval_lm_does(formats, checkpoint, tmp_path, capsys):
    """On the subsets of the first folder."""
    for output, data in (("one", formats / "mmap"), ("two", f"{formats / 'mmap'}:{formats / 'lazy'}")):
        main(["evaluate", str(data), str(checkpoint), "--lengths", "16", "--cpu", "--output", str(tmp_path / output)])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["16", "16"]]
    assert len(tables) == 2
    assert tables[0].split()[:4] == tables[1].split()[:4]


def test_offsets_past_the_end_are_named(formats, tmp_path):
    folder = shutil.copytree(formats / "mmap", tmp_path / "data")
    index = bytearray((folder / "valid.idx").read_bytes())
    sentences = int.from_bytes(index[18:26], "little")
    index[26 + 4 * sentences + 8 : 26 + 4 * sentences + 16] = (10**6).to_bytes(8, "little")  # of the second sentence
    (folder / "valid.idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"valid.idx points to places that its .bin does not have: prepare the folder"):
        read_subset(str(folder), "valid")
