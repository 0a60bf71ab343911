"""The masked language model `alibi_masked_lm`: fairseq's RoBERTa with a position method of choice; architectures."""

import contextlib
import sys

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaEncoder, RobertaModel
from fairseq.models.roberta import base_architecture as roberta_architecture
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, open_dict

from .encoder import Encoder
from .options import EncoderOptions, check_encoder_options, encoder_position_method, fill_in_options


def check_options(args) -> None:
    """Refuses options of fairseq's `roberta` that contradict the position method or would bypass it.

    Raises:
        ValueError: names the option, the reason and the remedy.
    """
    check_encoder_options(args)
    for option in ("mha_heads_to_keep", "ffn_blocks_to_remove"):
        if safe_getattr(args, option, -1) != -1:
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name}: fairseq's pruning would give heads the bias of others; drop it")


class MaskedLanguageModelEncoder(RobertaEncoder):
    """fairseq's RoBERTa encoder and output layer, with an `Encoder` in it."""

    def build_encoder(self, args, dictionary, embed_tokens):
        position_method = encoder_position_method(args)
        # RoBERTa's tokens start as small as its learned positions, and would be lost beside sines of size 1.
        args.no_scale_embedding = position_method.embedding != "sinusoidal"
        encoder = Encoder(args, dictionary, embed_tokens, position_method)
        encoder.apply(init_bert_params)
        return encoder


@register_model("alibi_masked_lm")
class AlibiMaskedLanguageModel(RobertaModel):
    """A masked language model without position embeddings, unless its position method adds some.

    `--max-positions`, if given, limits the length of a sequence; without it there is no limit, except for learned
    positions, whose table ends with the training length.
    """

    @classmethod
    def hub_models(cls):
        """None to download: those of RoBERTa have position embeddings."""
        return {}

    @staticmethod
    def add_args(parser):
        """Adds the model's options to a parser."""
        RobertaModel.add_args(parser)
        gen_parser_from_dataclass(parser, EncoderOptions(), delete_default=True)
        parser.add_argument(
            "--checkpoint-activations",
            action="store_true",
            help="compute the activations of a layer anew in the backward pass, to save memory",
        )

    @classmethod
    def build_model(cls, args, task):
        """Builds the model from `args`, which get the defaults of what they lack.

        Raises:
            ValueError: see `check_options` and `EncoderALiBi`.
        """
        with open_dict(args) if isinstance(args, DictConfig) else contextlib.nullcontext():
            fill_in_options(args, EncoderOptions)
            check_options(args)
            args.tokens_per_sample = safe_getattr(args, "tokens_per_sample", task.cfg.tokens_per_sample)
            if safe_getattr(args, "max_positions") is None:
                args.max_positions = args.tokens_per_sample if args.position_method == "learned" else sys.maxsize
            return cls(args, MaskedLanguageModelEncoder(args, task.source_dictionary))


@register_model_architecture("alibi_masked_lm", "alibi_masked_lm")
def alibi_masked_lm(args):
    """fairseq's `roberta_base`: 12 layers, width 768, 12 heads, norms behind the parts of a layer."""
    roberta_architecture(args)


@register_model_architecture("alibi_masked_lm", "alibi_masked_lm_tiny")
def alibi_masked_lm_tiny(args):
    """For CPUs: 2 layers, width 128, 8 heads, norms in front of the parts of a layer."""
    args.encoder_layers = safe_getattr(args, "encoder_layers", 2)
    args.encoder_embed_dim = safe_getattr(args, "encoder_embed_dim", 128)
    args.encoder_ffn_embed_dim = safe_getattr(args, "encoder_ffn_embed_dim", 512)
    args.encoder_attention_heads = safe_getattr(args, "encoder_attention_heads", 8)
    args.encoder_normalize_before = safe_getattr(args, "encoder_normalize_before", True)
    roberta_architecture(args)
