"""Text that continues a prompt; fairseq's generator, made to read the prompt in one pass.

`Generator` is what fairseq-interactive, fairseq-generate and the hub interface get for a model of this plugin
(`read_prompts_in_one_pass`). It gives the hypotheses and scores of fairseq's own, which reads a prompt token by token.

Shapes: B sentences, R = B * beam hypotheses, V types.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils, search, utils
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor, nn
from tqdm import tqdm

from .decoder import Decoder

#: Numbers in the largest matrix of scores, positions times V, that is made for a prompt.
SCORES = 2**24


class PromptReader(EnsembleModel):
    """fairseq's ensemble of decoders; at the first step it reads a whole prompt, and needs no step inside it.

    Args:
        models: one or more language models.
        eos: what ends a sentence.
        line_end: what the models read where the tokens hold `stand_in`.
        stand_in: see `Generator`.
    """

    def __init__(self, models: Sequence[nn.Module], eos: int, line_end: int, stand_in: Optional[int] = None):
        super().__init__(models)
        self.eos, self.line_end, self.stand_in = eos, line_end, stand_in
        #: (B, n) first tokens of the prompts, as far as the shortest goes; None for no prompt.
        self.prompt: Optional[Tensor] = None
        self.inside = False  # whether the last step was inside the prompt
        self.log_probs: Optional[Tensor] = None  # (B, n, 2) of the prompt's next token and of eos
        #: Whether the end, when it has to come, costs nothing.
        self.free_end = False
        #: What smaller log-probabilities are raised to; None to leave them.
        self.least: Optional[float] = None

    def reads_prompts(self) -> bool:
        """Whether all models have this plugin's decoder, which can read any number of tokens at once."""
        return all(isinstance(getattr(model, "decoder", None), Decoder) for model in self.models)

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        """See `EnsembleModel.forward_decoder`. (R, 1 + step) tokens -> (R, V), None.

        Inside the prompt all is -inf but the prompt's next token, which is to be forced, and eos, which may have to
        come because the longest length is reached.
        """
        tokens = torch.cat([tokens[:, :1], self.as_read(tokens[:, 1:])], dim=1)
        step = tokens.size(1) - 1
        self.inside = self.prompt is not None and step < self.prompt.size(1)
        if not self.inside:
            log_probs, attn = super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
            if self.free_end:
                log_probs[:, self.eos] = 0.0
            return self.raise_to_least(log_probs), attn
        prompt = self.as_read(self.prompt)
        sentences = prompt.size(0)
        # Each prompt is read once; its hypotheses are still alike, so they start from copies of the same keys.
        copies = torch.arange(sentences, device=tokens.device).repeat_interleave(tokens.size(0) // sentences)
        if step == 0:
            self.log_probs = self.read(
                torch.cat([tokens[:: tokens.size(0) // sentences], prompt[:, :-1]], dim=1),
                torch.stack([prompt, torch.full_like(prompt, self.eos)], dim=2),
                incremental_states,
                temperature,
            )
            super().reorder_incremental_state(incremental_states, copies)
        known = torch.stack([prompt[:, step], torch.full_like(prompt[:, step], self.eos)], dim=1)
        log_probs = self.raise_to_least(self.log_probs[:, step])
        return log_probs.new_full((sentences, self.types()), -math.inf).scatter_(1, known, log_probs)[copies], None

    def reorder_incremental_state(self, incremental_states, new_order):
        """See `EnsembleModel.reorder_incremental_state`; inside the prompt there is nothing to be done.

        There all hypotheses of a sentence have the same keys, and no sentence ends. To move them at each step would
        take time in proportion to the square of the prompt.
        """
        if not self.inside:
            super().reorder_incremental_state(incremental_states, new_order)

    def as_read(self, tokens: Tensor) -> Tensor:
        """Tokens with the line ends that the stand-in stands for."""
        return tokens if self.stand_in is None else tokens.masked_fill(tokens == self.stand_in, self.line_end)

    def raise_to_least(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities of at least `least`."""
        return log_probs if self.least is None else log_probs.float().clamp(min=self.least)

    def types(self) -> int:
        """V."""
        return len(self.single_model.decoder.dictionary)

    def read(self, tokens: Tensor, wanted: Tensor, incremental_states, temperature: float) -> Tensor:
        """Reads (B, n) tokens into empty incremental states.

        Returns:
            (B, n, k) log-probabilities, averaged over the models, of the (B, n, k) `wanted` tokens after each position.
        """
        positions = max(1, SCORES // (tokens.size(0) * self.types()))
        features = [
            model.decoder.extract_features_scriptable(tokens, None, state, last=tokens.size(1))[0]
            for model, state in zip(self.models, incremental_states)
        ]
        found = []
        for first in range(0, tokens.size(1), positions):
            chunk = slice(first, first + positions)
            log_probs = []
            for model, x in zip(self.models, features):
                # The temperature divides what fairseq divides: logits, or the features of an adaptive softmax.
                output = model.decoder.output_layer(x[:, chunk]) / temperature
                scores = model.get_normalized_probs((output, None), log_probs=True, sample=None)
                log_probs.append(scores.gather(2, wanted[:, chunk]))
            average = torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))
            found.append(log_probs[0] if len(log_probs) == 1 else average)
        return torch.cat(found, dim=1)


class RepeatBlock(nn.Module):
    """Bans tokens that would repeat an n-gram, but none that is forced.

    fairseq's own looks for the n-gram at the end of its token buffer, which is padding, and so bans nothing on CPU; on
    GPU it bans tokens of a prompt that repeats itself.

    Args:
        size: n.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int) -> Tensor:
        """See `NGramRepeatBlock.forward`: (R, V) `lprobs` with -inf at banned tokens."""
        if step + 1 < self.size:
            return lprobs
        ngrams = tokens[:, : step + 1].unfold(1, self.size, 1)  # (R, number, n)
        last = tokens[:, None, step + 2 - self.size : step + 1]
        rows, places = (ngrams[:, :, :-1] == last).all(dim=2).nonzero(as_tuple=True)
        free = lprobs.isfinite().sum(dim=1)[rows] > 1
        lprobs[rows[free], ngrams[rows, places, -1][free]] = -math.inf
        return lprobs


class Generator(SequenceGenerator):
    """fairseq's `SequenceGenerator`, which reads the prompt, its `prefix_tokens`, in one pass.

    Args:
        models, dictionary, kwargs: as for `SequenceGenerator`.
        lines_in_prompt: whether a line end inside a prompt leaves the sentence open; for fairseq it ends it.
        free_end: whether `eos`, then a token that comes at the longest length only, adds nothing to a score.
    """

    def __init__(self, models, dictionary: Dictionary, lines_in_prompt: bool = False, free_end: bool = False, **kwargs):
        # While fairseq looks, the prompt's line ends are tokens that no text holds.
        stand_in = dictionary.bos() if lines_in_prompt else None
        eos = kwargs.get("eos")
        reader = PromptReader(models, dictionary.eos() if eos is None else eos, dictionary.eos(), stand_in)
        reader.free_end = free_end
        super().__init__(reader, dictionary, **kwargs)
        if isinstance(self.search, search.Sampling):
            # fairseq draws the tokens that it forces too, and fails at one whose probability underflows to 0.
            reader.least = math.log(torch.finfo(torch.float).tiny)
        if self.repeat_ngram_blocker is not None:
            self.repeat_ngram_blocker = RepeatBlock(self.repeat_ngram_blocker.no_repeat_ngram_size)

    def _generate(self, sample, prefix_tokens=None, constraints=None, bos_token=None):
        if prefix_tokens is not None and self.model.stand_in is not None:
            prefix_tokens = prefix_tokens.masked_fill(prefix_tokens == self.model.line_end, self.model.stand_in)
        if prefix_tokens is not None and self.model.reads_prompts():
            # As far as every row has a token and goes on after it: no row can end inside.
            goes_on = (prefix_tokens != self.pad) & (prefix_tokens != self.eos)
            length = int(goes_on.all(dim=0).long().cumprod(dim=0).sum())
            self.model.prompt = prefix_tokens[:, :length] if length else None
        try:
            finalized = super()._generate(sample, prefix_tokens, constraints, bos_token)
        finally:
            self.model.prompt = self.model.log_probs = None
        for hypothesis in (one for sentence in finalized for one in sentence):
            hypothesis["tokens"] = self.model.as_read(hypothesis["tokens"])
        return finalized

    def _prefix_tokens(self, step, lprobs, scores, tokens, prefix_tokens, beam_size):
        """See `SequenceGenerator._prefix_tokens`: makes the prompt's next token the only possible one."""
        if self.model.stand_in is not None:
            line_ends = (prefix_tokens[:, step] == self.model.stand_in).repeat_interleave(beam_size)
            lprobs[line_ends, self.model.stand_in] = lprobs[line_ends, self.model.line_end]
        if self.model.free_end:  # where another row is still in its prompt fairseq lets shorter texts end too early
            lprobs[:, self.eos] = -math.inf
        return super()._prefix_tokens(step, lprobs, scores, tokens, prefix_tokens, beam_size)


def read_prompts_in_one_pass(task) -> None:
    """Makes `Generator` what the task's `build_generator` builds, unless it is told another class.

    The task is all that fairseq's commands ask for a generator. A task that builds none stays as it is.
    """
    if hasattr(task, "build_generator"):
        vars(task).setdefault("build_generator", partial(task.build_generator, seq_gen_cls=Generator))


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
    if not Path(checkpoint).is_file():
        raise ValueError(f"there is no checkpoint {checkpoint}: name a checkpoint_best.pt or checkpoint_last.pt")
    if not (Path(data) / "dict.txt").is_file():
        raise ValueError(f"there is no {Path(data) / 'dict.txt'}: name the data folder the model was trained on")
    overrides = {"data": data, **overrides}
    if length_scale is not None:
        overrides["alibi_length_scale"] = length_scale
    try:
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], arg_overrides=overrides)
    except Exception as error:  # whatever a broken file raises deep inside torch or fairseq
        reason = " ".join(str(error).split()) or repr(error)
        if "size mismatch" in reason:
            types = len(Dictionary.load(str(Path(data) / "dict.txt")))
            reason = f"it does not fit the {types:,} types of {data}: name the data folder it was trained on"
        raise ValueError(f"{checkpoint} cannot be loaded: {reason[:300]}") from error
    if cfg.task._name != "language_modeling":
        raise ValueError(f"{checkpoint} was trained for '{cfg.task._name}', not for language_modeling")
    if length_scale is not None and str(cfg.model.get("alibi_length_scale")) != length_scale:
        raise ValueError(f"--length-scale {length_scale}: the model of {checkpoint} has no such option, drop it")
    return GeneratorHubInterface(cfg, task, models)


def text_options(data: Path) -> dict[str, Optional[str]]:
    """Tokenizer and BPE of a data folder, as scripts/prepare_text.sh left word of them; None for none."""
    codes, marker = data / "bpe.codes", data / "prepared.json"
    settings = json.loads(marker.read_text(encoding="utf-8"))["settings"] if marker.is_file() else {}
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
            raise ValueError(f"generation failed: {' '.join(str(error).split())[:300]}") from error
        made.update(zip(batch, results))
    print("\n\n".join(decode(model, made[i]) for i in range(len(prompts))))
