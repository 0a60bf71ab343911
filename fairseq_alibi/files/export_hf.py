"""Writes a checkpoint as a folder for Hugging Face's transformers: weights, code and tokenizer.

The folder loads without this package and without fairseq:

    model = AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(OUT, trust_remote_code=True)

transformers copies the code: `modeling_alibi`, `tokenization_alibi` and what they import from their folder. The folder
is written under a temporary name, read again, and gets its name once its log-probabilities equal those of fairseq.
"""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from fairseq import tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.models import BaseFairseqModel
from fairseq.utils import split_paths
from safetensors import SafetensorError

from .. import core
from ..models.language_model import AlibiLanguageModel, language_model_config
from .checkpoints import load_model, read_checkpoint
from .data_folders import text_options
from .errors import one_line
from .import_checkpoint import plain_options
from .results import naming

#: Options that the exported model does not have, with the value that a model must have to be exported.
WITHOUT = {
    **dict.fromkeys(("decoder_layerdrop", "quant_noise_pq", "quant_noise_scalar"), 0.0),
    **dict.fromkeys(("character_embeddings", "scale_fc", "scale_attn", "scale_heads", "scale_resids"), False),
    "cpu_bf16": False,
}

ACTIVATIONS = ("relu", "gelu", "tanh")  # activation functions that the exported layers have
NO_WEIGHTS = ("version", "_float_tensor")  # buffers of fairseq that are no weights
TOLERANCE = 1e-3  # largest difference of a log-probability between fairseq's model and the exported one, in nats


def exported_options(options: dict[str, Any], model: BaseFairseqModel) -> dict[str, Any]:
    """Returns the options of the exported model, see `AlibiConfig.OPTIONS`; ValueError for what it does not have."""
    from ..core.configuration_alibi import AlibiConfig

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
    if (activation := options["activation_fn"]) not in ACTIVATIONS:
        raise ValueError(f"--activation-fn {activation}: the exported model has only {', '.join(ACTIVATIONS)}")
    scaling, factor = options["rotary_scaling"], options["rotary_scaling_factor"]
    if scaling == "dynamic_ntk" or (scaling != "none" and factor == "auto"):
        raise ValueError(
            f"--rotary-scaling {scaling} with the factor {factor}: the exported model does not know the length of an "
            "evaluation; pass --model-overrides \"{'rotary_scaling': 'yarn', 'rotary_scaling_factor': '4.0'}\""
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
    from ..core.pretrained_alibi import OLD_NAMES

    weights, seen = {}, set()
    for name, value in model.state_dict().items():
        if name.rsplit(".", 1)[-1] not in NO_WEIGHTS and value.data_ptr() not in seen:
            seen.add(value.data_ptr())  # the embeddings come first, and only they are shared
            for fairseqs, ours in OLD_NAMES.items():
                name = re.sub(fairseqs, ours, name)
            weights[name] = value
    return weights


def largest_difference(exported: torch.nn.Module, model: BaseFairseqModel) -> float:
    """Returns the largest difference of log-probabilities, in nats, after tokens from all parts of the dictionary."""
    tokens = torch.linspace(4, len(model.decoder.dictionary) - 1, 48).long().view(2, 24)
    with torch.no_grad():
        ours = exported(tokens).logits.log_softmax(-1)
        theirs = model.get_normalized_probs(model(tokens), log_probs=True)
    return (ours - theirs).abs().max().item()


def check_texts(folder: Path, model: BaseFairseqModel, cfg: Any) -> None:
    """Raises ValueError unless the exported model gives texts the ids, scores and continuations of fairseq.

    `cfg` is fairseq's configuration, with the tokenizer and BPE of the data.
    """
    from ..core.modeling_alibi import AlibiForCausalLM
    from ..core.tokenization_alibi import AlibiTokenizer

    exported, tokenizer = AlibiForCausalLM.from_pretrained(folder).eval(), AlibiTokenizer.from_pretrained(folder)
    hub = GeneratorHubInterface(cfg, tasks.setup_task(cfg.task), [model])
    text = " ".join([word for word in hub.src_dict.symbols[4:] if word.isalnum()][:12] or ["a"])
    scores = hub.score(text)["positional_scores"]
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        log_probs = exported(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    if len(log_probs) != len(scores) or not (log_probs - scores).abs().max() <= TOLERANCE:
        raise ValueError(f"the exported model and fairseq score the text '{text}' differently, so nothing was written")
    longest = min(len(ids[0]) + 8, model.max_positions())
    continued = exported.generate(ids, max_length=longest, do_sample=False, eos_token_id=None, suppress_tokens=[0, 1])
    read = continued.masked_fill(continued == 0, exported.config.begin_token or 0)
    theirs = model.get_normalized_probs(model(read), log_probs=True)[0, len(ids[0]) - 1 : -1]
    theirs[:, :2] = -torch.inf  # beginning and padding, which fairseq would not read as text
    chosen = theirs.gather(1, continued[0, len(ids[0]) :, None])[:, 0]
    if len(chosen) and not (theirs.amax(1) - chosen).max() <= 2 * TOLERANCE:
        raise ValueError(f"the exported model continues the text '{text}' in another way, so nothing was written")


def export_tokenizer(dictionary: Dictionary, data: Path, out: Path) -> str:
    """Writes the tokenizer of a data folder, and returns a description of how it splits a text."""
    from ..core.tokenization_alibi import AlibiTokenizer

    options = text_options(data)
    if options["bpe"] == "sentencepiece":
        raise ValueError(f"{data} was prepared with --tokenizer sentencepiece, which the exported tokenizer has not")
    with tempfile.TemporaryDirectory() as folder:
        types = Path(folder) / AlibiTokenizer.vocab_files_names["vocab_file"]
        types.write_bytes("\n".join(dictionary.symbols).encode())
        moses = options["tokenizer"] == "moses"
        language = options.get("source_lang", "en")
        rules = {"escape": not options.get("moses_no_escape"), "dash_splits": not options.get("moses_no_dash_splits")}
        tokenizer = AlibiTokenizer(str(types), options["bpe_codes"], moses, language=language, **rules)
        tokenizer.save_pretrained(out)
    return f"{'Moses tokens' if moses else 'white space'}{', BPE' if options['bpe'] else ''}"


def export(checkpoint: str, out: Path, data: str, overrides: dict[str, Any]) -> str:
    """Writes the folder `out`, whole or not at all, and returns a description of it.

    `data` is the data folder of the checkpoint, "" for the one that it was trained on; `overrides` replace its options
    by name. ValueError: it is no `alibi_lm`, a folder cannot be used, or the exported model computes something else.
    """
    from transformers import GenerationConfig

    from ..core.configuration_alibi import AlibiConfig
    from ..core.modeling_alibi import AlibiForCausalLM

    state = read_checkpoint(checkpoint)
    task = state["cfg"]["task"]
    data = data or split_paths(str(task["data"]))[0]
    model = load_model(checkpoint, state, data, overrides)
    if not isinstance(model, AlibiLanguageModel):
        raise ValueError(
            f"{checkpoint} is no checkpoint of alibi_lm, and only those can be exported; convert one of transformer_lm "
            f"with fairseq-alibi import-checkpoint {checkpoint} NEW --position-method sinusoidal"
        )
    if (size := task.get("output_dictionary_size", -1)) >= 0:
        raise ValueError(f"--output-dictionary-size {size}: an exported model can predict every type that it reads")
    defaults = {option.name: option.default for option in dataclasses.fields(language_model_config())}
    options = {**defaults, **plain_options(state["cfg"]["model"]), "tokens_per_sample": task["tokens_per_sample"]}
    begin = None if task.get("add_bos_token") else model.decoder.dictionary.eos()
    exported = AlibiForCausalLM(AlibiConfig(**exported_options(options, model), begin_token=begin))
    missing, unexpected = exported.load_state_dict(exported_weights(model), strict=False)
    different = [*unexpected, *(set(missing) - set(exported._tied_weights_keys or ()))]
    if different:
        raise ValueError(f"{checkpoint} and the exported model have different weights: {', '.join(different[:3])}")
    dictionary = model.decoder.dictionary
    special = {"bos_token_id": dictionary.bos(), "eos_token_id": dictionary.eos(), "pad_token_id": dictionary.pad()}
    exported.generation_config = GenerationConfig(**special)
    with naming(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial-") as folder:
        partial = Path(folder) / out.name
        try:
            exported.save_pretrained(partial)
        except SafetensorError as error:  # what the system said, of a full disk for example
            raise OSError(one_line(error)) from error
        splits = export_tokenizer(dictionary, Path(data), partial)
        difference = largest_difference(AlibiForCausalLM.from_pretrained(partial).eval(), model)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{checkpoint}: the exported model's log-probabilities differ from fairseq's by up to "
                f"{difference:.2g}, so nothing was written"
            )
        overwrite_args_by_name(state["cfg"], text_options(Path(data)))
        check_texts(partial, model, state["cfg"])
        partial.replace(out)
    return f"tokenizer: {splits}\nlog-probabilities: those of fairseq, with differences up to {difference:.2g}"
