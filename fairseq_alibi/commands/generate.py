"""`fairseq-alibi generate`: text that continues a prompt."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import utils

from ..evaluation.generation import continue_prompts, decode_tokens, encode_text, load_text_model
from ..files.data_folders import first_folder, text_options

LONGEST_PROMPT = 2**26  # bytes on standard input
LARGEST_NUMBER = 10**7  # of tokens, beams, ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fairseq-alibi generate`."""
    parser.add_argument("data", metavar="DATA", help="fairseq data folder the model was trained on")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    text = "text to continue; without any, standard input"
    prompts = parser.add_argument("prompts", metavar="PROMPT", nargs="+", default=[], help=text)
    prompts.required = False  # unlike with nargs="*", options may stand before the prompts
    parser.add_argument("--tokens", type=int, default=200, help="new tokens (default 200)")
    parser.add_argument("--stop-at-line-end", action="store_true", help="stop where the line ends")
    parser.add_argument("--sampling", action="store_true", help="draw tokens; the best of --beam drawn texts")
    parser.add_argument("--sampling-topk", type=int, help="draw from the K likeliest (default 10, with --sampling all)")
    parser.add_argument("--sampling-topp", type=float, help="draw from the likeliest that have this probability")
    parser.add_argument("--beam", type=int, help="beam search of this width, 1 is greedy; with --sampling see there")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default 1)")
    parser.add_argument("--lenpen", type=float, default=1.0, help="length penalty of beam search (default 1)")
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0, help="no N tokens come twice (default 0: off)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1)")
    parser.add_argument("--length-scale", help="alibi_length_scale of the model: a number or auto")
    parser.add_argument("--tokenizer", choices=["moses", "nltk", "space", "none"], help="default: as DATA was prepared")
    bpes = ["subword_nmt", "fastbpe", "sentencepiece", "none"]
    parser.add_argument("--bpe", choices=bpes, help="default: as DATA was prepared")
    parser.add_argument("--bpe-codes", help="default: DATA/bpe.codes")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--fp16", action="store_true", help="compute in half precision")


def check_numbers(args: argparse.Namespace) -> None:
    """Checks each number by itself; ValueError names the option and the remedy."""
    for name, least in (("tokens", 1), ("beam", 1), ("sampling_topk", 1), ("no_repeat_ngram_size", 0), ("seed", 0)):
        value = getattr(args, name)
        option = f"--{name.replace('_', '-')}"
        if value is not None and value < least:
            raise ValueError(f"{option} {value}: pass a whole number of at least {least}")
        if value is not None and value > LARGEST_NUMBER and name != "seed":
            raise ValueError(f"{option} {value}: pass a whole number of at most {LARGEST_NUMBER:,}")
    if args.no_repeat_ngram_size == 1:
        raise ValueError("--no-repeat-ngram-size 1: no token would come twice; pass 0 for no limit, or 2 and more")
    if args.seed >= 2**63:
        raise ValueError(f"--seed {args.seed}: pass a whole number below 2 ** 63")
    if not math.isfinite(args.lenpen):
        raise ValueError(f"--lenpen {args.lenpen}: pass a number, 1 for none")
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: pass a number above 0")
    if args.sampling_topp is not None and not 0 < args.sampling_topp <= 1:
        raise ValueError(f"--sampling-topp {args.sampling_topp}: pass a probability above 0, at most 1")


def search_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of fairseq's generation; ValueError if one is wrong, or two contradict each other."""
    check_numbers(args)
    if args.sampling_topk is not None and args.sampling_topp is not None:
        raise ValueError("--sampling-topk and --sampling-topp exclude each other: drop one")
    sampling_option = next((name for name in ("sampling_topk", "sampling_topp") if getattr(args, name) is not None), "")
    if args.beam is not None and sampling_option and not args.sampling:
        option = sampling_option.replace("_", "-")
        raise ValueError(f"--{option} contradicts beam search: drop --beam, or add --sampling")
    sampling = args.sampling or args.beam is None
    topk = args.sampling_topk or (-1 if args.sampling or args.sampling_topp else 10)
    return {
        "beam": args.beam or 1,
        "sampling": sampling,
        "sampling_topk": topk if sampling else -1,
        "sampling_topp": args.sampling_topp or -1.0,
        "temperature": args.temperature,
        "lenpen": args.lenpen,
        "no_repeat_ngram_size": args.no_repeat_ngram_size,
    }


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts among the arguments, else standard input as one prompt, without its final newline; ValueError."""
    if arguments:
        return [decode_argument(text) for text in arguments]
    text = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"the prompt on standard input has more than {LONGEST_PROMPT:,} bytes: pass its end only")
    if not text:
        raise ValueError('no prompt: pass one, or text on standard input, or "" for text from nothing')
    try:
        lines = text.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on standard input is not UTF-8 ({error.reason}): convert it") from error
    return [lines[:-1] if lines.endswith("\n") else lines]


def decode_argument(text: str) -> str:
    """An argument; what Python could not decode in the encoding of the locale is decoded as UTF-8, or ValueError."""
    if not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"a prompt is not UTF-8 ({error.reason}): convert it") from error


def chosen_text_options(args: argparse.Namespace) -> dict[str, Any]:
    """Tokenizer and BPE: as the arguments say, else as the data folder was prepared; ValueError without codes."""
    chosen = text_options(first_folder(args.data))
    for name in ("tokenizer", "bpe", "bpe_codes"):
        value = getattr(args, name)
        if value is not None:
            chosen[name] = None if value == "none" else value
    codes = chosen["bpe_codes"] or chosen.get("sentencepiece_model") or str(first_folder(args.data) / "bpe.codes")
    if chosen["bpe"] and not Path(codes).is_file():
        raise ValueError(f"--bpe {chosen['bpe']}: there are no codes {codes}, name them with --bpe-codes")
    return chosen


def run(args: argparse.Namespace) -> None:
    """Prints prompts with their continuations, an empty line between them."""
    options = search_options(args)
    texts = read_prompts(args.prompts)
    model = load_text_model(args.data, args.checkpoint, args.length_scale, **chosen_text_options(args))
    if args.fp16:
        model.half()
    if torch.cuda.is_available() and not args.cpu:
        model.cuda()
    model.eval()
    types = len(model.tgt_dict)
    if options["sampling_topk"] > types:
        raise ValueError(f"--sampling-topk {options['sampling_topk']}: the dictionary has {types:,} types only")
    prompts = [encode_text(model, text) for text in texts]
    unknown = sum(int((prompt == model.tgt_dict.unk()).sum()) for prompt in prompts)
    if unknown:
        print(f"{unknown:,} of the prompt's {sum(map(len, prompts)):,} tokens are unknown, <unk>", file=sys.stderr)
    utils.set_torch_seed(args.seed)
    continued = continue_prompts(model, prompts, args.tokens, args.stop_at_line_end, **options)
    print("\n\n".join(decode_tokens(model, tokens) for tokens in continued))
