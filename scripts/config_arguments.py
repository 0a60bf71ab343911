"""Prints a config for fairseq-hydra-train as arguments for fairseq-train, one a line.

    python scripts/config_arguments.py configs/wikitext103.yaml

The script that calls this adds the rest: data, folders, precision, and what follows from the length.
"""

import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

#: Keys that belong to a run or a machine, or follow from the length.
LEFT_OUT = (
    *("data", "save_dir", "tensorboard_logdir", "user_dir", "fp16", "cpu"),
    *("tokens_per_sample", "max_tokens", "update_freq"),
)
#: The option that takes the `_name` of a group; the name of the model is that of an architecture.
NAME_OPTIONS = {"task": "task", "criterion": "criterion", "optimizer": "optimizer", "lr_scheduler": "lr-scheduler"}


def config_arguments(path: Path) -> list[str]:
    """Returns the settings of a config as arguments for fairseq-train.

    Options without a value (null) and switches that are off are left out, as they are fairseq-train's defaults.

    Args:
        path: A YAML file of configs/.
    """
    with initialize_config_dir(str(path.resolve().parent), version_base="1.1"):
        content = OmegaConf.to_container(compose(path.stem))
    arguments = []
    for group, settings in dict(content).items():
        for key, value in settings.items():
            if key == "_name":
                arguments += [f"--{NAME_OPTIONS[group]}", value] if group in NAME_OPTIONS else []
            elif key not in LEFT_OUT:
                arguments += option_arguments(f"--{key.replace('_', '-')}", value)
    return arguments


def option_arguments(option: str, value: Any) -> list[str]:
    """Returns an option and its value as fairseq-train takes them."""
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    return [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]


if __name__ == "__main__":
    print("\n".join(config_arguments(Path(sys.argv[1]))))
