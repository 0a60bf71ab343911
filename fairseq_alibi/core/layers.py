"""Self-attention and transformer layers that take `AttentionInputs`, also those of fairseq's models. Pure torch.

Shapes: B batch, H heads, T new tokens, S all tokens (the last S positions), D head_dim, C = H * D.
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, attention_weights
from .attention_inputs import AttentionInputs
from .attention_setup import AttentionSettings
from .bounded_cache import bounded_cache_in
from .positions import PositionMethod
from .rotary import rotate

#: Keys and values, (B, H, S, D), and the running sums (B, H, S) of a bias by key, or None.
CachedTensors = tuple[Tensor, Tensor, Optional[Tensor]]


class AttentionCore:
    """Multi-head self-attention for a module with projections, which all layers of this package run."""

    if TYPE_CHECKING:  # at run time torch.jit.trace would take the annotations for types of TorchScript
        num_heads: int
        head_dim: int
        q_proj: nn.Module
        k_proj: nn.Module
        v_proj: nn.Module
        out_proj: nn.Module
        gate: Optional[nn.Module]  # for a bias by key, see `PositionMethod.make_gate`
        score_scale: Optional[nn.Parameter]
        has_positions: bool
        layer: int  # under which a cache keeps the keys

    time_dim = 1  # dimension of time in the layer's input: 1 for (B, T, C), 0 for (T, B, C)

    def use_positions(self, method: Optional[PositionMethod], settings: AttentionSettings, layer: int = 0) -> None:
        """Gives the module, of layer number `layer`, its part of the position method, and parameters for it."""
        self.layer = layer
        self.has_positions = settings.position_layers[layer % len(settings.position_layers)] == "1"
        width = self.num_heads * self.head_dim
        self.gate = method.make_gate(width) if method is not None and self.has_positions else None
        self.score_scale = None
        if settings.score_scale == "ssmax":
            start = 1 / math.log(settings.training_length)
            self.score_scale = nn.Parameter(torch.full((self.num_heads,), start))

    def compute_attention(
        self, x: Tensor, inputs: AttentionInputs, dropout: float = 0.0, need_weights: bool = False
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Attention of new tokens to all: (B, T, C), or (T, B, C) by `time_dim`, and (B, H, T, S) weights or None.

        Of the result only the queries that `inputs` asks for are computed. ValueError: weights of attention without a
        mask.
        """
        if not self.has_positions:
            assert inputs.plain is not None
            inputs = dataclasses.replace(inputs.plain, queries=inputs.queries)
        time, length = self.time_dim, x.size(self.time_dim)
        queries = length if inputs.queries is None else inputs.queries

        def split_heads(x: Tensor) -> Tensor:  # (B, T, C) or (T, B, C) -> (B, H, T, D)
            return x.unflatten(-1, (self.num_heads, self.head_dim)).movedim((1 - time, 2, time), (0, 1, 2))

        # Another order of the projections would sum gradients in another order, and change the last bits of a training.
        k, v = split_heads(self.k_proj(x)), split_heads(self.v_proj(x))
        q = split_heads(self.q_proj(x.narrow(time, length - queries, queries)))
        if inputs.rotation is not None:  # keys are cached as they are at their positions
            q, k = rotate(q, inputs.rotation[:2, -queries:]), rotate(k, inputs.rotation[-2:])
        if inputs.query_scale is not None:
            scale = inputs.query_scale[..., -queries:, None]
            if self.score_scale is not None:
                scale = scale * self.score_scale.float()[:, None, None]
            q = (q * scale).to(k.dtype)
        decay = None if self.gate is None else self.decays(x)
        bounded = bounded_cache_in(inputs.cache)
        if inputs.cache is not None and bounded is None:
            k, v, decay = self.extend_cache(inputs.cache, (k, v, decay), inputs.window)
        if decay is not None:
            inputs = inputs.with_decay(decay, queries)
        weights = attention_weights(q, k, inputs) if need_weights else None
        if bounded is None:
            out = attend(q, k, v, inputs, dropout)
        else:
            out = bounded.attend(self.layer, (q, k, v), inputs, dropout)
        return self.out_proj(out.movedim((0, 1, 2), (1 - time, 2, time)).flatten(-2)), weights

    def decays(self, x: Tensor) -> Tensor:
        """Running sums of the decays of the new tokens: (B, H, T) float64; padding in front cancels in differences."""
        assert self.gate is not None
        decay = self.gate(x).movedim((1 - self.time_dim, -1, self.time_dim), (0, 1, 2)).double()
        return decay.cumsum(2)

    def extend_cache(self, cache: Any, new: CachedTensors, window: Optional[int]) -> CachedTensors:
        """Appends what is new to what is cached, and returns all of it."""
        raise NotImplementedError


def append(earlier: CachedTensors, new: CachedTensors) -> CachedTensors:
    """Keys, values and running sums of new tokens behind those of earlier ones."""
    k, v = (torch.cat(pair, dim=2) for pair in zip(earlier[:2], new[:2]))  # type: ignore[arg-type]
    sums, added = earlier[2], new[2]
    if sums is not None and added is not None:
        added = torch.cat([sums, added + sums[..., -1:] if sums.size(2) else added], dim=2)
    return k, v, added


class Cache:
    """Keys and values of the tokens that a stack has read, for reading more tokens after them.

    `Transformer` takes any object with the first two methods, unless its bias is by key: then there are sums to keep.
    """

    def __init__(self) -> None:
        self.layers: dict[int, CachedTensors] = {}

    def get_seq_length(self) -> int:
        """Number of tokens read, the same in every layer."""
        return self.layers[0][0].size(2) if self.layers else 0

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends keys and values of a layer, (B, H, T, D); returns all of that layer, (B, H, S, D)."""
        return self.extend((k, v, None), layer)[:2]

    def extend(self, new: CachedTensors, layer: int) -> CachedTensors:
        """Appends keys, values and running sums of a layer; returns all of that layer."""
        self.layers[layer] = append(self.layers[layer], new) if layer in self.layers else new
        return self.layers[layer]


class SelfAttention(AttentionCore, nn.Module):
    """The attention of a layer in a stack, (B, T, C) -> (B, T, C); ValueError if the heads do not divide the width.

    A cache keeps its keys under the number `layer`.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, layer: int = 0):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, {embed_dim}, and {num_heads} does not")
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.dropout = dropout
        self.use_positions(None, AttentionSettings(), layer)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        dropout, kept = self.dropout if self.training else 0.0, inputs.weights
        out, weights = self.compute_attention(x, inputs, dropout, need_weights=kept is not None)
        if kept is not None and weights is not None:
            kept.append(weights)
        return out

    def extend_cache(self, cache: Any, new: CachedTensors, window: Optional[int]) -> CachedTensors:
        """See `AttentionCore.extend_cache`; the cache is one as `Cache`."""
        k, v, sums = new
        return (*cache.update(k, v, self.layer), None) if sums is None else cache.extend(new, self.layer)


@dataclass(frozen=True)
class LayerOptions:
    """How the layers of a stack compute."""

    ffn_dim: Optional[int] = None  # width of the feed-forward parts; None for 4 C
    activation: str = "relu"  # or "gelu", a function of torch.nn.functional
    normalize_before: bool = True  # the norm is in front of each part (pre-norm), not behind it
    dropout: float = 0.0  # of the output of each part, in training, as the next two
    attention_dropout: float = 0.0  # of the attention weights
    activation_dropout: float = 0.0  # of the hidden units of the feed-forward parts


class Layer(nn.Module):
    """A transformer layer: attention and feed-forward, with residuals and norms; parameters have fairseq's names."""

    def __init__(self, embed_dim: int, num_heads: int, options: LayerOptions, layer: int = 0):
        super().__init__()
        ffn_dim = options.ffn_dim or 4 * embed_dim
        self.self_attn = SelfAttention(embed_dim, num_heads, options.attention_dropout, layer)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.fc1, self.fc2 = nn.Linear(embed_dim, ffn_dim), nn.Linear(ffn_dim, embed_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.activation, self.normalize_before = getattr(F, options.activation), options.normalize_before
        self.dropout, self.activation_dropout = nn.Dropout(options.dropout), nn.Dropout(options.activation_dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fc2(self.activation_dropout(self.activation(self.fc1(x))))

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.normalize_before:
            x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), inputs))
            return x + self.dropout(self.feed_forward(self.final_layer_norm(x)))
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, inputs)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


def checkpoint_activations(layer: Callable[..., Any], *arguments: Any, offload: bool = False) -> Any:
    """Calls a layer, whose activations are computed again in the backward pass instead of being kept.

    Gradients flow to the parameters and to every tensor in the arguments, those inside `AttentionInputs` too. With
    `offload` the arguments, which are kept, wait in the memory of the host.
    """
    with torch.autograd.graph.save_on_cpu() if offload else contextlib.nullcontext():
        return checkpoint(layer, *arguments, use_reentrant=False)
