"""`--ddp-backend fully_sharded` on torch's FSDP2 against training in one process, on this machine's CPU."""

import io
import json
import os
import re
import shutil

import pytest
import torch
from conftest import BIN, failure, fairseqs_own, run
from test_distributed import in_two_processes

from fairseq_alibi.__main__ import main
from fairseq_alibi.files.shard_sets import KEY
from fairseq_alibi.patches.sharded_trainer import own_rows

SHARDED = ("--ddp-backend", "fully_sharded", "--distributed-backend", "gloo", "--min-params-to-wrap", 1000)
#: Bands that a batch of one row may lack, so that a process has no gradient for them.
ADAPTIVE = (
    *("--criterion", "adaptive_loss", "--adaptive-input", "--tie-adaptive-weights"),
    *(f"--adaptive-{part}={value}" for part in ("input-cutoff", "softmax-cutoff") for value in ("20,38",)),
    *(f"--adaptive-{part}=2" for part in ("input-factor", "softmax-factor")),
    *(f"--decoder-{part}-dim=32" for part in ("embed", "input", "output", "ffn-embed")),
    *("--decoder-layers", 2, "--dropout", 0, "--attention-dropout", 0),
    *("--adam-eps", 1e-4),  # the gradients of some parameters are rounding errors, which Adam would enlarge
)


def command(corpus, save_dir, *arguments):
    optimizer = ("--optimizer", "adam", "--lr", 0.003, "--clip-norm", 0.3, "--cpu")
    task = ("--user-dir", "fairseq_alibi", "--task", "language_modeling", "--arch", "alibi_lm_tiny")
    sizes = ("--tokens-per-sample", 16, "--batch-size", 1, "--disable-validation", "--no-epoch-checkpoints")
    log = ("--log-format", "json", "--log-interval", 1)
    return (BIN / "fairseq-train", corpus, "--save-dir", save_dir, *task, *optimizer, *sizes, *log, *arguments)


def updates_in(output):
    lines = re.findall(r"train_inner \| (\{.*\})", output)
    return [(one["loss"], one["gnorm"], one["wpb"]) for one in map(json.loads, lines)]


@pytest.mark.slow
def test_two_processes_that_were_restarted_end_as_one_process(corpus, tmp_path):
    """With tied adaptive bands, clipping and accumulation; the checkpoint between and the last one are whole.

    An epoch has 13 blocks, so that the second process has no batch in its last update.
    """
    few = (*ADAPTIVE, "--train-subset", "valid", "--tokens-per-sample", 53)
    whole = (*few, "--max-update", 8, "--update-freq", 4, "--ddp-backend", "legacy_ddp")
    expected = updates_in(run(*command(corpus, tmp_path / "one", *whole)).output)
    assert [float(tokens) < 54 for *_, tokens in expected] == [False, False, False, True] * 2
    found = []
    for updates in (3, 8):
        more = (*few, *SHARDED, "--max-update", updates, "--update-freq", 2)
        (folder := tmp_path / f"log{updates}").mkdir()
        statuses, output = in_two_processes(folder, *command(corpus, tmp_path / "two", *more))
        assert statuses == [0, 0], output
        found += updates_in(output)
    assert found == expected
    one, two = (torch.load(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    for name in one["model"].keys() - {name for name in one["model"] if "_float_tensor" in name}:
        torch.testing.assert_close(two["model"][name], one["model"][name], rtol=0, atol=1e-5)
    states = [state["last_optimizer_state"]["state"] for state in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number, values in states[0].items():
        for name, value in values.items():
            torch.testing.assert_close(states[1][number][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--amp"], "--amp cannot run with --ddp-backend fully_sharded"),
        (["--store-ema"], "--store-ema cannot run"),
        (["--decoder-layerdrop", 0.5], "--decoder-layerdrop cannot run"),
        (["--use-bmuf"], "--use-bmuf cannot run"),
        (["--zero-sharding", "os"], "--zero-sharding os is part of --ddp-backend fully_sharded"),
        (["--cpu-offload"], "--cpu-offload needs a GPU"),
        (["--fp16"], "--fp16 needs a GPU"),
        (["--position-method", "fire"], "cannot divide decoder.position_method"),
        (["--optimizer", "adagrad"], "--optimizer adagrad needs whole parameters"),
        (["--arch", "transformer_lm"], "TransformerLanguageModel is no model of fairseq_alibi"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(corpus, tmp_path, options, message):
    done = run(*command(corpus, tmp_path, *SHARDED, "--max-update", 1, *options), check=False)
    assert done.returncode == 1
    assert message in done.output.splitlines()[-1]


def test_rows_of_the_last_process_may_be_few_or_none():
    class Mesh:
        def __init__(self, rank, size):
            self.get_local_rank, self.size = lambda: rank, lambda: size

    class Like:
        pass

    for rows, size in ((5, 4), (1, 3), (8, 4)):
        like, parts = Like(), []
        for rank in range(size):
            like.device_mesh = Mesh(rank, size)
            parts.append(own_rows(torch.arange(rows), like))
        chunks = torch.arange(rows).chunk(size)
        assert [part.tolist() for part in parts if len(part)] == [chunk.tolist() for chunk in chunks]


@pytest.fixture
def shards(make_once, corpus, tmp_path):
    """A run in one process that wrote its checkpoints of updates 2 and 4 as shards; returns a copy of its folder."""

    def fill(folder):
        more = (*SHARDED, "--use-sharded-state", "--save-interval-updates", 2, "--max-update", 4, "--decoder-layers", 1)
        run(*command(corpus, folder, *more))

    return shutil.copytree(make_once("shards", fill), tmp_path / "run")


def test_commands_read_shards_and_merge_them(shards, corpus, tmp_path, capsys):
    whole = tmp_path / "whole.pt"
    main(["merge-checkpoint", str(shards / "checkpoint_last.pt"), str(whole)])
    losses = [fairseqs_own(corpus, path) for path in (shards / "checkpoint_last.pt", whole)]
    assert losses[0] == losses[1]
    state = torch.load(whole)
    assert (
        state["last_optimizer_state"]["state"][0]["exp_avg"].shape
        == state["model"]["decoder.embed_tokens.weight"].shape
    )
    assert "is whole already" in failure(capsys, main, "merge-checkpoint", whole, tmp_path / "again.pt")
    assert "exists" in failure(capsys, main, "merge-checkpoint", shards / "checkpoint_last.pt", whole)


def test_a_damaged_folder_is_found_and_training_resumes_from_the_one_before(shards, corpus, capsys, tmp_path):
    (index,) = shards.glob("shards-4-*/__0_0.distcp")
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(content)
    last = shards / "checkpoint_last.pt"
    assert "__0_0.distcp is damaged" in failure(capsys, main, "evaluate", corpus, last, "--cpu", "--output", tmp_path)
    more = (*SHARDED, "--use-sharded-state", "--max-update", 5, "--decoder-layers", 1)
    output = run(*command(corpus, shards, *more)).output
    assert "training resumes from checkpoint_1_2.pt, 2 updates" in output
    assert len(updates_in(output)) == 3
    for path in shards.glob("shards-*"):
        shutil.rmtree(path)
    assert "is missing beside it" in failure(capsys, main, "merge-checkpoint", last, tmp_path / "whole.pt")


def test_the_index_of_a_folder_runs_no_code(shards, capsys, tmp_path):
    checkpoint = shards / "checkpoint_1_2.pt"
    state = torch.load(checkpoint)
    (shards / state[KEY]["folder"] / ".metadata").write_bytes(b"not read")
    main(["merge-checkpoint", str(checkpoint), str(tmp_path / "whole.pt")])
    torch.save(os.getcwd, buffer := io.BytesIO())
    state[KEY]["index"] = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    torch.save(state, checkpoint)
    line = failure(capsys, main, "merge-checkpoint", checkpoint, tmp_path / "other.pt")
    assert "getcwd" in line


def test_hydra_trains_sharded_too(corpus, tmp_path):
    """It imports this package after it has started the training command."""
    settings = (
        f"task.data={corpus}",
        f"checkpoint.save_dir={tmp_path}",
        f"hydra.run.dir={tmp_path}",
        "common.cpu=true",
    )
    more = (
        "optimization.max_update=1",
        "dataset.disable_validation=true",
        "common.bf16=true",
        "dataset.max_tokens=256",
    )
    config = ("--config-dir", "configs", "--config-name", "tiny", "distributed_training.ddp_backend=fully_sharded")
    output = run(BIN / "fairseq-hydra-train", *config, *settings, *more).output
    assert "Finished saving checkpoint" in output
    optimizer = torch.load(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["optimizer_name"]
    assert optimizer == "MemoryEfficientFP16Optimizer", "of sharded training in half precision"
