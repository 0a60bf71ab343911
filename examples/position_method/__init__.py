"""A position method of one's own: KERPLE's logarithmic bias (Chi et al. 2022, arXiv 2205.09921).

`--user-dir examples/position_method` loads this file, in every command of fairseq and of fairseq-alibi:

    fairseq-train DATA --user-dir examples/position_method --task language_modeling --arch alibi_lm_tiny \
        --position-method kerple --kerple-start 0.5 ...
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from fairseq_alibi.core import PositionMethod, register_position_method


@dataclass
class KerpleOptions:
    """The options of the method, which `fairseq-train --help` shows."""

    kerple_start: float = field(default=1.0, metadata={"help": "value from which both parameters of a head start"})


@register_position_method("kerple")
class Kerple(PositionMethod):
    """The bias -p * ln(1 + a * (i - j)), with p and a positive and learned for each head, shared by all layers.

    Args:
        num_heads: H.
        start: value from which p and a start, above 0.

    Raises:
        ValueError: a start that is not above 0.
    """

    options = KerpleOptions
    bias_kind = "distance"

    def __init__(self, num_heads: int, start: float = 1.0):
        super().__init__(num_heads)
        if not 0 < start < math.inf:
            raise ValueError(f"--kerple-start must be above 0, not {start}")
        self.log_parameters = nn.Parameter(torch.full((2, num_heads, 1), math.log(start)))

    @classmethod
    def from_options(cls, num_heads, embed_dim, options):
        """See `PositionMethod.from_options`."""
        return cls(num_heads, options.kerple_start)

    def distance_bias(self, distance):
        """See `PositionMethod.distance_bias`: (N,) distances -> (H, N)."""
        p, a = self.log_parameters.exp()
        return -p * torch.log1p(a * distance.clamp(min=0))
