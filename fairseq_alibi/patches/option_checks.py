"""Options of fairseq's commands: those that cannot work end them with one line or are repaired; the help."""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import importlib.util
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data.plasma_utils import PYARROW_AVAILABLE
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed.utils import is_master
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fairseq.trainer import Trainer
from fairseq.utils import safe_getattr
from omegaconf import DictConfig, OmegaConf

from ..files.errors import check_kind, one_line, output_fault, replace_closed_outputs
from ..files.locks import locked
from .compatibility import limit_waiting
from .data import SKIP
from .patch import CommandError, original

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
LOCK_WAIT = 10.0  # seconds for the lock of a save folder, which data loaders of a run that was killed keep for 5

#: The tasks of fairseq that each model can be used in; tasks of others are not known, and so not refused.
TASKS = {
    "alibi_lm": ("language_modeling",),
    "alibi_masked_lm": ("masked_lm", "multilingual_masked_lm", "sentence_prediction", "sentence_ranking"),
    "alibi_transformer": (
        *("translation", "translation_multi_simple_epoch", "translation_from_pretrained_xlm"),
        *("denoising", "multilingual_denoising"),
    ),
}

#: The criterions of fairseq that can train these models in all tasks; another has the name of its task.
CRITERIONS = (
    *("adaptive_loss", "cross_entropy", "label_smoothed_cross_entropy"),
    "label_smoothed_cross_entropy_with_alignment",
)


def check_task(architecture: Optional[str], task: Optional[str]) -> None:
    """Checks that a model can be trained in a task, with a CommandError."""
    model = ARCH_MODEL_NAME_REGISTRY.get(architecture, architecture)
    of_fairseq = task in TASK_REGISTRY and TASK_REGISTRY[task].__module__.startswith("fairseq.tasks.")
    if of_fairseq and task not in TASKS.get(model, (task,)):
        raise CommandError(f"--arch {architecture} cannot be used in --task {task}, only in {', '.join(TASKS[model])}")


def add_denoising_args(parser: argparse.ArgumentParser) -> None:
    """Replaces `DenoisingTask.add_args`, which adds options of every transformer again."""
    parser._optionals.conflict_handler = "resolve"
    original("fairseq.tasks.denoising:DenoisingTask.add_args")(parser)


def check_criterion(cfg: FairseqConfig) -> None:
    """Checks that criterion, output layer and DDP backend of a training run fit each other, with a CommandError."""
    criterion = safe_getattr(cfg.criterion, "_name")
    adaptive, cutoff = criterion == "adaptive_loss", safe_getattr(cfg.model, "adaptive_softmax_cutoff")
    backend = cfg.distributed_training.ddp_backend
    architecture = safe_getattr(cfg.model, "_name", None) or safe_getattr(cfg.model, "arch", None)
    if ARCH_MODEL_NAME_REGISTRY.get(architecture, architecture) in TASKS:
        suitable = (*CRITERIONS, str(safe_getattr(cfg.task, "_name")).replace("multilingual_", ""))
        of_fairseq = CRITERION_REGISTRY[criterion].__module__.startswith("fairseq.criterions.")
        if of_fairseq and criterion not in suitable:
            names = ", ".join(name for name in suitable if name in CRITERION_REGISTRY)
            raise CommandError(f"--criterion {criterion} cannot train {architecture} in this task: pass one of {names}")
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
    processes = max(cfg.distributed_training.distributed_world_size, int(os.environ.get("WORLD_SIZE", 1)))  # torchrun's
    if backend in ("c10d", "pytorch_ddp") and processes > 1 and cpu:
        raise CommandError(f"--ddp-backend {backend} needs GPUs in fairseq 0.12.2: pass --ddp-backend legacy_ddp")


def parse_overrides(
    text: str, option: str = "--model-overrides", example: str = "{'attention': 'mask'}"
) -> dict[str, Any]:
    """Reads an option that fairseq evaluates as code; CommandError unless it is a dictionary of literals by name."""
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        overrides = None
    if not isinstance(overrides, dict) or not all(isinstance(name, str) for name in overrides):
        raise CommandError(f"{option} '{text[:100]}' is no dictionary: pass one as \"{example}\"")
    return overrides


def check_overrides(cfg: FairseqConfig) -> None:
    """Checks that --model-overrides names options that exist, with a CommandError; fairseq ignores others silently."""
    names = parse_overrides(cfg.common_eval.model_overrides)
    known = known_options(cfg) if names else set()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean '{close[0]}'?" if close else "drop it"
            raise CommandError(f"--model-overrides: no model or task has an option '{name}': {hint}")


#: What repairs the optimizers and schedulers that need more than their name.
OPTIMIZER_REMEDIES = {
    "composite": "pass another --optimizer, such as adam, as no parameter of these models names a group of its own",
    "manual": "pass --epoch2lr and --update2lr as \"{'1-4': 0.01, '5': 0.001}\"",
    "pass_through": "pass another --lr-scheduler, such as fixed, as the optimizer has none of its own",
}


@contextlib.contextmanager
def checked_optimizer(trainer: Trainer) -> Iterator[None]:
    """A context in which a trainer builds optimizer and scheduler: options that do not fit them are a CommandError."""
    cfg = trainer.cfg
    names = [safe_getattr(group, "_name") for group in (cfg.optimizer, cfg.lr_scheduler)]
    try:
        yield
    except (CommandError, ImportError):
        raise
    except Exception as error:  # of any kind, of classes of fairseq and torch
        reason = one_line(error) if str(error) else traceback.extract_tb(error.__traceback__)[-1].line
        remedy = next(filter(None, map(OPTIMIZER_REMEDIES.get, names)), "pass other options")
        raise CommandError(f"--optimizer {names[0]} with --lr-scheduler {names[1]}: {reason}: {remedy}") from error
    options = {name: value for name, value in next(iter(trainer.optimizer.param_groups)).items() if name != "params"}
    for name, value in parse_optimizer_overrides(cfg).items():
        numbers = {isinstance(one, (int, float)) for one in (value, options.get(name))}
        if name not in options or (options[name] is not None and len(numbers) > 1):
            raise CommandError(
                f"--optimizer-overrides: {name} {value!r} is none of the options of --optimizer {names[0]}, {options}"
            )


def build_optimizer(self: Trainer) -> None:
    """Replaces `Trainer._build_optimizer`, see `checked_optimizer`."""
    with checked_optimizer(self):
        original("fairseq.trainer:Trainer._build_optimizer")(self)


def parse_optimizer_overrides(cfg: FairseqConfig) -> dict[str, Any]:
    """Reads --optimizer-overrides, see `parse_overrides`."""
    return parse_overrides(cfg.checkpoint.optimizer_overrides, "--optimizer-overrides", "{'weight_decay': 0.01}")


def known_options(cfg: FairseqConfig) -> set[str]:
    """Returns the names of all options of fairseq's commands and of all models and tasks that are registered."""
    names = set(cfg.keys())
    for group in cfg.values():
        names.update(group if isinstance(group, DictConfig) else getattr(group, "__dict__", ()))
    for config in (*MODEL_DATACLASS_REGISTRY.values(), *TASK_DATACLASS_REGISTRY.values()):
        names.update(field.name for field in dataclasses.fields(config))
    for registry, described in ((MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY), (TASK_REGISTRY, TASK_DATACLASS_REGISTRY)):
        for name in registry.keys() - described.keys():
            parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
            registry[name].add_args(parser)
            names.update(action.dest for action in parser._actions)
    return names


def overwrite_args_by_name(cfg: DictConfig, overrides: dict[str, Any]) -> None:
    """Replaces `fairseq.checkpoint_utils.overwrite_args_by_name`; CommandError for a value of another kind.

    Sets options too that an older checkpoint lacks.
    """
    for group in filter(OmegaConf.is_dict, cfg.values()):
        for name in overrides.keys() & group.keys():
            try:
                check_kind(name, overrides[name], group[name])
            except ValueError as error:
                raise CommandError(str(error)) from None
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


def parse_args_and_arch(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
    """Replaces fairseq's function: help gets the options of --arch, what excludes each other is refused in one line."""
    from .catalogue import apply  # the catalogue imports this file

    apply(in_command=True)  # where this package was imported before the command's module
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--arch", "-a")
    finder.add_argument("--task", default=parser.get_default("task"))
    finder.add_argument("--help", "-h", action="store_true")
    known = finder.parse_known_args(args[0] if args else sys.argv[1:])[0]
    if known.help and known.arch in ARCH_MODEL_REGISTRY:
        # Python prints the help and ends before fairseq would add them.
        group = parser.add_argument_group(f"options of {known.arch}", argument_default=argparse.SUPPRESS)
        ARCH_MODEL_REGISTRY[known.arch].add_args(group)
    if not known.help:
        check_task(known.arch, known.task)  # before the options of the task, which may contradict those of the model
    try:
        parsed = original("fairseq.options:parse_args_and_arch")(parser, *args, **kwargs)
    except ValueError as error:
        message = str(error)
        if "Cannot combine --fp16" in message:  # fairseq sets --tpu for --bf16
            message = "--fp16 excludes --bf16 and --tpu: pass one of them"
        raise CommandError(" ".join(message.split())) from error
    if getattr(parsed, "use_plasma_view", False) and not PYARROW_AVAILABLE:  # fairseq starts it before `call_main`
        raise CommandError("--use-plasma-view needs Plasma, which pyarrow has no more since release 12: drop it")
    return parsed


def check_precision(cfg: FairseqConfig, training: bool) -> None:
    """Checks --fp16, --bf16, --amp and --tpu (set by --bf16) against the hardware; CommandError if they do not fit."""
    common = cfg.common
    gpu = torch.cuda.is_available() and not common.cpu
    if common.tpu and importlib.util.find_spec("torch_xla") is None:
        if not common.bf16:
            raise CommandError("--tpu: torch_xla is not installed; drop --tpu, or install it")
        for group in filter(OmegaConf.is_dict, cfg.values()):  # several copy it
            if "tpu" in group:
                group.tpu = False
    ignored = ("bf16",) * (not training) + ("amp",) * (not (training and gpu)) + ("fp16",) * (not (training or gpu))
    for name in filter(common.get, ignored):
        logger.warning("--%s is ignored by this command, which computes in float32: drop it", name)
    if not training:
        return
    if common.bf16 and not (gpu or common.tpu or cfg.distributed_training.ddp_backend == "fully_sharded"):
        raise CommandError("--bf16 needs a GPU: drop it, or pass --cpu-bf16 for matrix products in bfloat16 on a CPU")
    precisions = [f"--{name}" for name in ("fp16", "bf16", "amp") if common[name]]
    if len(precisions) > 1:
        raise CommandError(f"{' and '.join(precisions)} exclude each other: pass one of them")
    if common.fp16 and not gpu:  # with --fp16-no-flatten-grads it ends at the first gradient that overflows
        raise CommandError("--fp16 needs a GPU: drop it, or pass --cpu-bf16 for matrix products in bfloat16 on a CPU")


def train_alone(main: Callable[..., None], cfg: FairseqConfig, **kwargs: Any) -> None:
    """Calls fairseq's training under a lock on --save-dir, into which a second run would mix its checkpoints."""
    from .catalogue import apply  # the catalogue imports this file

    apply(in_command=True)  # in a process that fairseq has started
    with contextlib.ExitStack() as stack:
        if is_master(cfg.distributed_training) and not cfg.checkpoint.no_save:
            try:
                stack.enter_context(locked(Path(cfg.checkpoint.save_dir) / "checkpoint_last.pt", LOCK_WAIT))
            except (ValueError, OSError, NotImplementedError) as error:
                has_locks = getattr(error.__cause__, "errno", None) not in (errno.ENOLCK, errno.EOPNOTSUPP)
                if has_locks and not isinstance(error, NotImplementedError):
                    raise CommandError(str(error)) from None
                logger.warning("%s: this file system has no locks; start no second run there", cfg.checkpoint.save_dir)
        main(cfg, **kwargs)


def drop_output(handler: logging.Handler, record: logging.LogRecord) -> None:
    """In the place of `Handler.handleError`: a run whose output is closed continues, with one line, no traceback."""
    if message := output_fault():
        print(message, file=sys.stderr)


@contextlib.contextmanager
def checked_command(cfg: FairseqConfig, training: bool = False) -> Iterator[None]:
    """A context in which one of fairseq's commands runs: what cannot work is a CommandError, Ctrl-C status 130."""
    from .catalogue import apply  # the catalogue imports this file

    apply(in_command=True)
    replace_closed_outputs()
    check_precision(cfg, training)
    check_overrides(cfg)
    handle_error = logging.StreamHandler.handleError
    logging.StreamHandler.handleError = drop_output  # type: ignore[method-assign, assignment]
    try:
        yield
    except FileNotFoundError as error:  # a data folder, subset or dictionary
        raise CommandError(f"{one_line(error)}: name folders, files and subsets that exist") from error
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        raise CommandError(output_fault(error) or one_line(error)) from error
    except ImportError as error:  # of an optimizer, a tokenizer, ...
        raise CommandError(one_line(error)) from error
    except (ValueError, AssertionError) as error:
        if is_message_for_user(error) or "--batch-size" in str(error):  # without it, or --max-tokens
            raise CommandError(str(error)) from None
        if "offset must be non-negative" in str(error):  # numpy, in this process or one that loads data
            raise CommandError("an .idx points to places that its .bin does not have: prepare the data anew") from error
        raise
    except KeyboardInterrupt:
        if is_master(cfg.distributed_training):
            resumes = training and not cfg.checkpoint.no_save
            logger.warning("interrupted%s", "; the same command resumes from its last checkpoint" * resumes)
        sys.exit(128 + signal.SIGINT)
    finally:
        logging.StreamHandler.handleError = handle_error  # type: ignore[method-assign]
    if message := output_fault():
        raise CommandError(message)


def call_main(cfg: FairseqConfig, main: Callable[..., None], **kwargs: Any) -> None:
    """Replaces `fairseq.distributed.utils.call_main`, through which commands other than generate call their `main`."""
    limit_waiting(cfg.distributed_training)
    training = hasattr(sys.modules[main.__module__], "validate_and_save")
    with checked_command(cfg, training):
        if training:
            architecture = safe_getattr(cfg.model, "_name") or safe_getattr(cfg.model, "arch")
            check_task(architecture, safe_getattr(cfg.task, "_name"))
            check_criterion(cfg)
            parse_optimizer_overrides(cfg)
            main = functools.partial(train_alone, main)
        original("fairseq.distributed.utils:call_main")(cfg, main, **kwargs)


def eval_lm(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Replaces fairseq's function, which reports a perplexity of 1.00 where no token was scored: CommandError."""
    results = original("fairseq_cli.eval_lm:eval_lm")(*args, **kwargs)
    if not results["loss"]:
        raise CommandError(
            f"no token was scored: the subset is empty, or all samples are longer than the model's longest sequence; "
            f"drop {SKIP}, which leaves them out"
        )
    return results
