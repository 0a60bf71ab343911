"""The masked language model `alibi_masked_lm`: fairseq's RoBERTa with a position method of choice; architectures."""

import contextlib
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

from fairseq.data import Dictionary
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaEncoder, RobertaHubInterface, RobertaModel
from fairseq.models.roberta import base_architecture as roberta_architecture
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from fairseq.tasks import FairseqTask
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, open_dict
from torch import nn

from ..core.positions import ENCODER, position_methods
from . import options
from .encoder import AlibiEncoder

UNKNOWN_LENGTH = 512  # the training length where no option says one; fairseq's longest sequence


class MaskedLanguageModelEncoder(RobertaEncoder):
    """fairseq's RoBERTa encoder and output layer, with an `AlibiEncoder` in it."""

    def build_encoder(self, args: Any, dictionary: Dictionary, embed_tokens: nn.Module) -> AlibiEncoder:
        """See `RobertaEncoder.build_encoder`."""
        position_method = options.position_method_of(args, ENCODER)
        # RoBERTa's tokens start as small as its learned positions, and would be lost beside positions of size 1.
        args.no_scale_embedding = not position_method.needs_scaled_tokens
        encoder = AlibiEncoder(args, dictionary, embed_tokens, position_method)
        encoder.apply(init_bert_params)
        return encoder


class HubInterface(RobertaHubInterface):
    """RoBERTa's hub interface for text whose tokens do not begin with a space."""

    def fill_mask(self, masked_input: str, topk: int = 5) -> list[tuple[str, float, str]]:
        """See `RobertaHubInterface.fill_mask`, which takes away the space that GPT-2's tokens begin with."""
        return super().fill_mask(masked_input.replace(" <mask>", "  <mask>"), topk)


@register_model("alibi_masked_lm")
class AlibiMaskedLanguageModel(RobertaModel):
    """A masked language model without position embeddings, unless its position method adds some.

    `--max-positions`, if given, limits the length of a sequence; without it there is no limit, except for learned
    positions, whose table ends with the training length.
    """

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        """None to download: those of RoBERTa have position embeddings."""
        return {}

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str = ".",
        bpe: Optional[str] = None,
        **kwargs: Any,
    ) -> RobertaHubInterface:
        """See `RobertaModel.from_pretrained`; without `bpe`, as the data folder was prepared and not as GPT-2's."""
        codes = Path(data_name_or_path) / "bpe.codes"
        if bpe is None and codes.is_file():
            bpe = "subword_nmt"
            kwargs.setdefault("bpe_codes", str(codes))
        hub = super().from_pretrained(model_name_or_path, checkpoint_file, data_name_or_path, bpe, **kwargs)
        hub = HubInterface(hub.cfg, hub.task, hub.model)
        hub.bpe = hub.bpe or SimpleNamespace(encode=str, decode=str)  # the words of the text are the tokens
        return hub

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """Adds the model's options to a parser."""
        RobertaModel.add_args(parser)
        options.add_options(parser, options.position_options(ENCODER), options.AttentionOptions)
        text = "compute the activations of a layer anew in the backward pass, to save memory"
        parser.add_argument("--checkpoint-activations", action="store_true", help=text)

    @classmethod
    def build_model(cls, args: Any, task: FairseqTask) -> "AlibiMaskedLanguageModel":
        """Builds the model from `args`, which get the defaults of what they lack; ValueError."""
        with open_dict(args) if isinstance(args, DictConfig) else contextlib.nullcontext():
            options.fill_in_options(args, options.position_options(ENCODER), options.AttentionOptions)
            options.check_position_options(args, ENCODER)
            for option in ("mha_heads_to_keep", "ffn_blocks_to_remove"):
                if safe_getattr(args, option, -1) != -1:
                    name = f"--{option.replace('_', '-')}"
                    raise ValueError(f"{name}: fairseq's pruning would give heads the bias of others; drop it")
            task_options = task.cfg or safe_getattr(task, "args")  # older tasks of fairseq have the latter
            if safe_getattr(args, "tokens_per_sample") is None:  # fine-tuning has a longest length at most
                known = (safe_getattr(task_options, name) for name in ("tokens_per_sample", "max_positions"))
                args.tokens_per_sample = next(filter(None, known), UNKNOWN_LENGTH)
            if safe_getattr(args, "max_positions") is None:
                limited = position_methods(ENCODER)[args.position_method].limited_to_training_length
                args.max_positions = args.tokens_per_sample if limited else sys.maxsize
            if isinstance(task_options, Namespace) and safe_getattr(task_options, "max_positions") is None:
                task_options.max_positions = args.max_positions  # sentence_ranking reads the model's option
            return cls(args, MaskedLanguageModelEncoder(args, task.source_dictionary))


# fairseq's `roberta_base`: 12 layers, width 768, 12 heads, norms behind the parts of a layer.
register_model_architecture("alibi_masked_lm", "alibi_masked_lm")(roberta_architecture)


@register_model_architecture("alibi_masked_lm", "alibi_masked_lm_tiny")
def alibi_masked_lm_tiny(args: Any) -> None:
    """For CPUs: 2 layers, width 128, 8 heads, norms in front of the parts of a layer."""
    sizes = {"encoder_layers": 2, "encoder_embed_dim": 128, "encoder_ffn_embed_dim": 512}
    options.set_defaults(args, **sizes, encoder_attention_heads=8, encoder_normalize_before=True)
    roberta_architecture(args)
