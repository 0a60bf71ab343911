"""Names that moved; import them from where they are. This file goes as soon as nobody imports it."""

from .checkpoints import check_exists, count_types, describe_model, read_checkpoint
from .data_folders import (
    load_dictionary,
    made_up_dictionary,
    open_subset,
    read_dictionary,
    read_subset,
    subset_tokens,
    text_options,
)
from .errors import one_line
from .model_loading import check_dictionary, load_model, override_options
from .safe_reading import code_called, safe_loader

__all__ = [
    "check_dictionary",
    "check_exists",
    "code_called",
    "count_types",
    "describe_model",
    "load_dictionary",
    "load_model",
    "made_up_dictionary",
    "one_line",
    "open_subset",
    "override_options",
    "read_checkpoint",
    "read_dictionary",
    "read_subset",
    "safe_loader",
    "subset_tokens",
    "text_options",
]
