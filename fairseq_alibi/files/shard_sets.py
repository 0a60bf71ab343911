"""Checkpoints of `--use-sharded-state`: a small file, and beside it a folder that all processes wrote their shares to.

The tensors are in the format of `torch.distributed.checkpoint`, named model/NAME and optimizer/PARAMETER/NAME. The file
has everything else, and the checksums of the folder's files.
"""

import pickle
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

KEY = "fairseq_alibi_shards"  # of a checkpoint's state: the folder's name and its files

#: What the index of a folder may consist of. It is a pickle, which could run any other code.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
        *("_MEM_FORMAT_ENCODING", "StorageMeta"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


class IndexReader(pickle.Unpickler):
    """Reads the index of a folder, and refuses everything that is none of `INDEX_CLASSES`."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler.find_class`."""
        if name not in INDEX_CLASSES.get(module, ()):
            raise ValueError(f"its index calls {module}.{name}, which could run anything")
        return super().find_class(module, name)


def crc32_of_file(path: Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes tensors, of which some are DTensors, to a new folder; all processes have to call it.

    Returns what `read_shards` needs to know of the folder, in the first process; it has to be in its checkpoint.
    """
    from torch.distributed.checkpoint import FileSystemWriter, save  # takes most of a second to import

    save(tensors, storage_writer=FileSystemWriter(folder))
    rank = dist.get_rank()
    own = {path.name: crc32_of_file(path) for path in folder.glob(f"__{rank}_*")}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    files = {name: value for part in found for name, value in part.items()}
    index = folder / ".metadata"
    return {"folder": folder.name, "files": {**files, index.name: crc32_of_file(index)}} if rank == 0 else {}


def find_shard_damage(path: Path) -> Optional[str]:
    """Returns what is wrong with the folder of a checkpoint; None for nothing, or for a checkpoint without one."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict) or KEY not in state:
        return None
    folder = path.with_name(state[KEY]["folder"])
    for name, value in state[KEY]["files"].items():
        if not (folder / name).is_file():
            return f"{folder.name}/{name} is missing beside it"
        if crc32_of_file(folder / name) != value:
            return f"{folder.name}/{name} is damaged"
    return None


def read_shards(path: str, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a checkpoint with the tensors of its folder, whole, on the CPU; ValueError."""
    if KEY not in state:
        return state
    from torch.distributed.checkpoint import FileSystemReader, load

    class Reader(FileSystemReader):
        """Reads a folder without running code of its index."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            """See `FileSystemReader.read_metadata`."""
            with open(folder / ".metadata", "rb") as file:
                return IndexReader(file).load()

    folder = Path(path).with_name(state[KEY]["folder"])
    index = Reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in index.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
        load(tensors, storage_reader=Reader(folder), no_dist=True)
    whole = {name: value for name, value in state.items() if name != KEY}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == "model":
            whole["model"][rest] = tensor
        else:
            number, _, kind = rest.partition("/")
            whole["last_optimizer_state"]["state"].setdefault(int(number), {})[kind] = tensor
    return whole


def remove_unused_folders(save_dir: Path) -> None:
    """Removes the folders of shards that no checkpoint needs: those of removed checkpoints and of interrupted saves."""
    used = set()
    for path in save_dir.glob("checkpoint*.pt"):
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            used.add(state[KEY]["folder"])
        except Exception:  # damaged, or whole
            continue
    for folder in save_dir.glob("shards-*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)
