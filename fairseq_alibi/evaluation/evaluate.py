"""Perplexity of checkpoints at many lengths: by windows or as one stream, exact, each scored token once.

Three ways to give the tokens of a subset their context, L tokens being the length of a window:

non-overlapping   blocks of L tokens; a token sees its own block only, so tokens early in a block see little.
sliding window    windows of L tokens, each `stride` tokens further; a window scores its last `stride` tokens.
streaming         no windows: in every layer a token attends to the last L tokens, itself included.

The first two are those of the paper (Press et al. 2022, section 4 and appendix B) and give the loss of fairseq-eval-lm,
without what makes that slow (see `scoring`). A masked language model has the first alone: it is to find the tokens that
are masked, the same 15% at any length, in blocks that begin with <s>, as fairseq's task masked_lm makes them.

A checkpoint is read once for all lengths. Its results stand in one JSON file, written after each length; what is there
is not done again. Under torchrun the processes deal out the batches among themselves, with the same results.
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy
import torch
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from fairseq.models.roberta import RobertaModel
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..commands.arguments import model_options, positive_integer
from ..files.inputs import (
    check_exists,
    describe_model,
    load_model,
    one_line,
    read_checkpoint,
    read_dictionary,
    read_subset,
)
from ..files.results import check_writable, describe_environment, naming, now, write_json, written_whole
from . import processes
from .generate import text_options
from .scoring import Scored, masked_tokens, score_masked, score_stream, score_windows
from .windows import batches, windows

#: Options of the task that change what a model reads or is to predict.
OTHER_TEXT = ("add_bos_token", "future_target", "past_target", "self_target")

#: Multiples of the training length at which a model is evaluated unless told otherwise.
MULTIPLES = (1, 2, 4, 8, 16)


class Way(NamedTuple):
    """How the subset is cut: windows of `length` tokens, `stride` further each time, or streaming without a stride."""

    length: int
    stride: Optional[int]

    @property
    def name(self) -> str:
        """As messages and files name it."""
        return f"length {self.length}, " + ("streaming" if self.stride is None else f"stride {self.stride}")


class Text:
    """A subset and what its losses are divided by.

    Args:
        stream: (N,) tokens.
        dictionary: theirs.
        marker: what tells the parts of a word, as fairseq's --remove-bpe has it: "@@ " at all parts but the last,
            "sentencepiece" for its underline in front of the first; None where tokens are words.
    """

    def __init__(self, stream: Tensor, dictionary: Dictionary, marker: Optional[str]):
        self.stream = stream
        symbols = [dictionary[n] for n in range(len(dictionary))]
        eos = stream == dictionary.eos()
        if marker == "sentencepiece":
            begins = torch.tensor([symbol.startswith("\u2581") for symbol in symbols])[stream] | eos
            self.goes_on = torch.cat([~begins[1:], begins.new_tensor([False])])
            lengths = [len(symbol) - symbol.startswith("\u2581") for symbol in symbols]
        elif marker is not None:
            end = marker.rstrip()
            self.goes_on = torch.tensor([symbol.endswith(end) for symbol in symbols])[stream]
            lengths = [len(symbol) - len(end) * symbol.endswith(end) for symbol in symbols]
        else:
            self.goes_on = torch.zeros_like(eos)
            lengths = [len(symbol) for symbol in symbols]
        self.divided = marker is not None
        self.tokens, self.words = len(stream), int((~self.goes_on).sum())
        # A word is followed by a space or its line's end; an empty line has an end all the same.
        empty = eos & torch.cat([eos.new_tensor([True]), eos[:-1]])
        of_words = torch.tensor(lengths)[stream[~eos]].sum()
        self.characters = int(of_words) + self.words - int(eos.sum()) + int(empty.sum())

    def words_of_fairseq(self, stride: int) -> int:
        """What fairseq-eval-lm --remove-bpe divides by: there a word that is cut by a window's end counts twice."""
        ends = torch.arange(stride - 1, self.tokens + stride - 1, stride).clamp(max=self.tokens - 1)
        return self.words + int(self.goes_on[ends].sum())

    def measures(self, bits: float, stride: Optional[int]) -> dict[str, Any]:
        """Losses and perplexities for all bits together."""
        found = per_token(bits, self.tokens)
        if self.divided:
            found.update(words=self.words, word_loss=bits / self.words, word_perplexity=perplexity(bits / self.words))
            if stride is not None:
                found["fairseq_remove_bpe_loss"] = bits / self.words_of_fairseq(stride)
        return {**found, "characters": self.characters, "bits_per_character": bits / self.characters}


def per_token(bits: float, tokens: int) -> dict[str, Any]:
    """Loss and perplexity of tokens that have so many bits together."""
    return {"tokens": tokens, "loss": bits / tokens, "perplexity": perplexity(bits / tokens)}


def perplexity(bits: float) -> float:
    """2 ** bits, infinite where that is too large for a float."""
    return 2**bits if bits < 1024 else math.inf


def read_text(data: str, subset: str, marker: Optional[str]) -> Text:
    """A subset of a fairseq data folder.

    Raises:
        ValueError: there is no such folder, dictionary or subset, or the files are broken.
    """
    dictionary, stream = read_dictionary(data), read_subset(data, subset)
    if int(stream.max()) >= len(dictionary):
        raise ValueError(
            f"{data}/{subset}.bin holds type {int(stream.max()):,}, but dict.txt {len(dictionary):,} types: "
            "they are not of one preparation, prepare the folder anew"
        )
    return Text(stream, dictionary, marker)


def position_bins(length: int) -> list[int]:
    """First positions of the bins in which losses are summed up: each alone up to 8, then four to an octave."""
    edges = [*range(8), *(round(2 ** (n / 4)) for n in range(12, 4 * length.bit_length() + 1))]
    return [edge for edge in dict.fromkeys(edges) if edge < length]


def by_position(losses: Tensor, way: Way, positions: int) -> list[dict[str, Any]]:
    """Loss by position in the window.

    Args:
        losses: (N,) of all tokens, bits.
        way: windows' length and stride.
        positions: tokens in a batch, see `batches`.

    Returns:
        Per bin: first and last position, counted from the window's start, 0; tokens; loss in bits. Position p has p
        tokens of the window before it. Without bins in which nothing was scored.
    """
    longest = min(way.length, len(losses))  # of a window that holds so much text
    sums, counts = numpy.zeros(longest), numpy.zeros(longest, dtype=int)
    for batch in batches(windows(len(losses), way.length, way.stride), positions):
        tokens, last = batch[0].shape
        of_batch = losses[batch[0].scored : batch[-1].end].view(len(batch), last)
        sums[tokens - last : tokens] += of_batch.double().sum(0).numpy()
        counts[tokens - last : tokens] += len(batch)
    edges = position_bins(way.length)
    found = []
    for first, end in zip(edges, [*edges[1:], way.length]):
        tokens = int(counts[first:end].sum())
        if tokens:
            found.append(
                {"first": first, "last": end - 1, "tokens": tokens, "loss": float(sums[first:end].sum()) / tokens}
            )
    return found


def scores(model: BaseFairseqModel, text: Text, way: Way, positions: int) -> Iterator[Scored]:
    """The scored tokens of a text, in its order: those that are this process' share."""
    share = (processes.rank(), processes.count())
    if isinstance(model, RobertaModel):
        return score_masked(model, text.stream, way.length, positions, share)
    if way.stride is None:
        return score_stream(model, text.stream, way.length)
    return score_windows(model, text.stream, way.length, way.stride, positions, share)


def score(model: BaseFairseqModel, text: Text, way: Way, positions: int, title: str = "") -> Tensor:
    """Scores a text in one way, with a progress bar; all processes together, if there are several.

    Args:
        model: language model, in evaluation mode.
        text: see `read_text`.
        way: length and stride.
        positions: tokens in a batch, context included.
        title: of the progress bar, which the first process shows.

    Returns:
        The (N,) float32 losses of all tokens in bits.

    Raises:
        ValueError: the model gives a loss that is no number, or cannot be evaluated in this way.
    """
    losses = torch.full((text.tokens,), math.inf)
    hidden = True if processes.rank() else None
    with tqdm(total=text.tokens, desc=title, unit=" tokens", unit_scale=True, disable=hidden) as bar:
        with processes.together():
            for first, found in scores(model, text, way, positions):
                bits = found.flatten() / math.log(2)
                if not bits.isfinite().all():
                    raise ValueError(f"{way.name}: a loss is {bits[~bits.isfinite()][0]:g}; the model has diverged")
                losses[first : first + len(bits)] = bits
                bar.update(first + len(bits) - bar.n)
        processes.minimum(losses)  # what was not this process' share is infinite
        bar.update(text.tokens - bar.n)
    return losses


def evaluate(
    model: BaseFairseqModel, text: Text, way: Way, positions: int = 4096, positionwise: bool = False, title: str = ""
) -> tuple[dict[str, Any], Tensor]:
    """Scores a text in one way.

    Args:
        model, text, way, positions, title: see `score`.
        positionwise: whether the result has the loss by position in the window.

    Returns:
        The result: length, stride, tokens, loss, perplexity, ..., and the (N,) float32 losses of all tokens in bits, of
        which a masked language model has those of the masked ones alone, else NaN.

    Raises:
        ValueError: see `score`.
    """
    both_sides = isinstance(model, RobertaModel)
    if both_sides and (way.stride != way.length or positionwise):
        raise ValueError(
            "a masked language model reads what is after a token too: it has no sliding window, stream or loss by "
            "position; drop the option"
        )
    started = time.perf_counter()
    losses = score(model, text, way, positions, title)
    seconds = time.perf_counter() - started
    bits = losses.double().sum().item()
    if both_sides:
        masked = masked_tokens(text.tokens)
        measures = {**per_token(bits, int(masked.sum())), "of_tokens": text.tokens}
        losses[~masked] = math.nan
    else:
        measures = text.measures(bits, way.stride)
    result = {
        "length": way.length,
        "stride": way.stride,
        "context_window": None if way.stride is None else way.length - way.stride,
        **measures,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(text.tokens / seconds, 1),
        "finished": now(),
    }
    if positionwise:
        result["by_position"] = by_position(losses, way, positions)
    return result, losses


def checksum(tensors: Iterable[Tensor]) -> str:
    """CRC-32 of tensors, to tell whether they are the same as before."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def read_results(path: Path, subject: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """What an earlier run of the same evaluation left, to go on from; nothing where there is no file.

    Raises:
        ValueError: the file is of something else and not to be overwritten.
    """
    if overwrite or not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in subject if content["subject"].get(name) != subject[name]]
        results = content["results"]
    except (ValueError, KeyError, TypeError, AttributeError):
        differ, results = ["content"], []
    if differ:
        raise ValueError(
            f"{path} exists and is of another evaluation ({', '.join(differ)}): pass --overwrite to replace it, or "
            "another --output"
        )
    return results


class LossFile:
    """The losses of single tokens, an array for each way, in one .npz file that is never seen half-written.

    Args:
        path: of the file; None to keep nothing.
        overwrite: whether to begin anew.

    Raises:
        ValueError: there is a file that holds something else.
    """

    def __init__(self, path: Optional[Path], stream: Tensor, overwrite: bool):
        self.path, self.arrays = path, {"tokens": stream.numpy()}
        if path is None or overwrite or not path.exists():
            return
        try:
            with numpy.load(path) as kept:
                same = numpy.array_equal(kept["tokens"], self.arrays["tokens"])
                self.arrays = dict(kept)
        except Exception:  # whatever numpy or zipfile have to say of a file that is no .npz, or half of one
            same = False
        if not same:
            raise ValueError(f"{path} exists and holds something else: pass --overwrite to replace it")

    def lacks(self, way: Way) -> bool:
        """Whether the losses of a way are wanted and not there."""
        return self.path is not None and way.name not in self.arrays

    def add(self, way: Way, losses: Tensor) -> None:
        """Adds the (N,) losses of a way, bits."""
        if self.path is not None:
            self.arrays[way.name] = losses.numpy()
            with written_whole(self.path) as partial:
                numpy.savez(partial, **self.arrays)


def result_file(checkpoint: str, args: argparse.Namespace) -> Path:
    """Where the results of a checkpoint go: beside it, or into the folder that was asked for."""
    path = Path(checkpoint)
    if args.output is None:
        return path.with_name(f"{path.stem}_{args.subset}.json")
    return args.output / f"{path.resolve().parent.name}_{path.stem}_{args.subset}.json"


def ways(args: argparse.Namespace, training_length: int) -> list[Way]:
    """The ways that `args` asks for.

    Raises:
        ValueError: a stride is longer than a length.
    """
    lengths = args.lengths or [training_length * multiple for multiple in MULTIPLES]
    found = []
    for length in lengths:
        stride = None if args.streaming else args.stride or length
        if args.stride_fraction is not None:
            stride = max(1, int(length * args.stride_fraction))
        if stride is not None and stride > length:
            raise ValueError(f"stride {stride} is longer than the length {length} and would skip tokens")
        found.append(Way(length, stride))
    return list(dict.fromkeys(found))


def open_checkpoint(
    checkpoint: str, text: Text, args: argparse.Namespace
) -> tuple[BaseFairseqModel, dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint, in all processes at once.

    Returns:
        Its model, where it is to run; what it says of itself; and what is evaluated, to tell it from anything else.

    Raises:
        ValueError: bad input, or not the same in all processes.
    """
    with processes.together():
        state = read_checkpoint(checkpoint)
        description = describe_model(checkpoint, state, ("language_modeling", "masked_lm"))
        task = state["cfg"]["task"]
        other = [name for name in OTHER_TEXT if task.get(name)]
        if other or task.get("output_dictionary_size", -1) > 0:
            option = (other or ["output_dictionary_size"])[0].replace("_", "-")
            raise ValueError(
                f"{checkpoint} was trained with --{option}: use scripts/eval_nonoverlapping.sh with -- --{option}"
            )
        model = load_model(checkpoint, state, args.data, args.model_overrides)
        subject = {
            "weights": checksum(model.parameters()),
            "text": checksum([text.stream]),
            "model_overrides": args.model_overrides,
            "dtype": args.dtype,
            "remove_bpe": args.remove_bpe,
        }
        model = model.to(args.device, getattr(torch, args.dtype))
    ours, *theirs = processes.everyones(subject)
    if any(one != ours for one in theirs):
        raise ValueError(f"{checkpoint} or {args.data} is not the same on all machines: copy one to all")
    return model, description, subject


def evaluate_checkpoint(checkpoint: str, text: Text, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates a checkpoint in all ways that are wanted and not in `output` yet, which is written after each.

    Returns:
        What the file holds.

    Raises:
        ValueError: bad input.
    """
    model, description, subject = open_checkpoint(checkpoint, text, args)
    wanted = ways(args, description["training_length"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    results = read_results(output, subject, args.overwrite)
    losses = LossFile(args.save_token_losses, text.stream, args.overwrite)
    content = {
        "model": {**description, "parameters": parameters},
        "data": args.data,
        "subset": args.subset,
        "subject": subject,
        "settings": {
            "max_tokens": args.max_tokens,
            "processes": processes.count(),
            "command": shlex.join(sys.argv),
        },
        "environment": describe_environment(),
        "results": results,
    }
    for path in filter(None, (output, args.save_token_losses)):
        check_writable(path)
    for way in wanted:
        (found,) = [one for one in results if (one["length"], one["stride"]) == way] or [None]
        if found and not losses.lacks(way) and (found.get("by_position") or not args.by_position):
            print(f"{way.name}: perplexity {found['perplexity']:.2f} (in {output} already)")
            continue
        title = f"{Path(checkpoint).resolve().parent.name}: {way.name}"
        processes.tell(way)
        try:
            result, of_tokens = evaluate(model, text, way, args.max_tokens, args.by_position, title)
        except RuntimeError as error:
            raise ValueError(f"{title}: {one_line(error)}") from error
        losses.add(way, of_tokens)
        if found:
            results.remove(found)
        results.append(result)
        write_json(output, content)
        print(f"{title}: perplexity {result['perplexity']:.2f} ({result['seconds']} s)")
    processes.tell(None)
    return content


def table(content: dict[str, Any], wanted: list[Way]) -> str:
    """The results of a checkpoint for the terminal."""
    model = content["model"]
    names = {
        "length": ("length", ","),
        "stride": ("stride", ","),
        "loss": ("loss", ".4f"),
        "perplexity": ("perplexity", ".2f"),
        "word_perplexity": ("word perplexity", ",.2f"),
        "bits_per_character": ("bits per character", ".4f"),
        "tokens_per_second": ("tokens/s", ",.0f"),
        "seconds": ("seconds", ",.1f"),
    }
    results = [one for way in wanted for one in content["results"] if (one["length"], one["stride"]) == way]
    columns = [name for name in names if any(name in one for one in results)]
    rows = [["streaming" if one.get(name) is None else one[name] for name in columns] for one in results]
    tokens, whole = results[0]["tokens"], results[0].get("of_tokens")
    scored = f"{tokens:,}" if whole is None else f"{tokens:,} masked ones of the {whole:,}"
    text = (
        f"{model['position_method']}, trained on {model['training_length']} tokens, evaluated on the "
        f"{scored} tokens of {content['subset']}: {model['checkpoint']}\n"
    )
    formats = [names[name][1] for name in columns]
    headers = [names[name][0] for name in columns]
    return text + tabulate(rows, headers, floatfmt=formats, intfmt=",", maxheadercolwidths=10, numalign="right")


def log_to_tensorboard(folder: Path, content: dict[str, Any], name: str) -> None:
    """Writes the results of a checkpoint as scalars against length, in one folder a checkpoint."""
    from tensorboardX import SummaryWriter

    with naming(folder / name), SummaryWriter(str(folder / name)) as writer:
        for one in content["results"]:
            way = "streaming" if one["stride"] is None else "non-overlapping"
            if one["stride"] not in (None, one["length"]):
                way = f"stride {one['stride']}"
            for measure in ("loss", "perplexity", "tokens_per_second"):
                writer.add_scalar(f"{content['subset']}/{measure}/{way}", one[measure], one["length"])


def some_lengths(text: str) -> list[int]:
    """An argparse type: lengths with commas between."""
    return [positive_integer(part) for part in text.split(",")]


def fraction(text: str) -> Fraction:
    """An argparse type: a share of the length, as 1/4 or 0.25."""
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share of the length: pass one above 0 and up to 1, as 1/4")
    return share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi evaluate`."""
    add = parser.add_argument
    add("data", metavar="DATA", help="fairseq data folder")
    add("checkpoints", metavar="CHECKPOINT", nargs="+")
    add(
        "--lengths",
        type=some_lengths,
        metavar="N,N,...",
        help="tokens in a window (default: 1, 2, 4, 8 and 16 times what the model was trained on)",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--stride", type=positive_integer, metavar="N", help="sliding window: tokens from one window to the next"
    )
    way.add_argument(
        "--stride-fraction", type=fraction, metavar="F", help="the same as a share of each length, as 1/4 or 0.25"
    )
    way.add_argument("--streaming", action="store_true", help="one stream: a token attends to the last N tokens")
    add("--subset", default="valid", help="valid (default), test, ...")
    add("--by-position", action="store_true", help="also the loss by position in the window")
    add("--save-token-losses", type=Path, metavar="FILE", help="the loss of every token, in bits, as numpy's .npz")
    add(
        *("--remove-bpe", "--post-process"),
        nargs="?",
        const="@@ ",
        metavar="MARKER",
        help="also count words: '@@ ' (without a value, and by itself where DATA holds bpe.codes) or sentencepiece",
    )
    add(
        "--max-tokens",
        type=positive_integer,
        default=4096,
        metavar="N",
        help="in a batch, context included (default 4096)",
    )
    add("--model-overrides", type=model_options, default={}, metavar="DICT", help="options of the model, by name")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model (default float32)")
    add("--cpu", action="store_true", help="do not use the GPU")
    add("--output", type=Path, metavar="DIR", help="folder for the JSON files (default: beside each checkpoint)")
    add("--overwrite", action="store_true", help="replace results that are there; without it they are gone on from")
    add("--tensorboard-logdir", type=Path, metavar="DIR", help="also write scalars against length")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what cannot be done before anything is.

    Raises:
        ValueError: names what contradicts what.
    """
    if args.remove_bpe is not None and not args.remove_bpe.strip():
        raise ValueError(f"--remove-bpe '{args.remove_bpe}': pass the marker, '@@ ' or sentencepiece, or drop it")
    if args.by_position and args.streaming:
        raise ValueError("--by-position: a stream has no windows, and so no positions in them; drop one of the two")
    if args.save_token_losses is not None:
        if len(args.checkpoints) > 1:
            raise ValueError("--save-token-losses: the file is of one checkpoint, evaluate one at a time")
        if args.save_token_losses.suffix != ".npz":
            raise ValueError(f"--save-token-losses {args.save_token_losses}: the file's name has to end in .npz")
    if args.streaming and processes.count() > 1:
        raise ValueError("--streaming: a stream is read from one end to the other, by one process; do without torchrun")
    files: dict[Path, str] = {}
    for checkpoint in args.checkpoints:
        check_exists(checkpoint)
        path = result_file(checkpoint, args)
        if path in files:
            raise ValueError(f"{files[path]} and {checkpoint} would both be written to {path}: drop --output")
        files[path] = checkpoint


def main(args: argparse.Namespace) -> None:
    """`fairseq-alibi evaluate`: a table for each checkpoint, and where its results are."""
    check_arguments(args)
    args.device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    if args.remove_bpe is None and text_options(Path(args.data))["bpe"] == "subword_nmt":
        args.remove_bpe = "@@ "
    processes.tell(args)
    with processes.together():
        text = read_text(args.data, args.subset, args.remove_bpe)
    tables = []
    try:
        for checkpoint in args.checkpoints:
            output = result_file(checkpoint, args)
            content = evaluate_checkpoint(checkpoint, text, output, args)
            tables.append(f"{table(content, ways(args, content['model']['training_length']))}\nwritten to {output}")
            if args.tensorboard_logdir is not None:
                log_to_tensorboard(args.tensorboard_logdir, content, output.stem)
    except KeyboardInterrupt:
        sys.exit("fairseq-alibi evaluate: interrupted; the same command goes on with the length that was not done")
    finally:
        print("".join(f"\n{table}\n" for table in tables), end="")


def follow() -> None:
    """Under torchrun, what the processes but the first do, which end here: they score their share."""
    processes.join()
    if processes.rank() == 0:
        return
    # What fails, in whichever process, the first says; until it has, this one is not to end and take it along.
    with contextlib.suppress(ValueError, OSError, RuntimeError, KeyboardInterrupt):
        args = processes.told()
        with processes.together():
            text = read_text(args.data, args.subset, args.remove_bpe)
        for checkpoint in args.checkpoints:
            model, _, _ = open_checkpoint(checkpoint, text, args)
            for way in iter(processes.told, None):
                score(model, text, way, args.max_tokens)
    processes.told()
