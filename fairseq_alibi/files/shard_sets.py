"""Checkpoints of `--use-sharded-state`: a small file, and beside it a folder that all processes wrote their shares to.

The tensors are in the format of `torch.distributed.checkpoint`, named model/NAME and optimizer/PARAMETER/NAME. The file
has everything else, the checksums of the folder's files, and the index of the tensors: that in the folder is a pickle,
which could run code.
"""

import dataclasses
import enum
import io
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

KEY = "fairseq_alibi_shards"  # of a checkpoint's state: the folder's name and its files


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

    index = save(tensors, storage_writer=FileSystemWriter(folder))
    rank = dist.get_rank()
    own = {path.name: crc32_of_file(path) for path in folder.glob(f"__{rank}_*")}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if rank != 0:
        return {}
    index.storage_meta = None  # has a path, which the safe loader refuses
    torch.save(index, buffer := io.BytesIO())
    files = {name: value for part in found for name, value in part.items()}
    return {"folder": folder.name, "files": files, "index": torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)}


def record_of(path: Path) -> Optional[dict[str, Any]]:
    """Returns what a checkpoint knows of its folder; None if it has none, or cannot be read."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)[KEY]
    except Exception:  # the one who needs more of it explains
        return None


def find_shard_damage(path: Path) -> Optional[str]:
    """Returns what is wrong with the folder of a checkpoint; None for nothing, or for a checkpoint without one."""
    record = record_of(path)
    if record is None:
        return None
    folder = path.with_name(record["folder"])
    for name, value in record["files"].items():
        if not (folder / name).is_file():
            return f"{folder.name}/{name} is missing beside it"
        if crc32_of_file(folder / name) != value:
            return f"{folder.name}/{name} is damaged"
    return None


def read_shards(path: str, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a checkpoint with the tensors of its folder, whole, on the CPU; ValueError."""
    if KEY not in state:
        return state
    from torch.distributed.checkpoint import FileSystemReader, filesystem, load, metadata

    index_types = [value for module in (metadata, filesystem) for value in vars(module).values() if is_record(value)]

    class Reader(FileSystemReader):
        """Reads a folder by the index that is in the checkpoint."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            """See `FileSystemReader.read_metadata`."""
            with torch.serialization.safe_globals([*index_types, torch.serialization._get_layout]):
                index = torch.load(io.BytesIO(state[KEY]["index"].numpy().tobytes()), weights_only=True)
            index.storage_meta = metadata.StorageMeta()
            return index

    folder = Path(path).with_name(state[KEY]["folder"])
    entries = Reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in entries.items()}
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
    records = map(record_of, save_dir.glob("checkpoint*.pt"))
    used = {record["folder"] for record in records if record}
    for folder in save_dir.glob("shards-*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def is_record(value: Any) -> bool:
    """Returns whether a class of torch holds plain values: a dataclass or an enumeration."""
    return isinstance(value, type) and (dataclasses.is_dataclass(value) or issubclass(value, enum.Enum))
