"""A picture of the ALiBi bias: what is added to the scores, head by head, causal and in the three forms of encoders."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..commands.arguments import positive_integer
from ..core.positions import ALiBi, EncoderALiBi
from ..files.results import written_whole

#: Forms of the bias, in the order of the picture.
FORMS = ("causal", *EncoderALiBi.FORMS)

#: Heads that a picture has room for.
SHOWN = 8

#: Bias with the darkest colour: a key with it weighs e^-8, 0.0003, of what it would weigh without.
DARKEST = -8


def bias_of(form: str, heads: int, length: int, max_bias: float = 8.0) -> Tensor:
    """The bias of a form, (H, L, L) float32; -inf where a head sees nothing.

    Raises:
        ValueError: see `ALiBi` and `EncoderALiBi`.
    """
    if form == "causal":
        return ALiBi(heads, max_bias).future_mask(length, length)
    return EncoderALiBi(heads, form, max_bias).full_mask(length, length)


def draw(biases: dict[str, Tensor], path: Path) -> None:
    """Draws a row for each form and a column for each head, or for some of them; row i of a cell is query i."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heads, length = next(iter(biases.values())).shape[:2]
    shown = sorted({round(n) for n in torch.linspace(0, heads - 1, min(heads, SHOWN)).tolist()})
    size = (1.6 * len(shown) + 1.6, 1.7 * len(biases) + 0.5)
    figure, axes = plt.subplots(len(biases), len(shown), figsize=size, squeeze=False, layout="constrained")
    colours = plt.get_cmap("viridis").with_extremes(bad="#cccccc")
    for row, (form, bias) in zip(axes, biases.items()):
        for cell, head in zip(row, shown):
            values = bias[head].masked_fill(bias[head].isinf(), torch.nan)
            image = cell.imshow(values.numpy(), cmap=colours, vmin=DARKEST, vmax=0, interpolation="nearest")
            cell.set(xticks=[0, length - 1], yticks=[0, length - 1])
            cell.tick_params(labelsize=7)
        row[0].set_ylabel(f"{form}\nquery", fontsize=9)
    for top, bottom, head in zip(axes[0], axes[-1], shown):
        top.set_title(f"head {head + 1}", fontsize=9)
        bottom.set_xlabel("key", fontsize=9)
    figure.colorbar(image, ax=axes, extend="min", label="bias (grey: not seen)", shrink=0.8, pad=0.02)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--heads", type=positive_integer, default=8, help="number of heads (default 8)")
    parser.add_argument("--length", type=positive_integer, default=32, help="tokens (default 32)")
    parser.add_argument(
        "--form", choices=FORMS, action="append", help="may be repeated (default: all that the heads allow)"
    )
    parser.add_argument("--max-bias", type=float, default=8.0, help="exponent range of the slopes (default 8)")
    parser.add_argument("--output", type=Path, default=Path("bias.png"), help="picture (default bias.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that is there")


def main(args: argparse.Namespace) -> None:
    """Draws the picture.

    Raises:
        ValueError: bad input, or the picture is there already.
    """
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists: pass --overwrite to replace it, or another --output")
    if args.length > 4096:
        raise ValueError(f"--length {args.length:,} has more cells than a picture has points: up to 4,096 can be seen")
    forms = args.form or [form for form in FORMS if form != "one_sided" or args.heads % 2 == 0]
    biases = {form: bias_of(form, args.heads, args.length, args.max_bias) for form in forms}
    with written_whole(args.output) as partial:
        draw(biases, partial)
    print(f"{args.output}: the bias of {', '.join(biases)}, {args.heads} heads, {args.length} tokens; grey: not seen")
