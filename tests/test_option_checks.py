"""Options that cannot work end fairseq's commands with one line before any work; long lines; unused parameters."""

import shutil

import pytest
import torch
from conftest import BIN, random_tokens, run, training_config
from fairseq import models
from fairseq.data import bucket_pad_length_dataset, data_utils

from fairseq_alibi.patches import option_checks

ADAPTIVE = ["--adaptive-softmax-cutoff", "10,20"]
SIZES = ["--arch", "alibi_lm_tiny", "--tokens-per-sample", 16, "--max-tokens", 128, "--optimizer", "adam", "--cpu"]


def training(corpus, folder, *more, check=False):
    """Runs fairseq-train for one epoch of a tiny model."""
    sizes = ["--decoder-layers", 1, "--decoder-embed-dim", 32, "--decoder-input-dim", 32, "--decoder-output-dim", 32]
    command = [BIN / "fairseq-train", corpus, "--user-dir", "fairseq_alibi", "--task", "language_modeling", *SIZES]
    return run(*command, *sizes, "--save-dir", folder, "--no-epoch-checkpoints", *more, check=check)


REFUSED = {
    "--criterion cross_entropy cannot train an adaptive softmax": ["--arch", "alibi_lm_wiki103", *ADAPTIVE],
    "--criterion ctc cannot train alibi_lm_tiny in this task: pass one of adaptive_loss,": ["--criterion", "ctc"],
    "--criterion adaptive_loss needs an adaptive softmax": ["--criterion", "adaptive_loss"],
    "cannot run with --ddp-backend pytorch_ddp: pass legacy_ddp": ["--criterion", "adaptive_loss", *ADAPTIVE],
    "--alibi-heads 4 is for --position-method alibi, not rotary": ["--position-method=rotary", "--alibi-heads=4"],
    "shares one table, and --adaptive-input has several": ["--adaptive-input", "--adaptive-input-cutoff", "10,20"],
    "alibi_max_bias must be a positive number": ["--alibi-max-bias", "-1"],
    "--optimizer-overrides: twist 1 is none of the options of --optimizer adam": ["--optimizer-overrides={'twist': 1}"],
    "--lr-scheduler manual: argument of type 'int' is not iterable: pass --epoch2lr and --update2lr as": [
        *("--lr-scheduler=manual", "--update2lr={1: 0.01}")
    ],
    "--character-embeddings are no table that the output could share": ["--character-embeddings"],
    "--use-plasma-view needs Plasma, which pyarrow has no more": ["--use-plasma-view"],
    "--attention-dropout -1.0: pass a probability from 0 to 1": ["--attention-dropout=-1"],
    "a causal model predicts the next token alone; drop them": ["--past-target"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_run_that_cannot_work_ends_with_one_line(corpus, tmp_path, message):
    done = training(corpus, tmp_path / "checkpoints", *REFUSED[message], "--max-update", 1)
    assert done.returncode == 1
    assert message in done.output.splitlines()[-1]
    assert "Traceback" not in done.output
    assert not list(tmp_path.glob("checkpoints/*.pt"))


def test_several_processes_on_cpus_need_another_backend(corpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    with pytest.raises(SystemExit, match=r"--ddp-backend pytorch_ddp needs GPUs .*: pass --ddp-backend legacy_ddp"):
        option_checks.check_criterion(training_config(corpus, "--task", "language_modeling", *SIZES))


def test_overrides_reach_a_checkpoint_that_is_older_than_the_option(corpus, checkpoint, tmp_path):
    state = torch.load(checkpoint)
    del state["cfg"]["model"]["alibi_max_bias"]
    torch.save(state, tmp_path / "old.pt")
    losses = []
    for bias in ("8.0", "16.0"):
        command = [
            corpus,
            "--user-dir",
            "fairseq_alibi",
            "--path",
            tmp_path / "old.pt",
            "--gen-subset",
            "valid",
            "--cpu",
        ]
        overrides = f"{{'alibi_max_bias': {bias}}}"
        losses.append(
            run(BIN / "fairseq-eval-lm", *command, "--cpu", "--model-overrides", overrides).output.split("Loss")[1]
        )
    assert losses[0] != losses[1]


@pytest.fixture(scope="module")
def long_lines(corpus, tmp_path_factory):
    """The corpus with a line of 400 words in each split."""
    folder = tmp_path_factory.mktemp("long")
    for split in ("train", "valid"):
        text = (corpus.parent / f"{split}.txt").read_text().splitlines()[:60]
        (folder / split).write_text("\n".join([*text, " ".join(["word1 word2"] * 200)]) + "\n")
    command = ["--only-source", "--srcdict", corpus / "dict.txt", "--destdir", folder / "data"]
    run(BIN / "fairseq-preprocess", *command, "--trainpref", folder / "train", "--validpref", folder / "valid")
    return folder / "data"


@pytest.mark.parametrize("mode", ["eos", "complete"])
def test_lines_longer_than_a_batch_are_trained_on_and_evaluated(long_lines, tmp_path, mode):
    done = training(long_lines, tmp_path, "--sample-break-mode", mode, "--max-epoch", 1, check=True)
    assert "longer than --max-tokens 128" in done.output
    assert "valid on" in done.output
    checkpoint = tmp_path / "checkpoint_best.pt"
    command = [long_lines, "--user-dir", "fairseq_alibi", "--path", checkpoint, "--gen-subset", "valid", "--cpu"]
    output = run(BIN / "fairseq-eval-lm", *command, "--sample-break-mode", mode, "--max-tokens", 128).output
    tokens = sum(len(line.split()) + 1 for line in (long_lines.parent / "valid").read_text().splitlines())
    assert f"Evaluated {tokens:,} tokens" in output


def test_lengths_of_buckets_are_lengths_of_samples():
    assert bucket_pad_length_dataset.get_buckets([4, 1, 3, 2, 9], 2).tolist() == [3, 9]


@pytest.mark.parametrize("vector", [False, True])
def test_batches_hold_each_sample_once_and_long_ones_alone(vector):
    sizes = [3, 900, 5, 128, 129, 7, 2, 4000]
    options = {"num_tokens_vec": sizes} if vector else {}
    batches = data_utils.batch_by_size(
        range(len(sizes)), sizes.__getitem__, max_tokens=128, max_sentences=3, required_batch_size_multiple=2, **options
    )
    batches = [[int(n) for n in batch] for batch in batches]
    assert sorted(n for batch in batches for n in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or max(sizes[n] for n in batch) * len(batch) <= 128


ARCHITECTURES = {
    "adaptive": [
        *("alibi_lm", "--decoder-layers=1", "--decoder-embed-dim=32", "--decoder-input-dim=32"),
        *("--decoder-output-dim=32", "--adaptive-input", "--adaptive-input-cutoff=10,20"),
    ],
    "LayerDrop": ["alibi_lm_tiny", "--decoder-layerdrop=0.9"],
    "t5": ["alibi_lm_tiny", "--position-method=t5"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unused_parameters_are_looked_for_by_ddp(build, monkeypatch, name):
    """fairseq wraps a model for several processes with what torch needs; on a CPU the wrapper itself cannot run."""
    from argparse import Namespace

    model, wrapped = build(*ARCHITECTURES[name]), []
    monkeypatch.setattr(
        models.distributed_fairseq_model, "DistributedDataParallel", lambda **options: wrapped.append(options)
    )
    monkeypatch.setattr(models.distributed_fairseq_model, "ModuleProxyWrapper", lambda module: module)
    names = ["tpu", "device_id", "broadcast_buffers", "bucket_cap_mb", "find_unused_parameters", "heartbeat_timeout"]
    args = Namespace(**dict.fromkeys([*names, "gradient_as_bucket_view", "ddp_comm_hook"]), ddp_backend="pytorch_ddp")
    args.find_unused_parameters, args.heartbeat_timeout = False, -1
    models.DistributedFairseqModel(args, model, None, torch.device("cpu"))
    assert wrapped[0]["find_unused_parameters"] is True


def test_some_batches_leave_parameters_without_a_gradient(build):
    """Why: rare words are not in every batch."""
    model = build(*ARCHITECTURES["adaptive"]).train()
    model(random_tokens(model, 1, 5).clamp(max=6))[0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None]


def test_the_commands_stay_as_they_are_for_good_options(long_lines, tmp_path):
    folder = tmp_path / "adaptive"
    good = ["--arch", "alibi_lm", *ADAPTIVE, "--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"]
    done = training(long_lines, folder, *good, "--max-update", 1, check=True)
    assert "num_updates 1" in done.output
    shutil.rmtree(folder)
