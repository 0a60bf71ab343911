"""Options that this package adds to fairseq's models, and their checks. Each model takes the groups that it needs."""

import contextlib
import dataclasses
import itertools
import typing
from argparse import ArgumentParser
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, open_dict

from ..core.attention_inputs import EPSILON
from ..core.attention_setup import KERNEL_CHOICES, SCORE_SCALES, AttentionSettings, needs_mask
from ..core.methods import ALiBi
from ..core.positions import DECODER, ENCODER, PositionMethod, option_field, position_methods

MOST_LAYERS = 10_000  # of a stack


@dataclass
class AttentionOptions(FairseqDataclass):
    """How attention is computed."""

    attention: ChoiceEnum(list(KERNEL_CHOICES)) = option_field(  # type: ignore[valid-type]
        KERNEL_CHOICES[0],
        "mask: the bias folded into the mask, the reference; fused: no mask, so that memory is linear in "
        "the length and time per token grows slowly with it; auto: the faster one",
    )
    attention_epsilon: float = option_field(
        EPSILON, "weight, of 1 for all keys of a query, that fused attention skips for their distance; 0: skip none"
    )


@dataclass
class DecoderOptions(FairseqDataclass):
    """How a model with a decoder computes."""

    cpu_bf16: bool = option_field(
        False, "run matrix products in bfloat16 on a CPU that is faster so; what is on a GPU stays as it is"
    )


@dataclass
class LayerChoices(FairseqDataclass):
    """Options of language models that go with any position method."""

    score_scale: ChoiceEnum(list(SCORE_SCALES)) = option_field(  # type: ignore[valid-type]
        SCORE_SCALES[0],
        "ssmax: scores times s ln n for n visible keys, s learned; log_n: times ln n / ln(tokens per "
        "sample) for larger n, which is meant for evaluation",
    )
    position_layers: str = option_field(
        "1",
        "layers with the position method, as ones and zeros that are repeated: 1110 for all but every "
        "fourth; log_n then scales in the others alone",
    )


def position_options(*stacks: str) -> type[FairseqDataclass]:
    """A dataclass of `position_method` and the options of all methods registered now that every one of `stacks` has."""
    names = [name for name in position_methods(stacks[0]) if all(name in position_methods(stack) for stack in stacks)]
    choice = field(default=ALiBi.name, metadata={"help": "how the model knows the positions of its tokens"})
    fields: dict[str, tuple] = {"position_method": ("position_method", ChoiceEnum(names), choice)}
    for method in itertools.chain.from_iterable(position_methods(stack).values() for stack in stacks):
        types = {} if method.options is None else typing.get_type_hints(method.options)
        for option in method_options(method):
            choices = option.metadata.get("choices")
            kind = types[option.name] if choices is None else ChoiceEnum(list(choices))
            copy = field(default=option.default, metadata=dict(option.metadata))
            fields.setdefault(option.name, (option.name, kind, copy))
    return dataclasses.make_dataclass("PositionOptions", fields.values(), bases=(FairseqDataclass,))


def method_options(method: type[PositionMethod]) -> tuple[dataclasses.Field, ...]:
    """The fields of a position method's own options."""
    return () if method.options is None else dataclasses.fields(method.options)


def add_options(parser: ArgumentParser, *groups: type[FairseqDataclass]) -> None:
    """Adds groups of options to the parser of a model that has no dataclass for all of its options."""
    for group in groups:
        gen_parser_from_dataclass(parser, group(), delete_default=True)


def fill_in_options(args: Any, *groups: type[FairseqDataclass]) -> None:
    """Gives `args` the defaults of those options of the groups that it lacks, as an older checkpoint does.

    fairseq fills in options for a model's own name only, not for those of its architectures.
    """
    with open_dict(args) if isinstance(args, DictConfig) else contextlib.nullcontext():
        for option in itertools.chain.from_iterable(map(dataclasses.fields, groups)):
            if not hasattr(args, option.name):
                setattr(args, option.name, option.default)


def set_defaults(args: Any, **defaults: Any) -> None:
    """Gives `args` the values of an architecture for the options that it lacks."""
    for name, value in defaults.items():
        setattr(args, name, safe_getattr(args, name, value))


def check_position_options(args: Any, *stacks: str) -> None:
    """Rejects options that no model with these stacks can have, or that cannot work on this machine: ValueError."""
    name = args.position_method
    for stack in stacks:
        if (layers := getattr(args, f"{stack}_layers")) > MOST_LAYERS:
            raise ValueError(f"--{stack}-layers {layers}: a model has at most {MOST_LAYERS:,}, pass fewer")
        if name not in position_methods(stack):
            raise ValueError(
                f"--position-method {name}: choose one of {', '.join(position_methods(stack))}, or name the folder "
                "that registers it with --user-dir"
            )
    for dropout in ("dropout", "attention_dropout", "activation_dropout", "relu_dropout"):
        if not 0 <= (safe_getattr(args, dropout) or 0) <= 1:
            raise ValueError(f"--{dropout.replace('_', '-')} {getattr(args, dropout)}: pass a probability from 0 to 1")
    if args.attention not in KERNEL_CHOICES:
        raise ValueError(f"--attention {args.attention}: choose one of {', '.join(KERNEL_CHOICES)}")
    if not 0 <= args.attention_epsilon < 1:
        raise ValueError(f"--attention-epsilon must be at least 0 and below 1, not {args.attention_epsilon}")
    owners = defaultdict(set)
    for method in itertools.chain.from_iterable(position_methods(stack).values() for stack in stacks):
        for option in method_options(method):
            owners[option.name, option.default].add(method.name)
    for (option_name, default), having in owners.items():
        value = safe_getattr(args, option_name, default)
        if name not in having and value != default:
            raise ValueError(
                f"--{option_name.replace('_', '-')} {value} is for --position-method {' or '.join(sorted(having))}, "
                f"not {name}: drop one of the two"
            )
    if safe_getattr(args, "quant_noise_scalar") and not torch.cuda.is_available():
        raise ValueError("--quant-noise-scalar: fairseq's scalar quantization noise needs a GPU; drop it")


def check_decoder_options(args: Any) -> None:
    """Rejects, on either side, what a model with a decoder of this package cannot have: ValueError."""
    name = args.position_method
    if args.no_token_positional_embeddings and position_methods(DECODER)[name].adds_embedding:
        without = [
            other
            for other, method in position_methods(DECODER).items()
            if not (method.adds_embedding or method.rotates or method.scales_queries or method.bias_kind != "none")
        ]
        raise ValueError(
            f"--no-token-positional-embeddings contradicts --position-method {name}: use --position-method "
            f"{' or '.join(without)} for a model without position information"
        )
    longest = safe_getattr(args, "max_target_positions", None)
    if longest is not None and (type(longest) is not int or longest < 0):
        raise ValueError(f"--max-target-positions {longest!r}: pass a whole number, or drop it")
    if safe_getattr(args, "base_layers"):
        raise ValueError("--base-layers: fairseq 0.12.2 was released without the C++ sources that they need; drop it")
    tables = [other for other, method in position_methods(DECODER).items() if method.limited_to_training_length]
    for side in ("encoder", "decoder"):
        if safe_getattr(args, f"{side}_learned_pos"):
            raise ValueError(
                f"--{side}-learned-pos: drop it; {name} is the position method, --position-method "
                f"{' or '.join(tables)} has a table"
            )
        if safe_getattr(args, f"{side}_xformers_att_config"):
            raise ValueError(
                f"--{side}-xformers-att-config: xFormers' attention takes no bias per head; drop the option, "
                "attention runs through PyTorch's fused kernels already"
            )


def position_method_of(args: Any, stack: str) -> PositionMethod:
    """The position method of a stack, `DECODER` or `ENCODER`; ValueError if --attention excludes its mask."""
    heads, width = getattr(args, f"{stack}_attention_heads"), getattr(args, f"{stack}_embed_dim")
    method = position_methods(stack)[args.position_method].from_options(heads, width, args)
    impossible = needs_mask(method) or (stack == ENCODER and not method.has_distance_bias)
    if impossible and args.attention == "fused":
        raise ValueError(f"--attention fused: an {stack} with --position-method {method.name} needs a mask; use auto")
    return method


def attention_settings(args: Any, causal: bool) -> AttentionSettings:
    """How the attention of a stack with these options is computed."""
    choices = {name: value for name in ("score_scale", "position_layers") if (value := safe_getattr(args, name))}
    given = args.attention, args.attention_epsilon, args.attention_dropout, causal
    return AttentionSettings(*given, training_length=args.tokens_per_sample, **choices)
