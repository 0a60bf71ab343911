"""fairseq's transformer decoder with a position method: the hooks of fairseq that we override, and nothing else.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim, C = H * D.
"""

import contextlib
import copy
import functools
import sys
import time
from typing import Optional, Union

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoder
from fairseq.modules import LearnedPositionalEmbedding, MultiheadAttention, SinusoidalPositionalEmbedding
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from ..core.layers import AttentionCore, Pass, Passes
from ..core.positions import PositionMethod

#: Where an incremental state holds how many tokens it has the keys of, and of how many more it had them.
PROGRESS = "fairseq_alibi.progress"

#: Type of fairseq's incremental state: what the modules keep between the steps of decoding.
IncrementalState = dict[str, dict[str, Optional[Tensor]]]


class SelfAttention(AttentionCore, MultiheadAttention):
    """fairseq's multi-head attention (same parameters, same initial values) over the keys of a `Pass`."""

    time = 0  # (T, B, C)

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[IncrementalState] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Union[Pass, Tensor, None] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """See `MultiheadAttention.forward`; `attn_mask` is a `Pass`, or the mask or bias of one over whole sequences.

        In the last layer only the queries that the pass wants have an output: (last, B, C) then, not (T, B, C).
        `key` and `value` are the query (this is self-attention); the incremental state comes with the pass, as its
        cache; `static_kv` and `before_softmax` do not apply.

        Raises:
            ValueError: weights are wanted of attention without a mask.
        """
        run = of_argument(attn_mask, key_padding_mask)
        dropout = self.dropout_module.p if self.training or self.dropout_module.apply_during_inference else 0.0
        out, weights = self.attend(query, run, dropout, need_weights or need_head_weights)
        if weights is None:
            return out, None
        weights = weights.transpose(0, 1)  # (H, B, T, S), as fairseq returns it
        return out, weights if need_head_weights else weights.mean(dim=0)

    def extend_cache(
        self, cache: IncrementalState, k: Tensor, v: Tensor, window: Optional[int] = None
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionCore.extend_cache`; the cache is fairseq's incremental state.

        With a window the last window - 1 stay in the cache: the next query, which has its own key, sees no more.
        """
        kept = self._get_input_buffer(cache)
        if kept:
            k = torch.cat([kept["prev_key"], k], dim=2)
            v = torch.cat([kept["prev_value"], v], dim=2)
        seen = slice(0 if window is None else max(0, k.size(2) - (window - 1)), None)
        self._set_input_buffer(cache, {"prev_key": k[:, :, seen], "prev_value": v[:, :, seen]})
        return k, v


class DecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer with `SelfAttention`, whose matrix products may run in bfloat16 on a CPU."""

    #: Whether they do.
    cpu_bf16 = False

    def forward(self, x, encoder_out=None, encoder_padding_mask=None, incremental_state=None, **kwargs):
        """See `TransformerDecoderLayerBase.forward`; an incremental state comes with the pass, as its cache.

        Attention to an encoder is fairseq's own, without positions; it keeps the encoder's keys in that state.
        """
        run = kwargs.get("self_attn_mask")
        cache = run.cache if isinstance(run, Pass) else incremental_state
        with cpu_bf16_products(self.cpu_bf16, x):
            return super().forward(x, encoder_out, encoder_padding_mask, cache, **kwargs)

    def residual_connection(self, x, residual):
        """See `TransformerDecoderLayerBase.residual_connection`; `x` may be of the last tokens alone."""
        return super().residual_connection(x, residual[-x.size(0) :])

    def build_self_attention(self, embed_dim, cfg, add_bias_kv=False, add_zero_attn=False):
        return SelfAttention(
            embed_dim,
            cfg.decoder.attention_heads,
            dropout=cfg.attention_dropout,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            self_attention=True,
            q_noise=self.quant_noise,
            qn_block_size=self.quant_noise_block_size,
        )


class GoesOn:
    """A position embedding of fairseq's that can go on after tokens that were read before.

    fairseq's own take padding on the left for tokens when they decode step by step. Here it never is: a sequence has
    the same positions in a full pass and step by step, alone and in a batch.
    """

    #: (B, S - T) tokens before those that `forward` gets; none at first.
    earlier_tokens: Optional[Tensor] = None

    def forward(self, input: Tensor, incremental_state=None) -> Tensor:
        """(B, T) tokens -> (B, T, C), zero at padding."""
        if self.earlier_tokens is None or self.earlier_tokens.size(1) == 0:
            return super().forward(input)
        return super().forward(torch.cat([self.earlier_tokens, input], dim=1))[:, -input.size(1) :]


class SinusoidalEmbedding(GoesOn, SinusoidalPositionalEmbedding):
    """fairseq's sinusoidal embedding."""


class LearnedEmbedding(GoesOn, LearnedPositionalEmbedding):
    """fairseq's learned embedding, which starts from the values that fairseq gives it."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int):
        super().__init__(num_embeddings + padding_idx + 1, embedding_dim, padding_idx)
        nn.init.normal_(self.weight, mean=0, std=embedding_dim**-0.5)
        nn.init.constant_(self.weight[padding_idx], 0)


class Decoder(TransformerDecoder):
    """fairseq's transformer decoder whose attention has the bias of a position method, at any length.

    What attention needs is made once in a pass, before the layer loop, see `Passes`.

    Args:
        args: the model's options, a namespace or fairseq config; not changed.
        dictionary: of the targets.
        embed_tokens: token embeddings.
        position_method: what tells the positions.
        no_encoder_attn: whether its layers attend to no encoder.
    """

    def __init__(self, args, dictionary, embed_tokens, position_method: PositionMethod, no_encoder_attn: bool = False):
        args = copy.copy(args)
        self.longest = args.max_target_positions or sys.maxsize
        self.cpu_bf16 = args.cpu_bf16
        args.no_token_positional_embeddings = True  # or fairseq makes one of its own
        args.max_target_positions = args.tokens_per_sample
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn)
        self.layers[-1].self_attn.in_last_layer = True
        self.position_method = position_method
        self.passes = Passes(position_method, args.attention, args.attention_epsilon, args.attention_dropout)
        self._tokens = self._incremental_state = self._window = self._last = None  # of the pass that is going on
        self._first = 0  # position of its first token
        self._pass: Optional[Pass] = None
        if position_method.embedding == "sinusoidal":  # of a size that grows by itself
            self.embed_positions = SinusoidalEmbedding(self.embed_dim, self.padding_idx, args.tokens_per_sample)
        elif position_method.embedding == "learned":
            if self.longest == sys.maxsize:
                self.longest = args.tokens_per_sample
            # made last, so that the other weights start as with any method
            self.embed_positions = LearnedEmbedding(self.longest, self.embed_dim, self.padding_idx)

    def build_decoder_layer(self, args, no_encoder_attn=False):
        layer = DecoderLayer(args, no_encoder_attn)
        layer.cpu_bf16 = self.cpu_bf16
        return wrap_layer(layer, args)

    def buffered_future_mask(self, tensor: Tensor) -> Union[Pass, Tensor]:
        """What fairseq's layer loop hands on to each layer: the pass over T tokens.

        Args:
            tensor: (T, B, C), gives length, device and dtype.

        Returns:
            A `Pass`, made for the first layer, or its mask or bias, see `as_argument`.
        """
        if self._pass is None:
            self._pass = self.make_pass(tensor)
        return as_argument(self._pass)

    def output_layer(self, features: Tensor) -> Tensor:
        """See `TransformerDecoder.output_layer`; the logits are in the dtype of the features."""
        with cpu_bf16_products(self.cpu_bf16, features):
            return super().output_layer(features).to(features.dtype)

    def make_pass(self, tensor: Tensor) -> Pass:
        """The pass over T tokens: with a mask or without, and what it has to know of padding and earlier tokens."""
        return self.passes.make(
            tensor,
            queries=tensor.size(0),
            keys=self._tokens.size(1),
            padding=self._tokens.eq(self.padding_idx),
            first=self._first,
            window=self._window,
            last=self._last,
            cache=self._incremental_state,
            training=self.training,
        )

    def extract_features_scriptable(
        self,
        prev_output_tokens,
        encoder_out,
        incremental_state=None,
        full_context_alignment=False,
        *args,
        last: Optional[int] = None,
        window: Optional[int] = None,
        **kwargs,
    ):
        """See `TransformerDecoder.extract_features_scriptable`.

        With an incremental state all tokens that are new to it are read in one pass, be it one or a long prompt.

        Args:
            last: number of tokens, the last ones, whose features are wanted: (B, last, C). The last layer does no more
                for the others than they need as keys. Default: all new tokens; the last one with an incremental state.
            window: number of tokens, the last ones, itself included, that a token attends to in every layer. With an
                incremental state no more keys are kept, and `prev_output_tokens` holds before the new tokens the last
                window - 1 alone.
        """
        if full_context_alignment:
            raise NotImplementedError("full_context_alignment: this decoder is causal, it cannot look at the future")
        before = dropped = 0
        if incremental_state is not None:
            progress = incremental_state.setdefault(PROGRESS, {"kept": 0, "dropped": 0})
            before, dropped = progress["kept"], progress["dropped"]
            read = prev_output_tokens.size(1)
            progress["kept"] = read if window is None else min(read, window - 1)
            progress["dropped"] = dropped + read - progress["kept"]
            last = 1 if last is None else last
        new = prev_output_tokens[:, before:]
        assert new.size(1) > 0, f"no new token: {before} were read, {prev_output_tokens.size(1)} were given"
        self._tokens, self._incremental_state = prev_output_tokens, incremental_state
        self._window, self._last, self._first = window, last, dropped + before
        if self.position_method.embedding is not None:
            self.embed_positions.earlier_tokens = prev_output_tokens[:, :before]
        try:
            # Given an incremental state fairseq's loop would pass on the last token only, and no mask. So it is told of
            # whole sequences, and the state reaches the layers with the pass.
            x, extra = super().extract_features_scriptable(new, encoder_out, None, False, *args, **kwargs)
        finally:
            self._tokens = self._incremental_state = self._window = self._last = self._pass = None
        return x if last is None else x[:, -last:], extra

    def set_evaluation_length(self, length: int) -> None:
        """See `PositionMethod.set_evaluation_length`."""
        self.position_method.set_evaluation_length(length)
        self.passes.forget_mask()

    def max_positions(self) -> int:
        """Longest sequence: none, unless --max-target-positions was given or positions are learned."""
        return self.longest


def wrap_layer(layer: nn.Module, cfg) -> nn.Module:
    """A layer of a stack, wrapped as fairseq wraps its own: for activation checkpointing, and for FSDP."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


def as_argument(run: Pass) -> Union[Pass, Tensor]:
    """What a layer is given of a pass: for a bias with parameters the mask, or what is in its place, else all of it.

    Activation checkpointing carries gradients through arguments that are tensors only.
    """
    tensor = run.bias if run.mask is None else run.mask
    learned = tensor is not None and tensor.requires_grad
    return tensor if learned and run.cache is None else run


def of_argument(given: Union[Pass, Tensor, None], padding: Optional[Tensor]) -> Pass:
    """The pass of what a layer was given, see `as_argument`, and the (B, S) padding."""
    if isinstance(given, Pass):
        return given
    by_distance = given is not None and given.dim() == 2
    return Pass(bias=given, padding=padding) if by_distance else Pass(mask=given, padding=padding)


def cpu_bf16_products(wanted: bool, tensor: Tensor):
    """A context in which the matrix products of a float32 model on a CPU run in bfloat16, if that is wanted.

    The rest stays float32: residuals, norms, sums, and the embeddings, whose adaptive form autocast breaks.

    Raises:
        ValueError: this CPU is no faster in bfloat16.
    """
    if not wanted or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return contextlib.nullcontext()
    gain = bf16_gain()
    if gain < 1.2:
        raise ValueError(
            f"--cpu-bf16: matrix products in bfloat16 run at {gain:.2f} times the speed of float32 on this CPU; drop "
            "the option, or override it with --model-overrides \"{'cpu_bf16': False}\""
        )
    return torch.autocast("cpu", torch.bfloat16)


@functools.cache
def bf16_gain() -> float:
    """How many times as fast as in float32 a matrix product in bfloat16 runs on this CPU; takes 0.1 seconds, once."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(6):  # in turn, so that what else goes on hits both
        for dtype, measured in seconds.items():
            x = torch.ones(512, 512, dtype=dtype)
            started = time.perf_counter()
            x @ x
            measured.append(time.perf_counter() - started)
    float32, bfloat16 = (min(measured[1:]) for measured in seconds.values())
    return float32 / bfloat16
