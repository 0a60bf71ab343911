"""fairseq's transformer decoder with a position method: the hooks of fairseq that we override, and nothing else.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim, C = H * D.
"""

import copy
import sys
from typing import NamedTuple, Optional, Union

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoder
from fairseq.modules import MultiheadAttention, SinusoidalPositionalEmbedding
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor

from .attention import attention, attention_weights
from .positions import PositionMethod

#: Where an incremental state holds how many tokens it has read.
PROGRESS = "fairseq_alibi.progress"

#: Type of fairseq's incremental state: what the modules keep between the steps of decoding.
IncrementalState = dict[str, dict[str, Optional[Tensor]]]


class Pass(NamedTuple):
    """What the decoder hands its layers when it decodes incrementally, in the place of the mask.

    Args:
        mask: (H, T, S) or (1, T, S), see `PositionMethod.future_mask`.
        incremental_state: where keys and values of the tokens before these are and those of these are added.
    """

    mask: Tensor
    incremental_state: IncrementalState


class SelfAttention(MultiheadAttention):
    """fairseq's multi-head attention (same parameters, same initial values) under a future mask of its own per head."""

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[IncrementalState] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Union[Tensor, Pass, None] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """See `MultiheadAttention.forward`; `attn_mask` is a future mask or a `Pass`, and required.

        `key` and `value` are the query (this is self-attention); `incremental_state` comes with the pass; `static_kv`
        and `before_softmax` do not apply.
        """
        query_length, batch, _ = query.shape

        def split_heads(x: Tensor) -> Tensor:  # (T, B, C) -> (B, H, T, D)
            return x.view(query_length, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

        q, k, v = (split_heads(project(query)) for project in (self.q_proj, self.k_proj, self.v_proj))
        mask, incremental_state = attn_mask if isinstance(attn_mask, Pass) else (attn_mask, None)
        if incremental_state is not None:
            k, v, key_padding_mask = self.extend_cache(incremental_state, k, v, key_padding_mask)
        padding = None if key_padding_mask is None else key_padding_mask.bool()

        drops = self.training or self.dropout_module.apply_during_inference
        out = attention(q, k, v, mask, padding, self.dropout_module.p if drops else 0.0)
        out = self.out_proj(out.permute(2, 0, 1, 3).reshape(query_length, batch, -1))

        if not (need_weights or need_head_weights):
            return out, None
        weights = attention_weights(q, k, mask, padding).transpose(0, 1)  # (H, B, T, S), as fairseq returns it
        return out, weights if need_head_weights else weights.mean(dim=0)

    def extend_cache(
        self, incremental_state: IncrementalState, k: Tensor, v: Tensor, padding: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """Appends new keys and values, (B, H, T, D), and padding, (B, T), to the cached ones; returns all of them."""
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
    """fairseq's sinusoidal embedding, which can go on after tokens that were read before.

    fairseq's own takes padding on the left for tokens when it decodes step by step. Here it never is: a sequence has
    the same positions in a full pass and step by step, alone and in a batch.
    """

    #: (B, S) tokens before those that `forward` gets.
    earlier_tokens: Optional[Tensor] = None

    def forward(self, input: Tensor, incremental_state=None) -> Tensor:
        """(B, T) tokens -> (B, T, C), zero at padding."""
        if self.earlier_tokens is None:
            return super().forward(input)
        return super().forward(torch.cat([self.earlier_tokens, input], dim=1))[:, -input.size(1) :]


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
        self._tokens_before, self._incremental_state = 0, None  # of the pass that is going on
        if position_method.adds_embedding:
            self.embed_positions = SinusoidalEmbedding(self.embed_dim, self.padding_idx, args.tokens_per_sample)

    def build_decoder_layer(self, args, no_encoder_attn=False):
        layer = DecoderLayer(args, no_encoder_attn)
        if args.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=args.offload_activations)
        return fsdp_wrap(layer, min_num_params=0 if args.checkpoint_activations else args.min_params_to_wrap)

    def buffered_future_mask(self, tensor: Tensor) -> Union[Tensor, Pass]:
        """The future mask with the bias for T tokens, and with it what was read before them.

        Args:
            tensor: (T, B, C), gives length, device and dtype.

        Returns:
            What fairseq hands on to the layers. The mask of whole sequences is a view of the kept one, and nothing but
            a tensor, because activation checkpointing carries gradients to a bias through tensors only.
        """
        length, before, dtype = tensor.size(0), self._tokens_before, compute_dtype(tensor)
        kept = self._future_mask
        if before:
            mask = self.position_method.future_mask(length, before + length, dtype, tensor.device)
        elif kept.dim() == 3 and kept.size(-1) >= length and kept.device == tensor.device and kept.dtype == dtype:
            mask = kept[:, :length, :length]
        else:
            mask = self._future_mask = self.position_method.future_mask(length, length, dtype, tensor.device)
        return mask if self._incremental_state is None else Pass(mask, self._incremental_state)

    def extract_features_scriptable(
        self, prev_output_tokens, encoder_out, incremental_state=None, full_context_alignment=False, *args, **kwargs
    ):
        """See `TransformerDecoder.extract_features_scriptable`.

        With an incremental state all tokens that are new to it are read in one pass, be it one or a long prompt, and
        the features of the last are returned: (B, 1, C).
        """
        if full_context_alignment:
            raise NotImplementedError("full_context_alignment: this decoder is causal, it cannot look at the future")
        if any(True for _ in self.position_method.parameters()):
            self.forget_mask()  # a learned bias is another one in each pass
        if incremental_state is None:
            return super().extract_features_scriptable(prev_output_tokens, encoder_out, None, False, *args, **kwargs)
        # fairseq's loop would pass on the last token only and no mask, so it is told of a pass over the new tokens; the
        # state reaches the layers with the mask.
        progress = incremental_state.setdefault(PROGRESS, {"tokens_read": 0})
        before = progress["tokens_read"]
        earlier, new = prev_output_tokens[:, :before], prev_output_tokens[:, before:]
        assert new.size(1) > 0, f"no new token: {before} were read, {prev_output_tokens.size(1)} were given"
        self._tokens_before, self._incremental_state = before, incremental_state
        if self.position_method.adds_embedding:
            self.embed_positions.earlier_tokens = earlier
        try:
            x, extra = super().extract_features_scriptable(new, encoder_out, None, False, *args, **kwargs)
        finally:
            self._tokens_before, self._incremental_state = 0, None
            if self.position_method.adds_embedding:
                self.embed_positions.earlier_tokens = None
        progress["tokens_read"] = prev_output_tokens.size(1)
        return x[:, -1:], extra

    def forget_mask(self) -> None:
        """Has the mask made anew in the next pass, for a bias that has changed."""
        self._future_mask = torch.empty(0)

    def max_positions(self) -> int:
        """Longest sequence: none, unless --max-target-positions was given."""
        return self.longest


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which attention on this tensor runs: autocast's where autocast is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
