"""Options that contradict each other or do not exist: fairseq's commands end with one line before any work."""

import argparse
import ast
import dataclasses
import difflib
import traceback
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, OmegaConf

from .patch import CommandError, original

PACKAGE = Path(__file__).resolve().parents[1]


#: The tasks of fairseq that each model can be used in; tasks of others are not known, and so not refused.
TASKS = {
    "alibi_lm": ("language_modeling",),
    "alibi_masked_lm": ("masked_lm", "multilingual_masked_lm", "sentence_prediction", "sentence_ranking"),
    "alibi_transformer": (
        *("translation", "translation_multi_simple_epoch", "translation_from_pretrained_xlm"),
        *("denoising", "multilingual_denoising"),
    ),
}


def check_task(architecture: Optional[str], task: Optional[str]) -> None:
    """Checks that a model can be trained in a task.

    Raises:
        CommandError: It cannot.
    """
    model = ARCH_MODEL_NAME_REGISTRY.get(architecture, architecture)
    of_fairseq = task in TASK_REGISTRY and TASK_REGISTRY[task].__module__.startswith("fairseq.tasks.")
    if of_fairseq and task not in TASKS.get(model, (task,)):
        raise CommandError(f"--arch {architecture} cannot be used in --task {task}, only in {', '.join(TASKS[model])}")


def add_denoising_args(parser: argparse.ArgumentParser) -> None:
    """Replaces `DenoisingTask.add_args`, which adds options of every transformer again."""
    parser._optionals.conflict_handler = "resolve"
    original("fairseq.tasks.denoising:DenoisingTask.add_args")(parser)


def convert_namespace_to_omegaconf(args: argparse.Namespace) -> DictConfig:
    """Replaces `fairseq_cli.train.convert_namespace_to_omegaconf`, which fails for a task that lacks an option."""
    check_task(safe_getattr(args, "arch"), safe_getattr(args, "task"))
    return original("fairseq_cli.train:convert_namespace_to_omegaconf")(args)


def check_criterion(cfg: FairseqConfig) -> None:
    """Checks that criterion, output layer and DDP backend of a training run fit each other.

    Raises:
        CommandError: They do not.
    """
    criterion = safe_getattr(cfg.criterion, "_name")
    adaptive, cutoff = criterion == "adaptive_loss", safe_getattr(cfg.model, "adaptive_softmax_cutoff")
    backend = cfg.distributed_training.ddp_backend
    architecture = safe_getattr(cfg.model, "_name", None) or safe_getattr(cfg.model, "arch", None)
    if str(architecture).startswith(("fconv", "lstm")):
        cutoff = cutoff if adaptive else None  # these models of fairseq ignore the option for other criteria
    if cutoff is not None and not adaptive:
        raise CommandError(
            f"--criterion {criterion} cannot train an adaptive softmax (--adaptive-softmax-cutoff {cutoff}): pass "
            "--criterion adaptive_loss --ddp-backend legacy_ddp"
        )
    if adaptive and cutoff is None:
        raise CommandError(
            "--criterion adaptive_loss needs an adaptive softmax: pass --adaptive-softmax-cutoff, for example "
            "20000,60000, or --criterion cross_entropy"
        )
    if adaptive and backend in ("c10d", "pytorch_ddp"):
        raise CommandError(f"--criterion adaptive_loss cannot run with --ddp-backend {backend}: pass legacy_ddp")
    cpu = cfg.common.cpu or not torch.cuda.is_available()
    if backend in ("c10d", "pytorch_ddp") and cfg.distributed_training.distributed_world_size > 1 and cpu:
        raise CommandError(f"--ddp-backend {backend} needs GPUs in fairseq 0.12.2: pass --ddp-backend legacy_ddp")


def check_overrides(cfg: FairseqConfig) -> None:
    """Checks that --model-overrides is a dictionary of options that exist; fairseq ignores others silently.

    Raises:
        CommandError: It is not.
    """
    text = cfg.common_eval.model_overrides
    try:
        overrides = ast.literal_eval(text)
        names = list(overrides.keys())
    except (ValueError, SyntaxError, AttributeError, RecursionError, MemoryError):
        raise CommandError(
            f"--model-overrides {text[:100]} is no dictionary: pass one as \"{{'attention': 'mask'}}\""
        ) from None
    if not names:
        return
    known = known_options(cfg)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f"did you mean '{close[0]}'?" if close else "drop it"
            raise CommandError(f"--model-overrides: no model or task has an option '{name}': {hint}")


def known_options(cfg: FairseqConfig) -> set[str]:
    """Returns the names of all options of fairseq's commands and of all models and tasks that are registered."""
    names = set(cfg.keys())
    for group in cfg.values():
        names.update(
            group.keys() if isinstance(group, DictConfig) else vars(group) if hasattr(group, "__dict__") else ()
        )
    for config in (*MODEL_DATACLASS_REGISTRY.values(), *TASK_DATACLASS_REGISTRY.values()):
        names.update(field.name for field in dataclasses.fields(config))
    for registry, described in ((MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY), (TASK_REGISTRY, TASK_DATACLASS_REGISTRY)):
        for name in registry.keys() - described.keys():
            parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
            registry[name].add_args(parser)
            names.update(action.dest for action in parser._actions)
    return names


def overwrite_args_by_name(cfg: DictConfig, overrides: dict[str, Any]) -> None:
    """Replaces `fairseq.checkpoint_utils.overwrite_args_by_name`; sets options too that an older checkpoint lacks."""
    original("fairseq.checkpoint_utils:overwrite_args_by_name")(cfg, overrides)
    model = cfg.get("model")
    config = MODEL_DATACLASS_REGISTRY.get("alibi_lm")
    if isinstance(model, DictConfig) and str(model.get("_name")).startswith("alibi_lm") and config is not None:
        for name in overrides.keys() & config.__dataclass_fields__.keys() - model.keys():
            OmegaConf.update(model, name, overrides[name], force_add=True)


def is_message_for_user(error: BaseException) -> bool:
    """Whether an error was raised by the models of this package, to tell the user what to change."""
    frames = traceback.extract_tb(error.__traceback__)
    place = Path(frames[-1].filename).resolve() if frames else PACKAGE
    return isinstance(error, ValueError) and place.parent in (PACKAGE / "core", PACKAGE / "models")
