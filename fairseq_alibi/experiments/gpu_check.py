"""What attention does on this machine's GPU, measured in ten minutes: `fairseq-alibi doctor --gpu`.

Each part is a list of rows for a table. What fails is a row that says why. Without a GPU the same runs on the CPU.
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..core.alibi import ALiBi
from ..core.attention import KERNELS, Kernel, choose_kernel
from ..core.attention_inputs import AttentionInputs, FoldedMask, LinearBias, NoBias
from ..core.mask_limits import crossover_file, mask_fits, measured_crossovers
from ..core.positions import distances
from ..core.transformer import Transformer
from ..data.builtin_corpus import prepare_builtin
from ..evaluation.plots import chart, curve_styles
from ..files.errors import one_line
from ..files.locks import locked
from ..files.results import check_outputs, check_writable, describe_environment, write_json, write_text, written_whole

HEADS = 8

#: Files of a run.
FILES = ("gpu.json", "gpu.md", "speed.png", "memory.png")

#: Name: queries, keys, padding to the left, window, and by how much scores are low.
CASES: dict[str, tuple[int, int, int, Optional[int], float]] = {
    "192": (192, 192, 0, None, 0.0),
    "192, low scores": (192, 192, 0, None, 60.0),
    "704, low scores": (704, 704, 0, None, 60.0),
    "ragged": (391, 391, 0, None, 0.0),
    "one query": (1, 391, 0, None, 0.0),
    "left-padded": (300, 300, 9, None, 0.0),
    "window": (300, 400, 0, 130, 0.0),
    "700 of 1,999": (700, 1999, 0, None, 0.0),
}

#: Largest error relative to the largest value that is right, by dtype.
TOLERANCE = {torch.float32: 2e-2, torch.float16: 2e-2, torch.bfloat16: 8e-2}

#: Options of fairseq-train for each precision; on a CPU only the first works.
PRECISIONS = {
    "float32": (),
    "fp16": ("--fp16",),
    "bf16": ("--bf16",),
    "amp": ("--amp",),
    "memory-efficient fp16": ("--memory-efficient-fp16",),
    "memory-efficient bf16": ("--memory-efficient-bf16",),
    "two processes": ("--distributed-world-size", "2"),
}


@dataclass(frozen=True)
class GpuCheck:
    """What is measured."""

    device: str = "cuda"
    data: Optional[Path] = None  # fairseq data folder for training; None to train nothing
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    head_dims: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 49152)
    rounds: int = 5  # of each speed
    minutes: float = 10.0  # after which no measurement begins

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of speed and memory."""
        return self.dtypes[0]

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def random(self, rows: int, queries: int, keys: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Queries, keys and values, laid out as in a model."""
        torch.manual_seed(1)
        drawn = (torch.randn(n, rows, HEADS, dim, device=self.device).to(dtype) for n in (queries, keys, keys))
        return tuple(x.permute(1, 2, 0, 3).requires_grad_() for x in drawn)


def exact(qkv: tuple[Tensor, ...], inputs: AttentionInputs, biased: bool) -> tuple[Tensor, ...]:
    """Output and gradients of its sum of squares in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    distance = distances(q.size(2), k.size(2), q.device)
    scores = q @ k.transpose(2, 3) * q.size(-1) ** -0.5
    if biased:
        scores = scores - ALiBi(HEADS).slopes(q.device)[0].double()[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (inputs.window or math.inf))
    if inputs.padding is not None:
        hidden = hidden | (inputs.padding[:, None, None] & (distance != 0))
    out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return out.detach(), *torch.autograd.grad(real(out, inputs).square().sum(), (q, k, v))


def real(out: Tensor, inputs: AttentionInputs) -> Tensor:
    """The output without rows of padding, which have no meaning."""
    return out if inputs.padding is None else out.masked_fill(inputs.padding[:, None, -out.size(2) :, None], 0.0)


def check_case(check: GpuCheck, kernel: Kernel, case: str, dtype: torch.dtype, dim: int) -> Optional[dict[str, Any]]:
    """Compares a kernel with float64; None where it does not support the case."""
    queries, keys, padded, window, low = CASES[case]
    q, k, v = check.random(2, queries, keys, dim, dtype)
    if low:
        with torch.no_grad():  # each query avoids its own key
            q.copy_(-low / dim * k[:, :, -queries:])
    padding = torch.zeros(2, keys, dtype=torch.bool, device=q.device)
    padding[0, :padded] = True
    method, plain = ALiBi(HEADS), kernel.name == "causal"
    bias: Any = NoBias() if plain else LinearBias(method.slopes(q.device)[0])
    if kernel.name == "mask":
        wide = torch.float32 if q.device.type == "cpu" else dtype
        bias = FoldedMask(method.future_mask(queries, keys, window, q.device, wide))
    inputs = AttentionInputs(bias=bias, padding=padding if padded else None, window=window)
    if not kernel.supports(q, k, inputs, 0.0):
        return None
    row: dict[str, Any] = {"kernel": kernel.name, "dtype": str(dtype)[6:], "head_dim": dim, "case": case}
    try:
        out = kernel.run(q, k, v, inputs, 0.0)
        found = [real(out, inputs), *torch.autograd.grad(real(out, inputs).square().sum(), (q, k, v))]
        wanted = exact((q, k, v), inputs, not plain)
        pairs = zip(found, (real(wanted[0], inputs), *wanted[1:]))
        error, *gradients = (((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs)
    except Exception as failure:
        return {**row, "result": one_line(failure)}
    right = max(error, *gradients) <= TOLERANCE[dtype]  # not so for NaN
    return {**row, "error": error, "gradient error": max(gradients), "result": "right" if right else "WRONG"}


def check_choice(check: GpuCheck, length: int) -> dict[str, Any]:
    """Which kernel runs for ALiBi without a mask, and the functions of the device that took the most time in it."""
    q, k, v = check.random(1, length, length, check.head_dims[0], check.dtype)
    inputs = AttentionInputs(bias=LinearBias(ALiBi(HEADS).slopes(q.device)[0]))
    kernel = choose_kernel(q, k, inputs)
    kernel.run(q, k, v, inputs, 0.0).sum().backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if check.device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        kernel.run(q, k, v, inputs, 0.0).sum().backward()
    times = {
        one.key: getattr(one, f"self_{'device' if check.device == 'cuda' else 'cpu'}_time_total")
        for one in profile.key_averages()
    }
    return {"length": length, "kernel": kernel.name, "functions": ", ".join(sorted(times, key=times.__getitem__)[-3:])}


def measure_speed(check: GpuCheck, length: int, dim: int) -> list[dict[str, Any]]:
    """Milliseconds and peak memory of one layer's attention, forward and backward, in turns."""
    q, k, v = check.random(max(1, 4096 // length), length, length, dim, check.dtype)
    device, slopes = q.device, ALiBi(HEADS).slopes(q.device)[0]
    ways: dict[str, Any] = {"fused": LinearBias(slopes), "no bias": NoBias()}
    if mask_fits(device, HEADS * length**2):
        wide = torch.float32 if check.device == "cpu" else check.dtype
        ways["mask"] = FoldedMask(ALiBi(HEADS).future_mask(length, length, None, device, wide))

    def step(bias: Any) -> float:
        inputs, started = AttentionInputs(bias=bias), time.perf_counter()
        torch.autograd.grad(choose_kernel(q, k, inputs).run(q, k, v, inputs, 0.0).sum(), (q, k, v))
        check.synchronize()
        return time.perf_counter() - started

    rows = {}
    for way, bias in ways.items():
        row: dict[str, Any] = {"way": way, "length": length, "head_dim": dim}
        rows[way] = row
        try:
            row["first seconds"] = step(bias)  # with compilation
            if check.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step(bias)
                row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        except Exception as failure:
            row["result"] = one_line(failure)
    seconds: dict[str, list[float]] = {way: [] for way, row in rows.items() if "result" not in row}
    for _ in range(check.rounds):
        for way, measured in seconds.items():
            measured.append(step(ways[way]))
    for way, measured in seconds.items():
        rows[way]["milliseconds"] = 1000 * statistics.median(measured)
        rows[way]["spread"] = (max(measured) - min(measured)) / 2 / statistics.median(measured)
    return list(rows.values())


def check_passes(check: GpuCheck) -> dict[str, Any]:
    """Graphs that a sweep over lengths and batches compiles, and how often a pass of a model waits for the GPU."""
    from torch._dynamo.utils import counters  # it takes a second

    before = counters["stats"]["unique_graphs"]
    shapes = [(1, 300, 300), (3, 700, 700), (1, 1, 900), (2, 128, 1000)]
    for rows, queries, keys in shapes:
        with torch.no_grad():
            q, k, v = check.random(rows, queries, keys, check.head_dims[0], check.dtype)
            inputs = AttentionInputs(bias=LinearBias(ALiBi(HEADS).slopes(q.device)[0]))
            choose_kernel(q, k, inputs).run(q, k, v, inputs, 0.0)
    model = Transformer(4, 256, HEADS, attention="fused").to(check.device, check.dtype)
    x = torch.randn(2, 512, 256, device=check.device, dtype=check.dtype)
    model(x).sum().backward()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if check.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            model(x).sum().backward()
        finally:
            if check.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waiting = sum("synchroniz" in str(one.message) for one in waits)
    return {"graphs": counters["stats"]["unique_graphs"] - before, "passes": len(shapes), "waits of 4 layers": waiting}


def check_training(check: GpuCheck, precision: str) -> dict[str, Any]:
    """The loss after 20 updates of fairseq-train."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fairseq_cli.train", str(check.data), "--user-dir", Path(__file__).parents[1]]
        command += ["--task", "language_modeling", "--arch", "alibi_lm_tiny", "--tokens-per-sample", 128, "--seed", 1]
        command += ["--max-tokens", 2048, "--max-update", 20, "--optimizer", "adam", "--lr", 0.003, "--log-format"]
        command += ["json", "--disable-validation", "--save-dir", folder, "--no-save", *PRECISIONS[precision]]
        command += ["--distributed-world-size", 1] if precision != "two processes" else ["--max-tokens", 1024]
        command += ["--cpu"] if check.device == "cpu" else []
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    lines = [line.partition("{") for line in (done.stdout + done.stderr).splitlines() if '"train_loss"' in line]
    if done.returncode or not lines:
        last = (done.stderr or done.stdout).strip().splitlines()
        return {"precision": precision, "result": last[-1][:200] if last else f"status {done.returncode}"}
    return {"precision": precision, "loss after 20 updates": float(json.loads("{" + lines[-1][2])["train_loss"])}


def jobs(check: GpuCheck) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """What is measured, in the order of use: the part, a title, and what gives a row, rows or None."""
    yield "passes", "graphs and waits", partial(check_passes, check)
    for length in check.lengths:
        for dim in check.head_dims:
            yield "speed", f"{length:,} tokens", partial(measure_speed, check, length, dim)
    yield "choice", "profile", partial(check_choice, check, check.lengths[min(2, len(check.lengths) - 1)])
    kernels = [kernel for kernel in KERNELS if kernel.name not in ("empty", "explicit")]
    for dtype, dim, kernel, case in itertools.product(check.dtypes, check.head_dims, kernels, CASES):
        yield "correctness", f"{kernel.name}, {case}", partial(check_case, check, kernel, case, dtype, dim)
    possible = [name for name in PRECISIONS if name != "two processes" or torch.cuda.device_count() > 1]
    for precision in (possible if check.device == "cuda" else possible[:1]) if check.data else []:
        yield "training", precision, partial(check_training, check, precision)


def crossover(rows: list[dict[str, Any]]) -> Optional[int]:
    """The longest measured length at which a mask is faster; 0 if it never is; None without a comparison."""
    times = {(row["way"], row["length"], row["head_dim"]): row["milliseconds"] for row in rows if "milliseconds" in row}
    both = [shape for way, *shape in times if way == "mask" and ("fused", *shape) in times]
    faster = [length for length, dim in both if times["mask", length, dim] < times["fused", length, dim]]
    return max(faster, default=0) if both else None


def run_gpu_check(check: GpuCheck, output: Path) -> str:
    """Measures, writes gpu.json after every row, gpu.md, plots and the crossover for `auto`; returns the tables."""
    content: dict[str, Any] = {"environment": describe_environment(check.device), "heads": HEADS, "rows": {}}
    begun, todo = time.monotonic(), list(jobs(check))
    bar = tqdm(todo, desc="doctor --gpu", unit="job", file=sys.stderr)
    for part, title, job in bar:
        bar.set_postfix_str(title)
        rows = content["rows"].setdefault(part, [])
        if time.monotonic() - begun > 60 * check.minutes:
            content.setdefault("left out for lack of time", []).append(f"{part}: {title}")
            continue
        try:
            found = job()
        except Exception as failure:
            found = {"title": title, "result": one_line(failure)}
        rows += found if isinstance(found, list) else [found] if found else []
        write_json(output / "gpu.json", content)
    content["longest mask"] = crossover(content["rows"]["speed"])
    write_json(output / "gpu.json", content)
    if check.device == "cuda" and content["longest mask"] is not None:
        write_json(crossover_file(), {**measured_crossovers(), torch.cuda.get_device_name(): content["longest mask"]})
    text = [f"{content['environment']['device']}; torch {torch.__version__}; {str(check.dtype)[6:]}, {HEADS} heads."]
    for part, rows in content["rows"].items():
        text += [part, tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g")]
    text += [f"longest mask for `auto`: {content['longest mask']}"]
    write_text(output / "gpu.md", "\n\n".join(text) + "\n")
    plot_speed(content["rows"]["speed"], output)
    return "\n\n".join(text)


def check_this_gpu(output: Path, overwrite: bool) -> str:
    """`run_gpu_check` with the built-in corpus; ValueError without a GPU, or where results are to be kept."""
    if not torch.cuda.is_available():
        raise ValueError("--gpu: torch finds no GPU here; run it without the option")
    with locked(output), tempfile.TemporaryDirectory() as folder:
        check_outputs([output / name for name in FILES], overwrite)
        check_writable(crossover_file())
        prepare_builtin(Path(folder, "data"))
        return run_gpu_check(GpuCheck(data=Path(folder, "data")), output)


def plot_speed(rows: list[dict[str, Any]], output: Path) -> None:
    """Draws time and peak memory against length to speed.png and memory.png."""
    for name, value in (("speed", "milliseconds"), ("memory", "peak MiB")):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if value in row:
                lines.setdefault(f"{row['way']}, head_dim {row['head_dim']}", {})[row["length"]] = row[value]
        if lines:
            with written_whole(output / f"{name}.png") as partial, chart(partial, list(lines)) as axes:
                for (label, points), style in zip(lines.items(), curve_styles(len(lines))):
                    axes.plot(list(points), list(points.values()), label=label, **style)
                axes.set_xlabel("length (tokens)")
                axes.set_ylabel(value)
