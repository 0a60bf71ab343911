"""A corpus that needs no network: the source files of the running Python's standard library."""

import os
import platform
import re
import sysconfig
import tempfile
import tokenize
import zlib
from pathlib import Path
from typing import Optional

from .binarize import SPLITS
from .plain_text import TextSettings, prepare_text

#: Size and BPE merges where nothing else is asked for.
BYTES, MERGES = 6_000_000, 2_000

#: Paths of tests, other projects and generated tables, which are not code that somebody wrote for the library.
LEFT_OUT = re.compile(
    r"(^|/)(tests?|idlelib|turtledemo|lib2to3|ensurepip|encodings|pydoc_data|site-packages|dist-packages|__pycache__"
    r"|config-[^/]*|_sysconfigdata[^/]*|entities\.py)(/|$)"
)
#: Share of the corpus that a split may take, in percent.
PERCENT = {"train": 90, "valid": 5, "test": 5}


def write_builtin_corpus(folder: Path, max_bytes: int) -> dict[str, Path]:
    """Writes `folder`/SPLIT.txt, without blank lines. Every source file is in at most one split.

    A hash of its name decides the place of a file in the order and its split. A file is taken if it still fits.

    Args:
        folder: An existing folder.
        max_bytes: Limit of all splits together.

    Returns:
        The path of every split.

    Raises:
        ValueError: No file fits into some split.
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
) -> None:
    """Makes a data folder of the corpus.

    Args:
        destination: The data folder.
        max_bytes: See `write_builtin_corpus`.
        settings: How the text is split into tokens.
        workers: Number of processes; default: one for each core.

    Raises:
        ValueError: See `write_builtin_corpus` and `prepare_text`.
        OSError: The folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts = write_builtin_corpus(Path(folder), max_bytes)
        source = f"standard library of Python {platform.python_version()}"
        prepare_text(destination, texts, source, settings or TextSettings(units=MERGES), workers or os.cpu_count() or 1)
