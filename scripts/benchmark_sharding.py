"""Speed of `--ddp-backend fully_sharded` as a share of that of legacy_ddp, in alternated trainings of one model."""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from fairseq_alibi.commands.arguments import positive_integer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ("--decoder-layers=4", "--decoder-embed-dim=512", "--decoder-ffn-embed-dim=2048", "--decoder-attention-heads=8")
BACKENDS = ("legacy_ddp", "fully_sharded")


def tokens_per_second(args: argparse.Namespace, backend: str) -> float:
    """Trains for some updates; returns the median over the intervals of its log but the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    command += ["--no-python", str(Path(sys.executable).parent / "fairseq-train"), args.data]
    command += ["--user-dir", str(ROOT / "fairseq_alibi"), "--task=language_modeling", "--arch=alibi_lm_tiny", *MODEL]
    command += ["--optimizer=adam", "--lr=0.0001", "--clip-norm=1", "--tokens-per-sample=256", "--no-save"]
    command += [f"--max-tokens={args.tokens}", f"--max-update={args.updates}", "--disable-validation"]
    command += ["--log-format=json", f"--log-interval={max(1, args.updates // 5)}", "--min-params-to-wrap=1000"]
    command += [f"--ddp-backend={backend}", *([] if torch.cuda.is_available() else ["--cpu"])]
    command += ["--distributed-backend", "nccl" if torch.cuda.is_available() else "gloo"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, f"--save-dir={folder}"],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    speeds = [float(json.loads(line)["wps"]) for line in re.findall(r"train_inner \| (\{.*\})", done.stdout)[1:]]
    if done.returncode or not speeds:
        sys.exit(f"benchmark_sharding: {backend} failed: {' '.join(done.stdout.split())[-300:]}")
    return statistics.median(speeds)


def main() -> None:
    """Prints each round, and the median of the rounds' ratios with their range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", help="data folder of a language model, for example data-bin/builtin")
    parser.add_argument("--processes", type=positive_integer, default=2)
    parser.add_argument("--rounds", type=positive_integer, default=5)
    parser.add_argument("--updates", type=positive_integer, default=25, help="of each training (default 25)")
    parser.add_argument("--tokens", type=positive_integer, default=2048, help="of each process and update")
    args = parser.parse_args()
    ratios = []
    for number in tqdm(range(args.rounds), desc="benchmark_sharding", unit="round", file=sys.stderr):
        order = BACKENDS if number % 2 else BACKENDS[::-1]
        speeds = {backend: tokens_per_second(args, backend) for backend in order}
        ratios.append(speeds["fully_sharded"] / speeds["legacy_ddp"])
        print(f"round {number + 1}: {speeds} tokens/s, load average {os.getloadavg()[0]:.1f}", flush=True)
    print(f"fully_sharded / legacy_ddp: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
