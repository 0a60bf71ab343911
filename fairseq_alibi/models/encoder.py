"""fairseq's transformer encoder with a position method: the hooks of fairseq that we override, and nothing else.

Shapes: B batch, T tokens, C width.
"""

import copy
from typing import Any, Optional, Union

from fairseq.models.transformer import TransformerEncoder
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from ..core.layers import KEPT_LENGTH, Pass, Passes
from ..core.positions import PositionMethod
from .decoder import DecoderLayer, as_argument, wrap_layer


class EncoderLayer(DecoderLayer):
    """An encoder layer: fairseq's decoder layer without attention to an encoder, with the options of the encoder.

    fairseq's own encoder layer is the same, but in evaluation it runs, with norms behind its parts, through a kernel
    that takes no bias, and has a second, untrained copy of its weights for that.
    """

    #: Read by fairseq's encoder: whether to run that kernel.
    load_to_BT = False  # noqa: N815

    upgrade_state_dict_named = TransformerEncoderLayerBase.upgrade_state_dict_named

    def __init__(self, cfg):
        cfg = copy.copy(cfg)
        cfg.decoder = cfg.encoder
        super().__init__(cfg, no_encoder_attn=True)

    def forward(
        self, x: Tensor, encoder_padding_mask: Optional[Tensor], attn_mask: Union[Pass, Tensor, None] = None
    ) -> Tensor:
        """(T, B, C) -> (T, B, C).

        Args:
            x: what the layer reads.
            encoder_padding_mask: (B, T) bool, True at padding; None for none. A `Pass` has it already.
            attn_mask: see `SelfAttention.forward`.
        """
        return super().forward(x, self_attn_mask=attn_mask, self_attn_padding_mask=encoder_padding_mask)[0]


class Encoder(TransformerEncoder):
    """fairseq's transformer encoder whose attention has the bias of a position method, at any length.

    What attention needs is made once in a pass, for the first layer, see `Passes`.

    Args:
        args: the model's options, a namespace or fairseq config; not changed. `max_source_positions` is the size of a
            table of learned positions, and what `max_positions` says.
        dictionary: of the sources.
        embed_tokens: token embeddings.
        position_method: what tells the positions, one of `positions.ENCODER_POSITION_METHODS`.
    """

    def __init__(self, args, dictionary, embed_tokens, position_method: PositionMethod):
        args = copy.copy(args)
        args.no_token_positional_embeddings = position_method.embedding is None
        args.encoder_learned_pos = position_method.embedding == "learned"
        longest = args.max_source_positions
        if position_method.embedding == "sinusoidal":  # of a size that grows by itself
            args.max_source_positions = min(longest, KEPT_LENGTH)
        super().__init__(args, dictionary, embed_tokens)
        self.max_source_positions = longest
        self.position_method = position_method
        attention = (args.attention, args.attention_epsilon, args.attention_dropout)
        self.passes = Passes(position_method, *attention, causal=False)
        self._pass: Optional[Pass] = None

    def build_encoder_layer(self, args):
        layer = EncoderLayer(args)
        layer.cpu_bf16 = safe_getattr(args, "cpu_bf16", False)
        # fairseq's layer loop tells layers of padding only. The hook runs outside of activation checkpointing.
        layer.register_forward_pre_hook(self.hand_on, with_kwargs=True)
        return wrap_layer(layer, args)

    def hand_on(self, layer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Adds the pass over the tokens, made for the first layer, to the arguments of a layer."""
        if self._pass is None:
            length, padding = args[0].size(0), kwargs["encoder_padding_mask"]
            self._pass = self.passes.make(args[0], length, length, padding, training=self.training)
        return args, {**kwargs, "attn_mask": as_argument(self._pass)}

    def forward_scriptable(self, *args, **kwargs):
        """See `TransformerEncoderBase.forward_scriptable`."""
        try:
            return super().forward_scriptable(*args, **kwargs)
        finally:
            self._pass = None

    def set_evaluation_length(self, length: int) -> None:
        """See `PositionMethod.set_evaluation_length`."""
        self.position_method.set_evaluation_length(length)
        self.passes.forget_mask()
