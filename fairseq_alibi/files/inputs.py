"""What a command is given: checkpoints and data folders, read safely, every fault one line that names the remedy."""

import contextlib
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.data_utils import load_indexed_dataset
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.models import BaseFairseqModel
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from ..models.language_model import AlibiLanguageModelConfig

#: Names of the tables of token embeddings: plain, or one for each band of an adaptive input.
EMBEDDING_TABLE = re.compile(r"(decoder|encoder\.sentence_encoder)\.embed_tokens\.(weight|embeddings\.\d+\.0\.weight)")


def one_line(error: BaseException) -> str:
    """What an error says, be it many lines or nothing, as one line of at most 300 characters."""
    return (" ".join(str(error).split()) or repr(error))[:300]


def check_exists(path: str) -> None:
    """Checks that there is a checkpoint.

    Raises:
        ValueError: there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}: name a checkpoint_best.pt or checkpoint_last.pt")


@contextlib.contextmanager
def safe_loader() -> Iterator[None]:
    """A context in which fairseq loads with torch's safe loader, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD or not.

    What torch then warns of is the kind of file, which a refusal names.
    """
    forced = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol|'torch.load' received a zip file")
            yield
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = forced


def code_called(path: str, refusal: str) -> Optional[str]:
    """The class or function of which the safe loader refused to make something, None where that was not the reason.

    Args:
        path: of the file.
        refusal: what the loader said; it names what pickles up to protocol 3 call.
    """
    if found := re.search(r"GLOBAL (\S+)", refusal):
        return found[1]
    with contextlib.suppress(Exception), contextlib.ExitStack() as files:
        if zipfile.is_zipfile(path):
            archive = files.enter_context(zipfile.ZipFile(path))
            file = archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            file = files.enter_context(open(path, "rb"))
        words: list[str] = []
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
            words += [argument] if isinstance(argument, str) else []
    return None


def read_checkpoint(path: str) -> dict[str, Any]:
    """A fairseq checkpoint, through torch's safe loader, which refuses a file that could run code.

    Returns:
        fairseq's state: `cfg`, `model`, `optimizer_history` and more.

    Raises:
        ValueError: the file is missing, no checkpoint, or not safe.
    """
    check_exists(path)
    try:
        with safe_loader():
            state = checkpoint_utils.load_checkpoint_to_cpu(path)
        state["cfg"]["model"], state["cfg"]["task"], state["model"]
    except Exception as error:  # whatever a broken file raises deep inside pickle, zipfile or fairseq
        if code := code_called(path, str(error)):
            raise ValueError(
                f"{path} is refused, as it could run code: it calls {code}; get the checkpoint from a source you trust"
            ) from error
        reason = one_line(error).partition(". ")[0]  # then torch advises to load it without the safe loader
        raise ValueError(
            f"{path} is no fairseq checkpoint ({reason}): name a checkpoint_best.pt or checkpoint_last.pt"
        ) from error
    return state


def describe_model(
    path: str, state: Optional[dict[str, Any]] = None, tasks: tuple[str, ...] = ("language_modeling",)
) -> dict[str, Any]:
    """What a result has to say about its model: architecture, position method, training length, updates.

    Args:
        path: of the checkpoint.
        state: its content, see `read_checkpoint`; read where it is not given.
        tasks: of fairseq's that it may have been trained for.

    Raises:
        ValueError: see `read_checkpoint`, or it is of another task.
    """
    state = state or read_checkpoint(path)
    model, task = state["cfg"]["model"], state["cfg"]["task"]
    history = state.get("optimizer_history")
    get = model.get if hasattr(model, "get") else lambda name, default=None: getattr(model, name, default)
    if (name := getattr(task, "_name", None)) not in tasks:
        raise ValueError(f"{path} was trained for '{name}', not for {' or '.join(tasks)}")
    learned = get("decoder_learned_pos") or get("encoder_learned_pos")
    method = get("position_method") or ("learned" if learned else "sinusoidal")
    if method == "alibi" and get("alibi_encoder_bias"):
        method = f"alibi {get('alibi_encoder_bias')}{' learned' * bool(get('alibi_learned_slopes'))}"
    return {
        "checkpoint": path,
        "architecture": get("_name") or get("arch"),
        "position_method": method,
        "training_length": task.tokens_per_sample,
        "updates": history[-1]["num_updates"] if history else None,
    }


def types_in(weights: dict[str, Tensor]) -> int:
    """Number of types that a model's weights are for; 0 without a table of token embeddings."""
    return sum(len(value) for name, value in weights.items() if EMBEDDING_TABLE.fullmatch(name))


def read_dictionary(data: str) -> Dictionary:
    """The dictionary of a fairseq data folder.

    Raises:
        ValueError: there is none, or it is no dictionary.
    """
    path = Path(data) / "dict.txt"
    if not path.is_file():
        raise ValueError(f"there is no {path}: name the data folder the model was trained on")
    return load_dictionary(path)


def load_dictionary(path: Path) -> Dictionary:
    """A dict.txt.

    Raises:
        ValueError: it is no dictionary.
    """
    try:
        return Dictionary.load(str(path))
    except Exception as error:  # fairseq raises whatever it likes
        raise ValueError(f"{path} is no dictionary of fairseq's ({one_line(error)})") from error


def made_up_dictionary(types: int) -> Dictionary:
    """A dictionary of so many types, the special ones included, whose counts follow Zipf's law: 1 / rank.

    Raises:
        ValueError: the special ones are more.
    """
    dictionary = Dictionary()
    if types <= len(dictionary):
        raise ValueError(f"{types} types are no vocabulary, {len(dictionary)} of which are special: name a larger size")
    for rank in range(1, types - len(dictionary) + 1):
        dictionary.add_symbol(f"type{rank}", n=10**9 // rank)
    return dictionary


def check_dictionary(dictionary: Dictionary, data: str, path: str, state: dict[str, Any]) -> None:
    """Checks that a checkpoint was trained with the dictionary of `data`, as far as it knows: by its number of types
    and, where the folder it was trained on is still there, by the types.

    Raises:
        ValueError: it was not.
    """
    types = types_in(state["model"])
    if types not in (0, len(dictionary)):
        raise ValueError(
            f"{path} was trained with {types:,} types, but {data}/dict.txt has {len(dictionary):,}: name the data "
            "folder it was trained on"
        )
    trained_on = Path(str(state["cfg"]["task"].data)) / "dict.txt"
    if trained_on.is_file() and not trained_on.samefile(Path(data) / "dict.txt"):
        theirs = load_dictionary(trained_on)
        differ = (n for n, (a, b) in enumerate(zip(dictionary.symbols, theirs.symbols)) if a != b)
        if (number := next(differ, None)) is not None:
            raise ValueError(
                f"{data}/dict.txt is not the dictionary of {path}: type {number:,} is '{dictionary[number]}', in "
                f"{trained_on} '{theirs[number]}'; name the data folder it was trained on"
            )


def override_options(state: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Puts options of the model in the place of those in a checkpoint's state.

    Raises:
        ValueError: a model has no such option.
    """
    model = state["cfg"]["model"]
    for name, value in overrides.items():
        if name not in AlibiLanguageModelConfig.__dataclass_fields__ and not hasattr(model, name):
            raise ValueError(f"a language model has no option '{name}' to override")
        with open_dict(model) if OmegaConf.is_config(model) else contextlib.nullcontext():
            setattr(model, name, value)
    state["args"] = None  # an old checkpoint's, of which `cfg` was made


def load_model(
    path: str, state: dict[str, Any], data: str, overrides: Optional[dict[str, Any]] = None
) -> BaseFairseqModel:
    """The model of a checkpoint, on the CPU, for evaluation.

    Args:
        path: of the checkpoint.
        state: its content, see `read_checkpoint`.
        data: fairseq data folder.
        overrides: options of the model in the place of those in the checkpoint, by name.

    Raises:
        ValueError: the data folder has no dictionary or another one; or the model cannot be built from its options.
    """
    dictionary = read_dictionary(data)
    if getattr(state["cfg"]["task"], "_name", None) == "masked_lm":
        dictionary.add_symbol("<mask>")  # as the task does
    check_dictionary(dictionary, data, path, state)
    override_options(state, overrides or {})
    state["cfg"]["task"]["data"] = data
    try:
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], state=state)
    except Exception as error:  # whatever options that do not fit raise deep inside torch or fairseq
        raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error
    return model.eval()


def subset_tokens(data: str, subset: str) -> int:
    """Number of tokens in a subset of a fairseq data folder, end-of-sentence tokens included.

    Raises:
        ValueError: see `read_subset`.
    """
    dataset = open_subset(data, subset)  # has to live as long as its sizes are looked at, which lie in its file
    return int(dataset.sizes.sum())


def check_index(path: Path) -> None:
    """Checks that an index is whole and its text not empty, before fairseq stumbles over them with a traceback.

    Args:
        path: of the .idx and .bin, without a suffix; they may be missing.

    Raises:
        ValueError: one of them is cut short.
    """
    index, text = path.with_name(f"{path.name}.idx"), path.with_name(f"{path.name}.bin")
    if not index.is_file():
        return
    with index.open("rb") as file:
        head = file.read(26)  # of the mapped format: 9 bytes of magic, version, type, and the number of sentences
    if head and not MMapIndexedDataset.Index._HDR_MAGIC.startswith(head[:9]):
        return  # another format of fairseq's
    sentences = int.from_bytes(head[18:], "little")
    if len(head) < 26 or index.stat().st_size < 26 + 12 * sentences:  # 4 bytes of size and 8 of place for each
        raise ValueError(f"{index} is cut short: prepare the folder anew")
    if not text.is_file() or not text.stat().st_size:
        raise ValueError(f"{text} is missing or empty: prepare the folder anew")


def open_subset(data: str, subset: str):
    """A subset of a fairseq data folder, as fairseq's dataset of sentences.

    Raises:
        ValueError: the folder has no such subset, or the files are broken or hold nothing.
    """
    path = Path(data) / subset
    check_index(path)
    try:
        dataset = load_indexed_dataset(str(path)) if subset else None
    except Exception as error:  # an .idx or .bin that is cut short, or something else
        raise ValueError(f"{path}.bin and .idx cannot be read ({one_line(error)}): prepare the folder anew") from error
    if dataset is None:
        found = sorted(path.stem for path in Path(data).glob("*.idx"))
        raise ValueError(f"{data} holds no subset '{subset}' (it holds {', '.join(found) or 'none'}): pass --subset")
    if not len(dataset):
        raise ValueError(f"{path}.bin holds no text: prepare the folder anew")
    try:
        if dataset.supports_prefetch:  # fairseq's older formats, of which nothing can be read before
            dataset.prefetch(range(len(dataset)))
        dataset[len(dataset) - 1]
    except Exception as error:  # numpy's, for a .bin that is shorter than its .idx says
        raise ValueError(
            f"{path}.bin does not hold the {int(dataset.sizes.sum()):,} tokens of its .idx: prepare the folder anew "
            f"({one_line(error)})"
        ) from error
    return dataset


def read_subset(data: str, subset: str) -> Tensor:
    """All tokens of a subset, sentence after sentence, each with its end-of-sentence token: (N,) int32.

    Raises:
        ValueError: the folder has no such subset, or the files are broken or hold nothing.
    """
    dataset = open_subset(data, subset)
    return torch.cat([dataset[n].int() for n in range(len(dataset))])


def text_options(data: Path) -> dict[str, Optional[str]]:
    """Tokenizer and BPE with which a data folder was prepared, None for none; as scripts/prepare_text.sh recorded them.

    Raises:
        ValueError: the record cannot be read.
    """
    codes, marker = data / "bpe.codes", data / "prepared.json"
    try:
        settings = dict(json.loads(marker.read_text(encoding="utf-8"))["settings"]) if marker.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{marker} cannot be read ({one_line(error)}): prepare the folder anew") from error
    if codes.is_file():
        return {"tokenizer": "moses", "bpe": "subword_nmt", "bpe_codes": str(codes)}
    return {"tokenizer": settings.get("tokenizer"), "bpe": None, "bpe_codes": None}
