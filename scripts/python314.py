"""What can be tried of Python 3.14 without an interpreter of 3.14: imports, parsers, configurations and hydra.

`scripts/python314.sh` runs this file in pyodide. Libraries with compiled parts, torch among them, are stand-ins, so
nothing is computed.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import multiprocessing
import sys
import threading
import types
import warnings

warnings.simplefilter("ignore")

STAND_INS = {
    "_multiprocessing",
    "apex",
    "bitarray",
    "boto3",
    "cffi",
    "examples",
    "fairscale",
    "filelock",
    "iopath",
    "lxml",
}
STAND_INS |= {"matplotlib", "numpy", "pandas", "psutil", "regex", "sacrebleu", "sacremoses", "tabulate", "torch"}
STAND_INS |= {"torchaudio", "tqdm"}


class AnythingType(type):
    """The class of `Anything`: every attribute is the class itself."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __instancecheck__(cls, instance):
        return False

    def __iter__(cls):
        return iter(("13a", "none"))  # the tokenizers of sacrebleu


class Anything(metaclass=AnythingType):
    """A base class, a type, a value or a decorator, whatever is needed of it."""

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __iter__(self):
        return iter(())

    def __or__(self, other):
        return self

    def __neg__(self):
        return self

    __abs__ = __neg__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __pow__ = __rpow__ = __getitem__ = (
        __or__
    )


def decorator(*args, **kwargs):
    """A decorator with or without arguments that changes nothing."""
    return args[0] if len(args) == 1 and callable(args[0]) else lambda function: function


class StandIn(types.ModuleType):
    """A module that has every attribute."""

    DECORATORS = ("enable_grad", "export", "ignore", "inference_mode", "no_grad", "script", "script_method", "unused")

    def __getattr__(self, name):
        if name == "__version__":
            return "2.13.0"
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "_get_torch_home":
            return lambda: "/tmp"
        value = decorator if name in self.DECORATORS else type(name, (Anything,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        module.__path__ = []
        if module.__name__ == "torch":
            module.jit = StandIn("torch.jit")
            module.cuda = types.SimpleNamespace(
                device_count=lambda: 0,
                is_available=lambda: False,
                is_bf16_supported=lambda: False,
                amp=types.SimpleNamespace(autocast=Anything, GradScaler=Anything),
                Event=Anything,
                FloatTensor=Anything,
                Stream=Anything,
            )


def prepare():
    """Puts the stand-ins and the startup module in place."""
    sys.meta_path.insert(0, Finder())
    multiprocessing.Lock = threading.Lock
    debugger = types.ModuleType("fairseq.pdb")
    debugger.set_trace = None
    sys.modules["fairseq.pdb"] = debugger
    importlib.import_module("fairseq_alibi_startup").install()


def check():
    """Imports, registers and parses; any failure is raised."""
    import fairseq
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    print(f"Python {sys.version.split()[0]}, fairseq {fairseq.__version__}, {len(fairseq.tasks.TASK_REGISTRY)} tasks")
    for kind in ("training", "generation", "interactive_generation", "eval_lm", "validation", "preprocessing"):
        getattr(options, f"get_{kind}_parser")()
    registries = {
        "tasks": fairseq.tasks.TASK_REGISTRY,
        "models": fairseq.models.MODEL_REGISTRY,
        "criterions": fairseq.criterions.CRITERION_REGISTRY,
        "optimizers": fairseq.optim.OPTIMIZER_REGISTRY,
        "learning rate schedules": fairseq.optim.lr_scheduler.LR_SCHEDULER_REGISTRY,
    }
    for name, registry in registries.items():
        for entry in registry.values():
            if hasattr(entry, "add_args"):
                entry.add_args(argparse.ArgumentParser(conflict_handler="resolve"))
        print(f"options of {len(registry)} {name}")
    arguments = [
        "data",
        "--task",
        "language_modeling",
        "--arch",
        "transformer_lm",
        "--optimizer",
        "adam",
        "--max-update",
        "20",
    ]
    parsed = options.parse_args_and_arch(options.get_training_parser(), arguments)
    assert convert_namespace_to_omegaconf(parsed).optimization.max_update == 20
    importlib.import_module("fairseq_cli.hydra_train")
    importlib.import_module("hydra._internal.utils").get_args_parser()
    print("hydra's parser")


if __name__ == "__main__":
    prepare()
    check()
