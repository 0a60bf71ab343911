"""Results as tables, for the terminal and in Markdown."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from .curves import Curve, override_text
from .measurement import Windowing

#: Columns of the table of one checkpoint: name in the result, heading, number format.
COLUMNS = (
    ("length", "length", ","),
    ("stride", "stride", ","),
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("word_perplexity", "word perplexity", ",.2f"),
    ("bits_per_character", "bits per character", ".4f"),
    ("bits_per_byte", "bits per byte", ".4f"),
    ("tokenized_word_perplexity", "tokenized word perplexity", ",.2f"),
    ("bits_per_tokenized_character", "bits per tokenized character", ".4f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("seconds", "seconds", ",.1f"),
)


def model_title(content: dict[str, Any]) -> str:
    """A line that names a model as it was evaluated."""
    model, overrides = content["model"], override_text(content["subject"]["model_overrides"])
    title = f"{model['position_method']}, trained on {model['training_length']} tokens"
    return f"{title}, with {overrides}" if overrides else title


def checkpoint_table(content: dict[str, Any], windowings: Sequence[Windowing]) -> str:
    """The results of one checkpoint for the terminal, with a row for each windowing."""
    model = content["model"]
    by_windowing = {(result["length"], result["stride"]): result for result in content["results"]}
    results = [by_windowing[windowing] for windowing in windowings]
    columns = [column for column in COLUMNS if any(column[0] in result for result in results)]
    rows = [["streaming" if result.get(name) is None else result[name] for name, _, _ in columns] for result in results]
    tokens, whole = results[0]["tokens"], results[0].get("of_tokens")
    scored = f"{tokens:,}" if whole is None else f"{tokens:,} masked ones of the {whole:,}"
    text = f"{model_title(content)}, evaluated on the {scored} tokens of {content['subset']}: {model['checkpoint']}\n"
    headers = [heading for _, heading, _ in columns]
    formats = [number_format for _, _, number_format in columns]
    return text + tabulate(rows, headers, floatfmt=formats, intfmt=",", maxheadercolwidths=10, numalign="right")


def length_table(curves: Sequence[Curve], style: str, measure: str = "perplexity") -> str:
    """A measure in one of tabulate's formats, with a row per evaluation length and a column per curve."""
    number_format = {"perplexity": ".2f", "bits_per_byte": ".4f"}.get(measure, ",.0f")

    def cell(curve: Curve, length: int) -> Any:
        value = getattr(curve, measure).get(length)
        if measure != "perplexity" or length not in curve.deviation:
            return value
        return f"{value:{number_format}} ± {curve.deviation[length]:{number_format}}"

    lengths = sorted({length for curve in curves for length in getattr(curve, measure)})
    rows = [[length, *(cell(curve, length) for curve in curves)] for length in lengths]
    headers = ["evaluation length", *(curve.label for curve in curves)]
    width = 16 if style == "simple" else None  # headings wrap in a narrow terminal; Markdown needs one line per row
    alignment = {"numalign": "right", "stralign": "right"} if any(curve.deviation for curve in curves) else {}
    formats: dict[str, Any] = {"tablefmt": style, "floatfmt": number_format, "intfmt": ",", **alignment}
    return tabulate(rows, headers, maxheadercolwidths=width, **formats)


def position_table(pooled: dict[str, list[dict[str, Any]]]) -> str:
    """Loss in bits by position, in Markdown, with a row per octave of positions and a column per curve."""
    rows = []
    for octave in range(1 + max(part["last"] for bins in pooled.values() for part in bins).bit_length()):
        row: list[Any] = [f"{2**octave // 2:,} - {2**octave - 1:,}" if octave > 1 else f"{octave}"]
        for bins in pooled.values():
            inside = [part for part in bins if part["first"].bit_length() == octave]
            tokens = sum(part["tokens"] for part in inside)
            row.append(sum(part["tokens"] * part["loss"] for part in inside) / tokens if tokens else None)
        rows.append(row)
    rows = [row for row in rows if any(loss is not None for loss in row[1:])]
    return tabulate(rows, ["position", *pooled], tablefmt="github", floatfmt=".3f", colalign=("right",) * len(rows[0]))
