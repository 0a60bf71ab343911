"""The language model for Hugging Face's transformers. Needs torch and transformers, no fairseq.

`fairseq-alibi export-hf` writes checkpoints for it and puts this file, and those that it imports, beside them:

    model = AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)

The layers, attention and position methods are those of `layers`, `attention` and `methods`. A text begins with `</s>`,
the end of the line before it, which fairseq's models read in front of their first token.

Shapes: B batch, T new tokens, S all tokens (the last S positions), C width, V types.
"""

import dataclasses
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax, BorrowedLinear, cross_entropies
from .attention_inputs import EPSILON, AttentionInputs
from .embeddings import token_positions
from .layers import Layer, LayerOptions, checkpoint_activations
from .methods import ALiBi
from .positions import position_methods
from .transformer import Transformer

#: The token that fairseq pads with.
PADDING = 1

#: The label that transformers has no loss for.
IGNORED = -100

#: The options of the position methods with their defaults.
METHOD_OPTIONS = {
    option.name: option.default
    for method in position_methods().values()
    if method.options is not None
    for option in dataclasses.fields(method.options)
}


class AlibiConfig(PretrainedConfig):
    """The options of a model, under the names that they have as options of `alibi_lm`.

    `adaptive_input_cutoff` and `adaptive_softmax_cutoff` are lists that end with the number of types, None for plain
    embeddings and a plain softmax.
    """

    model_type = "alibi_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, transformers adds lists to it
    attribute_map = {  # noqa: RUF012
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
    }

    #: The options with their defaults.
    OPTIONS = {  # noqa: RUF012
        "vocab_size": 50264,
        "decoder_layers": 6,
        "decoder_embed_dim": 512,
        "decoder_input_dim": 512,
        "decoder_output_dim": 512,
        "decoder_ffn_embed_dim": 2048,
        "decoder_attention_heads": 8,
        "decoder_normalize_before": True,
        "no_decoder_final_norm": False,
        "layernorm_embedding": False,
        "no_scale_embedding": False,
        "activation_fn": "relu",
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "share_decoder_input_output_embed": False,
        "adaptive_input_cutoff": None,
        "adaptive_input_factor": 4.0,
        "adaptive_softmax_cutoff": None,
        "adaptive_softmax_factor": 4.0,
        "adaptive_softmax_dropout": 0.0,
        "tie_adaptive_weights": False,
        "tie_adaptive_proj": False,
        "position_method": ALiBi.name,
        **METHOD_OPTIONS,
        "tokens_per_sample": 512,
        "max_target_positions": None,
        "attention": "auto",
        "attention_epsilon": EPSILON,
    }

    def __init__(self, use_cache: bool = True, **kwargs: Any):
        for name, default in self.OPTIONS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.use_cache = use_cache
        # what is shared has one name here, and nothing is left for transformers to tie
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": PADDING, **kwargs})


class CheckpointedLayer(Layer):
    """A layer that computes its activations again in the backward pass if `gradient_checkpointing` is set."""

    gradient_checkpointing = False

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """See `Layer.forward`."""
        if self.gradient_checkpointing and self.training and inputs.cache is None:
            return checkpoint_activations(super().forward, x, inputs)
        return super().forward(x, inputs)


class ExportedDecoder(Transformer):
    """The stack with what fairseq's decoder has before and behind it, and with its names for the parameters."""

    layer_type = CheckpointedLayer
    embeds_tokens = True

    def __init__(self, config: AlibiConfig):
        heads, width = config.decoder_attention_heads, config.decoder_embed_dim
        method = position_methods()[config.position_method].from_options(heads, width, config)
        options = LayerOptions(
            ffn_dim=config.decoder_ffn_embed_dim,
            activation=config.activation_fn,
            normalize_before=config.decoder_normalize_before,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.activation_dropout,
        )
        super().__init__(config.decoder_layers, width, heads, True, method, options, config.attention)
        self.setup.settings = dataclasses.replace(self.setup.settings, epsilon=config.attention_epsilon)
        if config.no_decoder_final_norm:
            self.layer_norm = None
        self.dropout = nn.Dropout(config.dropout)
        self.embed_scale = 1.0 if config.no_scale_embedding else width**0.5
        adaptive, reads = config.adaptive_input_cutoff is not None, config.decoder_input_dim
        self.embed_tokens: Any = (
            AdaptiveEmbedding(config.adaptive_input_cutoff, reads, config.adaptive_input_factor, width, PADDING)
            if adaptive
            else nn.Embedding(config.vocab_size, reads, PADDING)
        )
        self.project_in_dim = None if adaptive or reads == width else nn.Linear(reads, width, bias=False)
        self.embed_positions = method.position_embedding(width, config.max_target_positions, PADDING)
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        self.build_output(config)

    def build_output(self, config: AlibiConfig) -> None:
        """Makes the output projection or the adaptive softmax."""
        width = config.decoder_embed_dim
        writes, tied = config.decoder_output_dim, config.tie_adaptive_weights
        self.project_out_dim = None if tied or writes == width else nn.Linear(width, writes, bias=False)
        self.adaptive_softmax: Optional[AdaptiveSoftmax] = None
        self.output_projection: Any = None
        if config.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = AdaptiveSoftmax(
                config.adaptive_softmax_cutoff,
                writes,
                config.adaptive_softmax_factor,
                config.adaptive_softmax_dropout,
                self.embed_tokens if tied else None,
                config.tie_adaptive_proj,
            )
        elif config.share_decoder_input_output_embed:
            self.output_projection = BorrowedLinear(self.embed_tokens)
        else:
            self.output_projection = nn.Linear(writes, config.vocab_size, bias=False)
        self.types = config.vocab_size

    def embed(self, tokens: Tensor, padding: Optional[Tensor], earlier: int) -> Tensor:
        """(B, T) new tokens -> (B, T, C) what the layers read.

        Args:
            tokens: int64.
            padding: (B, S) bool, True at padding; None for none.
            earlier: S - T.

        Raises:
            ValueError: a learned position that the table does not have.
        """
        x = self.embed_scale * self.embed_tokens(tokens)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if self.embed_positions is not None:
            length = earlier + tokens.size(1)
            present = tokens.new_ones(len(tokens), length, dtype=torch.bool) if padding is None else ~padding
            positions = token_positions(present, PADDING)[:, earlier:]
            x = x + self.embed_positions(positions, length).to(x.dtype)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout(x)

    def forward(self, tokens: Tensor, padding: Optional[Tensor] = None, cache: Any = None) -> Tensor:
        """(B, T) new tokens -> (B, T, C) what the output layer reads. See `Transformer.forward` and `embed`."""
        x = self.embed(tokens, padding, 0 if cache is None else cache.get_seq_length())
        x = super().forward(x, padding, cache)
        return x if self.project_out_dim is None else self.project_out_dim(x)

    def logits(self, features: Tensor) -> Tensor:
        """(B, n, C) features -> (B, n, V) scores; log-probabilities, float32, of an adaptive softmax."""
        return (self.adaptive_softmax or self.output_projection)(features)

    def losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """(n, C) features, (n,) targets -> (n,) float32 losses in nats, without a tensor of n x V elements."""
        if self.adaptive_softmax is not None:
            return self.adaptive_softmax.losses(features, targets)
        return cross_entropies(self.output_projection, features, targets, self.types)


class AlibiForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of any length, a checkpoint of fairseq's `alibi_lm`.

    Of an adaptive softmax the logits are log-probabilities of all types, which is much to compute: `forward` with
    labels makes them only where `logits_to_keep` is given, and the loss without them.
    """

    config_class = AlibiConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: AlibiConfig):
        super().__init__(config)
        self.decoder = ExportedDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings, or the adaptive input."""
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> None:
        """None: transformers has nothing to tie or resize here."""
        return

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        past_key_values: Any = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, Tensor, None] = None,
        num_items_in_batch: Union[int, Tensor, None] = None,
        return_dict: Optional[bool] = None,
        position_ids: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Union[CausalLMOutputWithPast, tuple]:
        """Logits and, with labels, the loss.

        Args:
            input_ids: (B, T) new tokens.
            attention_mask: (B, S), 0 at padding, on the left or the right; None for none.
            past_key_values: transformers' `DynamicCache` of the tokens before, extended.
            labels: (B, T), as `input_ids`; the loss is of each token's prediction of the next label, -100 for none.
            use_cache: whether a cache is wanted back; default as in the config, and not in training.
            logits_to_keep: the last n positions, or the positions, that logits are wanted of; 0 for all. Default: all,
                but with labels and an adaptive softmax none.
            num_items_in_batch: what the sum of the losses is divided by; default: their number. The Trainer of
                transformers 4 counts the first label of a row too, which nothing predicts, unless it is -100.
            return_dict: False for a tuple.
            position_ids: positions go by `attention_mask`; these must agree with it.

        Raises:
            ValueError: what is given or wanted is not there: embeddings as the input, several texts in one row, hidden
                states or attention weights.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name}: this model has no such thing; leave it out")
        if position_ids is not None and attention_mask is None and (position_ids.diff(dim=-1) != 1).any():
            raise ValueError("position_ids: several texts in one row are not kept apart; give each a row")
        cache = past_key_values
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache()
        padding = None if attention_mask is None else attention_mask == 0
        features = self.decoder(input_ids, padding, cache)
        loss = None if labels is None else self.mean_loss(features, labels, num_items_in_batch)
        logits = None
        if logits_to_keep is None and (labels is None or self.decoder.adaptive_softmax is None):
            logits_to_keep = 0
        if logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.decoder.logits(features[:, kept])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def mean_loss(self, features: Tensor, labels: Tensor, items: Union[int, Tensor, None]) -> Tensor:
        """The loss of the labels, each predicted from the features before it: their sum by `items`, or their mean."""
        targets = labels[:, 1:].to(features.device)
        kept = targets != IGNORED
        losses = self.decoder.losses(features[:, :-1][kept], targets[kept])
        return losses.sum() / (len(losses) if items is None else torch.as_tensor(items, device=losses.device))


AlibiConfig.register_for_auto_class()
AlibiForCausalLM.register_for_auto_class("AutoModelForCausalLM")
