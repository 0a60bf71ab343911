"""Text that continues a prompt, plain text in and out."""

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Optional

import torch
from fairseq import tasks
from fairseq.checkpoint_utils import overwrite_args_by_name
from fairseq.data.data_utils import collate_tokens
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor
from tqdm import tqdm

from ..core.reach import reach_of_excess
from ..files.checkpoints import describe_model, load_model, read_checkpoint
from ..files.errors import one_line
from ..models.decoder import AlibiDecoder
from ..models.generator import Generator
from .reach_measurement import least_slopes_of

LONG = 100_000  # tokens from which on it is asked what a bounded cache keeps of them


def load_text_model(
    data: str, checkpoint: str, length_scale: Optional[str] = None, **text_options: Any
) -> GeneratorHubInterface:
    """Loads a model with its dictionary, tokenizer and BPE for `continue_prompts`; ValueError if they do not fit."""
    state = read_checkpoint(checkpoint)
    describe_model(checkpoint, state)  # raises an error for a model of another task
    overwrite_args_by_name(state["cfg"], text_options)
    scale = {} if length_scale is None else {"alibi_length_scale": length_scale}
    model = load_model(checkpoint, state, data, scale)
    if scale and not isinstance(model.decoder, AlibiDecoder):
        raise ValueError(f"--length-scale {length_scale}: the model of {checkpoint} has no such option, drop it")
    try:
        return GeneratorHubInterface(state["cfg"], tasks.setup_task(state["cfg"].task), [model])
    except (Exception, SystemExit) as error:  # a library is missing, or subword-nmt exits because of invalid codes
        options = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in text_options.items() if value)
        reason = "see above" if isinstance(error, SystemExit) else one_line(error)
        raise ValueError(f"{options} cannot be used ({reason}): name others") from error


def encode_text(model: GeneratorHubInterface, text: str) -> Tensor:
    """Text -> (n,) tokens. A line break becomes an end of sentence; the last line has none."""
    # As in the preparation: other white space as a part of units would glue words together.
    tokens = torch.cat([model.encode(re.sub(r"\s", " ", line)) for line in text.split("\n")])[:-1]
    # The words <s> and <pad> in a text are not fairseq's special tokens. --output-dictionary-size cuts off rare types.
    types = model.tgt_dict
    special = (tokens == types.bos()) | (tokens == types.pad()) | (tokens >= len(types))
    return tokens.masked_fill(special, types.unk())


def decode_tokens(model: GeneratorHubInterface, tokens: Tensor) -> str:
    """(n,) tokens -> text. The reverse of `encode_text`, as far as the tokenizer can be reversed."""
    lines: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == model.tgt_dict.eos():
            lines.append([])
        else:
            lines[-1].append(token)
    return "\n".join(model.decode(torch.tensor(line, dtype=torch.long)) for line in lines)


def check_memory(model: GeneratorHubInterface, sequences: int, length: int) -> None:
    """Raises ValueError if the keys and values of all layers that are kept do not fit the memory of the device."""
    decoder, device = model.models[0].decoder, model.device
    weight = decoder.layers[0].self_attn.k_proj.weight
    kept = length * len(decoder.layers)
    if isinstance(decoder, AlibiDecoder) and decoder.setup.bounds_cache and length > LONG:
        reaches = reach_of_excess(decoder.score_excess(), least_slopes_of(decoder), decoder.setup.settings.epsilon / 2)
        kept = int(reaches.clamp(max=length).mean(1).sum())
    needed = 2 * weight.size(0) * weight.element_size() * sequences * kept
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"the keys and values of {sequences:,} texts of {length:,} tokens take {needed / 2**30:,.1f} GiB, there "
            f"are {memory / 2**30:,.1f}: pass fewer --tokens, fewer prompts or a smaller --beam"
        )


def continue_batch(
    model: GeneratorHubInterface, prompts: Sequence[Tensor], tokens: int, stop_at_line_end: bool = False, **options: Any
) -> list[Tensor]:
    """Continues prompts, (n,) tokens each, n from 0 on, by `tokens` new tokens each, in one batch.

    Returns for each the prompt and its continuation, (n + new,) tokens. Line ends count as tokens and do not end the
    text or, with `stop_at_line_end`, end it and are left out. `options` are those of fairseq's generation. ValueError:
    prompt and new tokens are longer than the model's longest sequence.
    """
    dictionary, device = model.tgt_dict, model.device
    longest = max(map(len, prompts))
    length = longest + tokens
    limit = min(member.max_decoder_positions() for member in model.models)
    if length >= limit:
        raise ValueError(
            f"a prompt of {longest:,} tokens and {tokens:,} new ones are too many for a model built with a longest "
            f"sequence of {limit:,}: shorten them, or train without --max-target-positions"
        )
    check_memory(model, len(prompts) * options["beam"], length)
    for member in model.models:
        if isinstance(member.decoder, AlibiDecoder):  # it may scale its slopes to the length
            member.decoder.set_evaluation_length(length)
    arguments = Namespace(**options, max_len_a=0, max_len_b=length, min_len=1 if stop_at_line_end else length)
    # <s> is never a target, so with it as the end of a sentence no model ends a text early.
    ending = {"lines_in_prompt": True} if stop_at_line_end else {"eos": dictionary.bos(), "free_end": True}
    generator = model.task.build_generator(model.models, arguments, seq_gen_cls=Generator, extra_gen_cls_kwargs=ending)
    prefix = collate_tokens(list(prompts), dictionary.pad()).to(device)
    with tqdm(total=length, unit=" tokens", disable=None) as bar:
        last_layer = model.models[0].decoder.layers[-1]
        # fairseq runs one more step than there are tokens, for the end of the sentences.
        hook = last_layer.register_forward_hook(lambda _, inputs, __: bar.update(min(len(inputs[0]), length - bar.n)))
        try:
            sample = {"net_input": {"src_tokens": prefix}}
            finalized = model.task.inference_step(generator, model.models, sample, prefix_tokens=prefix)
        finally:
            hook.remove()
    # A prompt that is shorter than the longest has more than `tokens` new tokens.
    return [
        hypotheses[0]["tokens"][:-1][: len(prompt) + tokens].cpu() for prompt, hypotheses in zip(prompts, finalized)
    ]


def continue_prompts(
    model: GeneratorHubInterface, prompts: Sequence[Tensor], tokens: int, stop_at_line_end: bool = False, **options: Any
) -> list[Tensor]:
    """Continues prompts of any lengths as `continue_batch` does; each gets the text that it would get alone."""
    # Beam search compares whole texts, so all texts of a batch must end at the length that was asked for.
    batches: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        batches.setdefault(len(prompt) if options["beam"] > 1 else 0, []).append(number)
    texts: dict[int, Tensor] = {}
    for batch in batches.values():
        try:
            continued = continue_batch(
                model, [prompts[number] for number in batch], tokens, stop_at_line_end, **options
            )
        except (RuntimeError, OverflowError) as error:  # out of memory, no token is left to draw, an absurd penalty
            raise ValueError(f"generation failed: {one_line(error)}") from error
        texts.update(zip(batch, continued))
    return [texts[number] for number in range(len(prompts))]
