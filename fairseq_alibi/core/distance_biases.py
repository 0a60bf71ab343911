"""Position methods whose bias is a function of the distance: T5, KERPLE and Sandwich. Shapes: H heads, N distances."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import DECODER, PositionMethod, register_position_method

KERPLE_LEAST = 0.01  # the least value of a parameter
SANDWICH_WIDTH = 128  # width of the embeddings, whatever the width of the model
SANDWICH_CHUNK = 8192  # distances whose cosines are computed at once


@register_position_method("t5", stacks=(DECODER,))
class T5(PositionMethod):
    """T5 (Raffel et al. 2020, section 2.1): a learned bias, from 0 on, for each head and range of distances.

    All layers share it. Distances below `buckets` / 2 have a bucket each, those to `longest` share the others, of
    growing width, the last one also all beyond.
    """

    bias_kind = "distance"
    paper_rank = 2

    def __init__(self, num_heads: int, buckets: int = 32, longest: int = 128):
        super().__init__(num_heads)
        self.buckets, self.longest = buckets, longest
        self.bucket_bias = nn.Parameter(torch.zeros(buckets, num_heads))

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance, int64; that of 0 for keys in the future."""
        exact = self.buckets // 2
        octaves = torch.log(distance.clamp(min=exact).double() / exact) / math.log(self.longest / exact)
        shared = (exact + (octaves * (self.buckets - exact)).long()).clamp(max=self.buckets - 1)
        return torch.where(distance < exact, distance.clamp(min=0), shared)

    def distance_bias(self, distance: Tensor) -> Tensor:
        """See `PositionMethod.distance_bias`."""
        return F.embedding(self.bucket(distance), self.bucket_bias).t()


@register_position_method("kerple", stacks=(DECODER,))
class Kerple(PositionMethod):
    """KERPLE (Chi et al. 2022, arXiv 2205.09921): the bias -p ln(1 + a d), p and a learned for each head.

    All layers share them. A parameter below 0.01 counts as 0.01, and its gradient flows as if it did not, so that it
    can rise again. At the start p is uniform in (0, 2) and a in (0, 1), by the seed of torch, without a draw from its
    generator.

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
        used = torch.stack([given[0].clamp(KERPLE_LEAST, most), given[1].clamp(min=KERPLE_LEAST)])
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


@register_position_method("sandwich", stacks=(DECODER,))
class Sandwich(PositionMethod):
    """Sandwich (Chi et al. 2023, arXiv 2212.10356), the product of two sinusoidal embeddings as a bias.

    That of head h = 1, ..., H is the sum of cos(d / 10000^(2n / 128)) over n = 0, ..., 63, divided by 8 h / H. It falls
    like -ln(d) at first, but it is never below that of d = 0 minus 128 H / (8 h): `reach.distance_reach` skips keys
    only where a head's bias differs by more than queries and keys can.
    """

    bias_kind = "distance"

    def distance_bias(self, distance: Tensor) -> Tensor:
        """See `PositionMethod.distance_bias`."""
        # In float64, which Apple's GPUs do not have: angles are as large as distances.
        device = "cpu" if distance.device.type == "mps" else distance.device
        exponents = torch.arange(0, SANDWICH_WIDTH, 2, dtype=torch.float64, device=device) / SANDWICH_WIDTH
        frequencies = 10000**-exponents
        parts = distance.abs().to(device).double().split(SANDWICH_CHUNK)
        sums = torch.cat([(part[:, None] * frequencies).cos_().sum(1) for part in parts])
        heads = torch.arange(1, self.num_heads + 1, dtype=torch.float64, device=device)[:, None]
        return (sums * self.num_heads / (8 * heads)).float().to(distance.device)
