"""Plain text to fairseq's binary format: checks before, fairseq-preprocess, checks after."""

import codecs
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from fairseq.data import Dictionary, indexed_dataset

SPLITS = ("train", "valid", "test")
MOST_WORKERS = 1024  # each is a process


def check_workers(workers: int) -> None:
    """Raises ValueError for an absurd number of processes."""
    if workers > MOST_WORKERS:
        raise ValueError(f"--workers {workers}: each is a process, pass at most {MOST_WORKERS:,}")


class TextSummary(NamedTuple):
    """A checked text file: its size as it was given, and its SHA-256, hexadecimal. White space separates words."""

    lines: int
    words: int
    characters: int
    bytes: int
    sha256: str


def lines_between(path: Path, begin: int = 0, end: Optional[int] = None) -> Iterator[bytes]:
    """Yields the lines of a file from one offset to another, each where a line begins."""
    with open(path, "rb") as file:
        file.seek(begin)
        while (end is None or begin < end) and (line := file.readline()):
            begin += len(line)
            yield line


def check_is_file(path: Path) -> None:
    """Raises ValueError unless the path is a file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: name a plain-text file that exists")


def check_text(path: Path, begin: int = 0, end: Optional[int] = None) -> TextSummary:
    """Checks that a file is text that fairseq-preprocess reads as meant: UTF-8, not empty, no BOM, no zero bytes.

    With `begin` and `end` a part of a file: see `lines_between`.
    """
    check_is_file(path)
    digest = hashlib.sha256()
    lines = words = characters = size = 0
    for line in lines_between(path, begin, end):
        lines += 1
        fault = "a zero byte, so this is no plain text: name a text file" if b"\0" in line else ""
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            fault = fault or f"not UTF-8 ({error.reason}): convert it, for example with iconv -f LATIN1 -t UTF-8"
        if fault:
            number = lines + sum(1 for _ in lines_between(path, 0, begin))
            raise ValueError(f"{path}, line {number}: {fault}")
        if lines == 1 and begin == 0 and line.startswith(codecs.BOM_UTF8):
            raise ValueError(f"{path} starts with a byte order mark: remove it with sed -i '1s/^\\xEF\\xBB\\xBF//'")
        digest.update(line)
        words += len(text.split())
        characters += len(text)
        size += len(line)
    if not words and end is None:
        raise ValueError(f"{path} is empty: name a file with text in it")
    return TextSummary(lines, words, characters, size, digest.hexdigest())


def run_preprocess(folder: Path, suffix: str, workers: int) -> Path:
    """Runs fairseq-preprocess on `folder`/SPLIT.`suffix`; returns the data folder. ValueError quotes its last line."""
    # The files are named relative to the working directory, because fairseq splits a path at its commas.
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--destdir", "data"]
    command += ["--workers", str(workers)]
    command += [word for split in SPLITS for word in (f"--{split}pref", f"{split}.{suffix}")]
    if sys.stderr.isatty():
        print("fairseq-preprocess runs: seconds for small texts, minutes for WikiText-103", file=sys.stderr)
    log = folder / "preprocess.out"
    with open(log, "w") as output:
        # A session of its own, so that its workers can be stopped with it before the folder is removed.
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if status:
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no output"
        if shutil.disk_usage(folder).free < 1 << 20:
            reason = "the disk is full: make room, or choose another DEST"
        raise ValueError(f"fairseq-preprocess ended with status {status}: {reason}")
    return folder / "data"


def count_tokens(data: Path, summaries: dict[str, TextSummary]) -> dict[str, Any]:
    """Counts what a data folder holds, given the summaries of the text of every split.

    Returns `types` of the dictionary; for each split `lines`, `words`, `characters` and `bytes` of the text as it was
    given, `tokens` (line ends included) and `unknown` tokens. Raises ValueError if lines were lost or added.
    """
    dictionary = Dictionary.load(str(data / "dict.txt"))
    counts: dict[str, Any] = {"types": len(dictionary)}
    for split in SPLITS:
        ids = np.memmap(data / f"{split}.bin", indexed_dataset.best_fitting_int_dtype(len(dictionary)), mode="r")
        dataset = indexed_dataset.MMapIndexedDataset(str(data / split))  # owns the memory that its sizes point to
        summary = summaries[split]
        if len(dataset) != summary.lines or dataset.sizes.sum() != len(ids):
            raise ValueError(
                f"fairseq-preprocess made {len(dataset):,} lines and {len(ids):,} tokens of the {summary.lines:,} "
                f"lines of the {split} text: look for carriage returns inside its lines"
            )
        unknown = int(np.count_nonzero(ids == dictionary.unk()))
        counts[split] = {**summary._asdict(), "tokens": len(ids), "unknown": unknown}
        del counts[split]["sha256"]
    return counts
