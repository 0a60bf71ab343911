"""A picture of the ALiBi bias that is added to the scores, per head, causal and in the three forms of encoders."""

from pathlib import Path

import torch
from torch import Tensor

from ..core.alibi import ENCODER_FORMS, ALiBi, EncoderALiBi

#: Forms of the bias, in the order of the picture.
FORMS = ("causal", *ENCODER_FORMS)

#: The largest number of heads in a picture.
SHOWN_HEADS = 8

#: The bias with the darkest colour. A key with this bias weighs e^-8 = 0.0003 of what it would weigh without a bias.
DARKEST_BIAS = -8


def alibi_bias(form: str, heads: int, length: int, max_bias: float = 8.0) -> Tensor:
    """The bias of a form, (H, L, L) float32; -inf where a query does not see a key.

    Raises:
        ValueError: see `ALiBi` and `EncoderALiBi`.
    """
    if form == "causal":
        return ALiBi(heads, max_bias).future_mask(length, length)
    return EncoderALiBi(heads, form, max_bias).full_mask(length)


def draw_biases(biases: dict[str, Tensor], path: Path) -> None:
    """Draws biases with a row per form and a column per head; row i of a cell is query i.

    Args:
        biases: (H, L, L) by form. Of more than `SHOWN_HEADS` heads only some are drawn.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heads, length = next(iter(biases.values())).shape[:2]
    shown = sorted({round(n) for n in torch.linspace(0, heads - 1, min(heads, SHOWN_HEADS)).tolist()})
    size = (1.6 * len(shown) + 1.6, 1.7 * len(biases) + 0.5)
    figure, axes = plt.subplots(len(biases), len(shown), figsize=size, squeeze=False, layout="constrained")
    colours = plt.get_cmap("viridis").with_extremes(bad="#cccccc")
    for row, (form, bias) in zip(axes, biases.items()):
        for cell, head in zip(row, shown):
            values = bias[head].masked_fill(bias[head].isinf(), torch.nan)
            image = cell.imshow(values.numpy(), cmap=colours, vmin=DARKEST_BIAS, vmax=0, interpolation="nearest")
            cell.set(xticks=[0, length - 1], yticks=[0, length - 1])
            cell.tick_params(labelsize=7)
        row[0].set_ylabel(f"{form}\nquery", fontsize=9)
    for top, bottom, head in zip(axes[0], axes[-1], shown):
        top.set_title(f"head {head + 1}", fontsize=9)
        bottom.set_xlabel("key", fontsize=9)
    figure.colorbar(image, ax=axes, extend="min", label="bias (grey: not seen)", shrink=0.8, pad=0.02)
    figure.savefig(path, dpi=150)
    plt.close(figure)
