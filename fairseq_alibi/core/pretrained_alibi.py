"""What the classes of an exported model have in common: the layer, loading, ties, and which arguments they refuse."""

import dataclasses
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from .adaptive import resize_rows
from .attention_inputs import AttentionInputs
from .configuration_alibi import VERSION, AlibiConfig
from .layers import Layer, checkpoint_activations

#: The outputs of this transformers, and its name of the cache.
FIELDS = [field.name for field in dataclasses.fields(CausalLMOutputWithPast)]
CACHE = "cache" if "cache" in FIELDS else "past_key_values"

#: Attention of transformers' that the model stands for; both names run the same code.
IMPLEMENTATIONS = (None, "sdpa", "eager")

#: Names of parameters in folders that were exported before the output layer left the stack.
OLD_NAMES = {r"^decoder\.output_projection\.": "lm_head.", r"^decoder\.adaptive_softmax\.": "lm_head."}


#: Arguments of packed rows that transformers' collators add for attention kernels which this model does not have.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

#: Arguments of `generate` that it passes on to the model too, and that concern the text alone.
TOKENIZERS = ("tokenizer", "assistant_tokenizer")


def refuse_arguments(arguments: dict[str, Any]) -> None:
    """Refuses arguments that the model does not have, unless they ask for nothing; ValueError names one.

    Those of `PACKING` say again what `position_ids` of one row say.
    """
    ids, lengths = arguments.pop("position_ids", None), arguments.get("cu_seq_lens_q")
    if ids is not None and lengths is not None and len(ids) == 1:
        starts = (ids[0] == 0).nonzero()[:, 0].to(lengths.device)
        if torch.equal(starts, lengths[:-1].to(starts.dtype)):
            arguments = {name: value for name, value in arguments.items() if name not in PACKING}
    for name, value in arguments.items():
        if value is not None and value is not False and name not in TOKENIZERS:
            raise ValueError(f"{name}: this model has no such argument; leave it out")


def wants_dict(config: Any, given: Optional[bool]) -> bool:
    """Whether outputs have names."""
    return bool(config.return_dict if given is None else given)


class StopStrings(StoppingCriteria):
    """Stops a text when its newest token completes one of some strings.

    That of transformers reads each token alone, where these tokens join to words by what is before them.
    """

    def __init__(self, tokenizer: Any, strings: Union[str, list[str]]):
        self.tokenizer, self.strings = tokenizer, [strings] if isinstance(strings, str) else strings

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, T) tokens -> (B,) bool, True where a text ends."""
        stops, tokens = [], 2 + max(map(len, self.strings))
        for row in input_ids[:, -tokens:].tolist():
            before, text = self.tokenizer.decode(row[:-1]), self.tokenizer.decode(row)
            stops.append(any(text.count(string) > before.count(string) for string in self.strings))
        return torch.tensor(stops, device=input_ids.device)


class AlibiLayer(Layer):
    """A layer that computes its activations again in the backward pass if `gradient_checkpointing` is set."""

    gradient_checkpointing = False

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """See `Layer.forward`."""
        if self.gradient_checkpointing and self.training and inputs.cache is None:
            return checkpoint_activations(super().forward, x, inputs)
        return super().forward(x, inputs)


class AlibiPreTrainedModel(PreTrainedModel):
    """What the stack and the language model have in common."""

    config_class = AlibiConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AlibiLayer", "AdaptiveEmbedding", "AdaptiveSoftmax"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: AlibiConfig):
        implementation = config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"attn_implementation '{implementation}': the bias of this model needs 'sdpa' or 'eager'")
        for name in ("adaptive_input_cutoff", "adaptive_softmax_cutoff"):
            ends = getattr(config, name)
            if ends is not None and ends[-1] != config.vocab_size:
                sizes = f"vocab_size {config.vocab_size}, but {name} ends with {ends[-1]}"
                raise ValueError(f"{sizes}: load the folder as it is, then call resize_token_embeddings")
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See transformers; parameters may have the names of folders that were exported before.

        With tie_word_embeddings=False the output layer of a tied folder is a copy of the embeddings; ValueError for
        bands of a tied adaptive softmax, which have the embeddings' parameters alone.
        """
        wanted = {"key_mapping": OLD_NAMES, **kwargs, "output_loading_info": True}
        loaded: Any = super().from_pretrained(*args, **wanted)
        model, report = loaded
        if any(name.startswith("lm_head.") for name in report["missing_keys"]) and not model.config.tie_word_embeddings:
            if model.config.adaptive_softmax_cutoff is None and model.config.share_decoder_input_output_embed:
                model.lm_head.weight.data.copy_(model.get_input_embeddings().weight)
            elif model.config.adaptive_softmax_cutoff is not None and model.config.tie_adaptive_weights:
                raise ValueError("tie_word_embeddings=False: the adaptive softmax of this folder is tied; leave it out")
        # transformers 5 would save under the old names again
        renamings = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in renamings if not OLD_NAMES.keys() & set(each.source_patterns)]
        return loaded if kwargs.get("output_loading_info") else model

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Makes tied parameters one again; transformers 4 knows only how to tie a plain softmax."""
        if VERSION >= (5, 0):
            super().tie_weights(*args, **kwargs)
            return
        for target, source in (self._tied_weights_keys or {}).items():
            layer = self.get_submodule(target.rpartition(".")[0])
            layer.weight = self.get_parameter(source)
            if isinstance(layer, nn.Linear):
                layer.out_features = layer.weight.size(0)

    def resize_token_embeddings(self, new_num_tokens: Optional[int] = None, *args: Any, **kwargs: Any) -> Any:
        """See transformers; the band of the rarest types changes; ValueError if it would be empty."""
        config = self.config
        cutoffs = [each for each in (config.adaptive_input_cutoff, config.adaptive_softmax_cutoff) if each is not None]
        if not cutoffs:
            return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        multiple = kwargs.get("pad_to_multiple_of") or (args[0] if args and args[0] else 1)
        types = -(-(config.vocab_size if new_num_tokens is None else new_num_tokens) // multiple) * multiple
        least = max([0, *(ends[-2] for ends in cutoffs if len(ends) > 1)])
        if types <= least:
            raise ValueError(f"{types} tokens: the vocabulary has frequent types up to {least}; keep more than those")
        modules: Any = self.get_input_embeddings(), self.get_output_embeddings()
        for module in filter(None, modules if types != config.vocab_size else ()):
            last = module.last_band() if hasattr(module, "last_band") else module
            resize_rows(last, last.weight.size(0) + types - config.vocab_size)
            if hasattr(module, "cutoff"):
                module.cutoff[-1] = types
        for ends in cutoffs:
            ends[-1] = types
        config.vocab_size = types
        self.tie_weights()
        return modules[0]
