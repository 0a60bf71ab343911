"""What numpy 2 and torch's safe loader broke in fairseq works with the plugin loaded."""

import argparse
import os

import numpy as np
import torch
from conftest import BIN, run
from fairseq.logging.meters import AverageMeter

import fairseq_alibi  # noqa: F401


def test_interactive_generation_runs(corpus, train):
    """Through `np.compat.long`, and past the training length of 32."""
    command = [corpus, "--user-dir", "fairseq_alibi", "--path", train(), "--task", "language_modeling", "--cpu"]
    command += ["--beam", 1, "--max-len-a", 1, "--max-len-b", 60, "--input", "/dev/stdin"]
    import subprocess

    done = subprocess.run(
        [str(part) for part in [BIN / "fairseq-interactive", *command]],
        input="word1 word2 word3\n",
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
    )
    (hypothesis,) = [line for line in done.stdout.splitlines() if line.startswith("H-")]
    assert "word1 word2 word3" in hypothesis, done.stdout + done.stderr


def test_checkpoints_of_2021_load(corpus, train, tmp_path):
    """With an argparse.Namespace, numpy scalars and fairseq's meters, as fairseq wrote them then."""
    state = torch.load(train())
    state["args"] = argparse.Namespace(**{**state["cfg"]["task"], **state["cfg"]["model"]})
    state["args"].arch, state["args"].task, state["args"].criterion = (
        "alibi_lm_tiny",
        "language_modeling",
        "cross_entropy",
    )
    state["cfg"] = None
    state["extra_state"]["val_loss"] = np.float64(5.0)
    state["extra_state"]["meters"] = AverageMeter()
    torch.save(state, tmp_path / "old.pt")
    arguments = [corpus, "--user-dir", "fairseq_alibi", "--path", tmp_path / "old.pt", "--cpu", "--gen-subset", "valid"]
    assert "Perplexity" in run(BIN / "fairseq-eval-lm", *arguments, "--tokens-per-sample", 64).output
