"""Data folders of probes: fairseq's binary format, with the answers marked.

Beside each subset `NAME` stands `NAME.answers`, see `models.probe_task`. For the subsets `test-SIZE`, which
`fairseq-alibi probe eval` reads, `NAME.json` lists each answer as [start, stop, source], see `probe_tasks.Answer`.
"""

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary, indexed_dataset
from torch import IntTensor
from tqdm import tqdm

from ..data.destination import is_prepared, print_counts, publish, work_folder
from ..models.probe_task import ANSWERS
from .probe_tasks import NAMES, PROBES, Draws, Probe, ProbeOptions

ATTEMPTS = 1000  # attempts to draw a text that no evaluation has
LARGEST_SIZE, LARGEST_VOCABULARY = 10**6, 10**5  # the largest size, and the largest number of words
MOST_TEXTS = 10**8  # of a subset


@dataclass(frozen=True)
class ProbeSettings:
    """What a data folder of probes holds; ValueError if two settings contradict each other."""

    task: str  # a name in `PROBES`
    train_sizes: tuple[int, int]  # smallest and largest in training and validation; all between are alike likely
    test_sizes: tuple[int, ...]  # one subset each
    texts: int = 20000  # for training
    tests: int = 500  # texts for validation and in each of the test subsets
    seed: int = 1  # of all draws
    options: ProbeOptions = dataclasses.field(default_factory=ProbeOptions)

    def __post_init__(self) -> None:
        """Checks the settings."""
        options, probe = self.options, PROBES[self.task]
        smallest = probe.smallest(options)
        if self.train_sizes[0] > self.train_sizes[1]:
            raise ValueError(f"--train-sizes {self.train_sizes[0]}-{self.train_sizes[1]}: pass the smaller one first")
        for name, texts in (("texts", self.texts), ("tests", self.tests)):
            if texts > MOST_TEXTS:
                raise ValueError(f"--{name} {texts}: pass at most {MOST_TEXTS:,}")
        if options.needles > len(NAMES):
            raise ValueError(f"--needles {options.needles}: there are {len(NAMES)} names for needles, pass fewer")
        for size in (*self.train_sizes, *self.test_sizes):
            if not smallest <= size <= LARGEST_SIZE:
                raise ValueError(
                    f"size {size}: {self.task} with these options has {smallest:,} to {LARGEST_SIZE:,} {probe.unit}"
                )
        if options.queries > options.pairs:
            raise ValueError(f"--queries {options.queries}: there are {options.pairs} pairs to ask for, pass fewer")
        if options.asked > options.needles:
            raise ValueError(f"--asked {options.asked}: there are {options.needles} needles to ask for, pass fewer")
        fewest = 2 * options.pairs if self.task == "mqar" else 2  # half of the words of mqar are keys
        if not fewest <= options.vocabulary <= LARGEST_VOCABULARY:
            allowed = f"{fewest} to {LARGEST_VOCABULARY:,}"
            raise ValueError(f"--vocabulary {options.vocabulary}: {self.task} with these options needs {allowed} words")

    def record(self) -> dict[str, Any]:
        """The settings for a JSON file; the options are those of the task."""
        options = {name: getattr(self.options, name) for name in PROBES[self.task].options}
        if "filler" in options:
            options["filler"] = " ".join(options["filler"])
        named = ("task", "train_sizes", "test_sizes", "texts", "tests", "seed")
        record = {**{name: getattr(self, name) for name in named}, "unit": PROBES[self.task].unit, "options": options}
        return dict(json.loads(json.dumps(record)))  # with lists, as it is read again


def training_probes(settings: ProbeSettings, subset: str, forbidden: set[tuple[str, ...]]) -> Iterator[Probe]:
    """Texts for training or validation, none of which is forbidden; ValueError if there are too few others."""
    make = PROBES[settings.task].make
    draws = Draws(f"{settings.seed} {settings.task} {subset}")
    smallest, largest = settings.train_sizes
    for _ in range(settings.texts if subset == "train" else settings.tests):
        for _ in range(ATTEMPTS):
            probe = make(draws, smallest + draws.below(largest - smallest + 1), settings.options)
            if tuple(probe.words) not in forbidden:
                yield probe
                break
        else:
            raise ValueError(
                f"{settings.task} has too few different texts of sizes {smallest} to {largest}: raise the sizes, or "
                "lower --tests"
            )


def write_subset(folder: Path, name: str, probes: Iterable[Probe], dictionary: Dictionary) -> dict[str, int]:
    """Writes a subset; returns its numbers of texts, tokens and answer tokens."""
    counts = {"texts": 0, "tokens": 0, "answer tokens": 0, "longest": 0}
    paths = [str(folder / f"{name}{suffix}") for suffix in ("", ANSWERS)]
    builders = [indexed_dataset.make_builder(f"{path}.bin", "mmap", len(dictionary)) for path in paths]
    for probe in probes:
        tokens = [*map(dictionary.index, probe.words), dictionary.eos()]
        answers = [dictionary.pad()] * len(tokens)
        for answer in probe.answers:
            answers[answer.start : answer.stop] = tokens[answer.start : answer.stop]
            counts["answer tokens"] += answer.stop - answer.start
        for builder, sentence in zip(builders, (tokens, answers)):
            builder.add_item(IntTensor(sentence))
        counts["texts"] += 1
        counts["tokens"] += len(tokens)
        counts["longest"] = max(counts["longest"], len(tokens))
    for builder, path in zip(builders, paths):
        builder.finalize(f"{path}.idx")
    return counts


def make_probe_data(destination: Path, settings: ProbeSettings) -> None:
    """Makes a data folder, or leaves the one that these settings have made; prints what it holds and what is next.

    ValueError: the folder holds something else, or the task has too few different texts. OSError: it cannot be written.
    """
    identity = {"probe": settings.record()}
    if is_prepared(destination, identity):
        return
    dictionary = Dictionary()
    # First the words of all tasks with default options: one model can learn tasks whose dictionaries are equal.
    for options, tasks in ((ProbeOptions(), PROBES), (settings.options, [settings.task])):
        for word in (word for task in tasks for word in PROBES[task].words(options)):
            dictionary.add_symbol(word)
    counts: dict[str, Any] = {"types": len(dictionary)}
    with work_folder(destination) as work:
        data = work / "data"
        data.mkdir()
        dictionary.save(str(data / "dict.txt"))
        evaluated: set[tuple[str, ...]] = set()
        tests = {}
        for size in settings.test_sizes:
            draws = Draws(f"{settings.seed} {settings.task} test-{size}")
            probes = [PROBES[settings.task].make(draws, size, settings.options) for _ in range(settings.tests)]
            evaluated.update(tuple(probe.words) for probe in probes)
            tests[f"test-{size}"] = write_subset(data, f"test-{size}", probes, dictionary)
            answers = [[list(answer) for answer in probe.answers] for probe in probes]
            (data / f"test-{size}.json").write_text(json.dumps(answers))
        validation = list(training_probes(settings, "valid", set()))
        evaluated.update(tuple(probe.words) for probe in validation)
        training = training_probes(settings, "train", evaluated)
        training = tqdm(training, settings.task, settings.texts, leave=False, unit=" texts")
        counts["train"] = write_subset(data, "train", training, dictionary)
        counts["valid"] = write_subset(data, "valid", validation, dictionary)
        counts.update(tests)
        source = f"fairseq-alibi probe make {settings.task}"
        publish(data, destination, {**identity, "source": source, "counts": counts})
    print_counts(destination, counts)
    command = ["fairseq-train", str(destination), "--user-dir", str(Path(__file__).parents[1]), "--task", "probe"]
    command += ["--arch", "alibi_lm_tiny", "--tokens-per-sample", str(counts["train"]["longest"])]
    command += ["--max-tokens", "4096", "--optimizer", "adam", "--lr", "0.002", "--max-update", "2000"]
    command += ["--save-dir", f"checkpoints/{destination.name}"]
    print(f"Next:\n  {shlex.join(command)}")
