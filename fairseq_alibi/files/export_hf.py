"""Writes a checkpoint as a folder for Hugging Face's transformers: weights, code and tokenizer.

The folder loads without this package and without fairseq:

    model = AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(OUT, trust_remote_code=True)

transformers copies the code: `modeling_alibi`, `tokenization_alibi` and what they import from their folder. The folder
is written under a temporary name, read again, and gets its name once its log-probabilities equal those of fairseq.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from fairseq.utils import split_paths

from .. import core
from ..models.language_model import AlibiLanguageModel, language_model_config
from .checkpoints import read_checkpoint
from .data_folders import text_options
from .errors import one_line
from .import_checkpoint import plain_options
from .model_loading import load_model

#: Options that the exported model does not have, with the value that a model must have to be exported.
WITHOUT = {
    "character_embeddings": False,
    "decoder_layerdrop": 0.0,
    "quant_noise_pq": 0.0,
    "quant_noise_scalar": 0.0,
    "scale_fc": False,
    "scale_attn": False,
    "scale_heads": False,
    "scale_resids": False,
    "cpu_bf16": False,
}

#: Activation functions that the exported layers have.
ACTIVATIONS = ("relu", "gelu", "tanh")

#: Buffers of fairseq that are no weights.
NO_WEIGHTS = ("version", "_float_tensor")

#: Largest difference of a log-probability between fairseq's model and the exported one, in nats.
TOLERANCE = 1e-3


def exported_options(options: dict[str, Any], model: BaseFairseqModel) -> dict[str, Any]:
    """Returns the options of the exported model, see `modeling_alibi.AlibiConfig.OPTIONS`.

    Args:
        options: Those of the checkpoint's model.
        model: The model built from them.

    Raises:
        ValueError: The exported model does not have one of them.
    """
    from ..core.modeling_alibi import AlibiConfig

    decoder = model.decoder
    method = type(decoder.position_method)
    if method.__module__.rpartition(".")[0] != core.__name__:
        raise ValueError(
            f"--position-method {method.name}: the exported model has the methods of fairseq_alibi.core only, and this "
            f"one is of {method.__module__}"
        )
    for name, value in WITHOUT.items():
        if options.get(name, value) not in (value, None):
            raise ValueError(
                f"--{name.replace('_', '-')} {options[name]}: the exported model does not have it; if the model "
                f"computes the same without it, pass --model-overrides \"{{'{name}': {value}}}\""
            )
    if options["activation_fn"] not in ACTIVATIONS:
        raise ValueError(
            f"--activation-fn {options['activation_fn']}: the exported model has only {', '.join(ACTIVATIONS)}"
        )
    if options["alibi_length_scale"] == "auto":
        raise ValueError(
            "--alibi-length-scale auto: the exported model does not know the length of an evaluation; pass "
            "--model-overrides \"{'alibi_length_scale': '4.0'}\", with your own scale"
        )
    derived = {
        "vocab_size": len(decoder.dictionary),
        "decoder_layers": decoder.num_layers,
        "adaptive_input_cutoff": getattr(decoder.embed_tokens, "cutoff", None),
        "adaptive_softmax_cutoff": getattr(decoder.adaptive_softmax, "cutoff", None),
        "activation_dropout": options["activation_dropout"] or options["relu_dropout"],
    }
    if decoder.position_method.limited_to_training_length:
        derived["max_target_positions"] = decoder.longest
    return {**{name: options[name] for name in AlibiConfig.OPTIONS if name in options}, **derived}


def exported_weights(model: BaseFairseqModel) -> dict[str, torch.Tensor]:
    """Returns the weights of a model, each once: a shared one has the name under which the exported model holds it."""
    weights, seen = {}, set()
    for name, value in model.state_dict().items():
        if name.rsplit(".", 1)[-1] not in NO_WEIGHTS and value.data_ptr() not in seen:
            seen.add(value.data_ptr())  # the embeddings come first, and only they are shared
            weights[name] = value
    return weights


def largest_difference(exported: torch.nn.Module, model: BaseFairseqModel) -> float:
    """Returns the largest difference of log-probabilities, in nats, after tokens from all parts of the dictionary."""
    tokens = torch.linspace(4, len(model.decoder.dictionary) - 1, 48).long().view(2, 24)
    with torch.no_grad():
        ours = exported(tokens).logits.log_softmax(-1)
        theirs = model.get_normalized_probs(model(tokens), log_probs=True)
    return (ours - theirs).abs().max().item()


def export_tokenizer(dictionary: Dictionary, data: Path, out: Path) -> str:
    """Writes the tokenizer of a data folder, and returns a description of how it splits a text."""
    from ..core.tokenization_alibi import AlibiTokenizer

    options = text_options(data)
    with tempfile.TemporaryDirectory() as folder:
        types = Path(folder) / AlibiTokenizer.vocab_files_names["vocab_file"]
        types.write_bytes("\n".join(dictionary.symbols).encode())
        moses = options["tokenizer"] == "moses"
        AlibiTokenizer(str(types), options["bpe_codes"], moses).save_pretrained(out)
    return f"{'Moses tokens' if moses else 'white space'}{', BPE' if options['bpe'] else ''}"


def export(checkpoint: str, out: Path, data: str, overrides: dict[str, Any]) -> str:
    """Writes the folder `out`, whole or not at all.

    Args:
        checkpoint: A checkpoint of `alibi_lm`.
        out: The folder to make; it may exist if it is empty.
        data: fairseq data folder of the checkpoint; "" for the one that it was trained on.
        overrides: Options of the model that replace those of the checkpoint, by name.

    Returns:
        A description of what was written.

    Raises:
        ValueError: The checkpoint or a folder cannot be used, or the exported model computes something else.
    """
    from transformers import GenerationConfig

    from ..core.modeling_alibi import AlibiConfig, AlibiForCausalLM

    state = read_checkpoint(checkpoint)
    task = state["cfg"]["task"]
    data = data or split_paths(str(task["data"]))[0]
    model = load_model(checkpoint, state, data, overrides)
    if not isinstance(model, AlibiLanguageModel):
        raise ValueError(
            f"{checkpoint} is no checkpoint of alibi_lm, and only those can be exported; convert one of transformer_lm "
            f"with fairseq-alibi import-checkpoint {checkpoint} NEW --position-method sinusoidal"
        )
    defaults = {option.name: option.default for option in dataclasses.fields(language_model_config())}
    options = {**defaults, **plain_options(state["cfg"]["model"]), "tokens_per_sample": task["tokens_per_sample"]}
    exported = AlibiForCausalLM(AlibiConfig(**exported_options(options, model)))
    try:
        exported.load_state_dict(exported_weights(model))
    except RuntimeError as error:  # torch lists every name, a line each
        raise ValueError(f"{checkpoint} has weights that the exported model lacks: {one_line(error)}") from error
    end = model.decoder.dictionary.eos()
    exported.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=model.decoder.dictionary.pad()
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial-") as folder:
        partial = Path(folder) / out.name
        exported.save_pretrained(partial)
        splits = export_tokenizer(model.decoder.dictionary, Path(data), partial)
        difference = largest_difference(AlibiForCausalLM.from_pretrained(partial).eval(), model)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{checkpoint}: the exported model's log-probabilities differ from fairseq's by up to "
                f"{difference:.2g}, so nothing was written"
            )
        partial.replace(out)
    return f"tokenizer: {splits}\nlog-probabilities: those of fairseq, with differences up to {difference:.2g}"
