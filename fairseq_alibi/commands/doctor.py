"""What this environment has and what of it works, each part tried, and the first thing to fix.

Needs nothing but Python's standard library itself, so that it runs where torch or fairseq do not.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

from .. import __version__

#: Makes everything that is required, and mends it.
SETUP = "bash scripts/setup.sh"

GIB = 2**30


class Part(NamedTuple):
    """A part of the environment.

    Args:
        name: of the part.
        try_it: uses it and says what was found; raises whatever it likes where it does not work.
        needed_for: what fails without it; None where everything does, as the part is required.
        remedy: the command that mends it.
    """

    name: str
    try_it: Callable[[], str]
    needed_for: Optional[str] = None
    remedy: str = SETUP


def try_python() -> str:
    """Its version, which has to be one that is supported."""
    if not (3, 9) <= sys.version_info < (3, 14):
        raise RuntimeError(f"{platform.python_version()}, but 3.9 to 3.13 is needed")
    return f"{platform.python_version()}, {platform.platform()}"


def try_startup() -> str:
    """The startup module, which Python from 3.11 on has to have run before fairseq is imported."""
    if sys.version_info < (3, 11):
        return "not needed before Python 3.11"
    if "fairseq_alibi_startup" not in sys.modules:
        raise RuntimeError("it did not run when Python started, so fairseq cannot be imported")
    return "ran when Python started"


def installed(package: str, module: Optional[str] = None) -> Callable[[], str]:
    """What imports a module and says which version of its package is there."""

    def try_package() -> str:
        importlib.import_module(module or package)
        return importlib.metadata.version(package)

    return try_package


def try_torch() -> str:
    """A product of matrices, and which torch made it."""
    import torch

    (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item()
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def try_fairseq() -> str:
    """Its import, and that of the parts that were compiled when it was installed."""
    import fairseq
    import fairseq.data.data_utils_fast
    import fairseq.data.token_block_utils_fast

    return fairseq.__version__


def try_model() -> str:
    """A tiny `alibi_lm`, which has to be registered and to compute the same with a mask as without one."""
    import torch
    from fairseq.models import MODEL_REGISTRY

    from ..files.inputs import made_up_dictionary
    from ..models.language_model import AlibiLanguageModel, AlibiLanguageModelConfig

    if MODEL_REGISTRY["alibi_lm"] is not AlibiLanguageModel:
        raise RuntimeError("another alibi_lm is registered with fairseq")
    dictionary = made_up_dictionary(64)
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    sizes = {f"decoder_{name}_dim": 32 for name in ("embed", "input", "output", "ffn_embed")}
    sizes.update(decoder_layers=2, decoder_attention_heads=4, max_target_positions=None, tpu=False)
    tokens, found = torch.arange(4, 60)[None], []
    for attention in ("mask", "fused"):
        options = {**vars(AlibiLanguageModelConfig(**sizes)), "attention": attention}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            found.append(AlibiLanguageModel.build_model(Namespace(**options), task).eval()(tokens)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    return "registered; attention with and without a mask agree"


def try_cpu() -> str:
    """Number of cores, and whether bfloat16 is faster on them."""
    from ..models.decoder import bf16_gain

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores; matrix products in bfloat16 (--cpu-bf16) at {bf16_gain():.1f} times the speed of float32"


def try_gpu() -> str:
    """The GPUs, if any; on the first, FlexAttention is compiled and compared with attention under a mask."""
    import torch

    from ..core.attention import fused_attention, masked_attention
    from ..core.positions import ALiBi

    if not torch.cuda.is_available():
        return "none; everything runs on the CPU"
    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = ", ".join(f"{one.name} ({one.total_memory / GIB:.0f} GiB)" for one in every)
    method, (q, k, v) = ALiBi(8), torch.randn(3, 1, 8, 256, 64, device="cuda")
    expected = masked_attention(q, k, v, method.future_mask(256, 256, device=q.device))
    torch.testing.assert_close(fused_attention(q, k, v, method.slopes.cuda()), expected, rtol=1e-2, atol=1e-2)
    return f"{names}; FlexAttention compiles and agrees with attention under a mask"


def try_distributed() -> str:
    """What several processes can talk through."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise RuntimeError("this torch has no gloo")
    return "gloo" + (" and nccl" if distributed.is_nccl_available() else "; no nccl, which GPUs would use")


def try_text() -> str:
    """Moses tokens, there and back, and the import of BPE."""
    import subword_nmt.apply_bpe  # noqa: F401
    from sacremoses import MosesDetokenizer, MosesTokenizer

    text = "It's here."
    back = MosesDetokenizer("en").detokenize(MosesTokenizer("en").tokenize(text))
    if back != text:
        raise RuntimeError(f"{text!r} comes back as {back!r}")
    return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("sacremoses", "subword-nmt"))


def try_plots() -> str:
    """An empty plot as PNG."""
    import matplotlib

    from ..evaluation.plots import chart

    with tempfile.TemporaryDirectory() as folder, chart(Path(folder) / "chart.png", ["one"]) as axes:
        axes.plot([1, 2], [1, 2], label="one")
    return f"matplotlib {matplotlib.__version__}"


def try_tensorboard() -> str:
    """A scalar in an event file."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("one", 1.0)
        if not any(Path(folder).iterdir()):
            raise RuntimeError("no event file was written")
    return f"tensorboardX {importlib.metadata.version('tensorboardX')}"


def try_fairscale() -> str:
    """Whether it is there; nothing of ours needs it."""
    try:
        return installed("fairscale")()
    except ImportError:
        return "not installed; only --ddp-backend fully_sharded wants it (pip install fairscale)"


def try_compiler() -> str:
    """The C++ compiler, by its path."""
    name = os.environ.get("CXX", "c++").split()[0]
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"no {name}")
    return path


def try_disk() -> str:
    """Free space in the current folder; WikiText-103 takes 1.5 GB."""
    free = shutil.disk_usage(".").free / GIB
    if free < 2:
        raise RuntimeError(f"{free:.1f} GiB free here")
    return f"{free:,.0f} GiB free here"


#: In the order in which they are to be mended: each may need those before it.
PARTS = (
    Part("Python", try_python, remedy=f"PYTHON=python3.11 {SETUP}"),
    Part("startup module", try_startup),
    Part("torch", try_torch),
    Part("numpy", installed("numpy")),
    Part("omegaconf", installed("omegaconf")),
    Part("hydra-core", installed("hydra-core", "hydra")),
    Part("fairseq", try_fairseq),
    Part("tabulate", installed("tabulate")),
    Part("tqdm", installed("tqdm")),
    Part("alibi_lm", try_model),
    Part("CPU", try_cpu),
    Part("GPU", try_gpu, "attention without a mask on a GPU", "pass --attention mask, or update the GPU's driver"),
    Part("processes", try_distributed, "training in several processes"),
    Part("text", try_text, "scripts/prepare_text.sh"),
    Part("plots", try_plots, "fairseq-alibi report"),
    Part("TensorBoard", try_tensorboard, "--tensorboard-logdir"),
    Part("fairscale", try_fairscale, "--ddp-backend fully_sharded", "pip install --force-reinstall fairscale"),
    Part(
        "C++ compiler",
        try_compiler,
        f"{SETUP} and torch.compile",
        "apt-get install build-essential (macOS: xcode-select --install)",
    ),
    Part("disk", try_disk, "scripts/prepare_wikitext103.sh", "free some space, or work in another folder"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`fairseq-alibi doctor` has no arguments."""


def run(args: argparse.Namespace) -> None:
    """`fairseq-alibi doctor`: prints a line for each part and, last, what to mend first.

    Raises:
        ValueError: a required part does not work.
    """
    print(f"{'fairseq-alibi':<16}{__version__} in {Path(__file__).parents[1]}")
    broken = []
    for part in PARTS:
        try:
            found = part.try_it()
        except Exception as error:  # a broken installation raises anything
            reason = " ".join(str(error).split())[:200] or repr(error)
            found = f"BROKEN, needed for {part.needed_for or 'everything'}: {reason}"
            broken.append(part)
        print(f"{part.name:<16}{found}", flush=True)
    first = next((part for part in broken if part.needed_for is None), next(iter(broken), None))
    if first is None:
        print("\nnothing to fix")
        return
    advice = f"fix first: {first.name}, with: {first.remedy}"
    if first.needed_for is None:
        raise ValueError(advice)
    print(f"\n{advice}")
