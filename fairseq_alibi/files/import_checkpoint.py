"""Turns a checkpoint of the ALiBi authors' fairseq fork into one of `alibi_lm`.

Their `alibi_wt103_L*.pt` are checkpoints of a `transformer_lm` whose code ignored its position embeddings and added the
bias. The weights are kept as they are; the options become those of `alibi_lm`, all written out, without a longest
sequence. The result evaluates with fairseq-eval-lm at any length, and fairseq-train continues it (--restore-file) or
fine-tunes it (--finetune-from-model).
"""

import argparse
import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from omegaconf import OmegaConf

from ..core.positions import POSITION_METHODS
from ..models.language_model import AlibiLanguageModel, AlibiLanguageModelConfig
from .inputs import load_dictionary, made_up_dictionary, one_line, read_checkpoint, types_in
from .results import written_whole

#: What the fork's options and weights hold besides fairseq's: the length of its bias table, an unused embedding.
DROPPED_OPTIONS = {"max_tokens"}
DROPPED_WEIGHTS = {"decoder.embed_positions._float_tensor", "decoder.embed_positions.weights"}
#: Names under which a configuration says what it is for, beside its options.
NAMES = {"_name", "arch"}


def plain(options: Any) -> Any:
    """Options as plain dictionaries, which any loader reads."""
    if isinstance(options, Namespace):
        return dict(vars(options))
    return OmegaConf.to_container(options) if OmegaConf.is_config(options) else options


def import_options(model: Any, task: dict[str, Any], position_method: str) -> tuple[dict[str, Any], list[str]]:
    """The options of `alibi_lm` for those of an old `transformer_lm`, and the names of those that were dropped.

    Args:
        model: the old options: a plain config, or a namespace of 2021 that holds every option of the training run.
        task: options of the task, from which a model takes some.
        position_method: one of `POSITION_METHODS`.

    Raises:
        ValueError: another kind of model, or an option that neither fairseq's `transformer_lm` nor the fork has.
    """
    flat = isinstance(model, Namespace)
    old = plain(model)
    arch = old.get("_name") or old.get("arch") or "transformer_lm"
    if not str(arch).startswith("transformer_lm"):
        raise ValueError(f"its model is '{arch}', and only a transformer_lm can be imported")
    known = {field.name: field.default for field in dataclasses.fields(AlibiLanguageModelConfig)}
    dropped = sorted(set(old) - set(known) - NAMES)
    unknown = [name for name in dropped if name not in DROPPED_OPTIONS]
    if unknown and not flat:
        raise ValueError(f"its model has options that are not known: {', '.join(unknown)}")
    options = Namespace(**{name: value for name, value in old.items() if name in known})
    if arch in ARCH_CONFIG_REGISTRY:  # what fairseq has got since then takes the architecture's value
        ARCH_CONFIG_REGISTRY[arch](options)
    options = {**known, **vars(options)}
    for name, default in known.items():  # architectures put False where the config wants 0
        if isinstance(options[name], bool) and isinstance(default, int):
            options[name] = type(default)(options[name])
    options.update(_name="alibi_lm", position_method=position_method, max_target_positions=None, tpu=False)
    options.update({name: task[name] for name in ("tokens_per_sample", "add_bos_token")})
    return options, dropped


def import_weights(
    weights: dict[str, torch.Tensor], options: dict[str, Any], dictionary: Optional[Dictionary]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights of the `alibi_lm` with these options, and the names of those that were dropped.

    Raises:
        ValueError: weights are missing, left over or of another shape, or made for another dictionary.
    """
    types = types_in(weights)
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
    source: Path, target: Path, dictionary: Optional[Path] = None, position_method: str = "alibi"
) -> list[str]:
    """Writes `target`, a checkpoint of `alibi_lm`, from `source`.

    It is read with torch's safe loader, which refuses a file that could run code.

    Returns:
        The names of the options and weights that were dropped.

    Raises:
        ValueError: what is wrong with the source or the dictionary, in one line.
    """
    state = read_checkpoint(str(source))
    old_model = state["cfg"]["model"]
    cfg = {name: plain(group) for name, group in state["cfg"].items()}
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi import-checkpoint`."""
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint of the authors' fork, or of transformer_lm")
    parser.add_argument("target", metavar="OUT", type=Path, help="checkpoint of alibi_lm to write")
    parser.add_argument("--dict", type=Path, help="dict.txt of the data, to check that it fits")
    parser.add_argument(
        "--position-method", choices=list(POSITION_METHODS), default="alibi", help="what it was trained with"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def main(args: argparse.Namespace) -> None:
    """`fairseq-alibi import-checkpoint`: says what was dropped and where the result is."""
    if args.target.exists() and not args.overwrite:
        raise ValueError(f"{args.target} exists: pass --overwrite to replace it, or another name")
    if args.dict and not args.dict.is_file():
        raise ValueError(f"there is no dictionary {args.dict}: name the dict.txt of the data folder")
    for name in import_checkpoint(args.source, args.target, args.dict, args.position_method):
        print(f"dropped: {name}")
    print(f"written to {args.target}")
