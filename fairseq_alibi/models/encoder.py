"""fairseq's transformer encoder with a position method, at any length. Shapes: B batch, T tokens, C width."""

import copy
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerEncoder
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from ..core.attention_inputs import TokenSpan
from ..core.attention_setup import AttentionSetup
from ..core.embeddings import token_positions
from ..core.positions import PositionMethod
from .layers import EncoderLayer, PositionedStack
from .options import attention_settings


class AlibiEncoder(PositionedStack, TransformerEncoder):
    """fairseq's transformer encoder whose attention has the bias of a position method.

    What attention needs is made once in a pass, before the layer loop, see `AttentionSetup`. A pass leaves nothing in
    the encoder. `args.max_source_positions` is the size of a table of learned positions, and what `max_positions` says.
    """

    def __init__(self, args: Any, dictionary: Dictionary, embed_tokens: nn.Module, position_method: PositionMethod):
        args = copy.copy(args)
        args.no_token_positional_embeddings = True  # or fairseq makes an embedding of its own
        self.cpu_bf16 = bool(safe_getattr(args, "cpu_bf16", False))
        super().__init__(args, dictionary, embed_tokens)
        self.position_method = position_method
        self.setup = AttentionSetup(position_method, attention_settings(args, causal=False))
        # Made last, so that the other weights start as with any method, but registered behind the token embeddings,
        # because RoBERTa draws the initial values of all modules in their order.
        width, later = int(args.encoder_embed_dim), list(self._modules)[list(self._modules).index("embed_tokens") + 1 :]
        self.embed_positions = position_method.position_embedding(width, args.max_source_positions, self.padding_idx)
        for name in later:
            self._modules[name] = self._modules.pop(name)

    def build_encoder_layer(self, args: Any) -> nn.Module:
        """See `TransformerEncoder.build_encoder_layer`."""
        return EncoderLayer(args, self.cpu_bf16)

    def forward_embedding(self, src_tokens: Tensor, token_embedding: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """See `TransformerEncoder.forward_embedding`: what the layers read, and the scaled token embeddings."""
        if token_embedding is None:
            token_embedding = self.embed_tokens(src_tokens)
        x = embedded = self.embed_scale * token_embedding
        if self.embed_positions is not None:
            positions = token_positions(src_tokens.ne(self.padding_idx), self.padding_idx)
            x = embedded + self.embed_positions(positions, src_tokens.size(1)).to(embedded.dtype)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        x = self.dropout_module(x)
        return (x if self.quant_noise is None else self.quant_noise(x)), embedded

    def forward_scriptable(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        return_all_hiddens: bool = False,
        token_embeddings: Optional[Tensor] = None,
    ) -> dict[str, list[Any]]:
        """See `TransformerEncoder.forward_scriptable`.

        The layer loop is that of fairseq 0.12.2, models/transformer/transformer_encoder.py, line 273, without its
        nested tensors and fused kernel, which take no bias.
        """
        padding = src_tokens.eq(self.padding_idx)
        x, embedded = self.forward_embedding(src_tokens, token_embeddings)
        x = x * (~padding)[..., None].to(x.dtype)
        span = TokenSpan(src_tokens.size(1), src_tokens.size(1), 0)
        inputs = self.setup.inputs(x, span, padding, training=self.training)
        x = x.transpose(0, 1)
        states = [x]
        for layer in self.layers:
            x, _ = layer(x, inputs)
            states.append(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return {
            "encoder_out": [x],
            "encoder_padding_mask": [padding],
            "encoder_embedding": [embedded],
            "encoder_states": states if return_all_hiddens else [],
            "fc_results": [None] * (len(states) - 1) if return_all_hiddens else [],
            "src_tokens": [],
            "src_lengths": [(~padding).sum(dim=1, dtype=torch.int32)[:, None].contiguous()],
        }

    def max_positions(self) -> int:
        """Longest source: as --max-source-positions says."""
        return self.max_source_positions
