"""ALiBi (attention with linear biases) for fairseq: train short, test long.

The README has a table of the folders, each of which imports only those above it.

The models are registered with fairseq as soon as fairseq is imported, before or after this package (`--user-dir
fairseq_alibi` imports it). Without fairseq nothing is registered and nothing is patched.
"""

import sys
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False  # as type checkers understand it; `typing` takes time to import
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.2.0"


def register() -> None:
    """Applies the patches and registers the models with fairseq, which has to be imported already."""
    from .patches.catalogue import apply

    apply()
    from . import models  # noqa: F401


class AfterFairseq:
    """Calls `register` once, when an import of fairseq has finished. It leaves the search for modules to the others."""

    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        if fullname != "fairseq":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: "Any") -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if sys.modules.get("fairseq"):
    register()
else:
    sys.meta_path.insert(0, AfterFairseq())
