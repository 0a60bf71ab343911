"""Sandwich (Chi et al. 2023, arXiv 2212.10356): the product of two sinusoidal embeddings as a bias."""

import torch
from torch import Tensor

from .positions import DECODER, PositionMethod, register_position_method

WIDTH = 128  # width of the embeddings, whatever the width of the model
CHUNK = 8192  # distances whose cosines are computed at once


@register_position_method("sandwich", stacks=(DECODER,))
class Sandwich(PositionMethod):
    """The bias of head h = 1, ..., H is the sum of cos(d / 10000^(2n / 128)) over n = 0, ..., 63, divided by 8 h / H.

    It has no parameters. It falls like -ln(d) at first, but it is never below that of d = 0 minus 128 H / (8 h):
    `reach.distance_reach` skips keys only where a head's bias differs by more than queries and keys can.
    """

    bias_kind = "distance"

    def distance_bias(self, distance: Tensor) -> Tensor:
        """See `PositionMethod.distance_bias`."""
        # In float64, which Apple's GPUs do not have: angles are as large as distances.
        device = "cpu" if distance.device.type == "mps" else distance.device
        frequencies = 10000 ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64, device=device) / WIDTH)
        parts = distance.abs().to(device).double().split(CHUNK)
        sums = torch.cat([(part[:, None] * frequencies).cos_().sum(1) for part in parts])
        heads = torch.arange(1, self.num_heads + 1, dtype=torch.float64, device=device)[:, None]
        return (sums * self.num_heads / (8 * heads)).float().to(distance.device)
