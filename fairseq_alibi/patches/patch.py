"""What a patch is, and how it takes the place of a function of fairseq."""

import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What stood at the target of each patch before, by target.
_originals: dict[str, Any] = {}


@dataclass(frozen=True)
class Patch:
    """A function of fairseq, or a missing attribute of numpy, that is replaced.

    Args:
        target: "module:attribute" or "module:Class.attribute".
        replacement: What takes its place.
        what: What the replacement does.
        why: What goes wrong without it.
        source: Where fairseq 0.12.2 defines the target, or uses the missing attribute: "file:line".
        removable: When the patch can go.
        in_command: Whether it is applied only when one of fairseq's commands starts, as its module may be half imported
            before. It is skipped if the module is not imported.
        only_if_missing: Whether a target that exists stays as it is.
    """

    target: str
    replacement: Any
    what: str
    why: str
    source: str
    removable: str
    in_command: bool = False
    only_if_missing: bool = False

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
    """An error that ends one of fairseq's commands with its message as the only line and status 1.

    Other callers can catch it as a ValueError.
    """
