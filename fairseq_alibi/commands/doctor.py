"""`fairseq-alibi doctor`: uses each part of this environment and says what to fix first.

This file needs Python's standard library only, so that it runs where torch or fairseq cannot be imported.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from .. import __version__
from ..files.errors import script_command


def pip_command() -> str:
    """Returns pip's command for the environment that this copy was installed in."""
    if "pipx" in Path(sys.prefix).parts:
        return "pipx runpip fairseq-alibi"
    try:
        installer = importlib.metadata.distribution("fairseq-alibi").read_text("INSTALLER") or ""
    except importlib.metadata.PackageNotFoundError:
        installer = ""
    return "uv pip" if installer.strip() == "uv" else f"{sys.executable} -m pip"


PIP = pip_command()  # what installs everything required, and repairs it, and what installs fairseq alone
SETUP = script_command("setup.sh") or f"{PIP} install --upgrade --force-reinstall ., in a clone"
TRANSFORMERS = f"{PIP} install 'transformers>=4.57.1,<5.25'"
FAIRSEQ = script_command("setup.sh") or f"{PIP} install --no-deps fairseq==0.12.2"
COMPILER = "apt-get install build-essential (macOS: xcode-select --install)"
GIB = 2**30


class Part(NamedTuple):
    """A part of the environment."""

    name: str
    check: Callable[[], str]  # uses it and returns a description; raises any exception if it does not work
    needed_for: Optional[str] = None  # what fails without it; None for a part without which everything fails
    remedy: str = SETUP  # the command that repairs it


def check_python() -> str:
    """Checks the version of Python."""
    if not (3, 9) <= sys.version_info < (3, 15):
        raise RuntimeError(f"{platform.python_version()}, but 3.9 to 3.14 is needed")
    return f"{platform.python_version()}, {platform.platform()}"


def check_startup() -> str:
    """Checks that the startup module ran, without which fairseq cannot be imported on Python 3.11 and newer."""
    if sys.version_info < (3, 11):
        return "not needed before Python 3.11"
    if "fairseq_alibi_startup" not in sys.modules:
        raise RuntimeError("it did not run when Python started, so fairseq cannot be imported")
    return "ran when Python started"


def installed(package: str) -> Callable[[], str]:
    """Returns a check that imports a package and reports its version."""

    def check_package() -> str:
        importlib.import_module(package.removesuffix("-core"))
        return importlib.metadata.version(package)

    return check_package


def check_versions() -> str:
    """Compares the versions of the libraries with those that this package needs."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in importlib.metadata.requires("fairseq-alibi") or ()]
    requirements = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    for requirement in requirements:
        version = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            raise RuntimeError(f"{requirement.name} {version} is installed, but {requirement.specifier} is needed")
    return f"{len(requirements)} libraries have versions that are known to work"


def check_commands() -> str:
    """Starts the commands of fairseq and of this package, as a folder that was moved leaves some that cannot start."""
    names = ("fairseq-alibi", "fairseq-eval-lm", "fairseq-generate", "fairseq-preprocess", "fairseq-train")
    folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    environment, quiet = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    broken, started = [], {}
    for name in names:
        path = shutil.which(name, path=folders)
        if path is None:
            raise RuntimeError(f"{name} is not installed")
        try:
            started[name] = subprocess.Popen([path, "--help"], env=environment, stdout=quiet, stderr=quiet)
        except OSError:  # the interpreter that the script names is gone
            broken.append(name)
    try:
        broken += [name for name, process in started.items() if process.wait() != 0]
    finally:
        for process in started.values():
            process.kill()  # those that still run when this is interrupted
    if broken:
        raise RuntimeError(f"{', '.join(broken)} --help fails")
    return f"{', '.join(names)} start"


def check_torch() -> str:
    """Multiplies two matrices."""
    import torch

    (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item()
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def check_fairseq() -> str:
    """Imports fairseq and the parts of it that were compiled when it was installed."""
    import fairseq
    import fairseq.data.data_utils_fast
    import fairseq.data.token_block_utils_fast

    return fairseq.__version__


def check_model() -> str:
    """Builds a tiny `alibi_lm`, which has to be registered and to compute the same with a mask as without one."""
    import torch
    from fairseq.models import MODEL_REGISTRY

    from ..files.data_folders import made_up_dictionary
    from ..models.language_model import AlibiLanguageModel, language_model_config

    if MODEL_REGISTRY["alibi_lm"] is not AlibiLanguageModel:
        raise RuntimeError("another alibi_lm is registered with fairseq")
    dictionary = made_up_dictionary(64)
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    sizes: dict[str, Any] = {f"decoder_{name}_dim": 32 for name in ("embed", "input", "output", "ffn_embed")}
    sizes.update(decoder_layers=2, decoder_attention_heads=4, max_target_positions=None, tpu=False)
    tokens, outputs = torch.arange(4, 60)[None], []
    for attention in ("mask", "fused"):
        options = {**vars(language_model_config()(**sizes)), "attention": attention}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            outputs.append(AlibiLanguageModel.build_model(argparse.Namespace(**options), task).eval()(tokens)[0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    return "registered; attention with and without a mask agree"


def check_cpu() -> str:
    """Counts the cores and measures whether bfloat16 is faster on them."""
    from ..models.layers import bf16_gain

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores; matrix products in bfloat16 (--cpu-bf16) at {bf16_gain():.1f} times the speed of float32"


def check_gpu() -> str:
    """Lists the GPUs; on the first, the kernel for attention without a mask is chosen, which compares its results."""
    import torch

    from ..core.alibi import ALiBi
    from ..core.attention import choose_kernel
    from ..core.attention_inputs import AttentionInputs, LinearBias

    if not torch.cuda.is_available():
        return "none; everything runs on the CPU"
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus)
    q = torch.zeros(1, 8, 256, 64, device="cuda")
    kernel = choose_kernel(q, q, AttentionInputs(bias=LinearBias(ALiBi(8).slopes(q.device)[0])))
    return f"{names}; attention without a mask through {kernel.name} (measure: fairseq-alibi doctor --gpu)"


def check_distributed() -> str:
    """Checks through which libraries several processes can communicate."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise RuntimeError("this torch has no gloo")
    return "gloo" + (" and nccl" if distributed.is_nccl_available() else "; no nccl, which GPUs would use")


def check_text_tools() -> str:
    """Tokenizes and detokenizes a text with Moses, and imports BPE."""
    import subword_nmt.apply_bpe  # noqa: F401
    from sacremoses import MosesDetokenizer, MosesTokenizer

    text = "It's here."
    result = MosesDetokenizer("en").detokenize(MosesTokenizer("en").tokenize(text))
    if result != text:
        raise RuntimeError(f"{text!r} comes back as {result!r}")
    return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("sacremoses", "subword-nmt"))


def check_transformers() -> str:
    """Compares the version of transformers, where it is installed, with the tested ones."""
    if importlib.util.find_spec("transformers") is None:
        return f"not installed; only fairseq-alibi export-hf needs it ({TRANSFORMERS})"
    import transformers

    from ..core.configuration_alibi import NEWEST, OLDEST, check_version

    check_version()
    return f"transformers {transformers.__version__}; exported models are tested with {OLDEST} to {NEWEST}"


def check_plots() -> str:
    """Draws a plot."""
    import matplotlib

    from ..evaluation.plots import chart

    with tempfile.TemporaryDirectory() as folder, chart(Path(folder) / "chart.png", ["one"]) as axes:
        axes.plot([1, 2], [1, 2], label="one")
    return f"matplotlib {matplotlib.__version__}"


def check_tensorboard() -> str:
    """Writes a scalar to an event file."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("one", 1.0)
        if not any(Path(folder).iterdir()):
            raise RuntimeError("no event file was written")
    return f"tensorboardX {importlib.metadata.version('tensorboardX')}"


def check_compiler() -> str:
    """Finds the C++ compiler."""
    name = os.environ.get("CXX", "c++").split()[0]
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"no {name}")
    return path


def check_disk() -> str:
    """Checks the free space in the current folder; WikiText-103 takes 1.5 GB."""
    free = shutil.disk_usage(".").free / GIB
    if free < 2:
        raise RuntimeError(f"{free:.1f} GiB free here")
    return f"{free:,.0f} GiB free here"


#: In the order of repair, as each part may need those before it.
PARTS = (
    Part("Python", check_python, remedy=f"PYTHON=python3.11 {SETUP}"),
    Part("startup module", check_startup),
    Part("torch", check_torch),
    *(Part(name, installed(name)) for name in ("numpy", "omegaconf", "hydra-core")),
    Part("fairseq", check_fairseq, remedy=FAIRSEQ),
    *(Part(name, installed(name)) for name in ("tabulate", "tqdm", "filelock")),
    Part("versions", check_versions),
    Part("commands", check_commands),
    Part("alibi_lm", check_model),
    Part("CPU", check_cpu),
    Part("GPU", check_gpu, "attention without a mask on a GPU", "pass --attention mask, or update the GPU's driver"),
    Part("processes", check_distributed, "training in several processes"),
    Part("text", check_text_tools, "scripts/prepare_text.sh"),
    Part("transformers", check_transformers, "fairseq-alibi export-hf", TRANSFORMERS),
    Part("plots", check_plots, "fairseq-alibi report"),
    Part("TensorBoard", check_tensorboard, "--tensorboard-logdir"),
    Part("C++ compiler", check_compiler, f"{SETUP} and torch.compile", COMPILER),
    Part("disk", check_disk, "scripts/prepare_wikitext103.sh", "free some space, or work in another folder"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi doctor`."""
    gpu_help = "measure attention and training on the GPU for 10 minutes, and set up to which length auto uses a mask"
    parser.add_argument("--gpu", action="store_true", help=gpu_help)
    parser.add_argument("--output", type=Path, metavar="DIR", help="of --gpu (default: results/gpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace results of --gpu that are there")


def run(args: argparse.Namespace) -> None:
    """Prints a line for each part and, last, what to fix first; ValueError if a required part does not work."""
    if args.gpu:
        from ..experiments.gpu_check import check_this_gpu

        output = args.output or Path("results/gpu")
        print(f"\n{check_this_gpu(output, args.overwrite)}\n\nwritten to {output}")
        return
    if args.output or args.overwrite:
        raise ValueError("--output and --overwrite are for --gpu: pass it, or neither of them")
    print(f"{'fairseq-alibi':<16}{__version__} in {Path(__file__).parents[1]}")
    broken = []
    for part in PARTS:
        try:
            report = part.check()
        except Exception as error:  # a broken installation raises anything
            reason = " ".join(str(error).split())[:200] or repr(error)
            report = f"BROKEN, needed for {part.needed_for or 'everything'}: {reason}"
            broken.append(part)
        print(f"{part.name:<16}{report}", flush=True)
    if not broken:
        print("\nnothing to fix")
        return
    first = next((part for part in broken if part.needed_for is None), broken[0])
    advice = f"fix first: {first.name}, with: {first.remedy}"
    if first.needed_for is None:
        raise ValueError(advice)
    print(f"\n{advice}")
