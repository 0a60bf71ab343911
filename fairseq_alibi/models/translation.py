"""The model `alibi_transformer`: fairseq's `transformer` with a switch for the position method; architectures.

The encoder has one of the encoder forms of ALiBi, the decoder the causal one; attention between them has no positions.
"""

import copy
import sys
from argparse import ArgumentParser
from typing import Any

from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import DEFAULT_MAX_SOURCE_POSITIONS, DEFAULT_MAX_TARGET_POSITIONS, TransformerModel
from fairseq.models.transformer import transformer_legacy as legacy
from fairseq.tasks import FairseqTask
from fairseq.utils import safe_getattr
from torch import nn

from ..core.positions import DECODER, ENCODER, position_methods
from . import options
from .decoder import AlibiDecoder
from .encoder import AlibiEncoder


def translation_options() -> tuple[type[FairseqDataclass], ...]:
    """What this model adds to the options of `transformer`."""
    return options.position_options(ENCODER, DECODER), options.AttentionOptions, options.DecoderOptions


@register_model("alibi_transformer")
class AlibiTransformer(TransformerModel):
    """A transformer whose lengths only --max-source-positions and --max-target-positions limit, if they are given."""

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        """None; fairseq's are no models of ours."""
        return {}

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """See `TransformerModel.add_args`."""
        super().add_args(parser)
        options.add_options(parser, *translation_options())

    @classmethod
    def build_model(cls, args: Any, task: FairseqTask) -> "AlibiTransformer":
        """Builds the model from `args`, which get the options that they lack; ValueError for impossible ones."""
        options.fill_in_options(args, *translation_options())
        options.check_position_options(args, ENCODER, DECODER)
        options.check_decoder_options(args)
        if args.alibi_length_scale == "auto":
            raise ValueError("--alibi-length-scale auto: a translation has no length known beforehand; pass a number")
        if args.rotary_scaling != "none":
            raise ValueError(f"--rotary-scaling {args.rotary_scaling}: a translation has no training length; drop it")
        if safe_getattr(args, "cross_self_attention"):
            raise ValueError("--cross-self-attention: source and target have no distance to each other; drop it")
        lift_default_limits(task)
        args = copy.copy(args)
        limited = position_methods(DECODER)[args.position_method].limited_to_training_length
        unasked = DEFAULT_MAX_TARGET_POSITIONS if limited else sys.maxsize  # the size of a table of positions
        for name in ("max_source_positions", "max_target_positions"):
            setattr(args, name, safe_getattr(args, name) or unasked)
        args.tokens_per_sample = DEFAULT_MAX_TARGET_POSITIONS
        return super().build_model(args, task)

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Dictionary, embed_tokens: nn.Module) -> AlibiEncoder:
        """See `TransformerModel.build_encoder`."""
        return AlibiEncoder(args, src_dict, embed_tokens, options.position_method_of(args, ENCODER))

    @classmethod
    def build_decoder(cls, args: Any, tgt_dict: Dictionary, embed_tokens: nn.Module) -> AlibiDecoder:
        """See `TransformerModel.build_decoder`."""
        causal = copy.copy(args)
        causal.alibi_learned_slopes = False  # the option is for the encoder here, as checkpoints of before have it
        method = options.position_method_of(causal, DECODER)
        return AlibiDecoder(args, tgt_dict, embed_tokens, method, args.no_cross_attention)


def lift_default_limits(task: FairseqTask) -> None:
    """Takes from a task the longest source and target that fairseq gives it unasked, 1,024 tokens each.

    A limit that is given in training is one of the model too, and so is kept. One that cuts sources is left. One that
    is given later, as just 1,024, cannot be told from fairseq's.
    """
    for side, unasked in (("source", DEFAULT_MAX_SOURCE_POSITIONS), ("target", DEFAULT_MAX_TARGET_POSITIONS)):
        name = f"max_{side}_positions"
        if safe_getattr(task.cfg, name) == unasked and not safe_getattr(task.cfg, f"truncate_{side}"):
            setattr(task.cfg, name, sys.maxsize)


# Those of fairseq's `transformer`: 6 layers on each side; width 512 and 8 heads, 512 and 4, 1024 and 16.
register_model_architecture("alibi_transformer", "alibi_transformer")(legacy.base_architecture)
register_model_architecture("alibi_transformer", "alibi_transformer_iwslt_de_en")(legacy.transformer_iwslt_de_en)
register_model_architecture("alibi_transformer", "alibi_transformer_wmt_en_de_big")(legacy.transformer_wmt_en_de_big)


@register_model_architecture("alibi_transformer", "alibi_transformer_tiny")
def alibi_transformer_tiny(args: Any) -> None:
    """For CPUs: 2 layers on each side, width 128, 8 heads."""
    sizes = {"encoder_embed_dim": 128, "encoder_ffn_embed_dim": 512, "encoder_layers": 2, "decoder_layers": 2}
    options.set_defaults(args, **sizes, share_decoder_input_output_embed=True)
    legacy.base_architecture(args)
