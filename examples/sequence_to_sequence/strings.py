"""Strings of tokens and the same in another order: data to translate, and how much of it was translated right.

    python strings.py make reverse FOLDER        # FOLDER/{train,valid,test}.{source,target}
    python strings.py accuracy GENERATED         # what fairseq-generate printed

A string has no token twice, so that its order is all there is to learn. Only the test strings are longer than 16.
"""

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tabulate import tabulate

#: What becomes of a string, a list of numbers.
TASKS = {"reverse": lambda string: string[::-1], "sort": sorted}

#: Tokens there are.
TYPES = 100

#: Split -> lengths of its strings, and number of strings.
SPLITS = {
    "train": (range(1, 17), 40_000),
    "valid": (range(1, 17), 500),
    "test": ((8, 16, 24, 32, 48, 64), 600),
}


def make(task: str, folder: Path) -> None:
    """Writes the splits of a task; the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(task)
    for split, (lengths, number) in SPLITS.items():
        strings = [rng.sample(range(TYPES), lengths[i % len(lengths)]) for i in range(number)]
        for side, side_strings in (("source", strings), ("target", map(TASKS[task], strings))):
            text = "".join(" ".join(f"{token:02}" for token in string) + "\n" for string in side_strings)
            (folder / f"{split}.{side}").write_text(text)


def accuracy(generated: Iterable[str]) -> list[tuple[int, float, float]]:
    """How much of a test set is right, by length.

    Args:
        generated: lines that fairseq-generate printed with --beam or --nbest 1: target T-i and hypothesis H-i of each.

    Returns:
        For each length: itself, the share of strings that are right as a whole, and the share of tokens that are right
        where they stand.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for line in generated:
        match = re.match(r"([TH])-(\d+)\t(.*)", line)
        if match:
            kind, number, rest = match.groups()
            found[number][kind] = rest.split("\t")[-1].split()
    by_length = defaultdict(list)
    for pair in found.values():
        by_length[len(pair["T"])].append((pair["T"], pair["H"]))
    rows = []
    for length, pairs in sorted(by_length.items()):
        strings = sum(target == hypothesis for target, hypothesis in pairs) / len(pairs)
        tokens = sum(a == b for target, hypothesis in pairs for a, b in zip(target, hypothesis))
        rows.append((length, strings, tokens / (length * len(pairs))))
    return rows


def main() -> None:
    """`strings.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make")
    command.add_argument("task", choices=TASKS)
    command.add_argument("folder", type=Path)
    command = commands.add_parser("accuracy")
    command.add_argument("generated", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        make(args.task, args.folder)
    else:
        with args.generated.open(encoding="utf-8") as lines:
            rows = accuracy(lines)
        print(tabulate(rows, ["length", "strings", "tokens"], tablefmt="github", floatfmt=".1%"))


if __name__ == "__main__":
    main()
