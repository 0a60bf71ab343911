"""A corpus that needs no network: the source files of the running Python's standard library."""

import os
import platform
import re
import sysconfig
import tempfile
import tokenize
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from .binarize import SPLITS
from .plain_text import TextSettings, prepare_text

BYTES, MERGES = 6_000_000, 2_000  # size and BPE merges where nothing else is asked for

#: Paths of tests, other projects and generated tables, which are not code that somebody wrote for the library.
LEFT_OUT = re.compile(
    r"(^|/)(tests?|idlelib|turtledemo|lib2to3|ensurepip|encodings|pydoc_data|site-packages|dist-packages|__pycache__"
    r"|config-[^/]*|_sysconfigdata[^/]*|entities\.py)(/|$)"
)
PERCENT = {"train": 90, "valid": 5, "test": 5}  # share of the corpus that a split may take, in percent


def write_builtin_corpus(folder: Path, max_bytes: int) -> dict[str, Path]:
    """Writes `folder`/SPLIT.txt of at most `max_bytes` together, without blank lines; returns their paths.

    A hash of the name of a source file decides its place in the order and its split. A file is taken if it still fits.
    ValueError: no file fits into some split.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    files = sorted((zlib.crc32(name.encode()), name) for name in names if not LEFT_OUT.search(name))
    room = {split: max_bytes * percent // 100 for split, percent in PERCENT.items()}
    texts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for checksum, name in files:
        split = {0: "valid", 1: "test"}.get(checksum % 20, "train")
        with tokenize.open(root / name) as source:
            text = "".join(line.rstrip("\n") + "\n" for line in source if line.strip()).encode()
        if 0 < len(text) <= room[split]:
            room[split] -= len(text)
            texts[split].append(text)
    for split in SPLITS:
        if not texts[split]:
            raise ValueError(f"no file of {root} fits into the {split} split with --max-bytes {max_bytes}: raise it")
        (folder / f"{split}.txt").write_bytes(b"".join(texts[split]))
    return {split: folder / f"{split}.txt" for split in SPLITS}


def prepare_builtin(
    destination: Path,
    max_bytes: int = BYTES,
    settings: Optional[TextSettings] = None,
    workers: Optional[int] = None,
    prepare: Callable[..., None] = prepare_text,
) -> None:
    """Makes a data folder of the corpus, with one worker for each core by default; raises as `prepare` does."""
    with tempfile.TemporaryDirectory() as folder:
        texts = write_builtin_corpus(Path(folder), max_bytes)
        source = f"standard library of Python {platform.python_version()}"
        prepare(destination, texts, source, settings or TextSettings(units=MERGES), workers or os.cpu_count() or 1)
