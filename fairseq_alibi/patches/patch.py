"""What a patch is, and how it takes the place of a function of fairseq."""

import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_originals: dict[str, Any] = {}  # what stood at the target of each patch before, by target


@dataclass(frozen=True)
class Patch:
    """A function of fairseq, or a missing attribute of numpy, that is replaced."""

    target: str  # "module:attribute" or "module:Class.attribute"
    replacement: Any
    what: str  # the replacement does
    why: str  # what goes wrong without it
    source: str  # "file:line" of fairseq 0.12.2, which defines the target or uses the missing attribute
    removable: str  # when the patch can go
    in_command: bool = False  # applied when a command of fairseq starts, whose module may be half imported before
    only_if_missing: bool = False  # a target that exists stays as it is

    def apply(self) -> None:
        """Replaces the target, once."""
        module, _, path = self.target.partition(":")
        *parents, attribute = path.split(".")
        owner: Any
        if self.in_command:
            main = sys.modules["__main__"]  # python fairseq_cli/train.py
            as_script = Path(getattr(main, "__file__", None) or "").match(f"{module.replace('.', '/')}.py")
            owner = main if as_script else sys.modules.get(module)
            if owner is None:
                return
        else:
            owner = pkgutil.resolve_name(module)
        for parent in parents:
            owner = getattr(owner, parent)
        current = getattr(owner, attribute, None)
        if current is self.replacement or (self.only_if_missing and current is not None):
            return
        _originals[self.target] = current
        setattr(owner, attribute, self.replacement)


def original(target: str) -> Any:
    """Returns what stood at a target before its patch was applied."""
    return _originals[target]


class CommandError(SystemExit, ValueError):
    """Ends one of fairseq's commands with its message as the only line and status 1; a ValueError to other callers."""
