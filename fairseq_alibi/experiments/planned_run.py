"""A training run that has not been started: its parameters, its batches and the FLOPs of an update."""

import functools
import math
from typing import NamedTuple

import numpy
import torch
from fairseq.data import Dictionary
from omegaconf import DictConfig
from torch import nn

from ..core.attention_inputs import TokenSpan
from .layer_measurement import GpuKernels, SequenceCost, build_model, measure_sequence
from .run_config import check_plannable, check_sizes

MOST_BLOCKS = 10**9  # blocks in an update; more cannot be planned


class Band(NamedTuple):
    """A band of an adaptive vocabulary: its share of the tokens, the width of its embeddings, its number of types."""

    share: float
    width: int
    types: int


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


class PlannedRun:
    """A training run. Its model is built with one and two layers on PyTorch's meta device, which has shapes only.

    The dictionary's counts say how many tokens are in a band of an adaptive vocabulary. ValueError: see
    `check_plannable`.
    """

    def __init__(self, cfg: DictConfig, dictionary: Dictionary):
        check_plannable(cfg)
        check_sizes(cfg.model, len(dictionary))
        self.cfg, self.dictionary, self.layers = cfg, dictionary, int(cfg.model.decoder_layers)
        with torch.device("meta"):
            models = [build_model(cfg.model, dictionary, decoder_layers=layers) for layers in (1, 2)]
        self.model, self.decoder = models[0], models[0].decoder
        counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
        self.layer_parameters = counts[1] - counts[0]
        common = cfg.common
        self.optimizer = cfg.optimizer._name
        self.half = bool(common.fp16 or common.bf16)
        self.efficient = self.half and bool(common.memory_efficient_fp16 or common.memory_efficient_bf16)
        self.sharded = cfg.distributed_training.ddp_backend == "fully_sharded"
        self.device = torch.device("cpu" if common.cpu else "cuda")
        self.element = 2 if self.half else 4  # bytes of a number in activations
        self.dropout_element = self.element if common.cpu else 1  # bytes of a number in a dropout mask
        self.length, self.width = int(cfg.task.tokens_per_sample), int(cfg.model.decoder_embed_dim)

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by part; tied parameters are in the first part that has them."""
        counts = {"embeddings": 0, "layers": (self.layers - 1) * self.layer_parameters, "output": 0}
        for name, parameter in self.model.named_parameters():
            part = "layers"
            if name.startswith(("decoder.embed_", "decoder.project_in_dim")):
                part = "embeddings"
            elif name.startswith(("decoder.adaptive_softmax", "decoder.output_projection", "decoder.project_out_dim")):
                part = "output"
            counts[part] += parameter.numel()
        return counts

    @functools.cached_property
    def bands(self) -> list[Band]:
        """The bands of an adaptive softmax, the head first; none of a plain softmax."""
        softmax = self.decoder.adaptive_softmax
        if softmax is None:
            return []
        counts = self.dictionary.count
        edges = [0, *softmax.cutoff]
        widths = [int(softmax.input_dim // softmax.factor**number) for number in range(len(edges) - 1)]
        shares = [sum(counts[first:last]) / max(1, sum(counts)) for first, last in zip(edges, edges[1:])]
        return [Band(*band) for band in zip(shares, widths, numpy.diff(edges).tolist())]

    @functools.cached_property
    def masked(self) -> bool:
        """Whether attention runs under a mask of length x length."""
        span = TokenSpan(self.length, self.length, 0)
        return not self.decoder.setup.runs_without_mask(self.device, span, training=True)

    @functools.cached_property
    def cost(self) -> SequenceCost:
        """What one sequence of the length takes, measured."""
        options, method, on_cpu = self.cfg.model.copy(), self.decoder.position_method, self.device.type == "cpu"
        dropout = options.attention_dropout
        learned = next(method.parameters(), None) is not None
        recomputed = not self.masked and method.has_distance_bias and (dropout or learned)
        if not (on_cpu and self.masked):
            options.attention_dropout = 0.0  # only a CPU under a mask keeps the weights of attention for it
        if not on_cpu:
            options.cpu_bf16 = False
        dtype = {2: torch.bfloat16 if self.cfg.common.bf16 else torch.half, 4: torch.float}[self.element]
        kernels = None if on_cpu else GpuKernels(copies_output=not recomputed)
        return measure_sequence(options, self.length, dtype, kernels)

    def rows(self, max_tokens: int) -> int:
        """Returns the blocks in a batch that fairseq makes with these max-tokens, after its rounding to a multiple."""
        multiple = self.cfg.dataset.required_batch_size_multiple
        rows = min(max_tokens // self.length, self.cfg.dataset.batch_size or max_tokens)
        return rows - rows % multiple if rows > multiple else rows

    def blocks_per_update(self) -> int:
        """Returns the blocks of an update on as many GPUs as the config says; ValueError if there are none."""
        max_tokens = self.cfg.dataset.max_tokens
        if not max_tokens or max_tokens < 1:
            raise ValueError("dataset.max_tokens is not set: set it to the tokens of a batch, for example 9216")
        rows = self.rows(max_tokens)
        if not rows:
            raise ValueError(f"dataset.max_tokens={max_tokens} holds no block of {self.length} tokens: raise it")
        blocks = rows * self.cfg.distributed_training.distributed_world_size * self.cfg.optimization.update_freq[0]
        if blocks > MOST_BLOCKS:
            raise ValueError(f"an update has {blocks:,} blocks: lower dataset.max_tokens to at most {MOST_BLOCKS:,}")
        return blocks

    def batches(self, gpus: int) -> list[tuple[int, int]]:
        """Returns (blocks in a batch, update_freq) that make an update on `gpus` GPUs, largest first; ValueError."""
        blocks = self.blocks_per_update()
        if blocks % gpus:
            fitting = ", ".join(map(str, divisors(blocks)[:20]))
            raise ValueError(
                f"{gpus} GPUs cannot share the {blocks} blocks of {self.length:,} tokens that the config has in an "
                f"update: pass --gpus {fitting}"
            )
        own = blocks // gpus
        return [(rows, own // rows) for rows in reversed(divisors(own)) if self.rows(rows * self.length) == rows]

    def flops(self, tokens: int) -> dict[str, float]:
        """Returns the FLOPs of an update by part: `model`, and `recomputed` by activation checkpointing.

        A token passes forward once and backward twice as expensively. Attention has two products of 2 C FLOPs for each
        pair of query and key, of which a causal model has (L + 1) / 2 per query. C is the width, L the length.
        """
        per_layer = self.cost.layer_flops / self.length + 2 * self.width * (self.length + 1)
        return {
            "model": 3 * tokens * (self.layers * per_layer + 2 * self.output_weights()),
            "recomputed": tokens * self.layers * per_layer if self.cfg.model.checkpoint_activations else 0,
        }

    def output_weights(self) -> float:
        """Returns the weights, beside those of layers, that a token is multiplied with, on average over all tokens."""
        if self.bands:
            head, *tails = self.bands
            count: float = self.width * (head.types + len(tails))
            count += sum(band.share * band.width * (self.width + band.types) for band in tails)
            if self.cfg.model.adaptive_input:
                count += sum(band.share * band.width * self.width for band in self.bands)
        else:
            count = len(self.dictionary) * self.decoder.output_embed_dim
        projections = (self.decoder.project_in_dim, self.decoder.project_out_dim)
        return count + sum(module.weight.numel() for module in projections if isinstance(module, nn.Linear))
