"""The configuration of an exported model, see `modeling_alibi`, and the versions of transformers that run it."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Optional

import transformers
from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from .attention_inputs import EPSILON
from .methods import ALiBi
from .positions import position_methods

PADDING = 1  # the token that fairseq pads with
OLDEST, NEWEST = "4.57", "5.24"  # the oldest and the newest version of transformers that the tests run with

#: The classes of a folder, in the file that transformers puts into it.
CLASSES = {"AutoModel": "modeling_alibi.AlibiModel", "AutoModelForCausalLM": "modeling_alibi.AlibiForCausalLM"}

#: The major and minor version of transformers.
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

#: The options of the position methods with their defaults.
METHOD_OPTIONS = {
    option.name: option.default
    for method in position_methods().values()
    if method.options is not None
    for option in dataclasses.fields(method.options)
}


def check_version() -> None:
    """Warns of a transformers newer than the tested ones; ImportError for an older one."""
    oldest, newest = (tuple(int(part) for part in version.split(".")) for version in (OLDEST, NEWEST))
    tested = f"transformers {transformers.__version__}: this model is tested with {OLDEST} to {NEWEST}"
    if oldest > VERSION:
        raise ImportError(f"{tested}; pip install 'transformers>={OLDEST}'")
    if newest < VERSION:
        warnings.warn(f"{tested}; compare its results, or pip install 'transformers=={NEWEST}.*'", stacklevel=2)


def name_nested_imports(file: Path) -> None:
    """Adds the names of the files that a file's imports import: transformers 4 copies only those that it names."""
    nested = {Path(found).stem for found in get_relative_import_files(file)} - {*get_relative_imports(file), file.stem}
    if nested:
        named = "".join(f"    from .{name} import __doc__  # noqa: F401\n" for name in sorted(nested))
        file.write_text(f"{file.read_text()}\nif False:  # transformers 4 copies what is named here\n{named}")


class AlibiConfig(PretrainedConfig):
    """The options of a model, under the names that they have as options of `alibi_lm`.

    Args:
        adaptive_input_cutoff, adaptive_softmax_cutoff: lists that end with the number of types, None for plain
            embeddings and a plain softmax.
        begin_token: what the model reads where a text has `<s>`; None for `<s>` itself.
        sliding_window: number of tokens that a token attends to, the last ones, itself included; None for all.
        logits_with_labels: whether a pass with labels returns logits beside the loss.
        tie_word_embeddings: False to give input and output tables of their own, whatever the other options say.
        layout: 2; folders written before it existed do not say `tie_word_embeddings`.
    """

    model_type = "alibi_lm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012, transformers adds lists to it
    attribute_map = {  # noqa: RUF012
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "decoder_ffn_embed_dim",
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
        "score_scale": "none",
        "position_layers": "1",
        "begin_token": None,
        "sliding_window": None,
        "logits_with_labels": True,
    }

    def __init__(self, use_cache: bool = True, layout: int = 1, **kwargs: Any):
        for name, default in self.OPTIONS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.use_cache, self.layout = use_cache, 2
        shares = self.share_decoder_input_output_embed and self.adaptive_softmax_cutoff is None
        ties = bool(shares or (self.tie_adaptive_weights and self.adaptive_softmax_cutoff is not None))
        given = kwargs.pop("tie_word_embeddings", ties)
        kwargs = {"pad_token_id": PADDING, **kwargs, "tie_word_embeddings": ties and (given or layout < 2)}
        super().__init__(**kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the configuration; the code that transformers has put beside it can be loaded by transformers 4 too.

        A model's folder names both classes, where transformers would name the one that is saved.
        """
        named = getattr(self, "auto_map", None)
        if named:
            self.auto_map = {**named, **CLASSES}
        super().save_pretrained(save_directory, *args, **kwargs)
        for name in ("configuration_alibi.py", "modeling_alibi.py"):
            if (file := Path(save_directory, name)).exists():
                name_nested_imports(file)

    def tied_weights(self) -> Optional[dict[str, str]]:
        """The output parameters that are parameters of the input, by name; None for none."""
        if not self.tie_word_embeddings:
            return None
        source = "decoder.embed_tokens"
        if self.adaptive_softmax_cutoff is None:
            return {"lm_head.weight": f"{source}.weight"}
        ties = {"lm_head.head.word_proj.weight": f"{source}.embeddings.0.0.weight"}
        for band in range(1, len(self.adaptive_softmax_cutoff)):
            ties[f"lm_head.tail.{band - 1}.2.weight"] = f"{source}.embeddings.{band}.0.weight"
            if self.tie_adaptive_proj:
                ties[f"lm_head.tail.{band - 1}.0.weight"] = f"{source}.embeddings.{band}.1.weight"
        return ties


check_version()
AlibiConfig.register_for_auto_class()
