"""`prepare-text --shards`: the text of one data folder in several, which training and evaluation take together."""

import json
import random
import re
import shutil
import signal
import sys

import benchmark_preparing
import pytest
import torch
from conftest import BIN, run
from fairseq.data import Dictionary, indexed_dataset

from fairseq_alibi.__main__ import main
from fairseq_alibi.data import shards


@pytest.fixture
def texts(tmp_path):
    """Three texts of short words, one of them unknown; returns their paths by split."""
    rng = random.Random(1)
    words = [f"{a}{b}" for a in "abcde" for b in ("lo", "wer", "est")]
    paths = {split: tmp_path / f"{split}.txt" for split in ("train", "valid", "test")}
    for (split, path), lines in zip(paths.items(), (400, 20, 20)):
        made = [" ".join(rng.choices(words, k=rng.randrange(9))) for _ in range(lines)]
        path.write_text("\n".join([*made, "œ" if split == "valid" else "low", ""]))
    return paths


def prepare(texts, dest, *options):
    arguments = [word for split, path in texts.items() for word in (f"--{split}", str(path))]
    main(["prepare-text", str(dest), *arguments, "--workers", "1", "--bpe-merges", "12", *map(str, options)])


def numbers(folder, split):
    """The tokens of a subset, line by line."""
    dataset = indexed_dataset.MMapIndexedDataset(str(folder / split))
    return [dataset[n].tolist() for n in range(len(dataset))]


def test_shards_hold_the_text_of_one_folder(texts, tmp_path, capsys):
    dest, one = tmp_path / "data", tmp_path / "one"
    prepare(texts, one)
    prepare(texts, dest, "--shards", 3)
    folders = [dest / f"shard{n}" for n in range(3)]
    assert ":".join(map(str, folders)) in capsys.readouterr().out.splitlines()[-5]
    parts = [numbers(folder, "train") for folder in folders]
    assert [line for part in parts for line in part] == numbers(one, "train")
    assert all(len(part) > 100 for part in parts)
    for split in ("valid", "test"):
        assert numbers(folders[0], split) == numbers(one, split)
    for folder in folders:
        for name in ("dict.txt", "bpe.codes"):
            assert (folder / name).read_bytes() == (one / name).read_bytes()
    counts = [json.loads((folder / "prepared.json").read_text())["counts"] for folder in (one, dest, *folders)]
    assert {**counts[1], "train": None} == {**counts[0], "train": None} == {**counts[2], "train": None}
    for name in ("lines", "words", "characters", "bytes", "tokens", "unknown"):
        assert counts[0]["train"][name] == counts[1]["train"][name] == sum(part["train"][name] for part in counts[2:])
    assert counts[0]["valid"]["unknown"] == 1

    prepare(texts, dest, "--shards", 3)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other inputs or settings"):
        prepare(texts, dest, "--shards", 2)


def test_a_stopped_preparation_keeps_the_parts_that_are_done(texts, tmp_path, monkeypatch, capsys):
    dest, read, encoded_lines = tmp_path / "data", [], shards.encoded_lines

    def stopping(part, *arguments):
        read.append(part.name)
        for number, line in enumerate(encoded_lines(part, *arguments)):
            if part.name == stop_in and number == 5:
                raise KeyboardInterrupt
            yield line

    monkeypatch.setattr(shards, "encoded_lines", stopping)
    for stop_in in ("train2", "test", None):
        read.clear()
        with pytest.raises(SystemExit, match="130") if stop_in else monkeypatch.context():
            prepare(texts, dest, "--shards", 4)
        if stop_in == "train2":
            assert read == ["train0", "train1", "train2"]
            assert not dest.exists()
    assert read == ["test"]
    assert "is resumed: its finished parts are kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "data" in path.name] == ["data"], "nothing else is left"
    prepare(texts, tmp_path / "fresh", "--shards", 4)
    for folder in (f"shard{n}" for n in range(4)):
        for path in (tmp_path / "fresh" / folder).glob("*.[bit]*"):
            assert path.read_bytes() == (dest / folder / path.name).read_bytes()


@pytest.mark.parametrize("change", ["text", "settings"])
def test_what_was_begun_with_other_inputs_is_made_anew(texts, tmp_path, monkeypatch, capsys, change):
    dest = tmp_path / "data"
    with monkeypatch.context() as stopped:
        stopped.setattr(shards, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            prepare(texts, dest, "--shards", 2)
    if change == "text":
        texts["train"].write_text(texts["train"].read_text().replace("elo", "ulo"))
    prepare(texts, dest, "--shards", 2 if change == "text" else 3)
    assert "was begun with other inputs or settings" in capsys.readouterr().err
    assert "elo" in " ".join(Dictionary.load(str(dest / "shard0" / "dict.txt")).symbols) or change == "text"
    assert len(list(dest.glob("shard*"))) == (2 if change == "text" else 3)


def test_a_process_that_the_system_kills_is_named():
    with pytest.raises(
        ValueError, match=r"with \{SIGKILL\(-9\).*pass fewer than 2 --workers; the same command keeps the parts"
    ):
        shards.run_jobs(signal.raise_signal, [signal.SIGKILL, signal.SIGKILL], 2, "killed")


@pytest.mark.slow
def test_the_benchmark_of_preparing_prints_a_line_for_each_way(texts, tmp_path, monkeypatch, capsys):
    assert benchmark_preparing.measure([sys.executable, "-c", ""], str(tmp_path))[1] >= 0
    with pytest.raises(SystemExit, match="failed: reason"):
        benchmark_preparing.measure([sys.executable, "-c", "exit('reason')"], str(tmp_path))
    monkeypatch.setattr(benchmark_preparing, "measure", lambda command, folder: run(*command, cwd=folder) and (1, 1, 1))
    words = ["benchmark_preparing.py", texts["train"], "--copies", 2, "--shards", 2, "--workers", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    benchmark_preparing.main()
    counts = re.findall(r"2 copies, (.*): ([0-9,]+) tokens, ", capsys.readouterr().out)
    assert [name for name, _ in counts] == ["words", "fairseq-preprocess", "Moses and BPE"]
    assert counts[0][1] == counts[1][1] != "0"


@pytest.mark.slow
def test_training_goes_through_shards_and_resumes_in_the_middle_of_one(texts, tmp_path):
    prepare(texts, tmp_path / "data", "--shards", 3)
    data = ":".join(str(tmp_path / "data" / f"shard{n}") for n in range(3))
    command = (BIN / "fairseq-train", data, "--user-dir", "fairseq_alibi", "--task", "language_modeling", "--cpu")
    command += ("--arch", "alibi_lm_tiny", "--decoder-layers", 1, "--tokens-per-sample", 16, "--max-tokens", 512)
    command += ("--optimizer", "adam", "--lr", 0.003, "--save-interval-updates", 1, "--disable-validation")
    command += ("--no-epoch-checkpoints", "--max-epoch", 4, "--save-dir")
    output = run(*command, tmp_path / "whole").output
    loaded = re.compile(r"loaded [\d,]+ examples from: \S+/shard(\d)/train")
    assert loaded.findall(output) == list("01201"), "fairseq opens the fifth epoch's before it ends"
    checkpoints = {
        tuple(map(int, re.findall(r"\d+", path.name))): path for path in (tmp_path / "whole").glob("*_*_*.pt")
    }
    updates = [update for epoch, update in checkpoints if epoch == 2]
    middle = checkpoints[2, updates[len(updates) // 2]]
    (tmp_path / "resumed").mkdir()
    shutil.copy(middle, tmp_path / "resumed" / "checkpoint_last.pt")
    output = run(*command, tmp_path / "resumed").output
    assert loaded.findall(output) == list("1201")
    whole, resumed = (torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    for place, folders in (("a", data), ("b", data.split(":")[0])):
        checkpoint = str(tmp_path / "whole" / "checkpoint_last.pt")
        main(["evaluate", folders, checkpoint, "--lengths", "32", "--cpu", "--output", str(tmp_path / place)])
    losses = [json.loads(next((tmp_path / place).glob("*.json")).read_text())["results"][0]["loss"] for place in "ab"]
    assert losses[0] == losses[1]
