"""Turns a checkpoint of the ALiBi authors' fairseq fork into one of `alibi_lm`.

Their `alibi_wt103_L*.pt` are checkpoints of a `transformer_lm` whose code ignored its position embeddings and added the
bias. The weights stay as they are. The options become those of `alibi_lm`, all written out, without a longest
sequence. The result evaluates with fairseq-eval-lm at any length, and fairseq-train continues it (--restore-file) or
fine-tunes it (--finetune-from-model).
"""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from omegaconf import OmegaConf

from ..core import ALiBi
from ..models.language_model import AlibiLanguageModel, language_model_config
from .checkpoints import count_types, read_checkpoint
from .data_folders import load_dictionary, made_up_dictionary
from .errors import one_line
from .results import written_whole

#: Options and weights that only the fork has: the length of its bias table, an unused embedding.
DROPPED_OPTIONS = {"max_tokens"}
DROPPED_WEIGHTS = {"decoder.embed_positions._float_tensor", "decoder.embed_positions.weights"}
NAMES = {"_name", "arch"}  # keys of a configuration that name the model and are no options


def plain_options(options: Any) -> Any:
    """Returns options as plain dictionaries, which any loader reads."""
    if isinstance(options, Namespace):
        return dict(vars(options))
    return OmegaConf.to_container(options) if OmegaConf.is_config(options) else options


def import_options(model: Any, task: dict[str, Any], position_method: str) -> tuple[dict[str, Any], list[str]]:
    """Converts the options of an old `transformer_lm` to those of `alibi_lm`; also the names of dropped ones.

    `model` is a plain config, or a namespace of 2021 that holds every option of the training run. ValueError: another
    kind of model, or options of neither fairseq nor the fork.
    """
    flat = isinstance(model, Namespace)
    old = plain_options(model)
    arch = old.get("_name") or old.get("arch") or "transformer_lm"
    if not str(arch).startswith("transformer_lm"):
        raise ValueError(f"its model is '{arch}', and only a transformer_lm can be imported")
    known = {field.name: field.default for field in dataclasses.fields(language_model_config())}
    dropped = sorted(set(old) - set(known) - NAMES)
    unknown = [name for name in dropped if name not in DROPPED_OPTIONS]
    if unknown and not flat:
        raise ValueError(f"its model has options that are not known: {', '.join(unknown)}")
    given = Namespace(**{name: value for name, value in old.items() if name in known})
    if arch in ARCH_CONFIG_REGISTRY:  # options that fairseq has added since get the architecture's value
        ARCH_CONFIG_REGISTRY[arch](given)
    options: dict[str, Any] = {**known, **vars(given)}
    for name, default in known.items():  # architectures write False where the config needs 0
        if isinstance(options[name], bool) and isinstance(default, int):
            options[name] = type(default)(options[name])
    options.update(_name="alibi_lm", position_method=position_method, max_target_positions=None, tpu=False)
    options.update({name: task[name] for name in ("tokens_per_sample", "add_bos_token")})
    return options, dropped


def import_weights(
    weights: dict[str, torch.Tensor], options: dict[str, Any], dictionary: Optional[Dictionary]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns the weights that an `alibi_lm` with these options has, and the names of those dropped.

    ValueError: weights are missing, left over or of another shape, or made for another dictionary.
    """
    types = count_types(weights)
    if not types:
        raise ValueError("it holds no table of token embeddings")
    if dictionary is None:
        dictionary = made_up_dictionary(types)
    elif len(dictionary) != types:
        raise ValueError(f"it was trained with {types:,} types, but the dictionary has {len(dictionary):,}")
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = AlibiLanguageModel.build_model(Namespace(**options), task)
    dropped = sorted(set(weights) & DROPPED_WEIGHTS - set(model.state_dict()))
    kept = {name: value for name, value in weights.items() if name not in dropped}
    try:
        model.load_state_dict(dict(kept))
    except RuntimeError as error:  # torch lists every name, a line each
        raise ValueError(" ".join(str(error).split())) from error
    return kept, dropped


def import_checkpoint(
    source: Path, target: Path, dictionary: Optional[Path] = None, position_method: str = ALiBi.name
) -> list[str]:
    """Writes `target`, a checkpoint of `alibi_lm`; returns the names of the options and weights that were dropped."""
    state = read_checkpoint(str(source))
    old_model = state["cfg"]["model"]
    cfg = {name: plain_options(group) for name, group in state["cfg"].items()}
    try:
        options, dropped_options = import_options(old_model, cfg["task"], position_method)
        symbols = load_dictionary(dictionary) if dictionary else None
        state["model"], dropped_weights = import_weights(state["model"], options, symbols)
    except ValueError as error:
        raise ValueError(f"{source} cannot be imported: {error}") from error
    state["args"], state["cfg"] = None, {**cfg, "model": options}
    with written_whole(target) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's, in which the system's own is hidden
            raise OSError(one_line(error.__context__ or error)) from error
    return [*dropped_options, *dropped_weights]
