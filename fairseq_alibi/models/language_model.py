"""The language model `alibi_lm`: fairseq's `transformer_lm` with a switch for the position method; architectures."""

import ast
import dataclasses
import logging
from typing import Any

import torch.distributed as dist
from fairseq.dataclass import FairseqDataclass
from fairseq.models import MODEL_DATACLASS_REGISTRY, register_model, register_model_architecture, transformer_lm
from fairseq.modules import AdaptiveInput, CharacterTokenEmbedder
from fairseq.tasks import FairseqTask
from hydra.core.config_store import ConfigStore
from torch import nn

from ..core.attention_setup import needs_mask
from ..core.positions import DECODER, add_registration_listener
from . import options
from .decoder import AlibiDecoder
from .generator import read_prompts_in_one_pass

logger = logging.getLogger(__name__)

OPTIONS = (options.AttentionOptions, options.DecoderOptions, options.LayerChoices)  # beside those of positions


def language_model_config() -> type[FairseqDataclass]:
    """All options of `transformer_lm`, and what this package adds for the position methods that are registered now."""
    bases = (options.position_options(DECODER), *OPTIONS, transformer_lm.TransformerLanguageModelConfig)
    return dataclasses.make_dataclass("AlibiLanguageModelConfig", [], bases=bases)


def check_whole_text(cfg: Any) -> None:
    """Raises ValueError where fairseq-eval-lm would give the loss of a share of the text, or in a wrong context."""
    # Not what `cfg` says: to the hub interface that is of the training.
    if dist.is_initialized() and dist.get_world_size() > 1 and cfg.common_eval.path:
        raise ValueError(
            "fairseq-eval-lm in several processes reports the loss of one process' share as that of the text: use "
            "fairseq-alibi evaluate under torchrun, or one process"
        )
    for option, name in (("num_shards", "--num-shards"), ("num_workers", "--num-workers")):
        number = getattr(cfg.dataset, option)
        if cfg.eval_lm.context_window > 0 and number > 1:
            raise ValueError(
                f"{name} {number} with --context-window gives windows other context than what is in front of them: "
                "drop it, or use fairseq-alibi evaluate"
            )


@register_model("alibi_lm", dataclass=language_model_config())
class AlibiLanguageModel(transformer_lm.TransformerLanguageModel):
    """A causal transformer language model without position embeddings, unless its position method adds some.

    Built with the same seed it starts from exactly the parameters of a `transformer_lm` of the same sizes.
    `--max-target-positions`, if given, limits the length of a sequence; without it there is no limit.
    """

    @classmethod
    def build_model(cls, args: Any, task: FairseqTask) -> "AlibiLanguageModel":
        """Builds the model from `args`; ValueError for options that contradict each other."""
        options.fill_in_options(args, options.position_options(DECODER), *OPTIONS)
        options.check_position_options(args, DECODER)
        options.check_decoder_options(args)
        if set(getattr(task, "targets", ["future"])) != {"future"}:
            raise ValueError("--self-target, --past-target: a causal model predicts the next token alone; drop them")
        read_prompts_in_one_pass(task)  # here, because the task that builds the model also builds the generator
        if args.decoder_layers_to_keep:
            kept, pattern = sorted(map(int, args.decoder_layers_to_keep.split(","))), args.position_layers
            args.decoder_layers = len(kept)
            args.position_layers = "".join(pattern[layer % len(pattern)] for layer in kept)
        position_method = options.position_method_of(args, DECODER)
        if "0" in args.position_layers and position_method.adds_embedding:
            raise ValueError(
                f"--position-layers {args.position_layers}: --position-method {args.position_method} adds an embedding "
                "before all layers; drop one of the two"
            )
        if needs_mask(position_method) and args.attention == "auto":
            logger.warning(
                "--position-method %s needs a mask: attention takes memory that grows with the square of the length",
                args.position_method,
            )
        embed_tokens = cls.embed_tokens(args, task)
        return cls(AlibiDecoder(args, task.target_dictionary, embed_tokens, position_method, no_encoder_attn=True))

    def prepare_for_inference_(self, cfg: Any) -> None:
        """See `BaseFairseqModel.prepare_for_inference_`; fairseq's commands call it once they know the windows."""
        check_whole_text(cfg)
        super().prepare_for_inference_(cfg)
        # The config of another task has no tokens per sample, for example in fairseq-generate --lm-path.
        if (tokens := getattr(cfg.task, "tokens_per_sample", None)) is not None:
            # fairseq-eval-lm has taken the context window off the tokens per sample by now.
            self.decoder.set_evaluation_length(tokens + cfg.eval_lm.context_window)

    @classmethod
    def embed_tokens(cls, args: Any, task: FairseqTask) -> nn.Module:
        """The token embeddings that the options ask for: character-based, adaptive or plain."""
        dictionary = task.source_dictionary
        if args.character_embeddings:
            if args.share_decoder_input_output_embed and args.adaptive_softmax_cutoff is None:
                raise ValueError(
                    "--character-embeddings are no table that the output could share: use an architecture without "
                    "--share-decoder-input-output-embed, as alibi_lm"
                )
            return CharacterTokenEmbedder(
                dictionary,
                ast.literal_eval(args.character_filters),
                args.character_embedding_dim,
                args.decoder_embed_dim,
                args.char_embedder_highway_layers,
            )
        if not args.adaptive_input:
            if args.tie_adaptive_weights:
                raise ValueError("--tie-adaptive-weights ties to the adaptive input: add --adaptive-input, or drop it")
            return cls.build_embedding(args, dictionary, args.decoder_input_dim)
        if args.share_decoder_input_output_embed and args.adaptive_softmax_cutoff is None:
            raise ValueError(
                "--share-decoder-input-output-embed shares one table, and --adaptive-input has several: drop one "
                "of them, or pass --adaptive-softmax-cutoff and --tie-adaptive-weights"
            )
        if args.adaptive_input_cutoff is None:
            raise ValueError("--adaptive-input needs --adaptive-input-cutoff, for example 20000,60000")
        if args.tie_adaptive_weights:
            for ours, theirs in (
                ("adaptive_input_factor", "adaptive_softmax_factor"),
                ("adaptive_input_cutoff", "adaptive_softmax_cutoff"),
                ("decoder_input_dim", "decoder_output_dim"),
            ):
                if getattr(args, ours) != getattr(args, theirs):
                    raise ValueError(
                        f"--tie-adaptive-weights needs equal {ours} and {theirs}, "
                        f"not {getattr(args, ours)} and {getattr(args, theirs)}"
                    )
        return AdaptiveInput(
            len(dictionary),
            dictionary.pad(),
            args.decoder_input_dim,
            args.adaptive_input_factor,
            args.decoder_embed_dim,
            [int(cutoff) for cutoff in args.adaptive_input_cutoff.split(",")],
            args.quant_noise_pq,
            args.quant_noise_pq_block_size,
        )


def refresh_config() -> None:
    """Gives fairseq the options of the model anew, after a position method was registered."""
    config = language_model_config()
    setattr(AlibiLanguageModel, "__dataclass", config)
    MODEL_DATACLASS_REGISTRY["alibi_lm"] = config
    node = config()
    node._name = "alibi_lm"
    ConfigStore.instance().store(name="alibi_lm", group="model", node=node, provider="fairseq")


add_registration_listener(refresh_config)


#: Architectures of fairseq's; the first is that of the paper's section 4.1.
ARCHITECTURES = {
    "alibi_lm_wiki103": transformer_lm.transformer_lm_baevski_wiki103,  # 16 layers, width 1024, 8 heads, adaptive, 247M
    "alibi_lm_big": transformer_lm.transformer_lm_big,  # 12 layers, width 1024, 16 heads
    "alibi_lm_gpt": transformer_lm.transformer_lm_gpt,  # 12 layers, width 768, 12 heads
}
for name, architecture in ARCHITECTURES.items():
    register_model_architecture("alibi_lm", name)(architecture)


@register_model_architecture("alibi_lm", "alibi_lm_1_3b")
def alibi_lm_1_3b(args: Any) -> None:
    """The paper's section 4.2: 25 layers, width 2048, 16 heads; with tied plain embeddings of GPT-2's BPE 1.36B.

    The paper does not say what its activation function, norms and vocabulary are: gelu, pre-norm and a BPE are ours.
    """
    sizes = {"decoder_layers": 25, "decoder_embed_dim": 2048, "decoder_ffn_embed_dim": 8192}
    options.set_defaults(args, **sizes, decoder_attention_heads=16, share_decoder_input_output_embed=True)
    options.set_defaults(args, activation_fn="gelu", dropout=0.0, decoder_normalize_before=True)
    transformer_lm.base_lm_architecture(args)


@register_model_architecture("alibi_lm", "alibi_lm_tiny")
def alibi_lm_tiny(args: Any) -> None:
    """For CPUs: 2 layers, width 128, 8 heads, tied plain embeddings."""
    sizes = {"decoder_layers": 2, "decoder_embed_dim": 128, "decoder_ffn_embed_dim": 512}
    options.set_defaults(args, **sizes, decoder_attention_heads=8, share_decoder_input_output_embed=True)
    transformer_lm.base_lm_architecture(args)
