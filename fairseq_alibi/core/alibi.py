"""ALiBi, attention with linear biases (Press et al. 2022), in decoders and encoders. Shapes: H heads, N distances."""

import math
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import DECODER, ENCODER, PositionMethod, option_field, register_position_method


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """Slopes m_h of ALiBi, one per head, steepest first (Press et al. 2022, section 3): (H,) float64.

    For a power of two they are `2 ** (-max_bias * h / num_heads)`, h = 1..H. For any other number of heads they are the
    slopes of the nearest lower power of two P, followed by the 1st, 3rd, 5th, ... of the 2P slopes. A larger `max_bias`
    reaches further. ValueError: fewer than one head, or a `max_bias` that is not a positive, finite number.
    """
    if num_heads < 1:
        raise ValueError(f"the number of heads must be at least 1, not {num_heads}")
    if not 0 < max_bias < math.inf:
        raise ValueError(f"alibi_max_bias must be a positive number (the paper's is 8), not {max_bias}")
    power = 1 << (num_heads.bit_length() - 1)

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-max_bias * h / count) for h in range(1, count + 1)]

    slopes = geometric(power) + geometric(2 * power)[::2]
    return torch.tensor(slopes[:num_heads], dtype=torch.float64, device="cpu")  # on the meta device they would be lost


class ScaledSlopes:
    """Slopes that may be divided by a length scale: position interpolation for ALiBi (arXiv 2310.13017).

    `unscaled` are (H,) float64. The scale "auto" is evaluation length over training length, where that is more than 1;
    ValueError for one that is no positive number and not "auto".
    """

    def __init__(self, unscaled: Tensor, length_scale: Union[float, str] = 1.0, training_length: Optional[int] = None):
        try:
            scale = 1.0 if length_scale == "auto" else float(length_scale)
        except ValueError:
            scale = math.nan
        if not 0 < scale < math.inf:
            raise ValueError(f"alibi_length_scale must be a positive number or auto, not {length_scale}")
        self.training_length = training_length if length_scale == "auto" else None
        self.unscaled, self.scale = unscaled, scale

    def set_evaluation_length(self, length: int) -> None:
        """Sets the scale, if it is "auto", for windows of so many tokens."""
        if self.training_length:
            self.scale = max(1.0, length / self.training_length)

    def values(self, device: Optional[torch.device] = None) -> Tensor:
        """(H,) float32 slopes, divided by the scale."""
        return (self.unscaled / self.scale).float().to(device, non_blocking=True)


@dataclass
class SlopeOptions:
    """Options of ALiBi in any stack."""

    alibi_max_bias: float = option_field(
        8.0, "exponent range of the ALiBi slopes, which lie between 1 and 2 ** -alibi_max_bias"
    )
    alibi_length_scale: str = option_field(
        "1.0",
        "divides the ALiBi slopes, to reach further than in training; to be overridden at evaluation: a "
        "number, or auto for evaluation length over training length",
    )
    alibi_learned_slopes: bool = option_field(
        False, "learn the slopes: those of a language model, or of an encoder with the bias two_slopes"
    )


@dataclass
class ALiBiOptions(SlopeOptions):
    """Options of ALiBi in a decoder."""

    alibi_heads: Optional[int] = option_field(
        None, "number of heads of the decoder with a bias, the first ones; the others have none (default: all have one)"
    )


@register_position_method("alibi", stacks=(DECODER,))
class ALiBi(PositionMethod):
    """Attention with linear biases: -m_h * (i - j) is added to the score of query i against key j <= i.

    No buffer, no embedding, no longest length, and no parameter unless the slopes are learned (Press et al. 2022,
    section 3; with learned slopes models extrapolate worse, as it says). The bias is computed from distances, not as
    one vector m_h * j per head: the two differ by a constant per row, which softmax ignores, but distances keep the
    numbers of near tokens small and so exact in half precision too.

    The first `heads` heads have a bias, with the slopes of a model of that many, the others have slope 0, which is
    none. `learned` slopes are parameters, as logarithms, that start from the fixed ones. A slope stays above 0, so the
    bias falls without end and `reach` holds as it is. ValueError: see `alibi_slopes` and `ScaledSlopes`, or too many
    heads.
    """

    options = ALiBiOptions
    bias_kind = "linear"
    paper_rank = 1

    def __init__(
        self,
        num_heads: int,
        max_bias: float = 8.0,
        length_scale: Union[float, str] = 1.0,
        training_length: Optional[int] = None,
        heads: Optional[int] = None,
        learned: bool = False,
    ):
        super().__init__(num_heads)
        heads = num_heads if heads is None else heads
        if not 0 < heads <= num_heads:
            raise ValueError(f"alibi_heads must be from 1 to the number of heads, {num_heads}, not {heads}")
        unscaled = F.pad(alibi_slopes(heads, max_bias), (0, num_heads - heads))
        self.fixed = ScaledSlopes(unscaled, length_scale, training_length)  # no buffer: not part of a checkpoint
        self.log_slopes = nn.Parameter(alibi_slopes(heads, max_bias).log().float()) if learned else None

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, options: Any) -> "ALiBi":
        """See `PositionMethod.from_options`."""
        scale, length, learned = options.alibi_length_scale, options.tokens_per_sample, options.alibi_learned_slopes
        return cls(num_heads, options.alibi_max_bias, scale, length, options.alibi_heads, learned)

    def set_evaluation_length(self, length: int) -> None:
        """See `ScaledSlopes.set_evaluation_length`."""
        self.fixed.set_evaluation_length(length)

    def slopes(self, device: Optional[torch.device] = None) -> tuple[Tensor, Optional[Tensor]]:
        """See `PositionMethod.slopes`; keys after the query are not seen."""
        if self.log_slopes is None:
            return self.fixed.values(device), None
        return F.pad(self.log_slopes.float().exp() / self.fixed.scale, (0, self.num_heads - len(self.log_slopes))), None


#: The three forms of the bias for keys on both sides, which the authors describe (their repository, issue 5).
ENCODER_FORMS = ("symmetric", "one_sided", "two_slopes")


@dataclass
class EncoderALiBiOptions(SlopeOptions):
    """Options of ALiBi in an encoder."""

    alibi_encoder_bias: str = option_field(
        ENCODER_FORMS[0],
        "the bias for keys on both sides: symmetric: that of the distance; one_sided: half of the heads "
        "see what is before, half what is after; two_slopes: each head has a slope for either side",
        choices=ENCODER_FORMS,
    )


@register_position_method("alibi", stacks=(ENCODER,))
class EncoderALiBi(PositionMethod):
    """ALiBi where a query sees keys on both sides: a bias of -left_h * (i - j) before it, -right_h * (j - i) after it.

    symmetric   left and right are the slopes of ALiBi.
    one_sided   half of the heads see only keys before the query, half only those after it, itself included; both
                halves have the slopes of H / 2 heads.
    two_slopes  the slopes of 2 H heads, in turn left and right; they may be learned, as sigmoids.

    ValueError: see `alibi_slopes` and `ScaledSlopes`; an unknown form; an odd number of heads for one_sided; learned
    slopes of another form.
    """

    options = EncoderALiBiOptions
    bias_kind = "linear"
    paper_rank = 1

    def __init__(
        self,
        num_heads: int,
        form: str = ENCODER_FORMS[0],
        max_bias: float = 8.0,
        length_scale: Union[float, str] = 1.0,
        training_length: Optional[int] = None,
        learned: bool = False,
    ):
        super().__init__(num_heads)
        if form not in ENCODER_FORMS:
            raise ValueError(f"alibi_encoder_bias must be one of {', '.join(ENCODER_FORMS)}, not {form}")
        if form == "one_sided" and num_heads % 2:
            raise ValueError(f"alibi_encoder_bias one_sided needs an even number of heads, not {num_heads}")
        if learned and form != "two_slopes":
            raise ValueError(f"learned slopes are for alibi_encoder_bias two_slopes, not {form}")
        self.form = form
        heads = {"symmetric": num_heads, "one_sided": num_heads // 2, "two_slopes": 2 * num_heads}[form]
        self.fixed = ScaledSlopes(alibi_slopes(heads, max_bias), length_scale, training_length)
        self.slope_logits: Optional[nn.Parameter] = None
        if learned:
            self.slope_logits = nn.Parameter(torch.empty(2, num_heads))
            with torch.no_grad():
                self.slope_logits.copy_(pairs(self.fixed.unscaled).logit())

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, options: Any) -> "EncoderALiBi":
        """See `PositionMethod.from_options`."""
        scale, length, learned = options.alibi_length_scale, options.tokens_per_sample, options.alibi_learned_slopes
        return cls(num_heads, options.alibi_encoder_bias, options.alibi_max_bias, scale, length, learned)

    def set_evaluation_length(self, length: int) -> None:
        """See `ScaledSlopes.set_evaluation_length`."""
        self.fixed.set_evaluation_length(length)

    def slopes(self, device: Optional[torch.device] = None) -> tuple[Tensor, Optional[Tensor]]:
        """See `PositionMethod.slopes`."""
        if self.slope_logits is not None:
            left, right = self.slope_logits.sigmoid() / self.fixed.scale
            return left, right
        slopes = self.fixed.values(device)
        if self.form == "symmetric":
            return slopes, slopes
        if self.form == "one_sided":
            blind = torch.full_like(slopes, math.inf)
            return torch.cat([slopes, blind]), torch.cat([blind, slopes])
        left, right = pairs(slopes)
        return left, right


def pairs(slopes: Tensor) -> Tensor:
    """(2 H,) slopes -> (2, H): the steepest left, the next right, and so on."""
    return slopes.sort(descending=True).values.view(-1, 2).t()
