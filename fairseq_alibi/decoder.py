"""fairseq's transformer decoder with a position method: the hooks of fairseq that we override, and nothing else.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim, C = H * D.
"""

import copy
import sys
from typing import Optional

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoder
from fairseq.modules import MultiheadAttention, SinusoidalPositionalEmbedding
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor

from .attention import attention, attention_weights
from .positions import PositionMethod

#: Where an incremental state carries the step's mask, next to the attention layers' keys and values.
STEP_MASK = "fairseq_alibi.step_mask"


class SelfAttention(MultiheadAttention):
    """fairseq's multi-head attention (same parameters, same initial values) that takes a mask of its own per head."""

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[dict[str, dict[str, Optional[Tensor]]]] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """See `MultiheadAttention.forward`; `attn_mask` is (H, T, S) or (1, T, S) and required unless decoding.

        `key` and `value` are the query (this is self-attention); `static_kv` and `before_softmax` do not apply to it.
        """
        query_length, batch, _ = query.shape

        def split_heads(x: Tensor) -> Tensor:  # (T, B, C) -> (B, H, T, D)
            return x.view(query_length, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

        q, k, v = (split_heads(project(query)) for project in (self.q_proj, self.k_proj, self.v_proj))

        if incremental_state is not None:
            k, v, key_padding_mask = self.extend_cache(incremental_state, k, v, key_padding_mask)
            if attn_mask is None:
                attn_mask = incremental_state[STEP_MASK]["mask"]
        padding = None if key_padding_mask is None else key_padding_mask.bool()

        drops = self.training or self.dropout_module.apply_during_inference
        out = attention(q, k, v, attn_mask, padding, self.dropout_module.p if drops else 0.0)
        out = self.out_proj(out.permute(2, 0, 1, 3).reshape(query_length, batch, -1))

        if not (need_weights or need_head_weights):
            return out, None
        weights = attention_weights(q, k, attn_mask, padding).transpose(0, 1)  # (H, B, T, S), as fairseq returns it
        return out, weights if need_head_weights else weights.mean(dim=0)

    def extend_cache(
        self, incremental_state: dict[str, dict[str, Optional[Tensor]]], k: Tensor, v: Tensor, padding: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """Appends this step's keys and values, (B, H, T, D), and padding, (B, T), to the cached ones; returns all."""
        cache = self._get_input_buffer(incremental_state)
        if "prev_key" in cache:
            k = torch.cat([cache["prev_key"], k], dim=2)
            v = torch.cat([cache["prev_value"], v], dim=2)
        padding = self._append_prev_key_padding_mask(
            key_padding_mask=padding,
            prev_key_padding_mask=cache.get("prev_key_padding_mask"),
            batch_size=k.size(0),
            src_len=k.size(2),
            static_kv=False,
        )
        cache = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": padding}
        self._set_input_buffer(incremental_state, cache)
        return k, v, padding


class DecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer with `SelfAttention`."""

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


class SinusoidalEmbedding(SinusoidalPositionalEmbedding):
    """fairseq's sinusoidal embedding, which counts padding on the left as tokens when it decodes step by step.

    Here it never does: a sequence has the same positions in a full pass and step by step, alone and in a batch.
    """

    def forward(self, input: Tensor, incremental_state=None) -> Tensor:
        """(B, L) tokens -> (B, L, C), zero at padding; the decoder takes the last position when it makes one step."""
        return super().forward(input)


class Decoder(TransformerDecoder):
    """fairseq's transformer decoder whose future mask carries the bias of a position method.

    The mask is made once, before the layer loop: (H, L, L), shared by the batch, kept between passes and grown when a
    longer sequence comes; a bias with parameters is made anew in each pass. It depends on no option: a model runs at
    any length.

    Args:
        args: the model's options, a namespace or fairseq config; not changed.
        dictionary: of the targets.
        embed_tokens: token embeddings.
        position_method: what tells the positions.
    """

    def __init__(self, args, dictionary, embed_tokens, position_method: PositionMethod):
        args = copy.copy(args)
        self.longest = args.max_target_positions or sys.maxsize
        args.no_token_positional_embeddings = not position_method.adds_embedding
        args.max_target_positions = args.tokens_per_sample  # first size of the sinusoidal table, which grows by itself
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=True)
        self.position_method = position_method
        if position_method.adds_embedding:
            self.embed_positions = SinusoidalEmbedding(self.embed_dim, self.padding_idx, args.tokens_per_sample)

    def build_decoder_layer(self, args, no_encoder_attn=False):
        layer = DecoderLayer(args, no_encoder_attn)
        if args.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=args.offload_activations)
        return fsdp_wrap(layer, min_num_params=0 if args.checkpoint_activations else args.min_params_to_wrap)

    def buffered_future_mask(self, tensor: Tensor) -> Tensor:
        """The future mask with the bias for a sequence of L tokens.

        Args:
            tensor: (L, B, C), gives length, device and dtype.

        Returns:
            (H, L, L), or (1, L, L) for a method without bias: a view of the kept mask.
        """
        length = tensor.size(0)
        kept, dtype = self._future_mask, compute_dtype(tensor)
        if kept.dim() != 3 or kept.size(-1) < length or kept.device != tensor.device or kept.dtype != dtype:
            self._future_mask = self.position_method.future_mask(length, length, dtype, tensor.device)
        return self._future_mask[:, :length, :length]

    def extract_features_scriptable(
        self, prev_output_tokens, encoder_out, incremental_state=None, full_context_alignment=False, *args, **kwargs
    ):
        if full_context_alignment:
            raise NotImplementedError("full_context_alignment: this decoder is causal, it cannot look at the future")
        # fairseq gives its layers no mask in incremental decoding: the one new token may see everything. It has to see
        # the bias as well, so the step's row of the mask travels in the incremental state.
        if incremental_state is not None:
            like = next(self.parameters())
            row = self.position_method.future_mask(1, prev_output_tokens.size(1), compute_dtype(like), like.device)
            incremental_state[STEP_MASK] = {"mask": row}
        elif any(True for _ in self.position_method.parameters()):
            self._future_mask = torch.empty(0)  # a learned bias is another one in each pass
        return super().extract_features_scriptable(
            prev_output_tokens, encoder_out, incremental_state, full_context_alignment, *args, **kwargs
        )

    def max_positions(self) -> int:
        """Longest sequence: none, unless --max-target-positions was given."""
        return self.longest


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which attention on this tensor runs: autocast's where autocast is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
