"""Speed and peak memory of attention with and without a mask: in one layer, in training, in evaluation; of scoring.

What is compared, the contenders, takes turns within one run, so that a machine that gets slower does so for all of
them. The first round warms up and does not count, unless one round alone takes longer than the budget. Medians.

A contender is one entry of a dict: a function for one layer of attention, options of fairseq-train for training,
options of the model, overridden in a checkpoint, for evaluation, a command for scoring.
"""

import argparse
import gc
import logging
import math
import multiprocessing
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy
import torch
import torch.nn.functional as F
from benchmark_report import write_report
from fairseq import options, tasks
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import BaseFairseqModel
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fairseq_alibi
from fairseq_alibi.commands.arguments import positive_integer
from fairseq_alibi.core import attention
from fairseq_alibi.core.alibi import ALiBi
from fairseq_alibi.core.attention import attend
from fairseq_alibi.core.attention_inputs import AttentionInputs, FoldedMask, LinearBias
from fairseq_alibi.evaluation.fairseq_eval_lm import EvalLmSettings, run_eval_lm
from fairseq_alibi.evaluation.measurement import Windowing, evaluate_model
from fairseq_alibi.evaluation.text import read_evaluation_text
from fairseq_alibi.files.checkpoints import describe_model, read_checkpoint
from fairseq_alibi.files.data_folders import made_up_dictionary, open_subset, subset_tokens
from fairseq_alibi.files.model_loading import load_model
from fairseq_alibi.files.results import check_writable, describe_environment, write_json

#: One layer of attention: what is called with q, k, v, the slopes and the future mask.
ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mask": lambda q, k, v, slopes, mask: attend(q, k, v, AttentionInputs(bias=FoldedMask(mask))),
    "fused": lambda q, k, v, slopes, mask: attend(q, k, v, AttentionInputs(bias=LinearBias(slopes))),
    "no skipping": lambda q, k, v, slopes, mask: attend(q, k, v, AttentionInputs(bias=LinearBias(slopes), epsilon=0.0)),
    "no bias": lambda q, k, v, slopes, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}
#: Training: the architecture, which --full completes, and options of fairseq-train. `transformer_lm` is fairseq's own.
TRAINING = {
    "mask": ("alibi_lm", "--attention", "mask"),
    "fused": ("alibi_lm", "--attention", "fused"),
    "auto": ("alibi_lm", "--attention", "auto"),
    "auto, bf16": ("alibi_lm", "--cpu-bf16"),
    "no position": ("alibi_lm", "--position-method", "none"),
    "transformer_lm": ("transformer_lm",),
}
#: Evaluation: options of the model in the place of those in the checkpoint.
EVALUATION: dict[str, dict[str, Any]] = {
    "auto": {"attention": "auto"},
    "auto, bf16": {"attention": "auto", "cpu_bf16": True},
    "no skipping": {"attention": "fused", "attention_epsilon": 0.0},
    "mask": {"attention": "mask"},
}
#: Scoring: what is called with data, checkpoint, length, stride and further options of fairseq-eval-lm.
SCORING: dict[str, Callable[[str, str, int, int, argparse.Namespace], Any]] = {
    "fairseq-eval-lm": lambda data, path, length, stride, args: run_eval_lm(
        EvalLmSettings(data, path, [(length, stride)], passed_on=["--cpu"] if args.device == "cpu" else []).arguments(
            length, stride
        )
    ),
    "fairseq-alibi evaluate": lambda data, path, length, stride, args: evaluate_model(
        load_model(path, read_checkpoint(path), data).to(args.device),
        read_evaluation_text(data, "valid", None),
        Windowing(length, stride),
        4096,
    ),
}
#: Those that the others are compared with.
BASES = {
    "attention": ("mask", "no bias"),
    "training": ("mask", "transformer_lm"),
    "evaluation": ("mask", "no skipping"),
    "scoring": ("fairseq-eval-lm",),
}
PARTS = ("attention", "training", "evaluation", "scoring", "memory")

HEADS = 8
HEAD_DIMS = (64, 128)  # of one layer of attention
SIZES = (
    *("--decoder-layers", 4, "--decoder-attention-heads", HEADS, "--decoder-ffn-embed-dim", 1024),
    *("--decoder-embed-dim", 256, "--decoder-input-dim", 256, "--decoder-output-dim", 256),
    "--share-decoder-input-output-embed",
)
#: Number of types in the vocabulary; with --full that of WikiText-103.
TYPES = {False: 8_000, True: 267_744}
#: Bytes from which on evaluation leaves out the contender with a mask.
LARGEST_MASK = 3e9
MODELS = {False: "4 layers, width 256, 8 heads, 8,000 types", True: "alibi_lm_wiki103 and transformer_lm_wiki103"}
PRECISION = {"float32": (), "bfloat16": ("--bf16",), "float16": ("--fp16",)}


class Case(NamedTuple):
    """What is scored: by a made-up model with a vocabulary of `types`, adaptive where it has cutoffs.

    Args:
        types: in the vocabulary.
        cutoffs: as --adaptive-softmax-cutoff has them; None for a plain softmax.
        length, stride: of the windows, in tokens.
        tokens: in the text.
    """

    types: int
    cutoffs: Optional[str]
    length: int
    stride: int
    tokens: int

    @property
    def title(self) -> str:
        """As a table names it."""
        softmax = "adaptive" if self.cutoffs else "plain"
        return f"{self.length:,} / {self.stride:,} / {self.types:,}, {softmax}"


#: The vocabularies of the WikiText-103 slice that this was developed with, and of the whole corpus.
CASES = (
    Case(32_496, "4000,8000", 512, 512, 8192),
    Case(32_496, None, 512, 512, 8192),
    Case(267_744, "20000,60000", 512, 512, 4096),
    Case(32_496, "4000,8000", 512, 128, 4096),
    Case(32_496, "4000,8000", 128, 1, 512),  # 128 of them are scored by the first window at once
)
#: Peak memory is measured with this one.
MEMORY_CASE = Case(32_496, "4000,8000", 8192, 8192, 16_384)

#: What the two levels measure; memory has lengths for training and for evaluation.
QUICK: dict[str, Any] = {
    "attention": (512, 4096),
    "training": (512, 2048),
    "evaluation": (512, 8192),
    "memory of training": (2048,),
    "memory of evaluation": (4096,),
    "cases": (CASES[0], *(case._replace(tokens=case.tokens // 2) for case in CASES[2:])),
    "repeats": 3,
    "budget": 3.0,
    "updates": 40,
}
ALL_LENGTHS: dict[str, Any] = {
    "attention": (512, 1024, 2048, 4096, 8192),
    "training": (128, 256, 512, 1024, 2048, 4096),
    "evaluation": (512, 2048, 8192, 32768, 131072),
    "memory of training": (128, 256, 512, 1024, 2048, 4096),
    "memory of evaluation": (512, 2048, 8192, 32768, 131072),
    "cases": tuple(case._replace(tokens=4 * case.tokens) for case in CASES),
    "repeats": 5,
    "budget": 60.0,
    "updates": 300,
}


def rows(length: int, tokens: int) -> int:
    """Sequences of `length` in a batch of about `tokens` tokens, at least one."""
    return max(1, tokens // length)


def alternate(contenders: dict[str, Callable[[], Any]], repeats: int, budget: float) -> dict[str, list[float]]:
    """Runs all contenders in turn, again and again.

    Args:
        contenders: what to run, by name.
        repeats: rounds that count.
        budget: seconds after which no new round begins.

    Returns:
        Seconds of every counting round, by name; none for a contender that ran out of memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    failed = set()
    begun = time.perf_counter()
    names = list(contenders)
    for _ in range(repeats + 1):
        names = (
            names[1:] + names[:1]
        )  # the first one of a round is another each time, and so is what it finds in caches
        for name in [name for name in names if name not in failed]:
            try:
                synchronize()
                started = time.perf_counter()
                contenders[name]()
                synchronize()
                seconds[name].append(time.perf_counter() - started)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                failed.add(name)
        if time.perf_counter() - begun > budget:
            break
    return {name: [] if name in failed else times[1:] or times for name, times in seconds.items()}


def synchronize() -> None:
    """Waits for the GPU, where there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says that memory ran out, on a GPU or a CPU."""
    return any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory"))


def compared(part: str, length: int, tokens: int, times: dict[str, list[float]], **more: Any) -> list[dict[str, Any]]:
    """The measurements of one length, each contender's speed beside that of the part's bases.

    Args:
        part: attention, training, evaluation or scoring.
        length: tokens in a sequence.
        tokens: that were worked on in all.
        times: see `alternate`.
        more: goes into every measurement.

    Returns:
        Per contender: what was measured, seconds of every repeat, their median, tokens_per_second, and `times_as_fast`
        as each base; instead of the last three an `error` where memory ran out.
    """
    medians = {name: statistics.median(seconds) for name, seconds in times.items() if seconds}
    measurements = []
    for name, seconds in times.items():
        measurement = {"part": part, "contender": name, "length": length, "tokens": tokens, **more, "seconds": seconds}
        if seconds:
            measurement["median_seconds"] = medians[name]
            measurement["tokens_per_second"] = tokens / medians[name]
            measurement["times_as_fast"] = {b: medians[b] / medians[name] for b in BASES[part] if b in medians}
        else:
            measurement["error"] = "out of memory"
        measurements.append(measurement)
    return measurements


def attention_step(contender: str, length: int, head_dim: int, args: argparse.Namespace) -> Callable[[], None]:
    """One layer of attention, forward and backward, on random queries, keys and values laid out as in the model."""
    torch.manual_seed(1)
    batch, dtype = rows(length, args.tokens), getattr(torch, args.dtype)
    method = ALiBi(HEADS)
    slopes, mask = method.slopes(args.device)[0], None
    if contender == "mask":
        mask = method.future_mask(length, length, dtype, torch.device(args.device))
    shape = (length, batch, HEADS * head_dim)
    inputs = [torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, device=args.device, dtype=dtype)

    def step():
        q, k, v = (x.view(length, batch, HEADS, head_dim).permute(1, 2, 0, 3) for x in inputs)
        out = ATTENTION[contender](q, k, v, slopes, mask)
        torch.autograd.grad(out.permute(2, 0, 1, 3).reshape(shape), inputs, gradient)

    return step


def training_config(contender: str, length: int, args: argparse.Namespace, data: str) -> FairseqConfig:
    """The configuration that fairseq-train would make of a contender's options."""
    arch, *more = TRAINING[contender]
    arguments = [data, "--task", "language_modeling", "--tokens-per-sample", length, "--distributed-world-size", 1]
    arguments += ["--arch", arch + "_wiki103" * args.full, "--dropout", 0.1, "--attention-dropout", 0, "--seed", 1]
    arguments += ["--optimizer", "adam", "--lr", 1e-4, "--clip-norm", 0.1, *PRECISION[args.dtype], *more]
    arguments += ["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"] if args.full else SIZES
    arguments += ["--cpu"] if args.device == "cpu" else []
    parsed = options.parse_args_and_arch(options.get_training_parser(), list(map(str, arguments)))
    parsed.tpu = False  # which fairseq concludes from --bf16
    return convert_namespace_to_omegaconf(parsed)


def training_step(contender: str, length: int, args: argparse.Namespace) -> Callable[[], Any]:
    """One update of a model as fairseq-train makes it: forward, loss, backward, optimizer; of a made-up text."""
    batch = rows(length, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        made_up_dictionary(TYPES[args.full]).save(str(Path(folder, "dict.txt")))
        cfg = training_config(contender, length, args, folder)
        task = tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    text = made_up_text(TYPES[args.full], batch * (length + 1)).view(batch, length + 1)
    sample = {
        "id": torch.arange(batch),
        "nsentences": batch,
        "ntokens": batch * length,
        "net_input": {"src_tokens": text[:, :-1].contiguous(), "src_lengths": torch.full((batch,), length)},
        "target": text[:, 1:].contiguous(),
    }
    return lambda: trainer.train_step([sample], raise_oom=True)


def made_up_model(case: Case, folder: Path, args: argparse.Namespace) -> tuple[str, str]:
    """Data and checkpoint of a case: random weights, and text in which types are as frequent as in `training_step`.

    Returns:
        The data folder and the checkpoint, both in `folder`.
    """
    text = made_up_text(case.types, case.tokens)
    made_up_dictionary(case.types).save(str(Path(folder, "dict.txt")))
    builder = MMapIndexedDatasetBuilder(str(folder / "valid.bin"), dtype=numpy.int32)
    for sentence in text.split(25):
        sentence[-1] = 2  # the end of sentence, which fairseq takes for granted
        builder.add_item(sentence)
    builder.finalize(str(folder / "valid.idx"))
    sizes, adaptive = list(SIZES), case.cutoffs is not None
    if adaptive:
        sizes.remove("--share-decoder-input-output-embed")
        sizes += ["--adaptive-input", "--adaptive-input-cutoff", case.cutoffs, "--tie-adaptive-weights"]
        sizes += ["--adaptive-softmax-cutoff", case.cutoffs]
    arguments = [folder, "--task", "language_modeling", "--arch", "alibi_lm", *sizes, "--decoder-normalize-before"]
    arguments += ["--optimizer", "adam", "--lr", 1e-4, "--tokens-per-sample", 512]
    parsed = options.parse_args_and_arch(options.get_training_parser(), list(map(str, arguments)))
    cfg = convert_namespace_to_omegaconf(parsed)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    path = folder / "checkpoint.pt"
    state = {"args": None, "cfg": OmegaConf.to_container(cfg), "model": model.state_dict(), "extra_state": {}}
    torch.save({**state, "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {}}]}, path)
    return str(folder), str(path)


def made_up_text(types: int, tokens: int) -> Tensor:
    """Random tokens, (tokens,) int64, none of them special; the token of rank r comes with a frequency like 1 / r."""
    torch.manual_seed(1)
    frequency = 1 / torch.arange(1.0, types - 3)  # fairseq adds 4 special symbols
    return torch.multinomial(frequency, tokens, replacement=True) + 4


def evaluated_model(contender: str, args: argparse.Namespace) -> BaseFairseqModel:
    """The checkpoint's model with a contender's options.

    Raises:
        ValueError: the checkpoint does not load, or not with this data.
    """
    path, overrides = str(args.checkpoint), {"max_target_positions": None, **EVALUATION[contender]}
    model = load_model(path, read_checkpoint(path), str(args.data), overrides)
    return model.to(args.device, getattr(torch, args.dtype))


def evaluation_step(contender: str, length: int, args: argparse.Namespace) -> Callable[[], Any]:
    """One pass of the checkpoint's network, without the softmax over the vocabulary, over the beginning of its text."""
    decoder = evaluated_model(contender, args).decoder
    tokens = first_tokens(str(args.data), length)[None].to(args.device)
    return torch.no_grad()(lambda: decoder.extract_features(tokens, None))


@torch.no_grad()
def perplexity(contender: str, length: int, args: argparse.Namespace) -> float:
    """Perplexity per token of the text of `evaluation_step`, scored 1,024 tokens at a time."""
    model = evaluated_model(contender, args)
    tokens = first_tokens(str(args.data), length + 1)[None].to(args.device)
    features, _ = model.decoder.extract_features(tokens[:, :-1], None)
    total = 0.0
    for some, targets in zip(features.split(1024, dim=1), tokens[:, 1:].split(1024, dim=1)):
        log_probs = model.get_normalized_probs((model.decoder.output_layer(some), None), log_probs=True)
        total -= log_probs.gather(2, targets[..., None]).double().sum().item()
    return math.exp(total / length)


def product_rate(args: argparse.Namespace) -> float:
    """Floating-point operations per second of this device in one large matrix product, the best of some."""
    n = 4096 if args.device == "cuda" else 1024
    x = torch.ones(n, n, device=args.device, dtype=getattr(torch, args.dtype))
    times = alternate({"product": lambda: x @ x}, 10, 10.0)
    return 2 * n**3 / min(times["product"])


def product_share(step: Callable[[], Any], seconds: float, args: argparse.Namespace) -> float:
    """The roofline of training: what share of `seconds` an update's matrix products need at `product_rate`.

    Those of the layers and the output; not those inside attention, which are another kernel's.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / product_rate(args) / seconds


def first_tokens(data: str, length: int) -> Tensor:
    """The first `length` tokens of the train split of a fairseq data folder, sentences joined: (length,) int64.

    Raises:
        ValueError: there are not that many.
    """
    available = subset_tokens(data, "train")
    if available < length:
        raise ValueError(f"{data} holds {available:,} tokens of training text, not {length:,}: pass shorter --lengths")
    dataset = open_subset(data, "train")
    sentences, count = [], 0
    while count < length:
        sentences.append(dataset[len(sentences)])
        count += len(sentences[-1])
    return torch.cat(sentences)[:length].long()


def keys_read(length: int, reaches: list[float]) -> int:
    """Scores that `fused_attention` computes on a CPU for a sequence, over all heads, given the reach of each."""
    return sum(
        math.prod(part.stop - part.start for part in (tile.heads, tile.queries, tile.keys))
        for tile in attention.tiles(length, length, reaches)
    )


def skipped(step: Callable[[], Any], length: int) -> dict[str, Any]:
    """What a pass of the model skips, by the reaches that its layers find.

    Returns:
        skipped_share: scores not computed, of 1 for those that are without skipping; reach_per_head: tokens, the
        median over the layers, None where it has no end. Both None where attention runs under a mask.
    """
    found, original = [], attention.reach

    def recorded(*args, **kwargs):
        reaches = original(*args, **kwargs)
        found.append(reaches.tolist())
        return reaches

    attention.reach = recorded
    try:
        step()
    finally:
        attention.reach = original
    if not found:
        return {"skipped_share": None, "reach_per_head": None}
    whole = keys_read(length, [math.inf] * len(found[0])) * len(found)
    medians = [statistics.median(reaches) for reaches in zip(*found)]
    return {
        "skipped_share": 1 - sum(keys_read(length, reaches) for reaches in found) / whole,
        "reach_per_head": [round(reach, 1) if math.isfinite(reach) else None for reach in medians],
    }


def evaluated(length: int) -> list[str]:
    """The contenders of evaluation: the mask, of 8 heads, only while it is small."""
    small = HEADS * length * length * 4 < LARGEST_MASK
    return [name for name, overrides in EVALUATION.items() if small or overrides["attention"] != "mask"]


def score(contender: str, case: Case, folder: str, args: argparse.Namespace) -> None:
    """Scores the text of a case: everything that a command does but the imports."""
    SCORING[contender](folder, str(Path(folder, "checkpoint.pt")), case.length, case.stride, args)


def peak_memory(of: Optional[str], contender: str, length: int, args: argparse.Namespace) -> int:
    """Bytes of memory at the highest, from here on where on a GPU, else of this process since it began.

    Args:
        of: training, evaluation, scoring, or None for doing nothing.
        contender, length, args: what is run; training twice, for the optimizer's state comes with the first update.
    """
    if args.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    quiet()
    if of == "scoring":
        with tempfile.TemporaryDirectory() as folder:
            made_up_model(MEMORY_CASE, Path(folder), args)
            score(contender, MEMORY_CASE, folder, args)
    elif of is not None:
        step = (training_step if of == "training" else evaluation_step)(contender, length, args)
        for _ in range(2 if of == "training" else 1):
            step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(of: Optional[str], contender: str, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures peak memory; on a CPU in a fresh process that has imported everything and run nothing."""
    measurement = {"part": "memory", "of": of, "contender": contender, "length": length, "rows": 1}
    if of == "training":
        measurement["rows"] = rows(length, args.tokens)
    if of == "scoring":
        measurement.update(case=MEMORY_CASE.title, length=MEMORY_CASE.length)
    try:
        if args.device == "cuda":
            return [{**measurement, "peak_memory_bytes": peak_memory(of, contender, length, args)}]
        # Forked from a server that did the imports: a process started from here would inherit this one's peak.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["fairseq.trainer", "fairseq_alibi", "fairseq_alibi.evaluation.measurement", "fairseq_cli.eval_lm"]
        )
        with ProcessPoolExecutor(1, context) as pool:
            peak = pool.submit(peak_memory, of, contender, length, args).result()
        return [{**measurement, "peak_memory_bytes": peak}]
    except (RuntimeError, BrokenProcessPool) as error:
        if not (isinstance(error, BrokenProcessPool) or out_of_memory(error)):
            raise
        return [{**measurement, "error": "out of memory"}]


def quiet() -> None:
    """Errors only: fairseq logs every model and every step."""
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("fairseq").setLevel(logging.ERROR)


def timed_scoring(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures how fast the commands score a text, reading the checkpoint included, see `compared`."""
    with tempfile.TemporaryDirectory() as folder:
        made_up_model(case, Path(folder), args)
        times = alternate(
            {name: partial(score, name, case, folder, args) for name in SCORING}, args.repeats, args.budget
        )
    more = {"case": case.title, "stride": case.stride, "types": case.types}
    return compared("scoring", case.length, case.tokens, times, **more)


def timed(part: str, length: int, head_dim: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the speed of all contenders of a part at one length, see `compared`."""
    more: dict[str, Any] = {}
    if part == "attention":
        more = {"head_dim": head_dim}
        steps = {name: attention_step(name, length, head_dim, args) for name in ATTENTION}
    elif part == "training":
        steps = {name: training_step(name, length, args) for name in TRAINING}
    else:
        steps = {name: evaluation_step(name, length, args) for name in evaluated(length)}
        more = skipped(steps["auto"], length)
    batch = 1 if part == "evaluation" else rows(length, args.tokens)
    times = alternate(steps, args.repeats, args.budget)
    measurements = compared(part, length, batch * length, times, rows=batch, **more)
    for one in measurements:
        if part == "training" and one["contender"] == "auto" and one["seconds"]:
            one["product_share"] = product_share(steps["auto"], one["median_seconds"], args)
        if part == "evaluation" and one["contender"].startswith("auto"):  # the others compute what auto does
            one["perplexity"] = perplexity(one["contender"], length, args)
    return measurements


def lengths_of(part: str, args: argparse.Namespace) -> list[int]:
    """The lengths at which a part, or `memory of training` or `memory of evaluation`, is measured."""
    return sorted(set(args.lengths or (ALL_LENGTHS if args.all_lengths else QUICK)[part]))


def jobs(args: argparse.Namespace) -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """What is to be measured, one after the other: a title, and what returns measurements."""
    found: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    for part in args.parts:
        if part == "scoring":
            for case in (ALL_LENGTHS if args.all_lengths else QUICK)["cases"]:
                found.append((f"scoring {case.title}", partial(timed_scoring, case, args)))
        elif part == "memory":
            if args.device == "cpu":  # what a process takes before it does anything
                found.append((part, partial(memory, None, "imports only", 0, args)))
            for name, contenders in (("training", lambda _: TRAINING), ("evaluation", evaluated)):
                for length in lengths_of(f"memory of {name}", args):
                    for contender in contenders(length):
                        if contender != "no skipping":  # it makes the tensors that are made with skipping too
                            title = f"memory of {name}, length {length:,}"
                            found.append((title, partial(memory, name, contender, length, args)))
            found += [("memory of scoring", partial(memory, "scoring", name, 0, args)) for name in SCORING]
        else:
            for head_dim in HEAD_DIMS if part == "attention" else (0,):
                for length in lengths_of(part, args):
                    found.append((f"{part}, length {length:,}", partial(timed, part, length, head_dim, args)))
    return found


def train_model(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """Trains a small ALiBi model on text of this machine, unless `folder` holds it; returns checkpoint and data."""
    data, save_dir = Path("data-bin/builtin"), folder / f"model-{args.updates}-updates"
    checkpoint, log = save_dir / "checkpoint_last.pt", save_dir / "train.log"
    if not checkpoint.exists():
        print(f"benchmark: training a model for {args.updates} updates (log in {log})", file=sys.stderr)
        save_dir.mkdir(parents=True, exist_ok=True)
        command = [data, "--user-dir", Path(fairseq_alibi.__file__).parent, "--task", "language_modeling"]
        command += ["--arch", "alibi_lm", *SIZES]
        command += ["--tokens-per-sample", 512, "--max-tokens", 2048, "--required-batch-size-multiple", 1]
        command += ["--optimizer", "adam", "--lr", 0.002, "--clip-norm", 0.5, "--lr-scheduler", "cosine"]
        command += ["--warmup-updates", args.updates // 5, "--lr-period-updates", args.updates - args.updates // 5]
        command += ["--max-update", args.updates, "--disable-validation", "--no-epoch-checkpoints", "--seed", 1]
        command += ["--save-dir", save_dir, *(["--cpu"] if args.device == "cpu" else [])]
        with log.open("w", encoding="utf-8") as output:
            for module, arguments in (
                ("fairseq_alibi", ["prepare-text", data, "--builtin"]),
                ("fairseq_cli.train", command),
            ):
                done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], stdout=output)
                if done.returncode:
                    raise ValueError(f"{module} ended with status {done.returncode}: see {log}, or pass --checkpoint")
    return checkpoint, data


def benchmark(args: argparse.Namespace) -> str:
    """Measures what `args` asks for and writes benchmark.json (after every job), .md and .png; returns the tables.

    Raises:
        ValueError: bad input, see `parse`; or the result is there already.
    """
    result = args.output / "benchmark.json"
    if result.exists() and not args.overwrite:
        raise ValueError(f"{result} exists: pass --overwrite to replace it, or another --output")
    if (args.checkpoint is None) != (args.data is None):
        raise ValueError("--checkpoint and --data, the folder it was trained on, go together: pass both or neither")
    todo = jobs(args)
    if {"evaluation", "memory"} & set(args.parts):
        if args.checkpoint is None:
            args.checkpoint, args.data = train_model(args.output, args)
        method = describe_model(str(args.checkpoint))["position_method"]
        if method != "alibi":
            raise ValueError(f"{args.checkpoint} has the position method {method}: name a checkpoint of an ALiBi model")
        parts = [part for part in ("evaluation", "memory of evaluation") if part.split()[0] in args.parts]
        first_tokens(str(args.data), 1 + max(length for part in parts for length in lengths_of(part, args)))
    check_writable(result)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    content = {
        "command": shlex.join(sys.argv),
        "environment": describe_environment(),
        "load_average": os.getloadavg()[0],  # other work on the same cores slows the contenders unequally
        "settings": settings,
        "model": MODELS[args.full],
        "heads": HEADS,
        "bases": BASES,
        "measurements": [],
    }
    bar = tqdm(todo, desc="benchmark", unit="job", file=sys.stderr)
    try:
        for title, job in bar:
            bar.set_postfix_str(title)
            content["measurements"] += job()
            write_json(result, content)
    finally:  # an interrupted run loses nothing
        bar.close()
        text = write_report(content, args.output) if content["measurements"] else ""
    return text


def some_parts(text: str) -> list[str]:
    """An argparse type: parts with commas between."""
    for part in text.split(","):
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"'{part}' is no part: choose of {','.join(PARTS)}, with commas between")
    return list(dict.fromkeys(text.split(",")))


def parse(argv: Optional[list[str]]) -> argparse.Namespace:
    """Parses the command line and settles what was left open: device, dtype, repeats, budget and updates."""
    parser = argparse.ArgumentParser(prog="benchmark.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="few lengths, few repeats: a few minutes (default)")
    level.add_argument("--all-lengths", action="store_true", help="lengths up to 131,072 tokens, more repeats")
    add("--full", action="store_true", help="train the WikiText-103 architecture of the paper, 247M parameters")
    add("--parts", type=some_parts, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    add("--lengths", type=positive_integer, nargs="+", metavar="N", help="tokens in a sequence, for every part")
    add(
        "--tokens",
        type=positive_integer,
        default=2048,
        metavar="N",
        help="tokens in a batch, at least 1 row (default 2048)",
    )
    add("--repeats", type=positive_integer, metavar="N", help="rounds that count (default 3, with --all-lengths 5)")
    add("--budget", type=positive_integer, metavar="SECONDS", help="for one length, after which no new round begins")
    add("--checkpoint", type=Path, help="ALiBi model for evaluation; default: a small one, trained first")
    add("--data", type=Path, help="fairseq data folder of the checkpoint")
    add("--output", type=Path, default=Path("results/benchmark"), metavar="DIR", help="default: results/benchmark")
    add("--overwrite", action="store_true", help="replace a result that is there")
    add("--cpu", action="store_true", help="do not use the GPU")
    add("--dtype", choices=list(PRECISION), help="default: float32 on a CPU, bfloat16 on a GPU")
    args = parser.parse_args(argv)
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for a GPU
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    chosen = ALL_LENGTHS if args.all_lengths else QUICK
    args.repeats, args.budget = args.repeats or chosen["repeats"], args.budget or chosen["budget"]
    args.updates = chosen["updates"]
    return args


def main(argv: Optional[list[str]] = None) -> None:
    """The command behind scripts/benchmark.sh."""
    args = parse(argv)
    quiet()
    try:
        print("\n" + benchmark(args))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(f"benchmark: interrupted; what was measured is in {args.output / 'benchmark.json'}")
    print(f"written to {args.output}/benchmark.json, benchmark.md and benchmark.png")


if __name__ == "__main__":
    main()
