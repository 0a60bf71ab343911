"""Checkpoints of version 0.1, from before the package had folders, load and compute what they did then.

Each file in `old_checkpoints` holds a tiny model of fairseq-train and, under `expected_logits`, what the code of that
version computed for the tokens below: the sums of the logits at each position, then the logits at the last one.
"""

import shutil
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

import fairseq_alibi  # noqa: F401

FOLDER = Path(__file__).parent / "old_checkpoints"
TOKENS = torch.tensor([[4, 5, 6, 7, 8, 9, 4, 5, 2, 6]])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.pt")), ids=lambda path: path.stem)
@pytest.mark.parametrize("attention", [None, "mask"])
def test_a_checkpoint_of_version_0_1_computes_the_same(path, attention, tmp_path):
    for name in ("dict.txt", "dict.src.txt", "dict.tgt.txt"):
        shutil.copy(FOLDER / "dict.txt", tmp_path / name)
    overrides = {"data": str(tmp_path), **({"attention": attention} if attention else {})}
    if path.stem.startswith("translation"):
        overrides.update(source_lang="src", target_lang="tgt")
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)
    with torch.no_grad():
        arguments = (TOKENS, torch.tensor([10]), TOKENS) if path.stem.startswith("translation") else (TOKENS,)
        logits = model.eval()(*arguments)[0].double()
    found = torch.cat([logits.sum(-1)[0], logits[0, -1]])
    expected = torch.tensor(torch.load(path)["expected_logits"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
