"""Models in several processes some of whose parameters get no gradient in some batch."""

import logging
from typing import Any

import torch
from fairseq.dataclass.configs import DistributedTrainingConfig
from torch import nn

from ..models.decoder import AlibiDecoder
from ..models.encoder import AlibiEncoder
from .patch import original

logger = logging.getLogger(__name__)


def wrap_model(
    args: DistributedTrainingConfig, model: nn.Module, process_group: Any, device: torch.device
) -> nn.Module:
    """Replaces `fairseq.models.DistributedFairseqModel`; sets --find-unused-parameters for models of this package.

    A band of an adaptive input or softmax, a dropped layer or a masked model's output layer may be unused in a batch.
    torch's DistributedDataParallel ends with an error then, unless it looks for such parameters.
    """
    ours = any(isinstance(module, (AlibiDecoder, AlibiEncoder)) for module in model.modules())
    if ours and args.ddp_backend in ("c10d", "pytorch_ddp") and not args.find_unused_parameters:
        logger.info("--find-unused-parameters is set, because not every batch uses all parameters of this model")
        args.find_unused_parameters = True
    return original("fairseq.models:DistributedFairseqModel")(args, model, process_group, device)
