"""Plain-text files to a data folder: Moses tokens, then BPE that is learned on the training text alone."""

import contextlib
import functools
import io
import itertools
import shlex
import types
from collections.abc import Callable
from pathlib import Path
from typing import Optional, Union

from sacremoses import MosesTokenizer
from sacremoses.util import parallelize_preprocess
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from tqdm import tqdm

from .binarize import SPLITS, check_text, count_tokens, run_preprocess
from .destination import is_prepared, publish, work_folder

MERGES = 10_000  # of BPE, where nothing else is asked for
BATCH_LINES = 20_000  # lines in memory at a time while they are encoded


def encode_splits(folder: Path, source: str, target: str, encode: Callable[[str], str], workers: int) -> None:
    """Encodes `folder`/SPLIT.`source` to `folder`/SPLIT.`target` line by line, in several processes."""
    for split in SPLITS:
        with (
            open(folder / f"{split}.{source}", encoding="utf-8", newline="\n") as lines,
            open(folder / f"{split}.{target}", "w", encoding="utf-8", newline="\n") as encoded,
            tqdm(desc=f"{target} {split}", unit=" lines", unit_scale=True, disable=None) as bar,
        ):
            while batch := [line.rstrip("\n") for line in itertools.islice(lines, BATCH_LINES)]:
                encoded.writelines(f"{line}\n" for line in parallelize_preprocess(encode, batch, workers))
                bar.update(len(batch))


def moses_encoder() -> Callable[[str], str]:
    """Returns the function of fairseq's `--tokenizer moses`, without fairseq, so that workers need not load it."""
    return functools.partial(MosesTokenizer("en").tokenize, aggressive_dash_splits=True, return_str=True, escape=True)


def learn_codes(text: Path, codes: Path, merges: int) -> None:
    """Learns up to `merges` BPE merges from a tokenized text and writes them to `codes`.

    Raises:
        ValueError: The text is too small for a single merge.
    """
    with (
        open(text, encoding="utf-8", newline="\n") as lines,
        open(codes, "w", encoding="utf-8") as file,
        tqdm(total=merges, desc="learn bpe", unit=" merges", disable=None) as bar,
    ):

        def write(line: str) -> None:
            file.write(line)
            bar.update(not line.startswith("#version"))

        # subword-nmt raises ValueError without a pair of characters, and writes to stderr without a frequent pair.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ValueError):
            learn_bpe(lines, types.SimpleNamespace(write=write), merges)
    if codes.read_text(encoding="utf-8").count("\n") < 2:
        raise ValueError("the training text is too small to learn BPE: give more text, or use --word-level")


def prepare_text(
    destination: Path,
    texts: dict[str, Path],
    source: Union[str, dict[str, str]],
    bpe_merges: Optional[int],
    workers: int,
) -> None:
    """Makes a data folder of plain-text files.

    Args:
        destination: The data folder.
        texts: The file of every split.
        source: Description of the texts, for `prepared.json`.
        bpe_merges: Number of BPE merges; None for Moses tokens alone.
        workers: Number of processes.

    Raises:
        ValueError: Bad input, see `check_text`, `is_prepared` and `learn_codes`.
        OSError: The folder cannot be written.
    """
    summaries = {split: check_text(path) for split, path in texts.items()}
    identity = {
        "inputs": {split: summary.sha256 for split, summary in summaries.items()},
        "settings": {"corpus": "text", "tokenizer": "moses", "bpe_merges": bpe_merges},
    }
    if is_prepared(destination, identity):
        return
    with work_folder(destination) as work:
        for split, path in texts.items():
            (work / f"{split}.txt").symlink_to(path.resolve())
        encode_splits(work, "txt", "moses", moses_encoder(), workers)
        suffix, options, codes = "moses", ["--tokenizer", "moses"], work / "bpe.codes"
        if bpe_merges is not None:
            learn_codes(work / "train.moses", codes, bpe_merges)
            with open(codes, encoding="utf-8") as file:
                encode_splits(work, "moses", "bpe", BPE(file).process_line, workers)
            suffix = "bpe"
            options += ["--bpe", "subword_nmt", "--bpe-codes", str(destination / codes.name)]
        data = run_preprocess(work, suffix, workers)
        if bpe_merges is not None:
            codes.rename(data / codes.name)
        counts = count_tokens(data, summaries)
        common = [str(destination), "--user-dir", str(Path(__file__).parents[1]), "--task", "language_modeling"]
        save_dir = f"checkpoints/{destination.name}"
        training = ["--arch", "alibi_lm_tiny", "--tokens-per-sample", "256", "--max-tokens", "4096"]
        training += ["--optimizer", "adam", "--lr", "0.001", "--max-update", "1000", "--save-dir", save_dir]
        command = ["fairseq-train", *common, *training]
        publish(data, destination, {**identity, "source": source, "counts": counts}, shlex.join(command))
        command = ["fairseq-interactive", *common, "--path", f"{save_dir}/checkpoint_best.pt", *options]
        print(f"The model then continues lines of plain text:\n  {shlex.join(command)}")
