"""Lets fairseq 0.12.2 be imported on Python 3.11 and newer, in every process of the environment, and hydra be calm.

From Python 3.11 on, `dataclasses` refuses a default value whose class is unhashable. fairseq's configuration classes
nest each other as such defaults, so `import fairseq` fails. The `.pth` file beside this module calls `install` at every
start of Python: `fairseq-train`, torchrun's workers and spawned data loaders included. Until something imports fairseq
that costs one entry in `sys.meta_path`; nothing is imported for it.

Only defaults of fairseq's own classes inside fairseq's own dataclasses pass; all others stay refused as before.

What hydra has to say about fairseq's calls of 2022 comes before any plugin is imported, so it is silenced here too.
"""

import sys


def _is_fairseqs(cls):
    return cls.__module__.partition(".")[0] == "fairseq"


def _allow_fairseqs_defaults():
    import dataclasses
    from functools import wraps

    get_field = dataclasses._get_field

    @wraps(get_field)
    def get_field_of_fairseq(cls, name, *args, **kwargs):
        default = getattr(cls, name, None)
        if isinstance(default, dataclasses.Field):
            default = default.default
        default_class = type(default)
        if not (_is_fairseqs(cls) and _is_fairseqs(default_class) and default_class.__hash__ is None):
            return get_field(cls, name, *args, **kwargs)
        # The check looks at nothing but `__hash__`. A default_factory instead would make omegaconf see a missing value.
        default_class.__hash__ = object.__hash__
        try:
            return get_field(cls, name, *args, **kwargs)
        finally:
            default_class.__hash__ = None

    dataclasses._get_field = get_field_of_fairseq


def _hush_hydra():
    import warnings

    for message in (
        r"\s*The version_base parameter is not specified",
        r"\s*'[^']+' is validated against ConfigStore schema",
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


class _BeforeFairseq:
    """Finds no module ever: it only learns that fairseq is about to be imported, acts once and leaves."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "fairseq":
            sys.meta_path.remove(cls)
            _hush_hydra()
            if sys.version_info >= (3, 11):
                _allow_fairseqs_defaults()
        return None


def install():
    """Registers the hook; called by the `.pth` file."""
    sys.meta_path.insert(0, _BeforeFairseq)
