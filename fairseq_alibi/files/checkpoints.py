"""Checkpoints: their content and the description of their model. Every fault is one line with the remedy."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

from fairseq import checkpoint_utils
from omegaconf import OmegaConf
from torch import Tensor

from ..core import ALiBi, Learned, Sinusoidal

#: Names of the tables of token embeddings: plain, or one for each band of an adaptive input.
EMBEDDING_TABLE = re.compile(r"(decoder|encoder\.sentence_encoder)\.embed_tokens\.(weight|embeddings\.\d+\.0\.weight)")


def check_exists(path: str) -> None:
    """Checks that a checkpoint exists.

    Raises:
        ValueError: There is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}: name a checkpoint_best.pt or checkpoint_last.pt")


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads a fairseq checkpoint through torch's safe loader, after comparing its checksums.

    Both are done by the function of fairseq that is called, as `patches.reading` replaces it.

    Returns:
        fairseq's state: `cfg`, `model`, `optimizer_history` and more.

    Raises:
        ValueError: The file is missing, damaged, no checkpoint, or could run code.
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
    """Describes the model of a checkpoint for a result: architecture, position method, training length, updates.

    Args:
        path: The checkpoint.
        state: Its content, see `read_checkpoint`; it is read if it is not given.
        tasks: Those of fairseq's tasks that it may have been trained for.

    Raises:
        ValueError: See `read_checkpoint`, or it was trained for another task.
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
    }


def count_types(weights: dict[str, Tensor]) -> int:
    """Returns the number of types that a model's weights are for; 0 without a table of token embeddings."""
    return sum(len(value) for name, value in weights.items() if EMBEDDING_TABLE.fullmatch(name))
