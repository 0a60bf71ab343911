"""Text that continues a prompt, plain text in and out."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import tasks, utils
from fairseq.checkpoint_utils import overwrite_args_by_name
from fairseq.data.data_utils import collate_tokens
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor
from tqdm import tqdm

from ..files.inputs import describe_model, load_model, one_line, read_checkpoint
from ..models.decoder import Decoder
from ..models.generator import Generator


def load(
    data: str, checkpoint: str, length_scale: Optional[str] = None, **overrides: Optional[str]
) -> GeneratorHubInterface:
    """A language model with its dictionary, tokenizer and BPE.

    Args:
        data: fairseq data folder.
        checkpoint: of a language model.
        length_scale: the model's `alibi_length_scale`, if it is to be another.
        overrides: `tokenizer`, `bpe` and `bpe_codes`, None for none.

    Raises:
        ValueError: a file is missing or no checkpoint, or the two do not fit together.
    """
    state = read_checkpoint(checkpoint)
    describe_model(checkpoint, state)  # refuses a model of another task
    overwrite_args_by_name(state["cfg"], overrides)
    scale = {} if length_scale is None else {"alibi_length_scale": length_scale}
    model = load_model(checkpoint, state, data, scale)
    if scale and not isinstance(model.decoder, Decoder):
        raise ValueError(f"--length-scale {length_scale}: the model of {checkpoint} has no such option, drop it")
    try:
        return GeneratorHubInterface(state["cfg"], tasks.setup_task(state["cfg"].task), [model])
    except (Exception, SystemExit) as error:  # a library is missing; codes are none, at which subword-nmt exits
        given = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in overrides.items() if value)
        reason = "see above" if isinstance(error, SystemExit) else one_line(error)
        raise ValueError(f"{given} cannot be used ({reason}): name others") from error


def text_options(data: Path) -> dict[str, Optional[str]]:
    """Tokenizer and BPE of a data folder, as scripts/prepare_text.sh left word of them; None for none.

    Raises:
        ValueError: the word that was left cannot be read.
    """
    codes, marker = data / "bpe.codes", data / "prepared.json"
    try:
        settings = dict(json.loads(marker.read_text(encoding="utf-8"))["settings"]) if marker.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{marker} cannot be read ({one_line(error)}): prepare the folder anew") from error
    if codes.is_file():
        return {"tokenizer": "moses", "bpe": "subword_nmt", "bpe_codes": str(codes)}
    return {"tokenizer": settings.get("tokenizer"), "bpe": None, "bpe_codes": None}


def encode(model: GeneratorHubInterface, text: str) -> Tensor:
    """Text -> (n,) tokens. A line break is a line end, eos; the last line stays open."""
    tokens = torch.cat([model.encode(line) for line in text.split("\n")])[:-1]
    # The words <s> and <pad> of a text are not fairseq's.
    special = (tokens == model.tgt_dict.bos()) | (tokens == model.tgt_dict.pad())
    return tokens.masked_fill(special, model.tgt_dict.unk())


def decode(model: GeneratorHubInterface, tokens: Tensor) -> str:
    """(n,) tokens -> text: the reverse of `encode`, as far as the tokenizer has one."""
    lines: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == model.tgt_dict.eos():
            lines.append([])
        else:
            lines[-1].append(token)
    return "\n".join(model.decode(torch.tensor(line, dtype=torch.long)) for line in lines)


def generate(
    model: GeneratorHubInterface,
    prompts: list[Tensor],
    tokens: int,
    stop_at_line_end: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Continues prompts, all in one batch, by `tokens` new tokens each.

    Args:
        model: see `load`.
        prompts: (n,) tokens each, n from 0 on.
        tokens: new tokens; past line ends, so that exactly as many are made.
        stop_at_line_end: ends each where its line ends, or after `tokens`.
        options: of fairseq's generation: beam, sampling, sampling_topk, temperature, lenpen, ...

    Returns:
        For each prompt itself and the continuation, (n + new,) tokens, without the line end at which it stopped.

    Raises:
        ValueError: prompt and new tokens are longer than the model's longest sequence.
    """
    dictionary, device = model.tgt_dict, model.device
    longest = max(map(len, prompts))
    length = longest + tokens
    limit = min(one.max_decoder_positions() for one in model.models)
    if length >= limit:
        raise ValueError(
            f"a prompt of {longest:,} tokens and {tokens:,} new ones are too many for a model built with a longest "
            f"sequence of {limit:,}: shorten them, or train without --max-target-positions"
        )
    for one in model.models:
        if isinstance(one.decoder, Decoder):  # it may scale its slopes to the length
            one.decoder.set_evaluation_length(length)
    arguments = argparse.Namespace(**options, max_len_a=0, max_len_b=length, min_len=1 if stop_at_line_end else length)
    # bos is never a target, and so nothing that a model wants to end with.
    ending = {"lines_in_prompt": True} if stop_at_line_end else {"eos": dictionary.bos(), "free_end": True}
    generator = model.task.build_generator(model.models, arguments, seq_gen_cls=Generator, extra_gen_cls_kwargs=ending)
    prefix = collate_tokens(prompts, dictionary.pad()).to(device)
    with tqdm(total=length, unit=" tokens", disable=None) as bar:
        last_layer = model.models[0].decoder.layers[-1]
        # fairseq asks once more for what ends the sentences
        hook = last_layer.register_forward_hook(lambda _, inputs, __: bar.update(min(len(inputs[0]), length - bar.n)))
        try:
            sample = {"net_input": {"src_tokens": prefix}}
            finalized = model.task.inference_step(generator, model.models, sample, prefix_tokens=prefix)
        finally:
            hook.remove()
    # A prompt shorter than the longest was continued further than asked for.
    return [
        hypotheses[0]["tokens"][:-1][: len(prompt) + tokens].cpu() for prompt, hypotheses in zip(prompts, finalized)
    ]


def check_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options of fairseq's generation for those of the command.

    Raises:
        ValueError: names the option, what is wrong and the remedy.
    """
    for name, least in (("tokens", 1), ("beam", 1), ("sampling_topk", 1), ("no_repeat_ngram_size", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: pass a whole number of at least {least}")
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
    if args.sampling_topk is not None and args.sampling_topp is not None:
        raise ValueError("--sampling-topk and --sampling-topp exclude each other: drop one")
    given = next((name for name in ("sampling_topk", "sampling_topp") if getattr(args, name) is not None), None)
    if args.beam is not None and given and not args.sampling:
        raise ValueError(f"--{given.replace('_', '-')} contradicts beam search: drop --beam, or add --sampling")
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


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts given as arguments or, for none, all of standard input as one, without its final newline.

    Raises:
        ValueError: there is none.
    """
    if given:
        return list(given)
    text = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    if not text:
        raise ValueError('no prompt: pass one, or text on standard input, or "" for text from nothing')
    try:
        lines = text.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on standard input is not UTF-8 ({error.reason}): convert it") from error
    return [lines[:-1] if lines.endswith("\n") else lines]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi generate`."""
    parser.add_argument("data", metavar="DATA", help="fairseq data folder the model was trained on")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    prompts = parser.add_argument(
        "prompts", metavar="PROMPT", nargs="+", default=[], help="text to continue; without any, standard input"
    )
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
    parser.add_argument("--bpe", choices=["subword_nmt", "fastbpe", "none"], help="default: as DATA was prepared")
    parser.add_argument("--bpe-codes", help="default: DATA/bpe.codes")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--fp16", action="store_true", help="compute in half precision")


def main(args: argparse.Namespace) -> None:
    """`fairseq-alibi generate`: prints prompts with their continuations, an empty line between them."""
    options = check_arguments(args)
    texts = read_prompts(args.prompts)
    chosen = text_options(Path(args.data))
    for name in ("tokenizer", "bpe", "bpe_codes"):
        value = getattr(args, name)
        chosen[name] = chosen[name] if value is None else None if value == "none" else value
    codes = chosen["bpe_codes"] or str(Path(args.data) / "bpe.codes")
    if chosen["bpe"] and not Path(codes).is_file():
        raise ValueError(f"--bpe {chosen['bpe']}: there are no codes {codes}, name them with --bpe-codes")
    model = load(args.data, args.checkpoint, args.length_scale, **chosen)
    if args.fp16:
        model.half()
    if torch.cuda.is_available() and not args.cpu:
        model.cuda()
    model.eval()
    types = len(model.tgt_dict)
    if options["sampling_topk"] > types:
        raise ValueError(f"--sampling-topk {options['sampling_topk']}: the dictionary has {types:,} types only")

    prompts = [encode(model, text) for text in texts]
    unknown = sum(int((prompt == model.tgt_dict.unk()).sum()) for prompt in prompts)
    if unknown:
        print(f"{unknown:,} of the prompt's {sum(map(len, prompts)):,} tokens are unknown, <unk>", file=sys.stderr)
    utils.set_torch_seed(args.seed)
    # Beam search compares whole texts, so it must not go further than asked for: only equal lengths share a batch.
    batches: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        batches.setdefault(len(prompt) if options["beam"] > 1 else 0, []).append(i)
    made: dict[int, Tensor] = {}
    for batch in batches.values():
        try:
            results = generate(model, [prompts[i] for i in batch], args.tokens, args.stop_at_line_end, **options)
        except RuntimeError as error:  # memory, or nothing is left to draw from
            raise ValueError(f"generation failed: {one_line(error)}") from error
        made.update(zip(batch, results))
    print("\n\n".join(decode(model, made[i]) for i in range(len(prompts))))
