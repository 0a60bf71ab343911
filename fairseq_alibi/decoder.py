"""fairseq's transformer decoder with a position method: the hooks of fairseq that we override, and nothing else.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim, C = H * D.
"""

import contextlib
import copy
import functools
import sys
import time
from typing import NamedTuple, Optional, Union

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoder
from fairseq.modules import LearnedPositionalEmbedding, MultiheadAttention, SinusoidalPositionalEmbedding
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from .attention import (
    EPSILON,
    attention_weights,
    fused_attention,
    fused_is_faster,
    masked_attention,
    padding_before_tokens,
)
from .positions import PositionMethod, rotate

#: Where an incremental state holds how many tokens it has the keys of, and of how many more it had them.
PROGRESS = "fairseq_alibi.progress"

#: Type of fairseq's incremental state: what the modules keep between the steps of decoding.
IncrementalState = dict[str, dict[str, Optional[Tensor]]]


class Pass(NamedTuple):
    """What the decoder hands all of its layers in one pass, in the place of fairseq's future mask.

    Args:
        mask: (H, T, S) or (1, T, S), see `PositionMethod.future_mask`; None for attention without a mask.
        slopes, epsilon: see `fused_attention`.
        padding: (B, S) bool, True at padded keys, see `padding_before_tokens`; or None.
        window: number of keys that a query sees, the last ones, itself included; None for all.
        last: number of queries, the last ones, that the last layer is computed for; None for all.
        rotation: of the T new tokens, see `PositionMethod.rotation`; None for none.
        incremental_state: where keys and values of the tokens before these are and those of these are added; None for
            whole sequences. Not fairseq's own argument, with which it reads one token at a time.
    """

    mask: Optional[Tensor] = None
    slopes: Optional[Tensor] = None
    epsilon: float = EPSILON
    padding: Optional[Tensor] = None
    window: Optional[int] = None
    last: Optional[int] = None
    rotation: Optional[Tensor] = None
    incremental_state: Optional[IncrementalState] = None


class SelfAttention(MultiheadAttention):
    """fairseq's multi-head attention (same parameters, same initial values) over the keys of a `Pass`."""

    #: Whether its layer is the last one, whose output nothing but the output layer reads.
    in_last_layer = False

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
        """See `MultiheadAttention.forward`; `attn_mask` is a `Pass`, or the mask of one over whole sequences.

        In the last layer only the queries that the pass wants have an output: (last, B, C) then, not (T, B, C).
        `key` and `value` are the query (this is self-attention); `incremental_state` comes with the pass; `static_kv`
        and `before_softmax` do not apply.

        Raises:
            ValueError: weights are wanted of attention without a mask.
        """
        run = attn_mask if isinstance(attn_mask, Pass) else Pass(mask=attn_mask, padding=key_padding_mask)
        batch = query.size(1)

        def split_heads(x: Tensor) -> Tensor:  # (T, B, C) -> (B, H, T, D)
            return x.view(x.size(0), batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

        k, v = (split_heads(project(query)) for project in (self.k_proj, self.v_proj))
        if self.in_last_layer and run.last is not None:
            query = query[-run.last :]
        q = split_heads(self.q_proj(query))
        if run.rotation is not None:  # keys go into the cache as they are at their positions
            q, k = rotate(q, run.rotation[:, -q.size(2) :]), rotate(k, run.rotation)
        if run.incremental_state is not None:
            k, v = self.extend_cache(run.incremental_state, k, v, run.window)

        dropout = self.dropout_module.p if self.training or self.dropout_module.apply_during_inference else 0.0
        if run.mask is None:
            out = fused_attention(q, k, v, run.slopes, run.padding, dropout, run.epsilon, run.window)
        else:
            mask = run.mask[:, -q.size(2) :]
            out = masked_attention(q, k, v, mask, run.padding, dropout)
        out = self.out_proj(out.permute(2, 0, 1, 3).reshape(query.shape))

        if not (need_weights or need_head_weights):
            return out, None
        if run.mask is None:
            raise ValueError("attention weights are there with --attention mask only")
        weights = attention_weights(q, k, mask, run.padding).transpose(0, 1)  # (H, B, T, S), as fairseq returns it
        return out, weights if need_head_weights else weights.mean(dim=0)

    def extend_cache(
        self, incremental_state: IncrementalState, k: Tensor, v: Tensor, window: Optional[int] = None
    ) -> tuple[Tensor, Tensor]:
        """Appends new keys and values, (B, H, T, D), to the cached ones; returns all of them.

        With a window the last window - 1 stay in the cache: the next query, which has its own key, sees no more.
        """
        cache = self._get_input_buffer(incremental_state)
        if cache:
            k = torch.cat([cache["prev_key"], k], dim=2)
            v = torch.cat([cache["prev_value"], v], dim=2)
        kept = slice(0 if window is None else max(0, k.size(2) - (window - 1)), None)
        self._set_input_buffer(incremental_state, {"prev_key": k[:, :, kept], "prev_value": v[:, :, kept]})
        return k, v


class DecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer with `SelfAttention`, whose matrix products may run in bfloat16 on a CPU."""

    #: Whether they do.
    cpu_bf16 = False

    def forward(self, x, *args, **kwargs):
        """See `TransformerDecoderLayerBase.forward`."""
        with cpu_bf16_products(self.cpu_bf16, x):
            return super().forward(x, *args, **kwargs)

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

    What attention needs is made once in a pass, before the layer loop. With a mask that is the bias folded into the
    future mask, (H, L, L), shared by the batch, kept between passes and grown when a longer sequence comes; a bias with
    parameters is made anew in each pass.

    Args:
        args: the model's options, a namespace or fairseq config; not changed.
        dictionary: of the targets.
        embed_tokens: token embeddings.
        position_method: what tells the positions.
    """

    def __init__(self, args, dictionary, embed_tokens, position_method: PositionMethod):
        args = copy.copy(args)
        self.longest = args.max_target_positions or sys.maxsize
        self.cpu_bf16 = args.cpu_bf16
        args.no_token_positional_embeddings = True  # or fairseq makes one of its own
        args.max_target_positions = args.tokens_per_sample
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=True)
        self.layers[-1].self_attn.in_last_layer = True
        self.position_method = position_method
        self.attention, self.attention_epsilon = args.attention, args.attention_epsilon
        self.attention_dropout = args.attention_dropout
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
        if args.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=args.offload_activations)
        return fsdp_wrap(layer, min_num_params=0 if args.checkpoint_activations else args.min_params_to_wrap)

    def buffered_future_mask(self, tensor: Tensor) -> Union[Pass, Tensor]:
        """What fairseq's layer loop hands on to each layer: the pass over T tokens.

        Args:
            tensor: (T, B, C), gives length, device and dtype.

        Returns:
            A `Pass`, made for the first layer. For a bias with parameters the mask itself, because activation
            checkpointing carries gradients through tensors only.
        """
        if self._pass is None:
            self._pass = self.make_pass(tensor)
        learned = self._pass.mask is not None and self._pass.mask.requires_grad
        return self._pass.mask if learned and self._incremental_state is None else self._pass

    def output_layer(self, features: Tensor) -> Tensor:
        """See `TransformerDecoder.output_layer`; the logits are in the dtype of the features."""
        with cpu_bf16_products(self.cpu_bf16, features):
            return super().output_layer(features).to(features.dtype)

    def make_pass(self, tensor: Tensor) -> Pass:
        """The pass over T tokens: with a mask or without, and what it has to know of padding and earlier tokens."""
        queries, keys = tensor.size(0), self._tokens.size(1)
        padding = padding_before_tokens(self._tokens.eq(self.padding_idx))
        rotation = self.position_method.rotation(self._first, self._first + queries, tensor.device)
        rest = (self.attention_epsilon, padding, self._window, self._last, rotation, self._incremental_state)
        if self.takes_no_mask(tensor.device, queries, keys, padding):
            slopes = self.position_method.slopes
            return Pass(None, None if slopes is None else slopes.to(tensor.device), *rest)
        # PyTorch's CPU kernels take a float32 mask in half precision, the GPU's want their own dtype
        dtype = (
            torch.promote_types(tensor.dtype, torch.float32) if tensor.device.type == "cpu" else compute_dtype(tensor)
        )
        if keys > queries or self._window is not None:
            mask = self.position_method.future_mask(queries, keys, dtype, tensor.device, self._window)
            return Pass(mask, None, *rest)
        kept = self._future_mask
        if kept.dim() != 3 or kept.size(-1) < keys or kept.device != tensor.device or kept.dtype != dtype:
            self._future_mask = self.position_method.future_mask(keys, keys, dtype, tensor.device)
        return Pass(self._future_mask[:, :keys, :keys], None, *rest)

    def takes_no_mask(self, device: torch.device, queries: int, keys: int, padding: Optional[Tensor]) -> bool:
        """Whether `fused_attention` runs the pass: as --attention wants it, or where it is faster."""
        if self.attention == "mask" or self.position_method.needs_mask or queries == 1 < keys:
            return False  # the mask of one query is one row
        if self._window is not None:
            return True  # the mask would be another one in each pass
        dropout = self.attention_dropout if self.training else 0.0
        plain = self.position_method.slopes is None and queries == keys and padding is None and not dropout
        return self.attention == "fused" or plain or fused_is_faster(device, queries, keys)

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
        if any(True for _ in self.position_method.parameters()):
            self.forget_mask()  # a learned bias is another one in each pass
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
        self.forget_mask()

    def forget_mask(self) -> None:
        """Has the mask made anew in the next pass, for a bias that has changed."""
        self._future_mask = torch.empty(0)

    def max_positions(self) -> int:
        """Longest sequence: none, unless --max-target-positions was given or positions are learned."""
        return self.longest


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


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which attention on this tensor runs: autocast's where autocast is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
