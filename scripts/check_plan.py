"""Peak memory of a process of fully_sharded by `fairseq-alibi plan`, by torch's FSDPMemTracker and in a real training.

In float32 on CPUs, with two batches in an update unless optimization.update_freq says otherwise.
"""

import argparse
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmark_models import made_up_data
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.experiments.layer_measurement import build_model, run_without_padding
from fairseq_alibi.experiments.planned_run import PlannedRun
from fairseq_alibi.experiments.run_config import find_dictionary, read_config
from fairseq_alibi.experiments.run_memory import GIB, memory_by_part, training_command
from fairseq_alibi.models.decoder import AlibiDecoder
from fairseq_alibi.models.layers import DecoderLayer

WIDTHS = (f"model.decoder_{part}_dim=16" for part in ("embed", "input", "output", "ffn_embed"))
TINY = ["model.decoder_layers=1", "model.decoder_attention_heads=2", *WIDTHS]


class Loss(nn.Module):
    """The loss of a language model with a plain softmax."""

    def __init__(self, decoder: AlibiDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the loss of tokens (B, T)."""
        logits = self.decoder.output_layer(run_without_padding(self.decoder, tokens))
        return F.nll_loss(F.log_softmax(logits, -1, dtype=torch.float32).flatten(0, 1), tokens.flatten())


def tracked_peak(run: PlannedRun, gpus: int, rows: int) -> float:
    """Returns the bytes at the peak of two updates with `rows` blocks in each of `gpus` processes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh = dist.device_mesh.init_device_mesh("cpu", (gpus,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Loss(build_model(run.cfg.model, run.dictionary).decoder)
        for module in model.modules():
            if isinstance(module, DecoderLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        tokens = torch.full((rows, run.length), 3)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((tokens,))
        with tracker:
            for update in range(2):
                model(tokens).backward()
                optimizer.step()
                if run.cfg.optimization.update_freq[0] == 1:
                    optimizer.zero_grad()
                if not update:
                    tracker.reset_mod_stats()
    dist.destroy_process_group()
    return max(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())


def trained_peak(config: Path, overrides: list[str], gpus: int, folder: str) -> int:
    """Returns the bytes of the largest of `gpus` processes at its highest after the first update."""
    settings = {
        **{"task.data": folder, "dataset.train_subset": "valid", "checkpoint.no_save": "true"},
        **{"dataset.disable_validation": "true", "optimization.max_update": 3, "hydra.run.dir": folder},
        **{"common.log_format": "json", "common.log_interval": 1, "common.tensorboard_logdir": "null"},
        **{"distributed_training.distributed_backend": "gloo", "dataset.num_workers": 0},
    }
    words = shlex.split(training_command(config, overrides, settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "--no-python"]
    command += [str(Path(sys.executable).parent / words[0]), *words[1:]]
    log, peaks = Path(folder, "log"), {}
    # Otherwise glibc keeps freed memory of up to 32 MiB, in pieces.
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000", **os.environ}
    with log.open("w") as file:
        main = psutil.Popen(command, stdout=file, stderr=file, env=environment)
        while main.poll() is None:
            for child in main.children() if '"num_updates": "1"' in log.read_text() else []:
                process = Path("/proc", str(child.pid))
                try:
                    if child.pid not in peaks:
                        (process / "clear_refs").write_text("5")  # the highest is the present one again
                    peaks[child.pid] = int(re.findall(r"VmHWM:\s*(\d+)", (process / "status").read_text())[0]) * 1024
                except (OSError, IndexError):  # it has ended
                    continue
            time.sleep(0.05)
    if main.returncode or not peaks:
        sys.exit(f"check_plan: the training failed: {log.read_text()[-1000:]}")
    return max(peaks.values())


def main() -> None:
    """Prints a row for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", metavar="CONFIG [KEY=VALUE ...]", nargs="+", help="as for plan")
    parser.add_argument("--gpus", type=positive_integer, nargs="+", default=[8], help="processes (default 8)")
    parser.add_argument("--rows", type=positive_integer, default=2, help="blocks in a batch (default 2)")
    parser.add_argument("--types", type=positive_integer, help="as for plan")
    parser.add_argument("--train", action="store_true", help="train too, on Linux; a tiny model's memory is taken off")
    args = parser.parse_args()
    config, table = Path(args.words[0]), []
    for gpus in args.gpus:
        overrides = ["common.cpu=true", "common.fp16=false", "model.attention=mask", "optimization.update_freq=[2]"]
        overrides += [*args.words[1:], f"distributed_training.distributed_world_size={gpus}"]
        length = read_config(config, overrides).task.tokens_per_sample
        overrides.append(f"dataset.max_tokens={args.rows * length}")
        cfg = read_config(config, overrides)
        run = PlannedRun(cfg, find_dictionary(cfg, config, args.types))
        planned, tracked = memory_by_part(run, gpus, args.rows)["peak"], tracked_peak(run, gpus, args.rows)
        row = [gpus, planned / GIB, tracked / GIB, planned / tracked]
        if args.train:
            peaks = []
            for types, more in ((300, TINY), (len(run.dictionary), [])):
                with tempfile.TemporaryDirectory() as folder:
                    made_up_data(Path(folder), types, 10 * gpus * args.rows * length)
                    peaks.append(trained_peak(config, [*overrides, *more], gpus, folder))
            row += [(peaks[1] - peaks[0]) / GIB, planned / (peaks[1] - peaks[0])]
        table.append(row)
    print(tabulate(table, ["processes", "plan", "FSDPMemTracker", "ratio", "training", "ratio"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
