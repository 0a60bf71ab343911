"""Checkpoints: their content, its description, and their model. Every fault is one line with the remedy."""

import contextlib
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from ..core import ALiBi, Learned, Sinusoidal
from ..core.rotary import SCALINGS
from ..models.language_model import language_model_config
from .data_folders import first_folder, load_dictionary, read_dictionary
from .errors import check_kind

#: Names of the tables of token embeddings: plain, or one for each band of an adaptive input.
EMBEDDING_TABLE = re.compile(r"(decoder|encoder\.sentence_encoder)\.embed_tokens\.(weight|embeddings\.\d+\.0\.weight)")

#: Options that decide the shapes of weights, which no override can change.
SIZE = re.compile(r"(encoder|decoder)_(layers|attention_heads|(embed|ffn_embed|input|output)_dim)")


def check_exists(path: str) -> None:
    """Raises ValueError if there is no such checkpoint."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}: name a checkpoint_best.pt or checkpoint_last.pt")


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads a checkpoint of fairseq, its state: `cfg`, `model`, `optimizer_history` and more.

    fairseq's function, as `patches.checkpoint_files` replaces it, compares checksums and runs no code of the file.
    ValueError: it is missing, damaged, no checkpoint, or could run code.
    """
    check_exists(path)
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    cfg, weights = state.get("cfg"), state.get("model")
    groups = [cfg.get(name) if OmegaConf.is_dict(cfg) else None for name in ("model", "task")]
    if not all(OmegaConf.is_dict(group) or isinstance(group, Namespace) for group in groups):
        fault = "its 'cfg' does not hold the options of a model and a task"
    elif not (isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())):
        fault = "its 'model' does not hold tensors by name"
    else:
        return state
    raise ValueError(f"{path} is no fairseq checkpoint ({fault}): name a checkpoint_best.pt or checkpoint_last.pt")


def describe_model(
    path: str, state: Optional[dict[str, Any]] = None, tasks: tuple[str, ...] = ("language_modeling",)
) -> dict[str, Any]:
    """Describes the model of a checkpoint for a result: architecture, position method, training length and more.

    `state` is its content, which is read if it is not given; ValueError if it was trained for none of fairseq's
    `tasks`.
    """
    state = state or read_checkpoint(path)
    model, task = state["cfg"]["model"], state["cfg"]["task"]
    history = state.get("optimizer_history")
    get = model.get if hasattr(model, "get") else lambda name, default=None: getattr(model, name, default)
    if (name := getattr(task, "_name", None)) not in tasks:
        raise ValueError(f"{path} was trained for '{name}', not for {' or '.join(tasks)}")
    learned = get("decoder_learned_pos") or get("encoder_learned_pos")
    method = get("position_method") or (Learned.name if learned else Sinusoidal.name)
    if method == ALiBi.name and get("alibi_encoder_bias"):
        method = f"alibi {get('alibi_encoder_bias')}{' learned' * bool(get('alibi_learned_slopes'))}"
    return {
        "checkpoint": path,
        "architecture": get("_name") or get("arch"),
        "position_method": method,
        "training_length": task.tokens_per_sample,
        "updates": history[-1]["num_updates"] if history else None,
        "seed": getattr(state["cfg"].get("common"), "seed", None),
    }


def reading_options(state: dict[str, Any]) -> dict[str, Any]:
    """The options of fairseq's task, other than its defaults, that change what a model reads or predicts."""
    task = state["cfg"]["task"]
    chosen = {
        "add_bos_token": task.get("add_bos_token", False),
        "output_dictionary_size": max(0, task.get("output_dictionary_size", -1)),
        "sample_break_mode": str(task.get("sample_break_mode") or "none"),
    }
    defaults = (False, 0, "none")
    return {name: value for (name, value), default in zip(chosen.items(), defaults) if value != default}


def describe_evaluated(
    checkpoint: str, state: dict[str, Any], overrides: dict[str, Any], tasks: tuple[str, ...] = ("language_modeling",)
) -> dict[str, Any]:
    """Describes a model as it was evaluated, with overridden options and the task options of `reading_options`.

    `state` is of the checkpoint, with the overridden options in it. ValueError: see `describe_model`, or the training
    length is no number.
    """
    description = describe_model(checkpoint, state, tasks)
    if (length := overrides.get("tokens_per_sample")) is not None:
        if type(length) is not int or length < 1:
            raise ValueError(f"--model-overrides: tokens_per_sample {length!r}: pass a whole number of at least 1")
        description["training_length"] = length
    options = ("alibi_length_scale", "rotary_scaling", "rotary_scaling_factor")
    scale, scaling, factor = (getattr(state["cfg"]["model"], name, None) for name in options)
    by_length = {"alibi_length_scale": scale} if scale == "auto" else {}
    if scaling == "dynamic_ntk" or (scaling in SCALINGS[1:] and factor == "auto"):
        by_length["rotary_scaling"] = scaling
    return {**description, **reading_options(state), **by_length}


def count_types(weights: dict[str, Tensor]) -> int:
    """Returns the number of types that a model's weights are for; 0 without a table of token embeddings."""
    return sum(len(value) for name, value in weights.items() if EMBEDDING_TABLE.fullmatch(name))


def check_dictionary(dictionary: Dictionary, data: str, path: str, state: dict[str, Any]) -> None:
    """Raises ValueError unless a checkpoint was trained with the dictionary of the folder `data`.

    Their numbers of types are compared and, if the folder that the checkpoint was trained on still exists, the types.
    """
    types = count_types(state["model"])
    if types not in (0, len(dictionary)):
        raise ValueError(
            f"{path} was trained with {types:,} types, but {data}/dict.txt has {len(dictionary):,}: name the data "
            "folder it was trained on"
        )
    trained_on = first_folder(str(state["cfg"]["task"].data)) / "dict.txt"
    if trained_on.is_file() and not trained_on.samefile(first_folder(data) / "dict.txt"):
        other = load_dictionary(trained_on)
        pairs = enumerate(zip(dictionary.symbols, other.symbols))
        number = next((number for number, (ours, theirs) in pairs if ours != theirs), None)
        if number is not None:
            raise ValueError(
                f"{data}/dict.txt is not the dictionary of {path}: type {number:,} is '{dictionary[number]}', in "
                f"{trained_on} '{other[number]}'; name the data folder it was trained on"
            )


def override_options(state: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Replaces options of the model in a checkpoint's state; raises ValueError for one that it does not have."""
    model, known = state["cfg"]["model"], language_model_config().__dataclass_fields__
    for name, value in overrides.items():
        if name not in known and not hasattr(model, name):
            raise ValueError(f"a language model has no option '{name}' to override")
        if SIZE.fullmatch(str(name)) and value != getattr(model, name, value):
            raise ValueError(f"--model-overrides: {name} {value} does not fit the weights, drop it")
        check_kind(name, value, known[name].default if name in known else getattr(model, name))
        with open_dict(model) if OmegaConf.is_config(model) else contextlib.nullcontext():
            setattr(model, name, value)
    state["args"] = None  # the options of an old checkpoint; fairseq made `cfg` of them


def load_model(
    path: str, state: dict[str, Any], data: str, overrides: Optional[dict[str, Any]] = None
) -> BaseFairseqModel:
    """Builds a checkpoint's model on the CPU for evaluation, with other options by name; ValueError if it cannot be."""
    dictionary = read_dictionary(data)
    if getattr(state["cfg"]["task"], "_name", None) == "masked_lm":
        dictionary.add_symbol("<mask>")  # as the task does
    check_dictionary(dictionary, data, path, state)
    override_options(state, overrides or {})
    state["cfg"]["task"]["data"] = data
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], state=state)
    return model.eval()
