"""Options that this package adds to fairseq's models, and their checks. Each model takes the groups that it needs."""

import contextlib
import dataclasses
import itertools
import logging
import sys
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, open_dict

from ..core.attention import EPSILON
from ..core.positions import ENCODER_POSITION_METHODS, POSITION_METHODS, EncoderALiBi, PositionMethod

logger = logging.getLogger(__name__)

#: How attention is computed, see the option.
ATTENTION = ("auto", "mask", "fused")


@dataclass
class PositionOptions(FairseqDataclass):
    """How a model knows positions, and attends with them."""

    position_method: ChoiceEnum(list(POSITION_METHODS)) = field(
        default="alibi", metadata={"help": "how the model knows the positions of its tokens"}
    )
    alibi_max_bias: float = field(
        default=8.0,
        metadata={"help": "exponent range of the ALiBi slopes, which lie between 1 and 2 ** -alibi_max_bias"},
    )
    alibi_length_scale: str = field(
        default="1.0",
        metadata={
            "help": "divides the ALiBi slopes, to reach further than in training; to be overridden at evaluation: a "
            "number, or auto for evaluation length over training length"
        },
    )
    attention: ChoiceEnum(list(ATTENTION)) = field(
        default="auto",
        metadata={
            "help": "mask: the bias folded into the mask, the reference; fused: no mask, so that memory and, "
            "past the reach of the heads, time per token do not grow with the length; auto: the faster one"
        },
    )
    attention_epsilon: float = field(
        default=EPSILON,
        metadata={
            "help": "weight, of 1 for all keys of a query, that fused attention skips for their distance; 0: skip none"
        },
    )


@dataclass
class DecoderOptions(FairseqDataclass):
    """How a model with a decoder knows positions there, and how it computes."""

    alibi_heads: Optional[int] = field(
        default=None,
        metadata={
            "help": "number of heads of the decoder with a bias, the first ones; the others have none (default: all "
            "have one)"
        },
    )
    cpu_bf16: bool = field(
        default=False,
        metadata={
            "help": "run matrix products in bfloat16 on a CPU that is faster so; what is on a GPU stays as it is"
        },
    )


@dataclass
class EncoderOptions(PositionOptions):
    """How a model with an encoder knows positions."""

    position_method: ChoiceEnum(list(ENCODER_POSITION_METHODS)) = field(
        default="alibi", metadata=dict(PositionOptions.__dataclass_fields__["position_method"].metadata)
    )
    alibi_encoder_bias: ChoiceEnum(list(EncoderALiBi.FORMS)) = field(
        default="symmetric",
        metadata={
            "help": "the bias for keys on both sides: symmetric: that of the distance; one_sided: half of the heads "
            "see what is before, half what is after; two_slopes: each head has a slope for either side"
        },
    )
    alibi_learned_slopes: bool = field(default=False, metadata={"help": "learn the slopes of two_slopes"})


def fill_in_options(args, *groups: type[FairseqDataclass]) -> None:
    """Gives `args` the defaults of those options of the groups that it lacks, as an older checkpoint does.

    fairseq fills in options for a model's own name only, not for those of its architectures.
    """
    with open_dict(args) if isinstance(args, DictConfig) else contextlib.nullcontext():
        for option in itertools.chain.from_iterable(map(dataclasses.fields, groups)):
            if not hasattr(args, option.name):
                setattr(args, option.name, option.default)


def check_position_options(args, methods: dict[str, type[PositionMethod]]) -> None:
    """Refuses what no model of this package can have, or not on this machine.

    Args:
        args: the model's options, a namespace or fairseq config.
        methods: position methods that the model can have, by name.

    Raises:
        ValueError: names the option, the reason and the remedy.
    """
    if args.position_method not in methods:
        raise ValueError(f"--position-method {args.position_method}: choose one of {', '.join(methods)}")
    if args.attention not in ATTENTION:
        raise ValueError(f"--attention {args.attention}: choose one of {', '.join(ATTENTION)}")
    if not 0 <= args.attention_epsilon < 1:
        raise ValueError(f"--attention-epsilon must be at least 0 and below 1, not {args.attention_epsilon}")
    if safe_getattr(args, "quant_noise_scalar") and not torch.cuda.is_available():
        raise ValueError("--quant-noise-scalar: fairseq's scalar quantization noise needs a GPU; drop it")
    fairscale = sys.modules.get("fairscale.nn.wrap.auto_wrap")
    if fairscale and fairscale.ConfigAutoWrap.in_autowrap_context and not torch.cuda.is_available():
        raise ValueError("--ddp-backend fully_sharded: fairscale shards on GPUs only, and here is none; use legacy_ddp")


def check_encoder_options(args) -> None:
    """Refuses what an encoder of this package cannot have, see `check_position_options`."""
    check_position_options(args, ENCODER_POSITION_METHODS)
    method, form = args.position_method, args.alibi_encoder_bias
    if method != "alibi" and (form != "symmetric" or args.alibi_learned_slopes):
        option = "--alibi-learned-slopes" if args.alibi_learned_slopes else f"--alibi-encoder-bias {form}"
        raise ValueError(f"{option} is for --position-method alibi, not {method}: drop one of the two")


def check_decoder_options(args) -> None:
    """Refuses what a model with a decoder of this package cannot have, on either side of it.

    Raises:
        ValueError: names the option, the reason and the remedy.
    """
    method = args.position_method
    if args.no_token_positional_embeddings and POSITION_METHODS[method].embedding:
        raise ValueError(
            f"--no-token-positional-embeddings contradicts --position-method {method}: "
            "use --position-method none for a model without position information"
        )
    if safe_getattr(args, "base_layers"):
        raise ValueError("--base-layers: fairseq 0.12.2 was released without the C++ sources that they need; drop it")
    for side in ("encoder", "decoder"):
        if safe_getattr(args, f"{side}_learned_pos"):
            raise ValueError(
                f"--{side}-learned-pos: drop it; {method} is the position method, --position-method learned has a table"
            )
        if safe_getattr(args, f"{side}_xformers_att_config"):
            raise ValueError(
                f"--{side}-xformers-att-config: xFormers' attention takes no bias per head; drop the option, "
                "attention runs through PyTorch's fused kernels already"
            )


def encoder_position_method(args) -> PositionMethod:
    """The position method of an encoder with these options, `EncoderOptions` among them.

    Raises:
        ValueError: attention is to run without a mask, and its bias needs one; see `EncoderALiBi`.
    """
    method = ENCODER_POSITION_METHODS[args.position_method].from_options(
        args.encoder_attention_heads, args.encoder_embed_dim, args
    )
    if args.attention == "fused" and not method.has_relative_bias:
        raise ValueError("--attention fused is for an encoder with ALiBi: use auto")
    return method


def decoder_position_method(args) -> PositionMethod:
    """The position method of a decoder with these options, `PositionOptions` and `DecoderOptions` among them.

    Raises:
        ValueError: its bias needs a mask, and attention is to run without; see `alibi_slopes`.
    """
    name = args.position_method
    method = POSITION_METHODS[name].from_options(args.decoder_attention_heads, args.decoder_embed_dim, args)
    if method.needs_mask and args.attention == "fused":
        raise ValueError(f"--attention fused: the bias of --position-method {name} needs a mask; use auto")
    if method.needs_mask and args.attention == "auto":
        logger.warning(
            "--position-method %s needs a mask: attention takes memory that grows with the square of the length", name
        )
    return method
