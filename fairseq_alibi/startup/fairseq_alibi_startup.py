"""Lets fairseq 0.12.2 be imported on Python 3.11 and newer, in every process of the environment.

The `.pth` file beside this module calls `install` at every start of Python: in `fairseq-train`, torchrun's workers and
spawned data loaders too. Until something imports fairseq that costs one entry in `sys.meta_path`; no further module is
imported. What is repaired when fairseq is imported:

Python 3.11   `dataclasses` refuses a default value whose class is unhashable. fairseq's configuration classes nest each
              other as such defaults. Only defaults of fairseq's own classes inside its own dataclasses are accepted.
Python 3.14   `Optional[str]` is `str | None`, which fairseq's options do not know.
              `argparse` refuses the help of an option of hydra that is no string, when that option is added.
              New processes come from a fork server, which outlives a killed run, and fairseq's data loaders end with a
              warning. fairseq was written for forked processes, so they are the default again; a choice that
              was made before stays.
torch 2.14    `torch.jit.script`, which fairseq calls when it is imported, gives a warning. On Python 3.14 it may fail.

hydra's warnings about fairseq's calls of 2022 come before any plugin is imported, so they are silenced here too.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in typing, which is not imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any


def _is_of_fairseq(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "fairseq"


def _accept_defaults_of_fairseq() -> None:
    import dataclasses
    from functools import wraps

    get_field = dataclasses._get_field  # type: ignore[attr-defined]

    @wraps(get_field)
    def get_field_of_fairseq(cls: type, name: str, *args: object, **kwargs: object) -> object:
        default = getattr(cls, name, None)
        if isinstance(default, dataclasses.Field):
            default = default.default
        default_class: type = type(default)
        if not (_is_of_fairseq(cls) and _is_of_fairseq(default_class) and default_class.__hash__ is None):
            return get_field(cls, name, *args, **kwargs)
        # The check looks at `__hash__` only. With a default_factory instead, omegaconf would see a missing value.
        default_class.__hash__ = object.__hash__  # type: ignore[method-assign, assignment]
        try:
            return get_field(cls, name, *args, **kwargs)
        finally:
            default_class.__hash__ = None  # type: ignore[method-assign, assignment]

    dataclasses._get_field = get_field_of_fairseq  # type: ignore[attr-defined]


def _silence_hydra() -> None:
    import warnings

    for message in (
        r"\s*The version_base parameter is not specified",
        r"\s*'[^']+' is validated against ConfigStore schema",
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


def _accept_unions(execute: Callable[[ModuleType], None], utils: ModuleType) -> None:
    """Repairs `fairseq.dataclass.utils`: an option of the type `X | None` is one of the type X."""
    execute(utils)
    interpret = utils.interpret_dc_type

    def interpret_union(field_type: object) -> object:
        if type(field_type).__name__ in ("UnionType", "Union"):  # the second from Python 3.14 on
            members = [member for member in field_type.__args__ if member is not type(None)]  # type: ignore[attr-defined]
            if len(members) == 1:
                return members[0]
        return interpret(field_type)

    utils.interpret_dc_type = interpret_union  # type: ignore[attr-defined]


def _accept_help_objects(execute: Callable[[ModuleType], None], utils: ModuleType) -> None:
    """Repairs `hydra._internal.utils`: its parser is built without the check of help texts of Python 3.14."""
    from argparse import ArgumentParser

    execute(utils)
    make_parser = utils.get_args_parser

    def make_unchecked_parser() -> ArgumentParser:
        check = ArgumentParser._check_help  # type: ignore[attr-defined]
        ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]
        try:
            return make_parser()  # type: ignore[no-any-return]
        finally:
            ArgumentParser._check_help = check  # type: ignore[attr-defined]

    if hasattr(ArgumentParser, "_check_help"):
        utils.get_args_parser = make_unchecked_parser  # type: ignore[attr-defined]


def _leave_functions_unscripted(execute: Callable[[ModuleType], None], utils: ModuleType) -> None:
    """Repairs `fairseq.models.model_utils`: its functions are plain ones, which compute the same."""
    import torch

    script = torch.jit.script
    torch.jit.script = lambda function: function  # type: ignore[assignment]
    try:
        execute(utils)
    finally:
        torch.jit.script = script  # type: ignore[assignment]


def _fork_by_default() -> None:
    import multiprocessing.context as context

    default: Any = context._default_context  # type: ignore[attr-defined]
    if default._actual_context is None and default._default_context._name == "forkserver":
        default._default_context = context._concrete_contexts["fork"]  # type: ignore[attr-defined]


#: Modules that are repaired when they are imported, each with the function that imports and repairs it.
_REPAIRS = {
    "fairseq.dataclass.utils": _accept_unions,
    "fairseq.models.model_utils": _leave_functions_unscripted,
    "hydra._internal.utils": _accept_help_objects,
}


class _BeforeFairseq:
    """Notices that fairseq is about to be imported, acts once and leaves; it never finds a module itself."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name == "fairseq":
            sys.meta_path.remove(cls)
            _silence_hydra()
            if sys.version_info >= (3, 11):
                _accept_defaults_of_fairseq()
            _fork_by_default()
            for module in _REPAIRS.keys() & sys.modules.keys():
                _REPAIRS.pop(module)(lambda _: None, sys.modules[module])
            sys.meta_path.insert(0, _DuringImport)


class _DuringImport:
    """Finds the modules of `_REPAIRS` as Python does, and repairs each."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _REPAIRS:
            return None
        from importlib.machinery import PathFinder

        repair, spec = _REPAIRS.pop(name), PathFinder.find_spec(name, path, target)
        if not _REPAIRS:
            sys.meta_path.remove(cls)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: repair(execute, module)  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers the hook; called by the `.pth` file."""
    sys.meta_path.insert(0, _BeforeFairseq)
