"""Attention and transformer layers with a position method, for any PyTorch model. Pure torch, usable without fairseq.

    from fairseq_alibi.modules import Transformer
    decoder = Transformer(layers=4, embed_dim=256, num_heads=8)
    y = decoder(x)  # (B, T, C) -> (B, T, C), of any length
    encoder = Transformer(layers=4, embed_dim=256, num_heads=8, causal=False)
    y = encoder(x, padding)  # padding (B, T), True where there is no token

Shapes: B batch, H heads, T new tokens, S all tokens (the last S positions), D head_dim, C = H * D.

The models of fairseq in this package run through the same code: their layers are fairseq's, and attend as here.
"""

import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import (
    EPSILON,
    attention_weights,
    fused_attention,
    fused_is_faster,
    masked_attention,
    padding_before_tokens,
)
from .positions import ALiBi, EncoderALiBi, PositionMethod, rotate

#: A mask is kept for later passes at up to this length, or twice theirs: memory follows what is run, not what once was.
KEPT_LENGTH = 1024


class Pass(NamedTuple):
    """What a stack hands all of its layers in one pass, made once before the layer loop.

    Args:
        mask: (H, T, S) or (1, T, S), see `PositionMethod.future_mask`; None for attention without a mask.
        slopes, bias, epsilon: see `fused_attention`.
        padding: (B, S) bool, True at padded keys that are to be hidden; None for none.
        window: number of keys that a query sees, the last ones, itself included; None for all.
        last: number of queries, the last ones, that the last layer is computed for; None for all.
        rotation: of the T new tokens, see `PositionMethod.rotation`; None for none.
        cache: where keys and values of the tokens before these are and those of these are added, see
            `AttentionCore.extend_cache`; None for whole sequences.
    """

    mask: Optional[Tensor] = None
    slopes: Optional[Tensor] = None
    bias: Optional[Tensor] = None
    epsilon: float = EPSILON
    padding: Optional[Tensor] = None
    window: Optional[int] = None
    last: Optional[int] = None
    rotation: Optional[Tensor] = None
    cache: Any = None


class Passes:
    """Makes the pass of a stack of layers, and keeps its mask for later ones.

    With a mask the bias is folded into the future mask, (H, L, L), shared by the batch, and grown when a longer
    sequence comes; a bias with parameters is made anew in each pass.

    Args:
        position_method: what tells the positions.
        attention: "mask", "fused", or "auto" for the faster one.
        epsilon: see `fused_attention`.
        dropout: of the attention weights, in training.
        causal: whether a token sees none after it.
    """

    def __init__(
        self,
        position_method: PositionMethod,
        attention: str = "auto",
        epsilon: float = EPSILON,
        dropout: float = 0.0,
        causal: bool = True,
    ):
        self.position_method, self.attention, self.epsilon = position_method, attention, epsilon
        self.dropout, self.causal = dropout, causal
        self.forget_mask()

    def forget_mask(self) -> None:
        """Has the mask made anew in the next pass, for a bias that has changed."""
        self.mask = torch.empty(0, 0, 0)

    def make(
        self,
        tensor: Tensor,
        queries: int,
        keys: int,
        padding: Optional[Tensor] = None,
        first: int = 0,
        window: Optional[int] = None,
        last: Optional[int] = None,
        cache: Any = None,
        training: bool = False,
    ) -> Pass:
        """The pass over new tokens.

        Args:
            tensor: gives device and dtype of the attention.
            queries, keys: T and S.
            padding: (B, S) bool, True at padding; None for none.
            first: position of the first new token.
            window, last, cache: see `Pass`.
            training: whether weights are dropped.
        """
        method, device = self.position_method, tensor.device
        if any(True for _ in method.parameters()):
            self.forget_mask()
        if self.causal:
            padding = padding_before_tokens(padding)
        elif padding is not None and not padding.any():
            padding = None
        rotation = method.rotation(first, first + queries, device)
        rest = {"epsilon": self.epsilon, "padding": padding, "window": window, "last": last}
        rest.update(rotation=rotation, cache=cache)
        if self.takes_no_mask(device, queries, keys, padding, window, training):
            if method.slopes is not None:
                return Pass(slopes=method.slopes.to(device), **rest)
            distance = torch.arange(1 - queries, keys, device=device)
            bias = method.relative_bias(distance)
            if bias is not None and self.causal:
                bias = bias.masked_fill(distance < 0, -math.inf)
            return Pass(bias=bias, **rest)
        # PyTorch's CPU kernels take a float32 mask in half precision, the GPU's want their own dtype
        dtype = torch.promote_types(tensor.dtype, torch.float32) if device.type == "cpu" else compute_dtype(tensor)
        if keys > queries or window is not None:
            return Pass(method.future_mask(queries, keys, dtype, device, window), **rest)
        longest = max(KEPT_LENGTH, 2 * keys)
        kept = self.mask
        if not keys <= kept.size(-1) <= longest or kept.device != device or kept.dtype != dtype:
            make = method.future_mask if self.causal else method.full_mask
            mask = make(keys, keys, dtype, device)
            if mask.requires_grad:  # part of one graph; a module that keeps it cannot be copied
                return Pass(mask, **rest)
            self.mask = mask
        return Pass(self.mask[:, :keys, :keys], **rest)

    def takes_no_mask(
        self,
        device: torch.device,
        queries: int,
        keys: int,
        padding: Optional[Tensor] = None,
        window: Optional[int] = None,
        training: bool = False,
    ) -> bool:
        """Whether `fused_attention` runs the pass: as `attention` wants it, or where it is faster."""
        method = self.position_method
        if (
            self.attention == "mask"
            or method.needs_mask
            or queries == 1 < keys
            or not (self.causal or method.has_relative_bias)
        ):
            return False  # the mask of one query is one row
        if window is not None:
            return True  # the mask would be another one in each pass
        dropout = self.dropout if training else 0.0
        plain = not method.has_relative_bias and queries == keys and padding is None and not dropout
        return self.attention == "fused" or plain or fused_is_faster(device, queries, keys)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which attention on this tensor runs: autocast's where autocast is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class AttentionCore:
    """Multi-head self-attention over the keys of a `Pass`, for a module with projections: what all our layers run.

    The module has `num_heads`, `head_dim`, and the layers `q_proj`, `k_proj`, `v_proj` and `out_proj`.
    """

    #: Whether its layer is the last one of a stack, whose output nothing but the output layer reads.
    in_last_layer = False

    #: Where time is in what it reads: (B, T, C) with 1, (T, B, C) with 0.
    time = 1

    def attend(
        self, x: Tensor, run: Pass, dropout: float = 0.0, need_weights: bool = False
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Attention of new tokens to all.

        Args:
            x: (B, T, C) or (T, B, C), see `time`.
            run: the pass.
            dropout: probability that an attention weight is dropped; 0 outside training.
            need_weights: whether the weights are wanted too.

        Returns:
            As `x`, in the last layer of the queries alone that the pass wants; and (B, H, T, S) weights or None.

        Raises:
            ValueError: weights are wanted of attention without a mask.
        """
        time, length = self.time, x.size(self.time)
        last = run.last if self.in_last_layer and run.last is not None else length

        def split_heads(x: Tensor) -> Tensor:  # (B, T, C) or (T, B, C) -> (B, H, T, D)
            return x.unflatten(-1, (self.num_heads, self.head_dim)).movedim((1 - time, 2, time), (0, 1, 2))

        k, v = split_heads(self.k_proj(x)), split_heads(self.v_proj(x))
        q = split_heads(self.q_proj(x.narrow(time, length - last, last)))
        if run.rotation is not None:  # keys go into the cache as they are at their positions
            q, k = rotate(q, run.rotation[:, -last:]), rotate(k, run.rotation)
        if run.cache is not None:
            k, v = self.extend_cache(run.cache, k, v, run.window)
        if run.mask is None:
            if need_weights:
                raise ValueError("attention weights are there with --attention mask only")
            out = fused_attention(q, k, v, run.slopes, run.padding, dropout, run.epsilon, run.window, run.bias)
        else:
            mask = run.mask[:, -last:]
            out = masked_attention(q, k, v, mask, run.padding, dropout)
        weights = attention_weights(q, k, mask, run.padding) if need_weights else None
        return self.out_proj(out.movedim((0, 1, 2), (1 - time, 2, time)).flatten(-2)), weights

    def extend_cache(self, cache: Any, k: Tensor, v: Tensor, window: Optional[int]) -> tuple[Tensor, Tensor]:
        """Appends new keys and values, (B, H, T, D), to the cached ones; returns all of them."""
        raise NotImplementedError


class Cache:
    """Keys and values of the tokens that a stack has read, for reading on after them.

    `Transformer` takes any object with these two methods, transformers' caches among them.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Tokens read, the same in every layer."""
        return self.layers[0][0].size(2) if self.layers else 0

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends keys and values of a layer, (B, H, T, D); returns all of that layer, (B, H, S, D)."""
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        return k, v


class SelfAttention(AttentionCore, nn.Module):
    """The attention of a layer in a stack.

    Args:
        embed_dim: C.
        num_heads: H, divides C.
        dropout: of the attention weights, in training.
        layer: number of its layer, under which a cache keeps its keys.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, layer: int = 0):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, {embed_dim}, and {num_heads} does not")
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.dropout, self.layer = dropout, layer
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.attend(x, run, self.dropout if self.training else 0.0)[0]

    def extend_cache(self, cache: Any, k: Tensor, v: Tensor, window: Optional[int]) -> tuple[Tensor, Tensor]:
        """See `AttentionCore.extend_cache`; the cache is one as `Cache`."""
        return cache.update(k, v, self.layer)


class Attention(SelfAttention):
    """Multi-head self-attention with a bias for distance: (B, T, C) -> (B, T, C), no position embedding needed.

    Args:
        embed_dim: C.
        num_heads: H, divides C.
        causal: whether a token sees none after it.
        position_method: default ALiBi, symmetric if not causal (`positions.EncoderALiBi` has the other forms).
        dropout: of the attention weights, in training.
        attention, epsilon: see `Passes`.

    Raises:
        ValueError: the heads do not divide the width, or the position method adds embeddings.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        causal: bool = True,
        position_method: Optional[PositionMethod] = None,
        dropout: float = 0.0,
        attention: str = "auto",
        epsilon: float = EPSILON,
    ):
        super().__init__(embed_dim, num_heads, dropout)
        self.position_method = own_or_alibi(position_method, num_heads, causal)
        self.passes = Passes(self.position_method, attention, epsilon, dropout, causal)

    def forward(self, x: Tensor, padding: Optional[Tensor] = None, cache: Any = None) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            x: the new tokens.
            padding: (B, S) bool, True where there is no token; None for tokens everywhere.
            cache: of the tokens before them, see `Cache`, causal attention only; it is extended.
        """
        return super().forward(x, make_pass(self.passes, x, padding, cache, self.training))


class Layer(nn.Module):
    """A transformer layer: attention and feed-forward, each with a residual connection and a norm.

    Its parameters have the names of those of fairseq's layers.

    Args:
        embed_dim, num_heads, layer: see `SelfAttention`.
        ffn_dim: width of the feed-forward part.
        activation: a function of torch.nn.functional, "relu" or "gelu".
        normalize_before: whether the norm is in front of each part (pre-norm), not behind it.
        dropout, attention_dropout, activation_dropout: in training, of the output of each part, of the attention
            weights, and of the hidden units of the feed-forward part.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        activation: str = "relu",
        normalize_before: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        layer: int = 0,
    ):
        super().__init__()
        self.self_attn = SelfAttention(embed_dim, num_heads, attention_dropout, layer)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.fc1, self.fc2 = nn.Linear(embed_dim, ffn_dim), nn.Linear(ffn_dim, embed_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.activation, self.normalize_before = getattr(F, activation), normalize_before
        self.dropout, self.activation_dropout = nn.Dropout(dropout), nn.Dropout(activation_dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fc2(self.activation_dropout(self.activation(self.fc1(x))))

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.normalize_before:
            x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), run))
            return x + self.dropout(self.feed_forward(self.final_layer_norm(x)))
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, run)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    """A stack of layers with a position method, decoder or encoder: (B, T, C) -> (B, T, C), at any length.

    The bias is made once in a pass, before the layer loop.

    Args:
        layers: number of layers.
        embed_dim: C.
        num_heads: H, divides C.
        ffn_dim: width of the feed-forward parts; default 4 C.
        causal: whether a token sees none after it: a decoder; else an encoder.
        position_method: default ALiBi, symmetric if not causal (`positions.EncoderALiBi` has the other forms).
        activation, normalize_before, dropout, attention_dropout, activation_dropout: see `Layer`.
        final_norm: whether a norm follows the last layer; default with `normalize_before`.
        attention, epsilon: see `Passes`.

    Raises:
        ValueError: see `Attention`.
    """

    #: Class of the layers, with the arguments of `Layer`.
    layer_type = Layer

    def __init__(
        self,
        layers: int,
        embed_dim: int,
        num_heads: int,
        ffn_dim: Optional[int] = None,
        causal: bool = True,
        position_method: Optional[PositionMethod] = None,
        activation: str = "relu",
        normalize_before: bool = True,
        final_norm: Optional[bool] = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        attention: str = "auto",
        epsilon: float = EPSILON,
    ):
        super().__init__()
        dropouts = (dropout, attention_dropout, activation_dropout)
        sizes = (embed_dim, num_heads, ffn_dim or 4 * embed_dim)
        self.layers = nn.ModuleList(
            self.layer_type(*sizes, activation, normalize_before, *dropouts, n) for n in range(layers)
        )
        self.position_method = own_or_alibi(position_method, num_heads, causal)
        self.passes = Passes(self.position_method, attention, epsilon, attention_dropout, causal)
        final_norm = normalize_before if final_norm is None else final_norm
        self.layer_norm = nn.LayerNorm(embed_dim) if final_norm else None

    def forward(self, x: Tensor, padding: Optional[Tensor] = None, cache: Any = None) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            x: embeddings of the new tokens.
            padding: (B, S) bool, True where there is no token; None for tokens everywhere.
            cache: of the tokens before them, see `Cache`, a decoder's only; it is extended.
        """
        run = make_pass(self.passes, x, padding, cache, self.training)
        for layer in self.layers:
            x = layer(x, run)
        return x if self.layer_norm is None else self.layer_norm(x)


def own_or_alibi(method: Optional[PositionMethod], num_heads: int, causal: bool) -> PositionMethod:
    """The position method that was asked for, or ALiBi.

    Raises:
        ValueError: it adds embeddings, which these modules, that read no tokens, do not.
    """
    if method is None:
        return ALiBi(num_heads) if causal else EncoderALiBi(num_heads)
    if method.embedding is not None:
        raise ValueError(f"{type(method).__name__} adds embeddings to those of the tokens: do so, and pass no method")
    return method


def make_pass(passes: Passes, x: Tensor, padding: Optional[Tensor], cache: Any, training: bool) -> Pass:
    """The pass over (B, T, C) new tokens after those of a cache.

    Raises:
        ValueError: a cache of attention that is not causal, or padding of another length than all tokens.
    """
    if cache is not None and not passes.causal:
        raise ValueError("a cache needs causal=True: without it the tokens before would see the new ones")
    earlier = 0 if cache is None else cache.get_seq_length()
    keys = earlier + x.size(1)
    if padding is not None and padding.shape != (x.size(0), keys):
        raise ValueError(f"padding must be (B, S) = ({x.size(0)}, {keys}), not {tuple(padding.shape)}")
    return passes.make(x, x.size(1), keys, padding, first=earlier, cache=cache, training=training)
