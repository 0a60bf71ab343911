"""What the benchmark compares: the contenders of every part, each as a function that takes a step.

A contender is an entry of a dictionary: a function for one layer of attention, options of fairseq-train for training,
options of the model that override those of a checkpoint for evaluation, a command for scoring.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_models import HEADS, SIZES, Case, first_tokens, made_up_text, rows
from fairseq import options, tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import BaseFairseqModel
from fairseq.trainer import Trainer
from torch import Tensor

from fairseq_alibi.core import position_methods
from fairseq_alibi.core.alibi import ALiBi
from fairseq_alibi.core.attention import attend
from fairseq_alibi.core.attention_inputs import AttentionInputs, FoldedMask, LinearBias, TokenSpan
from fairseq_alibi.core.reach import reach
from fairseq_alibi.core.tiled_attention import tiles
from fairseq_alibi.evaluation.fairseq_eval_lm import EvalLmSettings, run_eval_lm
from fairseq_alibi.evaluation.measurement import Windowing, evaluate_model
from fairseq_alibi.evaluation.reach_measurement import queries_and_keys
from fairseq_alibi.evaluation.text import read_evaluation_text
from fairseq_alibi.files.checkpoints import load_model, read_checkpoint
from fairseq_alibi.files.data_folders import made_up_dictionary
from fairseq_alibi.models.layers import autocast_products

#: Number of types in the vocabulary; with --full that of WikiText-103.
TYPES = {False: 8_000, True: 267_744}
#: Bytes from which on evaluation leaves out the contender with a mask.
LARGEST_MASK = 3e9
PRECISION = {"float32": (), "bfloat16": ("--bf16",), "float16": ("--fp16",)}
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
#: Training of every position method, with the attention that it has by itself and under a mask.
METHODS = {name: ("alibi_lm", "--position-method", name) for name in position_methods()}
UNDER_MASK = {f"{name}, mask": (*method, "--attention", "mask") for name, method in METHODS.items()}
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


def attention_step(contender: str, length: int, head_dim: int, args: argparse.Namespace) -> Callable[[], None]:
    """One layer of attention, forward and backward, on random queries, keys and values laid out as in the model."""
    torch.manual_seed(1)
    batch, dtype = rows(length, args.tokens), getattr(torch, args.dtype)
    method = ALiBi(HEADS)
    slopes, mask = method.slopes(args.device)[0], None
    if contender == "mask":
        mask = method.future_mask(length, length, device=torch.device(args.device)).to(dtype)
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
    arch, *more = {**TRAINING, **METHODS, **UNDER_MASK}[contender]
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


def cpu_bf16_helps() -> bool:
    """Says whether models may run matrix products in bfloat16 on this CPU, see `autocast_products`."""
    try:
        autocast_products(True, torch.empty(1))
    except ValueError:
        return False
    return True


def contenders_of(part: str, length: int, args: argparse.Namespace) -> list[str]:
    """Returns the contenders of training or evaluation that can run at a length.

    bfloat16 is left out on a CPU that is no faster with it, and in evaluation a mask of 8 heads that is too large.
    """
    names = list(TRAINING if part == "training" else EVALUATION)
    if args.device == "cpu" and not cpu_bf16_helps():
        names.remove("auto, bf16")
    if part == "evaluation" and HEADS * length * length * 4 >= LARGEST_MASK:
        names.remove("mask")
    return names


def score(contender: str, case: Case, folder: str, args: argparse.Namespace) -> None:
    """Scores the text of a case: everything that a command does but the imports."""
    SCORING[contender](folder, str(Path(folder, "checkpoint.pt")), case.length, case.stride, args)


def scores_computed(length: int, reaches: list[float]) -> int:
    """Returns the scores that tiled attention computes for a sequence on a CPU, over all heads.

    Args:
        length: Tokens in the sequence.
        reaches: Tokens, of each head, see `reach`.
    """
    return sum(
        math.prod(part.stop - part.start for part in (tile.heads, tile.queries, tile.keys))
        for tile in tiles(length, length, reaches, [0.0] * len(reaches))
    )


@torch.no_grad()
def skipped_scores(model: BaseFairseqModel, tokens: Tensor) -> dict[str, Any]:
    """Returns what a pass of a model with ALiBi over tokens, (1, T), skips.

    Returns:
        skipped_share: Of the scores that are computed without skipping. reach_per_head: Tokens, the median over the
        layers, None where there is no end. Both are None where attention runs under a mask.
    """
    length = tokens.size(1)
    if not model.decoder.setup.runs_without_mask(tokens.device, TokenSpan(length, length, 0)):
        return {"skipped_share": None, "reach_per_head": None}
    slopes, _ = model.decoder.position_method.slopes(tokens.device)
    reaches = [reach(q, k, slopes).tolist() for q, k in queries_and_keys(model.decoder, tokens)]
    whole = scores_computed(length, [math.inf] * len(slopes)) * len(reaches)
    medians = [statistics.median(of_head) for of_head in zip(*reaches)]
    return {
        "skipped_share": 1 - sum(scores_computed(length, of_layer) for of_layer in reaches) / whole,
        "reach_per_head": [round(median, 1) if math.isfinite(median) else None for median in medians],
    }
