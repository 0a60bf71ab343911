"""Lets fairseq 0.12.2 be imported on Python 3.11 and newer, in every process of the environment.

From Python 3.11 on, `dataclasses` refuses a default value whose class is unhashable. fairseq's configuration classes
nest each other as such defaults, so `import fairseq` fails. The `.pth` file beside this module calls `install` at every
start of Python: in `fairseq-train`, torchrun's workers and spawned data loaders too. Until something imports fairseq
that costs one entry in `sys.meta_path`; no further module is imported.

Only defaults of fairseq's own classes inside fairseq's own dataclasses are accepted; all others are refused as before.

hydra's warnings about fairseq's calls of 2022 come before any plugin is imported, so they are silenced here too.
"""

import sys


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


class _BeforeFairseq:
    """Notices that fairseq is about to be imported, acts once and leaves; it never finds a module itself."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name == "fairseq":
            sys.meta_path.remove(cls)
            _silence_hydra()
            if sys.version_info >= (3, 11):
                _accept_defaults_of_fairseq()


def install() -> None:
    """Registers the hook; called by the `.pth` file."""
    sys.meta_path.insert(0, _BeforeFairseq)
