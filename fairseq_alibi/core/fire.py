"""FIRE (Li et al. 2024, arXiv 2310.04418): a learned function of the distance, relative to the query's position.

Shapes: H heads, T queries, S keys, N distances.
"""

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .positions import DECODER, PositionMethod, distances, register_position_method

HIDDEN = 32  # hidden units of the network
KEYS = 2048  # keys whose bias is computed at once, because the hidden units take several times the memory of the bias


@register_position_method("fire", stacks=(DECODER,))
class Fire(PositionMethod):
    """The bias f(ln(|c| d + 1) / (ln(|c| max(i, |m| L0) + 1) + 1e-6)) for query i and key i - d, shared by all layers.

    f is a network of 32 hidden units with a number for each head, L0 the training length; c starts from 0.1, m from 1.
    Up to position |m| L0, and so in most of the training, the bias depends on the distance alone. Positions start
    with the first token of a row. There is no bound under which keys could be skipped.
    """

    bias_kind = "pair"
    gives_bias_of_tiles = True

    def __init__(self, num_heads: int, training_length: int = 512):
        super().__init__(num_heads)
        self.training_length = training_length
        # A generator of its own: the other weights of a model start as with any method.
        generator = torch.Generator().manual_seed(torch.initial_seed())

        def drawn(rows: int, columns: int) -> nn.Parameter:  # as in torch.nn.Linear
            uniform = torch.rand(rows, columns, generator=generator, device="cpu")
            return nn.Parameter((2 * uniform - 1) / math.sqrt(columns))

        # There is no bias of the output: it would be the same for all keys, which softmax ignores.
        self.hidden_weight, self.out_weight = drawn(HIDDEN, 1), drawn(num_heads, HIDDEN)
        self.hidden_bias = nn.Parameter(torch.zeros(HIDDEN))
        self.c, self.m = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, options: Any) -> "Fire":
        """See `PositionMethod.from_options`."""
        return cls(num_heads, options.tokens_per_sample)

    def network(self, x: Tensor) -> Tensor:
        """(...) -> (..., H)."""
        hidden = (x[..., None] * self.hidden_weight[:, 0].float() + self.hidden_bias.float()).relu_()
        return hidden @ self.out_weight.t().float()

    def limit(self) -> Tensor:
        """|m| L0, the position up to which all queries have the same bias."""
        return self.m.float().abs() * self.training_length

    def bias_of_tile(self, positions: Tensor, distance: Tensor) -> Tensor:
        """See `PositionMethod.bias_of_tile`."""
        c = self.c.float().abs()
        scale = (c * torch.maximum(positions.float(), self.limit()) + 1).log() + 1e-6
        logarithm = (c * distance.clamp(min=0) + 1).log()
        parts = [self.network(part / scale[..., None]).movedim(-1, -3) for part in logarithm.split(KEYS, dim=-1)]
        return torch.cat(parts, dim=-1)

    def early_bias(self, distance: Tensor, positions: int) -> Optional[Tensor]:
        """See `PositionMethod.early_bias`."""
        limit, c = self.limit(), self.c.float().abs()
        if positions - 1 > float(limit.detach()):
            return None
        return self.network((c * distance.clamp(min=0) + 1).log() / ((c * limit + 1).log() + 1e-6)).t()

    def pair_bias(self, query_length: int, key_length: int, device: Optional[torch.device] = None) -> Tensor:
        """See `PositionMethod.pair_bias`."""
        positions = torch.arange(key_length - query_length, key_length, device=device)
        return self.bias_of_tile(positions, distances(query_length, key_length, device))
