"""How a stack attends: its settings, and what makes the attention inputs of a pass.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_inputs import (
    EPSILON,
    AttentionInputs,
    Bias,
    DistanceBias,
    FoldedMask,
    LinearBias,
    NoBias,
    PairBias,
    TokenSpan,
)
from .bounded_cache import bounded_cache_in
from .kept import KeptTensor, in_transform
from .mask_limits import LONGEST_MASK, check_mask_memory, mask_fits, mask_is_slower
from .positions import PositionMethod, distances
from .tiled_attention import merge_padding_into_mask

#: A mask is kept for later passes at up to this length, or twice theirs, so that memory follows what is run now.
KEPT_LENGTH = 1024
KERNEL_CHOICES = ("auto", "mask", "fused")  # values of `AttentionSettings.kernel`
SCORE_SCALES = ("none", "ssmax", "log_n")  # values of `AttentionSettings.score_scale`


@dataclass(frozen=True)
class AttentionSettings:
    """How a stack attends, fixed when it is built; ValueError for unknown choices."""

    kernel: str = "auto"  # the faster one of "mask", which carries the bias, the reference, and "fused", without a mask
    epsilon: float = EPSILON  # see `AttentionInputs`
    dropout: float = 0.0  # probability that an attention weight is dropped in training
    causal: bool = True  # a token sees none after it
    #: "ssmax": scores times s ln n for n visible keys, with s learned for each head and layer from
    #: 1 / ln(training_length) on (arXiv 2501.19399); "log_n": times ln n / ln(training_length) for larger n, in the
    #: layers without the position method if there are such layers.
    score_scale: str = "none"
    position_layers: str = "1"  # with the method, ones and zeros that are repeated: "1110" for all but every fourth
    training_length: int = 512  # in tokens, for `score_scale`

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.score_scale not in SCORE_SCALES:
            raise ValueError(f"score_scale must be one of {', '.join(SCORE_SCALES)}, not {self.score_scale}")
        if self.score_scale != "none" and self.training_length < 2:
            raise ValueError(
                f"score_scale {self.score_scale} needs more than {self.training_length} tokens of training"
            )
        if not self.position_layers or set(self.position_layers) - {"0", "1"}:
            raise ValueError(f"position_layers must be ones and zeros, for example 1110, not {self.position_layers!r}")
        if self.kernel not in KERNEL_CHOICES:
            raise ValueError(f"attention must be one of {', '.join(KERNEL_CHOICES)}, not {self.kernel}")


class AttentionSetup:
    """Makes the attention inputs of a stack, and keeps its mask for later passes.

    The folded mask is (H, L, L), shared by the batch, and made anew when a longer sequence comes. A bias with
    parameters is made anew in each pass.
    """

    def __init__(self, method: PositionMethod, settings: AttentionSettings):
        self.method, self.settings, self.kept_mask = method, settings, KeptTensor()
        self.plain: Optional[AttentionSetup] = None  # of the layers without the position method, if there are such
        if "0" in settings.position_layers:
            of_others = dataclasses.replace(settings, position_layers="1")
            self.plain = AttentionSetup(PositionMethod(method.num_heads), of_others)

    def use_kernel(self, kernel: str) -> None:
        """Changes the kernel, see `AttentionSettings`, from the next pass on."""
        self.settings = dataclasses.replace(self.settings, kernel=kernel)
        if self.plain is not None:
            self.plain.use_kernel(kernel)

    @property
    def bounds_cache(self) -> bool:
        """Whether decoding needs no key beyond a static reach: with a linear bias alone, and not in the reference."""
        settings, method = self.settings, self.method
        plain = settings.score_scale == "none" and not method.scales_queries and not method.rotates
        return plain and method.bias_kind == "linear" and settings.epsilon > 0 and settings.kernel != "mask"

    def set_evaluation_length(self, length: int) -> None:
        """See `PositionMethod.set_evaluation_length`; the bias may be another one afterwards."""
        self.method.set_evaluation_length(length)
        self.kept_mask.forget()

    def inputs(
        self,
        x: Tensor,
        span: TokenSpan,
        padding: Optional[Tensor] = None,
        window: Optional[int] = None,
        cache: Any = None,
        training: bool = False,
    ) -> AttentionInputs:
        """The attention inputs of a pass whose first layer reads `x`, of any shape; see `AttentionInputs`."""
        method = self.method
        seen_padding = self.visible_padding(x, padding)
        rows = x.size(0) if padding is not None or (is_learned(method) and torch.is_grad_enabled()) else 1
        # Kernels without a mask cannot be traced or transformed. Compiled code leaves the graph for them where it must.
        by_distance = not in_transform(x)
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            by_distance = self.settings.kernel == "fused" or not span_mask_fits(self, x.device, span, rows)
        if window is not None and method.gives_bias_of_tiles:
            raise ValueError(f"--position-method {method.name} has no windows: its bias depends on a query's position")
        if span.queries == 0:
            bias: Bias = NoBias()
        elif (
            by_distance and self.runs_without_mask(x.device, span, seen_padding, window, training, rows)
        ) or bounded_cache_in(cache) is not None:
            bias = bias_without_mask(method, span, x.device, self.settings.causal, seen_padding)
        else:
            mask = self.folded_mask(x, span, window, seen_padding)
            bias = FoldedMask(mask if seen_padding is None else padded_mask(mask, seen_padding))
            seen_padding = None
        if method.needs_wide_exponents and compute_dtype(x) == torch.float16:
            raise ValueError(f"--position-method {method.name}: float16 cannot hold its factors; use another precision")
        rotation = method.rotation(span.first, span.first + span.queries, x.device) if method.rotates else None
        return AttentionInputs(
            bias=bias,
            causal=self.settings.causal,
            padding=seen_padding,
            window=window,
            rotation=rotation,
            query_scale=query_scale(self, span, padding, window, x.device),
            cache=cache,
            epsilon=self.settings.epsilon,
            plain=None if self.plain is None else self.plain.inputs(x, span, padding, window, cache, training),
        )

    def visible_padding(self, x: Tensor, padding: Optional[Tensor]) -> Optional[Tensor]:
        """The padding that attention has to hide: none that lies in the future of all tokens of its row."""
        if padding is None or in_transform(x) or in_transform(padding):
            return padding
        hides = (padding[:, :-1] & ~padding[:, 1:]) if self.settings.causal else padding
        return padding if hides.any() else None

    def folded_mask(self, x: Tensor, span: TokenSpan, window: Optional[int], padding: Optional[Tensor]) -> Tensor:
        """The bias folded into the mask, see `FoldedMask`; of rows that begin at places of their own with padding."""
        method, device, keys = self.method, x.device, span.keys
        check_mask_memory(device, mask_elements(self, span, 1), keys)
        # PyTorch's CPU kernels take a float32 mask in half precision; those of a GPU want the dtype of the queries.
        dtype = torch.promote_types(x.dtype, torch.float32) if device.type == "cpu" else compute_dtype(x)
        if padding is not None and method.gives_bias_of_tiles:
            distance, positions = distances(span.queries, span.keys, device), query_positions(span, device, padding)
            return method.bias_of_tile(positions, distance).masked_fill(distance < 0, -math.inf).to(dtype)
        if keys > span.queries or window is not None:
            return method.future_mask(span.queries, keys, window, device, dtype)
        make = partial(method.full_mask, keys, device, dtype)
        if self.settings.causal:
            make = partial(method.future_mask, keys, keys, None, device, dtype)
        if is_learned(method) or in_transform(x):
            return make()
        kept = self.kept_mask.get(device, dtype)
        if kept is None or not keys <= kept.size(-1) <= max(KEPT_LENGTH, 2 * keys):
            kept = self.kept_mask.keep(make)
        return kept[:, :keys, :keys]

    def scale_of_counts(self, visible: Tensor) -> Optional[Tensor]:
        """The factors, (B or 1, H or 1, T), of queries that see so many keys, (B or 1, T) int64; None for none."""
        form, visible = self.settings.score_scale, visible.clamp(min=1)
        if form == "log_n" and self.plain is not None:
            form = "none"
        scale: Any = self.method.query_scale(visible) if self.method.scales_queries else 1.0
        if form == "ssmax":
            scale = scale * visible.float().log()[:, None]
        elif form == "log_n":
            scale = scale * (visible.float().log() / math.log(self.settings.training_length)).clamp(min=1)[:, None]
        return scale if isinstance(scale, Tensor) else None

    def runs_without_mask(
        self,
        device: torch.device,
        span: TokenSpan,
        padding: Optional[Tensor] = None,
        window: Optional[int] = None,
        training: bool = False,
        rows: int = 1,
    ) -> bool:
        """Whether a pass runs without a mask: as the settings want it, where that is faster, or where it must.

        `rows` are those of the batch that would have a mask, or the gradients of one, of their own.
        """
        method, kernel = self.method, self.settings.kernel
        single_row = span.queries == 1 < span.keys  # the mask of a single query is one row, so it is cheap to build
        dropped_on_cpu = training and self.settings.dropout > 0 and device.type == "cpu"
        if kernel == "mask" or single_row:
            return False
        if needs_mask(method):
            return self.settings.causal and not span_mask_fits(self, device, span, rows)
        if not self.settings.causal and not method.has_distance_bias:
            # The mask is one row, for the padding, but with dropout PyTorch's CPU kernel makes all scores.
            return dropped_on_cpu and span.keys > LONGEST_MASK
        # The mask would be another one in each pass or, with a bias by key, in each layer and row of the batch.
        if kernel == "fused" or window is not None:
            return True
        if method.bias_kind == "key" and span.queries > 1 and (device.type == "cpu" or span.keys > LONGEST_MASK):
            return True
        whole = method.bias_kind == "none" and span.queries == span.keys and padding is None and not dropped_on_cpu
        return whole or (
            span.queries > 1 and (mask_is_slower(device, span.keys) or not span_mask_fits(self, device, span, rows))
        )


def is_learned(method: PositionMethod) -> bool:
    """Whether the bias has parameters, and so is another one in each pass."""
    return len(list(method.parameters())) > 0  # torch 2.7 compiles neither `next` with a default nor `bool` of a list


def span_mask_fits(setup: AttentionSetup, device: torch.device, span: TokenSpan, rows: int) -> bool:
    """Whether a mask of so many rows of a batch takes a small share of the memory."""
    return mask_fits(device, mask_elements(setup, span, rows))


def mask_elements(setup: AttentionSetup, span: TokenSpan, rows: int) -> int:
    """Numbers in a mask of so many rows of a batch."""
    plain = setup.method.bias_kind == "none"
    queries = 1 if plain and not setup.settings.causal else span.queries
    return rows * (1 if plain else setup.method.num_heads) * queries * span.keys


def query_scale(
    setup: AttentionSetup,
    span: TokenSpan,
    padding: Optional[Tensor],
    window: Optional[int],
    device: torch.device,
) -> Optional[Tensor]:
    """The factors of the queries, by the number of keys that each sees."""
    if setup.settings.score_scale == "none" and not setup.method.scales_queries:
        return None
    present = torch.ones(1, span.keys, dtype=torch.bool, device=device) if padding is None else ~padding
    if setup.settings.causal:
        visible = present.cumsum(1)[:, -span.queries :] + (span.first + span.queries - span.keys)
    else:
        visible = present.sum(1, keepdim=True).expand(-1, span.queries)
    return setup.scale_of_counts(visible.clamp(min=1, max=window))


def padded_mask(mask: Tensor, padding: Tensor) -> Tensor:
    """A mask with the padding in it, once for all layers: [B,] H, T, S and B, S -> B, H, T, S; see `aligned`."""
    spare = 0 if mask.device.type == "cpu" else -mask.size(-1) % 16
    mask = mask if mask.dim() == 4 else mask[None]
    merged = merge_padding_into_mask(F.pad(mask, (0, spare)), F.pad(padding, (0, spare)))
    return merged[..., : mask.size(-1)]


def query_positions(span: TokenSpan, device: torch.device, padding: Optional[Tensor]) -> Tensor:
    """Positions of the new tokens from the first token of their row on: (T,), or (B, T) with (B, S) padding."""
    positions = torch.arange(span.keys - span.queries, span.keys, device=device)
    return positions if padding is None else positions - padding.long().cumprod(1).sum(1, keepdim=True)


def bias_without_mask(
    method: PositionMethod, span: TokenSpan, device: torch.device, causal: bool, padding: Optional[Tensor]
) -> Bias:
    """The bias for attention without a mask."""
    if method.bias_kind == "none" and not causal:
        zeros = torch.zeros(method.num_heads, device=device)
        return LinearBias(zeros, zeros)
    if method.bias_kind in ("none", "key"):  # a layer adds its own bias by key
        return NoBias()
    if needs_mask(method):  # the bias of the last of so many queries, cut out

        def rows_of_queries(queries: Tensor, distance: Tensor) -> Tensor:
            rows = method.pair_bias(len(queries), int(queries[-1]) + 1, device)
            assert rows is not None
            return F.pad(rows, (0, span.keys - rows.size(-1)))[..., queries[0] - distance[0]]

        return PairBias(rows_of_queries, query_positions(span, device, None))
    if method.bias_kind == "linear":
        before, after = method.slopes(device)
        if not before.requires_grad:  # gradients of slopes flow through a bias by distance
            return LinearBias(before, after)
    distance = torch.arange(1 - span.queries, span.keys, device=device)
    pairs = method.bias_kind == "pair"
    values = method.early_bias(distance, span.keys) if pairs else method.distance_bias(distance)
    if values is None:
        return PairBias(method.bias_of_tile, query_positions(span, device, padding))
    return DistanceBias(values.masked_fill(distance < 0, -math.inf) if causal else values)


def needs_mask(method: PositionMethod) -> bool:
    """Whether a method's bias is given as a mask alone."""
    return method.bias_kind == "pair" and not method.gives_bias_of_tiles


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention on this tensor runs: that of autocast where autocast is on."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)
