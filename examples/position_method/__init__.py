"""A position method of one's own: a Gaussian window around each query (Guo et al. 2019, "Gaussian Transformer").

`--user-dir examples/position_method` loads this file, in every command of fairseq and of fairseq-alibi:

    fairseq-train DATA --user-dir examples/position_method --task language_modeling --arch alibi_lm_tiny \
        --position-method gaussian --gaussian-width 50 ...
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from fairseq_alibi.core import PositionMethod, register_position_method


@dataclass
class GaussianOptions:
    """The options of the method, which `fairseq-train --help` shows."""

    gaussian_width: float = field(default=100.0, metadata={"help": "width in tokens from which each head starts"})


@register_position_method("gaussian")
class Gaussian(PositionMethod):
    """The bias -(i - j)^2 / (2 w^2), with a width w that is learned for each head and shared by all layers.

    Args:
        num_heads: H.
        width: value from which w starts, above 0.

    Raises:
        ValueError: a width that is not above 0.
    """

    options = GaussianOptions
    bias_kind = "distance"

    def __init__(self, num_heads: int, width: float = 100.0):
        super().__init__(num_heads)
        if not 0 < width < math.inf:
            raise ValueError(f"--gaussian-width must be above 0, not {width}")
        self.log_width = nn.Parameter(torch.full((num_heads, 1), math.log(width)))

    @classmethod
    def from_options(cls, num_heads, embed_dim, options):
        """See `PositionMethod.from_options`."""
        return cls(num_heads, options.gaussian_width)

    def distance_bias(self, distance):
        """See `PositionMethod.distance_bias`: (N,) distances -> (H, N)."""
        return -((distance / self.log_width.exp()) ** 2) / 2
