"""Speed and memory of `prepare-text --shards` beside those of fairseq-preprocess, on copies of one text."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil

from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.files.data_folders import read_preparation

BIN = Path(sys.executable).parent


def measure(command: list[str], folder: str) -> tuple[float, float, float]:
    """Runs a command; returns its seconds, and of all its processes the seconds of CPU and the largest sum of MiB."""
    begin, seconds, peak = time.monotonic(), {}, 0
    with open(Path(folder, "log"), "w") as log:
        main = psutil.Popen(command, cwd=folder, stdout=log, stderr=log)
        while main.poll() is None:
            memory = 0
            for process in [main, *main.children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    seconds[process.pid] = times.user + times.system
                    memory += process.memory_info().rss
                except psutil.Error:  # it has ended
                    continue
            peak = max(peak, memory)
            time.sleep(0.1)
    if main.returncode:
        sys.exit(f"benchmark_preparing: {command[0]} failed: {Path(folder, 'log').read_text()[-300:]}")
    return time.monotonic() - begin, sum(seconds.values()), peak / 2**20


def main() -> None:
    """Prints a line for each preparation and number of copies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", metavar="TEXT", type=Path, help="file of words with spaces between them")
    parser.add_argument("--copies", type=positive_integer, nargs="+", default=[4, 16], help="of the text, in one file")
    parser.add_argument("--shards", type=positive_integer, default=8)
    parser.add_argument("--workers", type=positive_integer, default=2)
    args = parser.parse_args()
    workers = ["--workers", str(args.workers)]
    for copies in args.copies:
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder, "text"), "wb") as file:
                for _ in range(copies):
                    file.write(args.text.read_bytes())
            shards = [str(BIN / "fairseq-alibi"), "prepare-text", "DEST", *workers, "--shards", str(args.shards)]
            for split in ("train", "valid", "test"):
                shards += [f"--{split}", "text" if split == "train" else str(args.text.resolve())]
            words = [*shards, "--tokenizer", "none", "--word-level"]
            preprocess = [str(BIN / "fairseq-preprocess"), "--only-source", "--trainpref", "text", *workers]
            preprocess += [word for split in ("valid", "test") for word in (f"--{split}pref", str(args.text.resolve()))]
            commands = {"words": words, "fairseq-preprocess": preprocess, "Moses and BPE": shards}
            tokens = 0
            for name, command in commands.items():
                run = [word.replace("DEST", name) for word in command]
                wall, cpu, memory = measure(run + ["--destdir", "out"] * (command is preprocess), folder)
                if command is not preprocess:  # which has as many as the words
                    counts = read_preparation(Path(folder, name))["counts"]
                    tokens = sum(counts[split]["tokens"] for split in ("train", "valid", "test"))
                print(
                    f"{copies} copies, {name}: {tokens:,} tokens, {wall:.0f} s, {cpu:.0f} s of CPU, "
                    f"{tokens / cpu:,.0f} tokens/s per core, {memory:,.0f} MiB in all processes",
                    flush=True,
                )


if __name__ == "__main__":
    main()
