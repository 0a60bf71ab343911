"""Peak memory of a config by `fairseq-alibi plan` and by torch's FSDPMemTracker, in float32 on fake tensors."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.experiments.layer_measurement import build_model, run_without_padding
from fairseq_alibi.experiments.planned_run import PlannedRun
from fairseq_alibi.experiments.run_config import find_dictionary, read_config
from fairseq_alibi.experiments.run_memory import GIB, memory_by_part
from fairseq_alibi.models.decoder import AlibiDecoder
from fairseq_alibi.models.layers import DecoderLayer


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
            for update in range(2):  # the gradients stay, as with --update-freq
                model(tokens).backward()
                optimizer.step()
                if not update:
                    tracker.reset_mod_stats()
        return max(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())


def main() -> None:
    """Prints both peaks for each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="for example configs/alibi_1_3b.yaml")
    parser.add_argument("--gpus", type=positive_integer, default=8)
    parser.add_argument("--rows", type=positive_integer, default=2, help="blocks in a batch (default 2)")
    args = parser.parse_args()
    cfg = read_config(args.config, ["common.cpu=true", "common.fp16=false", "model.attention=mask"])
    run = PlannedRun(cfg, find_dictionary(cfg, args.config))
    planned, tracked = memory_by_part(run, args.gpus, args.rows)["peak"], tracked_peak(run, args.gpus, args.rows)
    print(f"plan {planned / GIB:.3f} GiB, FSDPMemTracker {tracked / GIB:.3f} GiB, ratio {planned / tracked:.3f}")


if __name__ == "__main__":
    main()
