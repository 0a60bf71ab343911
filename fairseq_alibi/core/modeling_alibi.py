"""The language model for Hugging Face's transformers. Needs torch and transformers, no fairseq.

`fairseq-alibi export-hf` writes checkpoints for it and puts this file, and those that it imports, beside them:

    model = AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)

`AlibiModel` is the stack of layers, `AlibiForCausalLM` adds the output layer. Layers, attention and positions are those
of `layers`, `attention` and `methods`. A text begins with `</s>`, the end of the line before it, which fairseq's
models read in front of their first token.

Shapes: B batch, T new tokens, S all tokens (the last S positions), H heads, C width, V types.
"""

import copy
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax, TokenEmbedding, cross_entropies
from .attention_setup import AttentionSettings, AttentionSetup
from .configuration_alibi import PADDING, AlibiConfig
from .kept import in_transform
from .layers import LayerOptions
from .pass_inputs import GenerationCache, PassInputs
from .positions import position_methods
from .pretrained_alibi import CACHE, AlibiLayer, AlibiPreTrainedModel, StopStrings, refuse_arguments, wants_dict
from .receptive_field import stack_excess

IGNORED = -100  # the label that transformers has no loss for


class AlibiModel(AlibiPreTrainedModel):
    """Embeddings and layers, with fairseq's names for the parameters: tokens -> what the output layer reads."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: AlibiConfig):
        super().__init__(config)
        heads, width, reads = config.decoder_attention_heads, config.decoder_embed_dim, config.decoder_input_dim
        # The table is first, as what comes last goes to the disk, where transformers 4 finds no tied weight.
        adaptive, begin = config.adaptive_input_cutoff is not None, config.begin_token or 0
        self.embed_tokens: Any = (
            AdaptiveEmbedding(config.adaptive_input_cutoff, reads, config.adaptive_input_factor, width, PADDING, begin)
            if adaptive
            else TokenEmbedding(config.vocab_size, reads, PADDING, begin)
        )
        options = LayerOptions(
            ffn_dim=config.decoder_ffn_embed_dim,
            activation=config.activation_fn,
            normalize_before=config.decoder_normalize_before,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.activation_dropout,
        )
        self.position_method = position_methods()[config.position_method].from_options(heads, width, config)
        settings = AttentionSettings(
            config.attention,
            config.attention_epsilon,
            config.attention_dropout,
            score_scale=config.score_scale,
            position_layers=config.position_layers,
            training_length=config.tokens_per_sample,
        )
        self.setup = AttentionSetup(self.position_method, settings)
        self.layers = nn.ModuleList(AlibiLayer(width, heads, options, n) for n in range(config.decoder_layers))
        for number, layer in enumerate(self.layers):
            layer.self_attn.use_positions(self.position_method, settings, number)  # type: ignore[union-attr, operator]
        final_norm = config.decoder_normalize_before and not config.no_decoder_final_norm
        self.layer_norm = nn.LayerNorm(width) if final_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.embed_scale = 1.0 if config.no_scale_embedding else width**0.5
        self.project_in_dim = None if adaptive or reads == width else nn.Linear(reads, width, bias=False)
        self.embed_positions = self.position_method.position_embedding(width, config.max_target_positions, PADDING)
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        writes = config.decoder_output_dim
        narrow = writes == width or config.tie_adaptive_weights
        self.project_out_dim = None if narrow else nn.Linear(width, writes, bias=False)
        self.post_init()

    @torch.no_grad()
    def score_excess(self) -> Tensor:
        """See `stack_excess`: (layers, H)."""
        tokens = torch.arange(self.config.vocab_size, device=self.device)[:, None]
        parts = tokens.split(4096)
        read = [self.embed(x, PassInputs.read(x, None, None, None, None))[:, 0] for x in map(self.embed_tokens, parts)]
        return stack_excess(self.layers, torch.cat(read))  # type: ignore[arg-type]

    def embed(self, x: Tensor, given: PassInputs) -> Tensor:
        """(B, T, input dim) vectors of the new tokens -> (B, T, C) what the layers read; ValueError past a table."""
        x = self.embed_scale * x
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if self.embed_positions is not None:
            positions, length = given.embedding_positions(x)
            x = x + self.embed_positions(positions, length).to(x.dtype)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout(x)

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        cache_position: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Union[BaseModelOutputWithPast, tuple]:
        """(B, T) new tokens -> (B, T, C) what the output layer reads, as `last_hidden_state`.

        Args:
            attention_mask: (B, S), 0 at padding, on the left or the right; or (B, 1, T, S), True or 0 where a token
                sees another one, False or very negative where not; None for no padding.
            position_ids: (B, T). Several texts in one row, each from 0, do not see each other. Otherwise positions
                must be those that `attention_mask` and the cache tell.
            inputs_embeds: (B, T, input dim) vectors instead of tokens, as `get_input_embeddings` gives them.
            past_key_values, cache: two names for transformers' cache of the tokens before, extended.
            output_hidden_states, output_attentions: whether the layers' inputs and weights, (B, H, T, S), are wanted.
            return_dict: False for a tuple.

        ValueError names what is given or wanted and is not there.
        """
        refuse_arguments({**kwargs, "position_ids": position_ids})
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give one of them")
        if None not in (cache, past_key_values):
            raise ValueError("cache, past_key_values: two names of one thing; give one of them")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        x: Any = inputs_embeds
        if input_ids is not None:  # as the embedding does too, but peft wraps it and reads the tokens itself
            x = self.embed_tokens(input_ids.masked_fill(input_ids == 0, self.config.begin_token or 0))
        given = PassInputs.read(x, attention_mask, position_ids, cache, self.config.sliding_window)
        x = self.embed(x, given)
        kept = self.config.output_attentions if output_attentions is None else output_attentions
        inputs = self.position_method(given.attention_inputs, self.setup, x, cache, self.training, bool(kept))
        states = []
        states_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        for layer in self.layers[: self.config.decoder_layers]:  # `assistant_early_exit` wants fewer
            states.append(x)
            x = layer(x, inputs)
        for last in filter(None, (self.layer_norm, self.project_out_dim)):
            x = last(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if states_wanted else None,
            attentions=None if inputs.weights is None else tuple(inputs.weights),
            **{CACHE: cache if use_cache else None},
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class AlibiForCausalLM(AlibiPreTrainedModel, GenerationMixin):
    """A causal language model of any length, a checkpoint of fairseq's `alibi_lm`.

    Of an adaptive softmax the logits are log-probabilities of all types, which is much to compute: with
    `config.logits_with_labels` False, `forward` with labels makes them only where `logits_to_keep` is given.
    """

    def __init__(self, config: AlibiConfig):
        super().__init__(config)
        self.decoder = AlibiModel(config)
        self.lm_head: Any = None
        if config.adaptive_softmax_cutoff is None:
            self.lm_head = nn.Linear(config.decoder_output_dim, config.vocab_size, bias=False)
        else:
            self.lm_head = AdaptiveSoftmax(
                config.adaptive_softmax_cutoff,
                config.decoder_output_dim,
                config.adaptive_softmax_factor,
                config.adaptive_softmax_dropout,
                self.decoder.embed_tokens if config.tie_word_embeddings else None,
                config.tie_adaptive_proj,
            )
        self._tied_weights_keys: Any = config.tied_weights()
        self.post_init()

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None, **kwargs: Any
    ) -> Any:
        strings = generation_config.stop_strings
        if strings and tokenizer is not None:
            generation_config = copy.copy(generation_config)
            generation_config.stop_strings = None
            stopping_criteria = [*(stopping_criteria or ()), StopStrings(tokenizer, strings)]
        parent: Any = super()
        return parent._get_stopping_criteria(generation_config, stopping_criteria, tokenizer, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses what transformers would do with all texts in one row, by attention without a place for the bias."""
        raise ValueError("continuous batching needs attention without a bias; call generate with a padded batch")

    def make_cache(self) -> Any:
        """A cache for `past_key_values` that drops what no later token can see; ValueError where nothing is too far.

        See `bounded_cache`. It is for generation of a model on a CPU or one GPU, without gradients.
        """
        stack = self.decoder
        if not stack.setup.bounds_cache or stack.config.sliding_window is not None:
            raise ValueError("make_cache: only ALiBi has a reach, without sliding_window, score_scale and a mask")
        return GenerationCache(stack.score_excess, stack.setup.settings.epsilon)

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, Tensor, None] = None,
        num_items_in_batch: Union[int, Tensor, None] = None,
        return_dict: Optional[bool] = None,
        **kwargs: Any,
    ) -> Union[CausalLMOutputWithPast, tuple]:
        """Logits and, with labels, the loss. Other arguments and ValueError: see `AlibiModel.forward`.

        Args:
            labels: (B, T), as `input_ids`; the loss is of each token's prediction of the next label, -100 for none.
            logits_to_keep: the last n positions, or the positions, that logits are wanted of; 0 for all.
            num_items_in_batch: what the sum of the losses is divided by; default: their number. The Trainer of
                transformers 4 counts the first label of a row too, which nothing predicts, unless it is -100.
            return_dict: False for a tuple.
        """
        outputs = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        features = outputs.last_hidden_state
        loss = None if labels is None else self.mean_loss(features, labels, num_items_in_batch)
        logits = None
        if logits_to_keep is None and (labels is None or self.config.logits_with_labels):
            logits_to_keep = 0
        if logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(features[:, kept])
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def mean_loss(self, features: Tensor, labels: Tensor, items: Union[int, Tensor, None]) -> Tensor:
        """The loss of the labels, each predicted from the features before it: their sum by `items`, or their mean."""
        if labels.shape != features.shape[:2]:
            raise ValueError(f"labels must be (B, T) = {tuple(features.shape[:2])}, not {tuple(labels.shape)}")
        targets = labels[:, 1:].to(features.device)
        kept, adaptive = targets != IGNORED, isinstance(self.lm_head, AdaptiveSoftmax)
        if in_transform(features) and not adaptive:  # which cannot choose by value; ignored labels have a loss of 0
            features, targets = features[:, :-1].flatten(0, 1), targets.flatten()
        else:
            features, targets = features[:, :-1][kept], targets[kept]
        if adaptive:
            losses = self.lm_head.losses(features, targets)
        else:
            losses = cross_entropies(self.lm_head, features, targets, self.config.vocab_size)
        return losses.sum() / (kept.sum() if items is None else torch.as_tensor(items, device=losses.device))


AlibiModel.register_for_auto_class("AutoModel")
AlibiForCausalLM.register_for_auto_class("AutoModelForCausalLM")
