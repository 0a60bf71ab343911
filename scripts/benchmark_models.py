"""Made-up texts and models that the benchmark measures with, and the small model that it trains once."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import numpy
import torch
from fairseq import options, tasks
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_alibi.data.builtin_corpus import prepare_builtin
from fairseq_alibi.experiments.presets import BUILTIN, ROOT
from fairseq_alibi.files.data_folders import made_up_dictionary, open_subset, subset_tokens

HEADS = 8
SIZES = (
    *("--decoder-layers", 4, "--decoder-attention-heads", HEADS, "--decoder-ffn-embed-dim", 1024),
    *("--decoder-embed-dim", 256, "--decoder-input-dim", 256, "--decoder-output-dim", 256),
    "--share-decoder-input-output-embed",
)


class Case(NamedTuple):
    """What is scored: by a made-up model with a vocabulary of `types`, adaptive where it has cutoffs.

    Args:
        types: in the vocabulary.
        cutoffs: as --adaptive-softmax-cutoff has them; None for a plain softmax.
        length, stride: of the windows, in tokens.
        tokens: in the text.
    """

    types: int
    cutoffs: Optional[str]
    length: int
    stride: int
    tokens: int

    @property
    def title(self) -> str:
        """As a table names it."""
        softmax = "adaptive" if self.cutoffs else "plain"
        return f"{self.length:,} / {self.stride:,} / {self.types:,}, {softmax}"


def rows(length: int, tokens: int) -> int:
    """Sequences of `length` in a batch of about `tokens` tokens, at least one."""
    return max(1, tokens // length)


def made_up_text(types: int, tokens: int) -> Tensor:
    """Random tokens, (tokens,) int64, none of them special; the token of rank r comes with a frequency like 1 / r."""
    torch.manual_seed(1)
    frequency = 1 / torch.arange(1.0, types - 3)  # fairseq adds 4 special symbols
    return torch.multinomial(frequency, tokens, replacement=True) + 4


def made_up_data(folder: Path, types: int, tokens: int) -> None:
    """Writes a data folder that has only a validation subset, of random tokens."""
    made_up_dictionary(types).save(str(folder / "dict.txt"))
    builder = MMapIndexedDatasetBuilder(str(folder / "valid.bin"), dtype=numpy.int32)
    for sentence in made_up_text(types, tokens).split(25):
        sentence[-1] = 2  # the end of sentence, which fairseq takes for granted
        builder.add_item(sentence)
    builder.finalize(str(folder / "valid.idx"))


def made_up_model(case: Case, folder: Path, args: argparse.Namespace) -> tuple[str, str]:
    """Data and checkpoint of a case: random weights, and text in which types are as frequent as in `training_step`.

    Returns:
        The data folder and the checkpoint, both in `folder`.
    """
    made_up_data(folder, case.types, case.tokens)
    sizes, adaptive = list(SIZES), case.cutoffs is not None
    if adaptive:
        sizes.remove("--share-decoder-input-output-embed")
        sizes += ["--adaptive-input", "--adaptive-input-cutoff", case.cutoffs, "--tie-adaptive-weights"]
        sizes += ["--adaptive-softmax-cutoff", case.cutoffs]
    arguments = [folder, "--task", "language_modeling", "--arch", "alibi_lm", *sizes, "--decoder-normalize-before"]
    arguments += ["--optimizer", "adam", "--lr", 1e-4, "--tokens-per-sample", 512]
    parsed = options.parse_args_and_arch(options.get_training_parser(), list(map(str, arguments)))
    cfg = convert_namespace_to_omegaconf(parsed)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    path = folder / "checkpoint.pt"
    state = {"args": None, "cfg": OmegaConf.to_container(cfg), "model": model.state_dict(), "extra_state": {}}
    torch.save({**state, "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {}}]}, path)
    return str(folder), str(path)


def first_tokens(data: str, length: int) -> Tensor:
    """The first `length` tokens of the train split of a fairseq data folder, sentences joined: (length,) int64.

    Raises:
        ValueError: there are not that many.
    """
    available = subset_tokens(data, "train")
    if available < length:
        raise ValueError(f"{data} holds {available:,} tokens of training text, not {length:,}: pass shorter --lengths")
    dataset = open_subset(data, "train")
    sentences, count = [], 0
    while count < length:
        sentences.append(dataset[len(sentences)])
        count += len(sentences[-1])
    return torch.cat(sentences)[:length].long()


def train_model(folder: Path, updates: int, cpu: bool) -> tuple[Path, Path]:
    """Trains a small ALiBi model on text of this machine, unless `folder` holds it.

    Returns:
        The checkpoint and its data folder.

    Raises:
        ValueError: Training failed; names its log.
    """
    data, save_dir = Path(BUILTIN), folder / f"model-{updates}-updates"
    checkpoint, log = save_dir / "checkpoint_last.pt", save_dir / "train.log"
    if checkpoint.exists():
        return checkpoint, data
    print(f"benchmark: training a model for {updates} updates (log in {log})", file=sys.stderr)
    save_dir.mkdir(parents=True, exist_ok=True)
    prepare_builtin(data.resolve())
    command = [data, "--user-dir", ROOT / "fairseq_alibi", "--task", "language_modeling", "--arch", "alibi_lm", *SIZES]
    command += ["--tokens-per-sample", 512, "--max-tokens", 2048, "--required-batch-size-multiple", 1]
    command += ["--optimizer", "adam", "--lr", 0.002, "--clip-norm", 0.5, "--lr-scheduler", "cosine"]
    command += ["--warmup-updates", updates // 5, "--lr-period-updates", updates - updates // 5]
    command += ["--max-update", updates, "--disable-validation", "--no-epoch-checkpoints", "--seed", 1]
    command += ["--save-dir", save_dir, *(["--cpu"] if cpu else [])]
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run([sys.executable, "-m", "fairseq_cli.train", *map(str, command)], stdout=output)
    if done.returncode:
        raise ValueError(f"fairseq-train ended with status {done.returncode}: see {log}, or pass --checkpoint")
    return checkpoint, data
