"""Options that cannot work: fairseq's commands end with one line before any work, or are repaired."""

import contextlib
import errno
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed.utils import is_master
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf

from ..files.locks import locked
from .batching import SKIP
from .option_checks import check_criterion, check_overrides, check_task, is_message_for_user
from .patch import CommandError, original

logger = logging.getLogger(__name__)

#: Seconds to wait for the lock of a save folder. The data loaders of a run that was killed keep it for 5 seconds.
LOCK_WAIT = 10.0


def check_precision(cfg: FairseqConfig, training: bool) -> None:
    """Checks --fp16, --bf16, --amp and --tpu against the hardware. fairseq sets --tpu for --bf16; a GPU runs it too.

    Args:
        cfg: The configuration of the command; `tpu` is corrected in it.
        training: Whether the command trains.

    Raises:
        CommandError: The options cannot work here.
    """
    common = cfg.common
    gpu = torch.cuda.is_available() and not common.cpu
    if common.tpu and importlib.util.find_spec("torch_xla") is None:
        if not common.bf16:
            raise CommandError("--tpu: torch_xla is not installed; drop --tpu, or install it")
        for group in filter(OmegaConf.is_dict, cfg.values()):  # several copy it
            if "tpu" in group:
                group.tpu = False
    if not training:
        if common.bf16:
            logger.warning("--bf16 is ignored by this command, which computes in float32: drop it, or pass --fp16")
        return
    if common.bf16 and not (gpu or common.tpu):
        raise CommandError("--bf16 needs a GPU: drop it, or pass --cpu-bf16 for matrix products in bfloat16 on a CPU")
    precisions = [f"--{name}" for name in ("fp16", "bf16", "amp") if common[name]]
    if len(precisions) > 1:
        raise CommandError(f"{' and '.join(precisions)} exclude each other: pass one of them")
    if common.fp16 and not gpu:  # with --fp16-no-flatten-grads it ends at the first gradient that overflows
        raise CommandError("--fp16 needs a GPU: drop it, or pass --cpu-bf16 for matrix products in bfloat16 on a CPU")


def train_alone(main: Callable[..., None], cfg: FairseqConfig, **kwargs: Any) -> None:
    """Calls fairseq's training under a lock on --save-dir, into which a second run would mix its checkpoints.

    Raises:
        CommandError: Another process trains into the folder.
    """
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


def call_main(cfg: FairseqConfig, main: Callable[..., None], **kwargs: Any) -> None:
    """Replaces `fairseq.distributed.utils.call_main`, through which every command calls its `main`."""
    from .catalogue import apply  # the catalogue imports this file

    apply(in_command=True)
    training = hasattr(sys.modules[main.__module__], "validate_and_save")
    check_precision(cfg, training)
    check_overrides(cfg)
    if training:
        architecture = safe_getattr(cfg.model, "_name") or safe_getattr(cfg.model, "arch")
        check_task(architecture, safe_getattr(cfg.task, "_name"))
        check_criterion(cfg)
        main = functools.partial(train_alone, main)
    try:
        original("fairseq.distributed.utils:call_main")(cfg, main, **kwargs)
    except ValueError as error:
        if is_message_for_user(error):
            raise CommandError(str(error)) from None
        raise


def eval_lm(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Replaces `fairseq_cli.eval_lm.eval_lm`, which reports a perplexity of 1.00 where no token was scored.

    Raises:
        CommandError: No token was scored.
    """
    results = original("fairseq_cli.eval_lm:eval_lm")(*args, **kwargs)
    if not results["loss"]:
        raise CommandError(
            f"no token was scored: the subset is empty, or all samples are longer than the model's longest sequence; "
            f"drop {SKIP}, which leaves them out"
        )
    return results
