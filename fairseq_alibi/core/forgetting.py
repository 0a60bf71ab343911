"""The Forgetting Transformer and CABLE: biases by key, like that of ALiBi with slopes that the data decide.

Shapes: H heads, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import DECODER, PositionMethod, register_position_method


class Gate(nn.Module):
    """The decay log sigmoid(sign (w_h . x + b_h)) of each token and head: (..., C) -> (..., H) float32, below 0.

    Weights start from 0, and b_h from `start`, so that a model starts with the same decay everywhere, and every other
    weight of it as with any method. `sign` is 1 or -1.
    """

    def __init__(self, embed_dim: int, num_heads: int, start: float, sign: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, embed_dim))
        self.bias = nn.Parameter(torch.full((num_heads,), start))
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.logsigmoid(self.sign * F.linear(x, self.weight, self.bias).float())


@register_position_method("fox", stacks=(DECODER,))
class Fox(PositionMethod):
    """The Forgetting Transformer (Lin et al. 2025, arXiv 2503.02130): c_i - c_j, c the running sum of log forget gates.

    The gates of each layer are sigmoid(w_h . x + b_h) of its input x. With a constant gate this is ALiBi with the slope
    -log(gate). b_h starts from 5, a slope of 0.0067. A gate is below 1, so c falls: `reach.oldest_keys` skips keys.
    """

    bias_kind = "key"
    start, sign = 5.0, 1.0  # `start` and `sign` of `Gate`

    def make_gate(self, embed_dim: int) -> nn.Module:
        """See `PositionMethod.make_gate`."""
        return Gate(embed_dim, self.num_heads, self.start, self.sign)


@register_position_method("cable", stacks=(DECODER,))
class Cable(Fox):
    """CABLE (Veisi et al. 2025): a decay of -softplus(w_h . x + b_h) = log sigmoid(-(w_h . x + b_h)).

    b_h starts from 0, a slope of 0.69.
    """

    start, sign = 0.0, -1.0
