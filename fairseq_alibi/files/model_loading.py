"""Models of checkpoints, built for evaluation."""

import contextlib
import re
from typing import Any, Optional

from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, BaseFairseqModel
from omegaconf import OmegaConf, open_dict

from ..models.language_model import language_model_config
from .checkpoints import count_types
from .data_folders import first_folder, load_dictionary, read_dictionary
from .errors import one_line

#: Options that decide the shapes of weights, which no override can change.
SIZE = re.compile(r"(encoder|decoder)_(layers|attention_heads|(embed|ffn_embed|input|output)_dim)")


def check_dictionary(dictionary: Dictionary, data: str, path: str, state: dict[str, Any]) -> None:
    """Checks that a checkpoint was trained with the dictionary of a data folder.

    Their numbers of types are compared and, if the folder that the checkpoint was trained on still exists, the types.

    Args:
        dictionary: That of `data`.
        data: The data folder.
        path: The checkpoint.
        state: Its content.

    Raises:
        ValueError: It was trained with another dictionary.
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
    """Replaces options of the model in a checkpoint's state.

    Raises:
        ValueError: A model has no such option.
    """
    model, known = state["cfg"]["model"], language_model_config().__dataclass_fields__
    for name, value in overrides.items():
        if name not in known and not hasattr(model, name):
            raise ValueError(f"a language model has no option '{name}' to override")
        if SIZE.fullmatch(str(name)) and value != getattr(model, name, value):
            raise ValueError(f"--model-overrides: {name} {value} does not fit the weights, drop it")
        with open_dict(model) if OmegaConf.is_config(model) else contextlib.nullcontext():
            setattr(model, name, value)
    state["args"] = None  # the options of an old checkpoint; fairseq made `cfg` of them


def load_model(
    path: str, state: dict[str, Any], data: str, overrides: Optional[dict[str, Any]] = None
) -> BaseFairseqModel:
    """Builds the model of a checkpoint on the CPU, for evaluation.

    Args:
        path: The checkpoint.
        state: Its content, see `read_checkpoint`.
        data: fairseq data folder.
        overrides: Options of the model that replace those of the checkpoint, by name.

    Raises:
        ValueError: The data folder has no dictionary or another one, or the model cannot be built from its options.
    """
    dictionary = read_dictionary(data)
    if getattr(state["cfg"]["task"], "_name", None) == "masked_lm":
        dictionary.add_symbol("<mask>")  # as the task does
    check_dictionary(dictionary, data, path, state)
    override_options(state, overrides or {})
    model = state["cfg"]["model"]
    architecture = getattr(model, "_name", None) or getattr(model, "arch", None)
    if architecture not in MODEL_REGISTRY and architecture not in ARCH_MODEL_REGISTRY:
        raise ValueError(
            f"{path} cannot be loaded: its architecture is '{architecture}', which neither fairseq nor fairseq_alibi "
            "has: name another checkpoint"
        )
    state["cfg"]["task"]["data"] = data
    try:
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], state=state)
    except Exception as error:  # whatever options that do not fit raise deep inside torch or fairseq
        raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error
    return model.eval()
