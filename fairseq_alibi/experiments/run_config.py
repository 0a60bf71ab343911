"""The config of a training run, read as fairseq-hydra-train reads it, and checked for what the planner can plan."""

from pathlib import Path
from typing import Optional

import yaml
from fairseq.data import Dictionary
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import omegaconf_no_object_check
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data.wikitext103 import TYPES as WIKITEXT103_TYPES
from ..files.data_folders import made_up_dictionary, read_dictionary
from ..files.errors import one_line

#: Types of the vocabulary for the configs whose names begin so, where neither the data nor --types says otherwise.
TYPES = {"wikitext103": WIKITEXT103_TYPES, "alibi_1_3b": 50_264}
MOST_TYPES = 10_000_000  # more types than any corpus has; a dictionary of them would fill the memory
MOMENTS = {"nag": 1, "adam": 2}  # float32 numbers per parameter that an optimizer of fairseq keeps

#: Options that the planner does not know the memory of.
UNPLANNED = ("common.amp", "distributed_training.cpu_offload", "distributed_training.pipeline_model_parallel")

#: Options that have to be whole numbers from 1 on, with the largest value that can be planned.
SIZES = {
    "task.tokens_per_sample": 2**24,
    "dataset.required_batch_size_multiple": 2**24,
    "optimization.update_freq[0]": 2**24,
    "distributed_training.distributed_world_size": 2**24,
    "model.decoder_layers": 2**24,
    "model.decoder_embed_dim": 2**20,
    "model.decoder_ffn_embed_dim": 2**22,
    "model.decoder_attention_heads": 2**14,
}
MOST_BYTES, MOST_VALUES = 2**20, 100_000  # limits of a config file: bytes, and values after its aliases are expanded


def check_file(path: Path) -> None:
    """Raises ValueError for a config that is missing, broken, or so large that hydra would not finish reading it."""
    if not path.is_file():
        raise ValueError(f"there is no config {path}: name a YAML file of configs/")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes: name a YAML file of configs/")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
        count = count_values(root, {}) if root else 0
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    if count > MOST_VALUES:
        raise ValueError(f"{path} expands to more than {MOST_VALUES:,} values: remove its aliases")


def count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Counts the values of a YAML node after its aliases are expanded; `known` are counts by id, filled here."""
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = MOST_VALUES + 1  # a node that contains itself has no end
        known[id(node)] = 1 + sum(count_values(part, known) for part in parts)
    return known[id(node)]


def read_config(path: Path, overrides: Optional[list[str]] = None) -> DictConfig:
    """Reads a config as fairseq-hydra-train does, with defaults lists, `KEY=VALUE` overrides and fairseq's defaults.

    ValueError: there is no such file, or hydra or fairseq refuses its content.
    """
    check_file(path)
    try:
        hydra_init(path.stem)
        with initialize_config_dir(str(path.parent.resolve()), version_base="1.1"):
            cfg = compose(path.stem, overrides or [])
        add_defaults(cfg)
        with omegaconf_no_object_check():
            return DictConfig(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def find_dictionary(cfg: DictConfig, path: Path, types: Optional[int] = None) -> Dictionary:
    """Returns the dictionary of a run: a made-up one of `types`, else that of its data, else of a known size by `path`.

    Real text has fewer rare words, so with it an adaptive softmax needs more memory and FLOPs. ValueError: no known
    size.
    """
    if types is not None and types > MOST_TYPES:
        raise ValueError(f"--types {types} is more than any vocabulary has: pass at most {MOST_TYPES:,}")
    if types:
        return made_up_dictionary(types)
    if cfg.task and not OmegaConf.is_missing(cfg.task, "data") and cfg.task.data:
        return read_dictionary(cfg.task.data)
    known = next((size for name, size in TYPES.items() if path.stem.startswith(name)), None)
    if known is None:
        raise ValueError(f"{path} does not say how large its vocabulary is: pass task.data=FOLDER or --types")
    return made_up_dictionary(known)


def check_sizes(model: DictConfig, types: int) -> None:
    """Raises ValueError for what fairseq only asserts, for `python -O` drops assertions."""
    width, heads = model.decoder_embed_dim, model.decoder_attention_heads
    if width % heads:
        raise ValueError(f"the options make no model: num_heads={heads} does not divide decoder_embed_dim={width}")
    for option in ("adaptive_input_cutoff", "adaptive_softmax_cutoff"):
        cutoffs = str(model.get(option) or "")
        if any(cutoff.isdecimal() and int(cutoff) > types for cutoff in cutoffs.split(",")):
            raise ValueError(f"the options make no model: model.{option}={cutoffs} needs a vocabulary of more types")


def check_plannable(cfg: DictConfig) -> None:
    """Raises ValueError for a model or options that the planner does not know."""
    name = OmegaConf.select(cfg, "model._name")
    if name != "alibi_lm":
        hint = " (an architecture's name does not apply its sizes under hydra)" if "alibi_lm" in str(name) else ""
        raise ValueError(f"model._name is {name}: only alibi_lm can be planned{hint}")
    for option, largest in SIZES.items():
        value = OmegaConf.select(cfg, option) or 0
        if value < 1:
            raise ValueError(f"{option} is {OmegaConf.select(cfg, option)}: set it to a whole number of at least 1")
        if value > largest:
            raise ValueError(f"{option} is {value}: at most {largest:,} can be planned")
    for option in UNPLANNED:
        if OmegaConf.select(cfg, option):
            raise ValueError(f"{option} cannot be planned: switch it off with {option}=false")
    optimizer = OmegaConf.select(cfg, "optimizer._name")
    if optimizer not in MOMENTS:
        raise ValueError(f"optimizer {optimizer} cannot be planned: use {' or '.join(MOMENTS)}")
