"""fairseq's transformer layers with attention that has a position bias.

Parameters and their initial values are those of fairseq's layers. The forward passes are our own, because fairseq's
hand a layer a mask only: here a layer gets `AttentionInputs`. Shapes: B batch, H heads, T queries, S keys (the last T
of the S positions are the queries), D head_dim, C = H * D.
"""

import contextlib
import copy
import functools
import time
from contextlib import AbstractContextManager
from typing import Any, Optional

import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor

from ..core.attention_inputs import AttentionInputs
from ..core.attention_setup import AttentionSettings, AttentionSetup
from ..core.layers import AttentionCore, CachedTensors, append, checkpoint_activations

#: fairseq's incremental state: what the modules keep between the steps of decoding.
IncrementalState = dict[str, dict[str, Optional[Tensor]]]


class PositionedStack:
    """What our encoder and decoder share."""

    setup: AttentionSetup

    def set_evaluation_length(self, length: int) -> None:
        """See `PositionMethod.set_evaluation_length`."""
        self.setup.set_evaluation_length(length)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
        """See `TransformerDecoder.upgrade_state_dict_named`; drops what fairseq keeps or adds without need for it."""
        for buffer in ("weights", "_float_tensor"):
            state_dict.pop(f"{name}.embed_positions.{buffer}", None)
        state_dict = super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]
        if getattr(self, "adaptive_softmax", None) is not None:
            # fairseq adds shared embeddings as the weights of an output layer, which there is none of.
            state_dict.pop(f"{name}.output_projection.weight", None)
        return state_dict


class FairseqSelfAttention(AttentionCore, MultiheadAttention):
    """fairseq's multi-head attention, same parameters and initial values, over the keys of `AttentionInputs`."""

    time_dim = 0  # (T, B, C)

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.use_positions(None, AttentionSettings())

    def forward(  # type: ignore[override]
        self, x: Tensor, inputs: AttentionInputs, need_weights: bool = False
    ) -> tuple[Tensor, Optional[Tensor]]:
        """(T, B, C) -> (queries, B, C), and (B, H, T, S) weights if they are wanted; see `compute_attention`."""
        dropped = self.training or self.dropout_module.apply_during_inference
        return self.compute_attention(x, inputs, self.dropout_module.p if dropped else 0.0, need_weights)

    def extend_cache(self, cache: IncrementalState, new: CachedTensors, window: Optional[int]) -> CachedTensors:
        """See `AttentionCore.extend_cache`; the cache is fairseq's incremental state.

        With a window the last window - 1 keys stay in the cache: the next query has its own key and sees no more.
        """
        names = ("prev_key", "prev_value", "prev_decay")
        kept: Any = self._get_input_buffer(cache)
        if kept:
            new = append((kept["prev_key"], kept["prev_value"], kept.get("prev_decay")), new)
        seen = slice(0 if window is None else max(0, new[0].size(2) - (window - 1)), None)
        found = {name: x[:, :, seen] for name, x in zip(names, new) if x is not None}
        self._set_input_buffer(cache, found)  # type: ignore[arg-type]
        return new


class DecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer, of a `TransformerConfig`, with `FairseqSelfAttention`."""

    def __init__(self, cfg: Any, no_encoder_attn: bool = False, cpu_bf16: bool = False):
        super().__init__(cfg, no_encoder_attn)
        self.cpu_bf16 = cpu_bf16
        self.checkpointed, self.offloaded = cfg.checkpoint_activations, cfg.offload_activations

    def build_self_attention(
        self, embed_dim: int, cfg: Any, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> FairseqSelfAttention:
        """See `TransformerDecoderLayerBase.build_self_attention`."""
        return FairseqSelfAttention(
            embed_dim,
            cfg.decoder.attention_heads,
            dropout=cfg.attention_dropout,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            self_attention=True,
            q_noise=self.quant_noise,
            qn_block_size=self.quant_noise_block_size,
        )

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        inputs: AttentionInputs,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        need_attn: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """A pass through the layer; the computation is that of fairseq 0.12.2, modules/transformer_layer.py, line 535.

        (T, B, C) and, from the encoder, (S', B, C') and padding (B, S') -> (queries, B, C), of the queries that
        `inputs` asks for, and the weights (H, B, queries, S') if wanted or, as fairseq returns them unasked in
        evaluation, their mean (B, queries, S'), or None. The cache of `inputs` also keeps the keys of the encoder.
        """
        arguments = (x, inputs, encoder_out, encoder_padding_mask, need_attn)
        with autocast_products(self.cpu_bf16, x):
            if self.checkpointed and torch.is_grad_enabled():
                return checkpoint_activations(self.compute, *arguments, offload=self.offloaded)
            return self.compute(*arguments)

    def compute(
        self,
        x: Tensor,
        inputs: AttentionInputs,
        encoder_out: Optional[Tensor],
        encoder_padding_mask: Optional[Tensor],
        need_attn: bool,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """`forward`, without activation checkpointing."""
        before, weights = self.normalize_before, None
        residual = x
        x, _ = self.self_attn(self.self_attn_layer_norm(x) if before else x, inputs)
        if self.c_attn is not None:
            x = (x.unflatten(-1, (self.nh, self.head_dim)) * self.c_attn[:, None]).flatten(-2)
        if self.attn_ln is not None:
            x = self.attn_ln(x)
        x = residual[-x.size(0) :] + self.dropout_module(x)
        x = x if before else self.self_attn_layer_norm(x)

        if self.encoder_attn is not None and encoder_out is not None:
            residual = x
            x, weights = self.encoder_attn(
                query=self.encoder_attn_layer_norm(x) if before else x,
                key=encoder_out,
                value=encoder_out,
                key_padding_mask=encoder_padding_mask,
                incremental_state=inputs.cache,
                static_kv=True,
                need_weights=need_attn or (not self.training and self.need_attn),
                need_head_weights=need_attn,
            )
            x = residual + self.dropout_module(x)
            x = x if before else self.encoder_attn_layer_norm(x)

        residual = x
        x = self.feed_forward(self.final_layer_norm(x) if before else x)
        residual = residual if self.w_resid is None else self.w_resid * residual
        x = residual + self.dropout_module(x)
        return x if before else self.final_layer_norm(x), weights

    def feed_forward(self, x: Tensor) -> Tensor:
        """(T, B, C) -> (T, B, C)."""
        x = self.activation_dropout_module(self.activation_fn(self.fc1(x)))
        return self.fc2(x if self.ffn_layernorm is None else self.ffn_layernorm(x))


class EncoderLayer(DecoderLayer):
    """An encoder layer: `DecoderLayer` without attention to an encoder, with the options of the encoder.

    fairseq's own encoder layer is the same, but in evaluation it runs, with norms behind its parts, through a kernel
    that takes no bias, and has a second, untrained copy of its weights for that.
    """

    upgrade_state_dict_named = TransformerEncoderLayerBase.upgrade_state_dict_named

    def __init__(self, cfg: Any, cpu_bf16: bool = False):
        cfg = copy.copy(cfg)
        cfg.decoder = cfg.encoder
        super().__init__(cfg, no_encoder_attn=True, cpu_bf16=cpu_bf16)


def autocast_products(wanted: bool, x: Tensor) -> AbstractContextManager[Any]:
    """A context in which the matrix products of a float32 model on a CPU run in bfloat16, if that is wanted.

    The rest stays float32: residuals, norms, sums, and the embeddings, whose adaptive form autocast breaks. ValueError:
    this CPU is no faster in bfloat16.
    """
    if not wanted or x.device.type != "cpu" or x.dtype != torch.float32:
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
    """Speed of a matrix product in bfloat16 divided by its speed in float32, on this CPU; takes 0.1 seconds, once."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(6):  # in turn, so that other load hits both
        for dtype, measured in seconds.items():
            x = torch.ones(512, 512, dtype=dtype)
            started = time.perf_counter()
            x @ x
            measured.append(time.perf_counter() - started)
    float32, bfloat16 = (min(measured[1:]) for measured in seconds.values())
    return float32 / bfloat16
