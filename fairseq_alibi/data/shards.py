"""One training text to many data folders, which fairseq trains on one after another: `a:b:c`, an epoch each.

The text is cut at line ends into parts of equal size. Each part, and the texts of validation and test, which are in the
first folder, is a job of one process. A job's result is in DEST.partial until all are done, so that the same command
resumes after a stop. Memory does not grow with the text: a job reads it line by line. Subword units are learned on a
sample, types and their counts on all parts.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from fairseq.data import Dictionary, indexed_dataset
from joblib import Parallel, delayed
from tqdm import tqdm

from ..files.results import write_json, written_whole
from .binarize import SPLITS, TextSummary, check_is_file, check_text, lines_between
from .destination import is_prepared, print_counts, publish, work_folder, write_description
from .plain_text import TextSettings, count_restored, encode_file, learn_units, print_commands, unit_encoder

MOST_SHARDS = 1000
SUMMED = ("lines", "words", "characters", "bytes", "tokens", "unknown")  # counts of parts that make those of a text
SAMPLE_BYTES = 100_000_000  # of the training text, on which subword units are learned: as much of each part


class TextPart(NamedTuple):
    """A text or a part of one, between two offsets."""

    name: str  # valid, test, or train and the number of the part
    path: Path
    begin: int = 0
    end: Optional[int] = None


def cut_text(path: Path, count: int) -> list[TextPart]:
    """Cuts a training text into parts of about the same size; ValueError if it has too few lines."""
    check_is_file(path)
    size, offsets = path.stat().st_size, [0]
    with open(path, "rb") as file:
        for number in range(1, min(count, MOST_SHARDS)):
            file.seek(max(0, size * number // count - 1))
            file.readline()
            offsets.append(file.tell())
    offsets.append(size)
    if count > MOST_SHARDS or any(begin >= end for begin, end in zip(offsets, offsets[1:])):
        raise ValueError(f"--shards {count}: {path} has too few lines: pass a smaller number, at most {MOST_SHARDS}")
    width = len(str(count - 1))
    return [TextPart(f"train{n:0{width}}", path, *pair) for n, pair in enumerate(zip(offsets, offsets[1:]))]


def run_jobs(job: Callable[..., Any], parts: Sequence[TextPart], workers: int, title: str, *more: Any) -> list[Any]:
    """Returns `job(part, *more)` of each part, in several processes; ValueError if the system kills one."""
    jobs = Parallel(n_jobs=min(workers, len(parts)), return_as="generator")(delayed(job)(part, *more) for part in parts)
    try:
        with warnings.catch_warnings(), contextlib.closing(jobs):
            warnings.filterwarnings("ignore", message=".*tasks which were still being processed")  # after a failure
            return list(tqdm(jobs, desc=title, total=len(parts), unit=" parts", disable=None))
    except BrokenExecutor as error:
        status = re.search(r"(?<=exit codes of the workers are )\{.*?\}", str(error))
        raise ValueError(
            f"a process ended{f' with {status[0]}' if status else ''}, perhaps because the memory is full: pass fewer "
            f"than {workers} --workers; the same command keeps the parts that are done"
        ) from error


def check_part(part: TextPart) -> TextSummary:
    """Checks a part, see `check_text`."""
    return check_text(*part[1:])


def encode_part(part: TextPart, work: Path, settings: TextSettings, units: Optional[Path]) -> None:
    """Writes the tokens of a part to `work`/NAME.tokens and how often each occurs to NAME.types.json, once."""
    if (types := work / f"{part.name}.types.json").exists():
        return
    counts: Counter[str] = Counter()
    made = written_whole(work / f"{part.name}.tokens")
    with made as path, open(path, "w", encoding="utf-8", newline="\n") as file:
        for line in encoded_lines(part, settings, units):
            file.write(line + "\n")
            counts.update(line.split())
    write_json(types, counts)


def encoded_lines(part: TextPart, settings: TextSettings, units: Optional[Path]) -> Iterator[str]:
    """Yields the lines of a part, with spaces between their tokens."""
    split_words, split_units = settings.word_encoder(), unit_encoder(units) if units else str
    for line in lines_between(*part[1:]):
        yield split_units(split_words(line.decode().rstrip("\n")))


def write_dictionary(work: Path, parts: Sequence[TextPart]) -> int:
    """Writes dict.txt, as fairseq-preprocess makes it of all parts together, once; returns the number of types."""
    if not (work / "dict.txt").exists():
        counts: Counter[str] = Counter()
        for part in parts:
            counts.update(json.loads((work / f"{part.name}.types.json").read_text(encoding="utf-8")))
        dictionary = Dictionary()
        for word, number in counts.items():
            dictionary.add_symbol(word, number)
        dictionary.finalize(padding_factor=8)
        with written_whole(work / "dict.txt") as path:
            dictionary.save(str(path))
    return len(Dictionary.load(str(work / "dict.txt")))


def binarize_part(part: TextPart, work: Path) -> dict[str, int]:
    """Writes NAME.bin and NAME.idx of the tokens of a part, once; returns the number of tokens and of unknown ones."""
    if (result := work / f"{part.name}.counts.json").exists():
        return json.loads(result.read_text())
    dictionary = Dictionary.load(str(work / "dict.txt"))
    index, unknown, counts = dictionary.indices, dictionary.unk(), {"tokens": 0, "unknown": 0}
    with (
        open(work / f"{part.name}.tokens", encoding="utf-8", newline="\n") as lines,
        written_whole(work / f"{part.name}.bin") as path,
    ):
        builder = indexed_dataset.make_builder(str(path), "mmap", vocab_size=len(dictionary))
        for line in lines:
            tokens = [index.get(word, unknown) for word in line.split()]
            builder.add_item(torch.tensor([*tokens, dictionary.eos()], dtype=torch.int))
            counts["tokens"] += len(tokens) + 1
            counts["unknown"] += tokens.count(unknown)
        builder.finalize(str(work / f"{part.name}.idx"))
    write_json(result, counts)
    return counts


def learn_sample(work: Path, parts: Sequence[TextPart], settings: TextSettings, workers: int) -> Optional[Path]:
    """Learns subword units, once, on the beginnings of all parts; returns their file, None for whole words."""
    if settings.units is None:
        return None
    (folder := work / "sample").mkdir(exist_ok=True)
    if not (done := folder / "done").exists():
        with open(folder / "train.txt", "wb") as file:
            for part in parts:
                assert part.end is not None
                end = min(part.end, part.begin + SAMPLE_BYTES // len(parts))
                file.writelines(lines_between(part.path, part.begin, end))
        encode_file(folder, "train", "txt", "words", settings.word_encoder(), workers)
        units = learn_units(folder, settings, workers)
        done.write_text(units.name)
    return folder / done.read_text()


def resume(work: Path, identity: dict[str, Any]) -> None:
    """Removes what an earlier preparation left in its folder unless it had the same inputs and settings."""
    record = work / "identity.json"
    if record.exists() and json.loads(record.read_text()) == identity:
        print(f"{work.parent} is resumed: its finished parts are kept", file=sys.stderr)
        return
    if record.exists():
        print(f"{work.parent} was begun with other inputs or settings: it is made anew", file=sys.stderr)
    shutil.rmtree(work)
    work.mkdir()
    write_json(record, identity)


def make_folder(folder: Path, parts: dict[str, TextPart], units: Optional[Path], description: dict[str, Any]) -> None:
    """Makes a data folder of the results of one part for each split, which are in the folder above `folder`'s own."""
    folder.mkdir(parents=True, exist_ok=True)
    work = folder.parents[1]
    for split, part in parts.items():
        for suffix in ("bin", "idx"):
            if (made := work / f"{part.name}.{suffix}").exists():  # else an earlier preparation has moved it
                made.replace(folder / f"{split}.{suffix}")
    for file in (work / "dict.txt", units):
        if file is not None:
            shutil.copyfile(file, folder / file.name)
    write_description(folder, description)


def count_parts(
    work: Path, parts: Sequence[TextPart], summaries: Sequence[TextSummary], settings: TextSettings, workers: int
) -> dict[str, Any]:
    """Returns what each part holds, by its name, after its tokens are binarized; see `count_tokens`."""
    counts: dict[str, Any] = {}
    for part, summary, size in zip(parts, summaries, run_jobs(binarize_part, parts, workers, "binarize", work)):
        counts[part.name] = {**summary._asdict(), **size}
        del counts[part.name]["sha256"]
        if part.begin == 0:
            restored = count_restored(work, {part.name: part.path}, work, "tokens", settings)
            counts[part.name]["restored"] = restored[part.name]
    return counts


def prepare_shards(
    destination: Path,
    texts: dict[str, Path],
    source: Union[str, dict[str, str]],
    settings: TextSettings,
    workers: int,
    shards: int,
) -> None:
    """Makes data folders of equal parts of the training text in `destination`; see `prepare_text`."""
    train = cut_text(texts["train"], shards)
    others = {split: TextPart(split, texts[split]) for split in SPLITS[1:]}
    parts = [*train, *others.values()]
    summaries = run_jobs(check_part, parts, workers, "check")
    if not any(summary.words for summary in summaries[:shards]):
        raise ValueError(f"{texts['train']} is empty: name a file with text in it")
    inputs = {part.name: summary.sha256 for part, summary in zip(parts, summaries)}
    identity = {"inputs": inputs, "settings": {**settings.record(), "shards": shards}}
    names = {part: part.name.replace("train", "shard") for part in train}
    if not is_prepared(destination, identity):
        with work_folder(destination, resumes=True) as work:
            resume(work, identity)
            units = learn_sample(work, train, settings, workers)
            run_jobs(encode_part, parts, workers, "encode", work, settings, units)
            types = write_dictionary(work, train)
            counts = count_parts(work, parts, summaries, settings, workers)
            described: dict[str, Any] = {**identity, "source": source}
            for part, name in names.items():
                content = {"train": part, **(others if part is train[0] else {})}
                held = {"types": types, **{split: counts[part.name] for split, part in content.items()}}
                make_folder(work / "data" / name, content, units, {**described, "part": part.name, "counts": held})
            whole = {name: sum(counts[part.name][name] for part in train) for name in SUMMED}
            whole = {"types": types, "train": {**counts[train[0].name], **whole}}
            described["counts"] = {**whole, **{name: counts[name] for name in others}}
            publish(work / "data", destination, described)
        print_counts(destination, described["counts"])
    data = os.pathsep.join(str(destination / name) for name in names.values())
    print(f"fairseq reads the next of these folders in each epoch:\n  {data}")
    print_commands(data, destination.name)
