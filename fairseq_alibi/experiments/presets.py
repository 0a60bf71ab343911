"""What `fairseq-alibi reproduce` trains and evaluates: three sizes of the paper's comparison."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

from ..core.rotary import SCALINGS
from .probe_data import ProbeSettings
from .probe_tasks import ProbeOptions

ROOT = Path(__file__).parents[2]
BUILTIN = "data-bin/builtin"  # data folder of the built-in corpus, which every machine can make

#: Probes that every machine can make, by data folder; their dictionaries are equal.
BUILTIN_PROBES = {
    "data-bin/probes/mqar": ProbeSettings(
        *("mqar", (8, 32), (32, 64, 128, 256, 512), 60000, 100), options=ProbeOptions(vocabulary=16, pairs=2, queries=2)
    ),
    "data-bin/probes/passkey": ProbeSettings(
        *("passkey", (16, 32), (32, 64, 128, 256, 512), 20000, 100), options=ProbeOptions(digits=2)
    ),
    "data-bin/probes/copy": ProbeSettings("copy", (1, 15), (8, 15, 31, 63), 40000, 100),
}

#: What `METHOD+NAME` changes in a trained model of METHOD when it is evaluated.
TEST_TIME: dict[str, dict[str, str]] = {
    **{f"rotary+{scaling}": {"rotary_scaling": scaling} for scaling in SCALINGS[1:]},
    "alibi+length_scale": {"alibi_length_scale": "auto"},
}


def small_model(
    data: str,
    method: str,
    length: int,
    save_dir: Path,
    updates: int,
    task: str = "language_modeling",
    model: Sequence[str] = (),
) -> list[str]:
    """Returns the fairseq-train command of a model that a CPU trains, without its seed; `model` are its options."""
    warmup = max(1, updates // 10)
    command = [data, "--user-dir", ROOT / "fairseq_alibi", "--task", task, "--position-method", method]
    command += ["--tokens-per-sample", length, "--max-tokens", max(2048, length), "--required-batch-size-multiple", 1]
    command += ["--optimizer", "adam", "--lr", 0.004, "--clip-norm", 0.5, "--lr-scheduler", "cosine"]
    command += ["--warmup-updates", warmup, "--lr-period-updates", max(1, updates - warmup), "--max-update", updates]
    command += ["--disable-validation", "--no-epoch-checkpoints", "--save-interval-updates", 200]
    command += ["--keep-interval-updates", 1, "--save-dir", save_dir, "--cpu"]
    return ["fairseq-train", *map(str, command), *model]


TINY = ("--arch", "alibi_lm_tiny")
PROBE_SIZES = ("--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "256", "--dropout", "0")
#: The tiny model with the adaptive, word-level vocabulary of a part of WikiText-103.
TINY_ADAPTIVE = (
    *("--arch=alibi_lm", "--decoder-normalize-before"),
    *("--decoder-embed-dim=128", "--decoder-input-dim=128", "--decoder-output-dim=128"),
    *("--decoder-ffn-embed-dim=512", "--decoder-layers=2", "--decoder-attention-heads=8"),
    *("--adaptive-input", "--adaptive-input-cutoff=4000,8000", "--adaptive-softmax-cutoff=4000,8000"),
    *("--tie-adaptive-weights", "--criterion=adaptive_loss", "--ddp-backend=legacy_ddp"),
)

laptop_model = partial(small_model, model=TINY)  # that of scripts/quickstart.sh
probe_model = partial(small_model, task="probe", model=(*TINY, *PROBE_SIZES))
slice_model = partial(small_model, model=TINY_ADAPTIVE)


def paper_model(data: str, method: str, length: int, save_dir: Path, updates: int) -> list[str]:
    """Returns the command for the paper's WikiText-103 model. Arguments: see `small_model`."""
    script = str(ROOT / "scripts" / "train_wikitext103.sh")
    command = ["bash", script, data, str(save_dir), str(length), "--position-method", method]
    return [*command, "--max-update", str(updates)]


class Preset(NamedTuple):
    """What is trained and evaluated."""

    training_command: Callable[[str, str, int, Path, int], list[str]]  # see `small_model`
    data: Optional[str]  # None where the user has to name it
    training_lengths: tuple[int, ...]
    evaluation_lengths: tuple[int, ...]
    updates: int
    parallel: int  # models that are trained or evaluated at the same time, with one thread each if more than 1
    sliding: tuple[str, str] = ("--stride-fraction", "1/2")  # option of `evaluate` that makes the sliding windows


#: Lengths and stride are those of the paper's tables 2, 4, 5 and 7.
PAPER_LENGTHS = (512, 1024, 1536, 2048, 2512, 3072, 5512, 6072, 12072, 12512)

PRESETS = {
    "laptop": Preset(laptop_model, BUILTIN, (128,), (128, 256, 512, 1024, 2048), 300, 2),
    "slice": Preset(slice_model, None, (256,), (256, 512, 1024, 2048, 4096), 1200, 2),
    "probes": Preset(probe_model, ":".join(BUILTIN_PROBES), (33,), (), 800, 2),
    "paper": Preset(
        *(paper_model, "data-bin/wikitext-103", (512, 3072), PAPER_LENGTHS, 286000, 1), sliding=("--stride", "512")
    ),
}
