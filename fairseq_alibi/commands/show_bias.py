"""`fairseq-alibi show-bias`: a picture of the ALiBi bias."""

import argparse
import math
from pathlib import Path

from ..evaluation.plots import FORMS, alibi_bias, draw_biases
from ..files.results import check_absent, written_whole
from .arguments import positive_integer

WRITES = "output"  # the argument that a lock is taken on
LONGEST_PICTURE = 4096  # tokens of which a picture has a point for each cell of the bias
MOST_HEADS = 4096
LARGEST_BIAS = 2**29  # heads x queries x keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi show-bias`."""
    add = parser.add_argument
    add("--heads", type=positive_integer, default=8, help="number of heads (default 8)")
    add("--length", type=positive_integer, default=32, help="tokens (default 32)")
    add("--form", choices=FORMS, action="append", help="may be repeated (default: all that the heads allow)")
    add("--max-bias", type=float, default=8.0, help="exponent range of the slopes (default 8)")
    add("--output", type=Path, default=Path("bias.png"), help="picture (default bias.png)")
    add("--overwrite", action="store_true", help="replace a picture that is there")


def run(args: argparse.Namespace) -> None:
    """Draws the picture and prints its name."""
    check_absent([args.output], args.overwrite)
    if args.length > LONGEST_PICTURE:
        raise ValueError(f"--length {args.length:,} has more cells than a picture has points: pass at most 4,096")
    if args.heads > MOST_HEADS or args.heads * args.length**2 > LARGEST_BIAS:
        raise ValueError(f"{args.heads:,} heads of {args.length:,} tokens take too much memory: pass fewer")
    if not 0 < args.max_bias < math.inf:
        raise ValueError(f"--max-bias {args.max_bias}: pass a number above 0, the paper's is 8")
    if not args.output.suffix:
        raise ValueError(f"--output {args.output}: give the picture's name a suffix, as in {args.output}.png")
    forms = args.form or [form for form in FORMS if form != "one_sided" or args.heads % 2 == 0]
    biases = {form: alibi_bias(form, args.heads, args.length, args.max_bias) for form in forms}
    with written_whole(args.output) as partial:
        draw_biases(biases, partial)
    print(f"{args.output}: the bias of {', '.join(biases)}, {args.heads} heads, {args.length} tokens; grey: not seen")
