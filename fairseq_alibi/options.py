"""Options that this package adds to fairseq's models, and their checks. Each model takes the groups that it needs."""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, open_dict

from .attention import EPSILON
from .positions import ENCODER_POSITION_METHODS, POSITION_METHODS, EncoderALiBi, PositionMethod

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
    """How a decoder knows positions."""

    alibi_heads: Optional[int] = field(
        default=None,
        metadata={"help": "number of heads with a bias, the first ones; the others have none (default: all have one)"},
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


def fill_in_options(args, options: type[FairseqDataclass]) -> None:
    """Gives `args` the defaults of those `options` that it lacks, as an older checkpoint does.

    fairseq fills in options for a model's own name only, not for those of its architectures.
    """
    with open_dict(args) if isinstance(args, DictConfig) else contextlib.nullcontext():
        for option in dataclasses.fields(options):
            if not hasattr(args, option.name):
                setattr(args, option.name, option.default)


def check_position_options(args, methods: dict[str, type[PositionMethod]]) -> None:
    """Refuses what no model of this package can have.

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


def check_encoder_options(args) -> None:
    """Refuses what an encoder of this package cannot have, see `check_position_options`."""
    check_position_options(args, ENCODER_POSITION_METHODS)
    method, form = args.position_method, args.alibi_encoder_bias
    if method != "alibi" and (form != "symmetric" or args.alibi_learned_slopes):
        option = "--alibi-learned-slopes" if args.alibi_learned_slopes else f"--alibi-encoder-bias {form}"
        raise ValueError(f"{option} is for --position-method alibi, not {method}: drop one of the two")


def encoder_position_method(args) -> PositionMethod:
    """The position method of an encoder with these options, `EncoderOptions` among them.

    Raises:
        ValueError: attention is to run without a mask, and its bias needs one; see `EncoderALiBi`.
    """
    method = ENCODER_POSITION_METHODS[args.position_method].from_options(
        args.encoder_attention_heads, args.encoder_embed_dim, args
    )
    if args.attention == "fused" and method.slopes is None:
        raise ValueError("--attention fused is for an encoder with ALiBi whose slopes are fixed: use auto")
    return method
