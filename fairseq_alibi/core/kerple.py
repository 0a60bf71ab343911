"""KERPLE (Chi et al. 2022, arXiv 2205.09921): a bias that falls with the logarithm or with a power of the distance.

Shapes: H heads, N distances.
"""

import torch
from torch import Tensor, nn

from .positions import DECODER, PositionMethod, register_position_method

LEAST = 0.01  # the least value of a parameter


@register_position_method("kerple", stacks=(DECODER,))
class Kerple(PositionMethod):
    """The bias -p ln(1 + a d), with p and a learned for each head and shared by all layers.

    A parameter below 0.01 counts as 0.01, and its gradient flows as if it did not, so that it can rise again. At the
    start p is uniform in (0, 2) and a in (0, 1), by the seed of torch, without a draw from its generator.

    The bias falls without end, so `reach.distance_reach` skips keys: those beyond a distance x weigh together at most
    exp(e) times the sum of (1 + a d)^-p over d > x. For p > 1 that is below exp(e) (1 + a x)^(1 - p) / (a (p - 1)), and
    the reach has an end whatever the length. For p <= 1 the sum has no limit, and the reach grows with the length.
    """

    bias_kind = "distance"
    starts = (2.0, 1.0)  # upper ends of the uniform distributions from which the rows of `parameters_of_heads` start

    def __init__(self, num_heads: int):
        super().__init__(num_heads)
        # A generator of its own: the other weights of a model start as with any method.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        drawn = [most * torch.rand(num_heads, generator=generator, device="cpu") for most in self.starts]
        self.parameters_of_heads = nn.Parameter(torch.stack(drawn))

    def bounded(self, most: float) -> tuple[Tensor, Tensor]:
        """The two parameters of each head, (H, 1) float32 each; the first is at most `most`."""
        given = self.parameters_of_heads.float()
        used = torch.stack([given[0].clamp(LEAST, most), given[1].clamp(min=LEAST)])
        first, second = given + (used - given).detach()
        return first[:, None], second[:, None]

    def distance_bias(self, distance: Tensor) -> Tensor:
        """See `PositionMethod.distance_bias`."""
        p, a = self.bounded(most=float("inf"))
        return -p * torch.log1p(a * distance.clamp(min=0))


@register_position_method("kerple_power", stacks=(DECODER,))
class KerplePower(Kerple):
    """The bias -a d^p, with 0 < p <= 2 and a > 0, whose reach has an end whatever the length; see `Kerple`."""

    def distance_bias(self, distance: Tensor) -> Tensor:
        """See `PositionMethod.distance_bias`."""
        p, a = self.bounded(most=2.0)
        # 0^p is 0, but its gradient in p is 0 * ln 0.
        power = torch.where(distance > 0, distance.clamp(min=1).float() ** p, 0.0)
        return -a * power
