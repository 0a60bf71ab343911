"""fairseq data folders: dictionaries, subsets and text options. Every fault is one line with the remedy."""

import json
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.data import Dictionary, FairseqDataset, data_utils
from torch import Tensor

from .errors import one_line


def first_folder(data: str) -> Path:
    """Returns the first of data folders with colons between them: that of the dictionary and of evaluation."""
    return Path(utils.split_paths(data)[0] if data else "")


def read_dictionary(data: str) -> Dictionary:
    """Reads the dictionary of a data folder; raises ValueError if there is none."""
    path = first_folder(data) / "dict.txt"
    if not path.is_file():
        raise ValueError(f"there is no {path}: name the data folder the model was trained on")
    return load_dictionary(path)


def load_dictionary(path: Path) -> Dictionary:
    """Reads a dict.txt; raises ValueError if it is none."""
    try:
        return Dictionary.load(str(path))
    except Exception as error:  # fairseq raises many kinds
        raise ValueError(f"{path} is no dictionary of fairseq ({one_line(error)})") from error


def made_up_dictionary(types: int) -> Dictionary:
    """Makes up a dictionary of so many types, special ones included, whose counts follow Zipf's law: 1 / rank."""
    dictionary = Dictionary()
    if types <= len(dictionary):
        raise ValueError(f"{types} types are no vocabulary, {len(dictionary)} of which are special: name a larger size")
    for rank in range(1, types - len(dictionary) + 1):
        dictionary.add_symbol(f"type{rank}", n=10**9 // rank)
    return dictionary


def read_preparation(data: Path) -> dict[str, Any]:
    """Reads what prepare-text records in a data folder: `settings`, `counts` and more; {} without a record."""
    path = data / "prepared.json"
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        return {**record, "settings": dict(record.get("settings", {})), "counts": dict(record.get("counts", {}))}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)}): prepare the folder anew") from error


def text_options(data: Path) -> dict[str, Any]:
    """Returns fairseq's options for the tokenizer and BPE of a data folder; None for none."""
    codes, model, settings = data / "bpe.codes", data / "sentencepiece.model", read_preparation(data)["settings"]
    tokenizer = settings.get("tokenizer", "moses" if codes.is_file() else None)
    options: dict[str, Any] = {"tokenizer": tokenizer if tokenizer == "moses" else None, "bpe": None, "bpe_codes": None}
    if codes.is_file():
        options.update(bpe="subword_nmt", bpe_codes=str(codes))
    elif model.is_file():
        options.update(bpe="sentencepiece", sentencepiece_model=str(model))
    if options["tokenizer"] and "language" in settings:
        options.update(source_lang=settings["language"], target_lang=settings["language"])
    for name, option in (("escape", "moses_no_escape"), ("dash_splits", "moses_no_dash_splits")):
        if options["tokenizer"] and name in settings:
            options[option] = not settings[name]
    return options


def open_subset(data: str, subset: str) -> FairseqDataset:
    """Opens a subset of a data folder as fairseq's dataset of sentences; ValueError for a missing or broken one."""
    folder = first_folder(data)
    path = folder / subset
    raw = not path.with_name(f"{path.name}.idx").exists() and (folder / "dict.txt").is_file()
    dictionary = read_dictionary(data) if raw else None  # raw text is read with it
    dataset = data_utils.load_indexed_dataset(str(path), dictionary) if subset else None  # see `patches.data`
    if dataset is None:
        present = sorted(path.stem for pattern in ("*.idx", "*.None-None") for path in folder.glob(pattern))
        raise ValueError(f"{data} holds no subset '{subset}' (it holds {', '.join(present) or 'none'}): pass --subset")
    return dataset


def subset_tokens(data: str, subset: str) -> int:
    """Counts the tokens in a subset, end-of-sentence tokens included; raises as `open_subset` does."""
    dataset = open_subset(data, subset)  # has to live while its sizes are read, as they are mapped from its file
    return int(dataset.sizes.sum())


def read_subset(data: str, subset: str) -> Tensor:
    """Reads all tokens of a subset, sentence after sentence, each with its end-of-sentence token: (N,) int32."""
    dataset = open_subset(data, subset)
    try:
        return torch.cat([dataset[n].int() for n in range(len(dataset))])
    except Exception as error:  # numpy raises it for an offset past the end
        raise ValueError(
            f"{first_folder(data) / subset}.idx points to places that its .bin does not have: prepare the folder anew "
            f"({one_line(error)})"
        ) from error
