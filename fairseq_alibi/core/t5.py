"""The bias of T5 (Raffel et al. 2020, section 2.1): learned for each head and range of distances."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import DECODER, PositionMethod, register_position_method


@register_position_method("t5", stacks=(DECODER,))
class T5(PositionMethod):
    """A learned bias for each head and range of distances, shared by all layers, from 0 on.

    Distances below `buckets` / 2 have a bucket each, those to `longest` share the others, of growing width, the last
    one also all beyond.
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
