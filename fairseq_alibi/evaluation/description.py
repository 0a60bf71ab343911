"""What results say of the model that was evaluated."""

from typing import Any

from ..files.checkpoints import describe_model


def reading_options(state: dict[str, Any]) -> dict[str, Any]:
    """The options of fairseq's task, other than its defaults, that change what a language model reads or predicts.

    Args:
        state: of the checkpoint.
    """
    task = state["cfg"]["task"]
    chosen = {
        "add_bos_token": task.get("add_bos_token", False),
        "output_dictionary_size": max(0, task.get("output_dictionary_size", -1)),
        "sample_break_mode": str(task.get("sample_break_mode") or "none"),
    }
    defaults = (False, 0, "none")
    return {name: value for (name, value), default in zip(chosen.items(), defaults) if value != default}


def describe_evaluated(
    checkpoint: str,
    state: dict[str, Any],
    overrides: dict[str, Any],
    tasks: tuple[str, ...] = ("language_modeling",),
) -> dict[str, Any]:
    """Describes a model as it was evaluated, with overridden options and the task options of `reading_options`.

    Args:
        checkpoint: its path.
        state: of the checkpoint, with the overridden options in it.
        overrides: options of the model that were overridden, by name.
        tasks: see `describe_model`.

    Raises:
        ValueError: the checkpoint was trained for another task, or the training length is no number.
    """
    description = describe_model(checkpoint, state, tasks)
    if (length := overrides.get("tokens_per_sample")) is not None:
        if type(length) is not int or length < 1:
            raise ValueError(f"--model-overrides: tokens_per_sample {length!r}: pass a whole number of at least 1")
        description["training_length"] = length
    scale = getattr(state["cfg"]["model"], "alibi_length_scale", None)
    by_length = {"alibi_length_scale": scale} if scale == "auto" else {}
    return {**description, **reading_options(state), **by_length}
