"""How far the heads of a model can see and how far they look: `fairseq-alibi reach`.

Shapes: H heads, T tokens of a text, D head_dim, V types.
"""

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.models import BaseFairseqModel
from tabulate import tabulate
from torch import Tensor, nn

from ..core.logit_bound import last_norm_of, longest_row, stack_change
from ..core.reach import reach, reach_of_excess
from ..core.receptive_field import least_slopes, norm_before
from ..files.checkpoints import count_types, describe_model, load_model, read_checkpoint
from ..files.data_folders import first_folder, made_up_dictionary
from ..models.decoder import AlibiDecoder
from .scoring import prepare_model, source_of

SHARES = (0.5, 0.99)  # of the weight that a head gives all keys, on average over the queries of a text


def load_for_reach(
    checkpoint: str, data: Optional[str], overrides: dict[str, Any]
) -> tuple[dict[str, Any], BaseFairseqModel]:
    """Loads a language model, with any dictionary of its size if none is there; ValueError if heads have no reach."""
    state = read_checkpoint(checkpoint)
    description = describe_model(checkpoint, state)
    with tempfile.TemporaryDirectory() as made_up:
        folder = data or str(first_folder(str(state["cfg"]["task"].data)))
        if data is None and not (Path(folder) / "dict.txt").is_file():
            folder = made_up
            made_up_dictionary(count_types(state["model"])).save(f"{made_up}/dict.txt")
        model = load_model(checkpoint, state, folder, overrides)
    decoder = model.decoder
    if not isinstance(decoder, AlibiDecoder) or decoder.position_method.bias_kind not in ("linear", "key"):
        method = description["position_method"]
        raise ValueError(
            f"{checkpoint}: position method {method} has no bias that falls without end, so no key is too far"
        )
    if (scale := decoder.setup.settings.score_scale) != "none":
        raise ValueError(
            f"{checkpoint}: --score-scale {scale} multiplies scores by the logarithm of the number of keys, which no "
            "weights bound"
        )
    return description, model


def least_slopes_of(decoder: AlibiDecoder) -> Tensor:
    """(layers, H) float64: the slopes, 0 in layers without them; with gates the least that these can bring about."""
    slopes = torch.zeros(decoder.num_layers, decoder.position_method.num_heads, dtype=torch.float64)
    for number, layer in enumerate(decoder.layers):
        if layer.self_attn.gate is not None:
            slopes[number] = least_slopes(layer.self_attn.gate, norm_before(decoder.layers, number))
        elif layer.self_attn.has_positions:
            slopes[number] = decoder.position_method.slopes()[0]
    return slopes


@torch.no_grad()
def logits_change(
    decoder: AlibiDecoder, epsilon: float, least_deviations: Optional[Mapping[nn.Module, float]] = None
) -> float:
    """The proven bound of what skipped keys change in a logit of any text, see `stack_change`.

    With an adaptive softmax it is that of a log-probability, which changes by twice as much as scores in each band.
    """
    vectors = decoder.vectors_of_types()
    change = stack_change(decoder.layers, decoder.layer_norm, epsilon, vectors, least_deviations)
    norm, width = last_norm_of(decoder.layers, decoder.layer_norm), decoder.layers[0].embed_dim
    first, softmax = decoder.project_out_dim or nn.Identity(), decoder.adaptive_softmax
    bands = [decoder.output_projection] if softmax is None else [softmax.head, *softmax.tail]
    rows = [longest_row(nn.Sequential(first, band), norm, width) for band in bands]
    factor = rows[0] if softmax is None else 2 * (rows[0] + max(rows[1:], default=0.0))
    return 1.001 * change * factor  # 0.1% for rounding


def epsilon_for(decoder: AlibiDecoder, tolerance: float) -> float:
    """An epsilon that changes no logit of any text by more than the tolerance; ValueError if none is known.

    The bound grows at most in proportion to epsilon, because all its steps are concave.
    """
    tiny = 1e-200
    epsilon = 0.999 * tolerance / (logits_change(decoder, tiny) / tiny or 1.0)
    if epsilon < 1e-250:
        raise ValueError(f"--logits {tolerance}: no epsilon proves that for this model; pass --epsilon")
    return min(epsilon, 0.5)


@torch.no_grad()
def describe_reach(model: BaseFairseqModel, epsilon: float) -> dict[str, Any]:
    """The static reach of all heads: `epsilon`, and for each head `layer`, `head`, `slope`, `excess`, `reach`.

    A reach is in tokens, None if nothing bounds it. `logits` is `logits_change`, None for no bound.
    """
    decoder = model.decoder
    slopes, excess = least_slopes_of(decoder), decoder.score_excess()
    reaches = reach_of_excess(excess, slopes, epsilon)
    heads = [
        {
            "layer": layer + 1,
            "head": head + 1,
            "slope": float(slopes[layer, head]),
            "excess": finite(excess[layer, head]),
            "reach": finite(reaches[layer, head]),
        }
        for layer in range(slopes.size(0))
        for head in range(slopes.size(1))
    ]
    return {"epsilon": epsilon, "logits": finite(logits_change(decoder, epsilon)), "heads": heads}


def finite(number: Any) -> Optional[float]:
    """A number for JSON, None where it is infinite."""
    value = float(number)
    return None if math.isinf(value) else int(value) if value.is_integer() else value


@contextlib.contextmanager
def measured_deviations(model: nn.Module) -> Iterator[dict[nn.Module, float]]:
    """Yields the least standard deviation of what each layer norm has read in the context so far."""
    deviations: dict[nn.Module, float] = {}

    def measure(norm: nn.Module, read: tuple[Tensor]) -> None:
        least = float(read[0].detach().std(-1, correction=0).min())
        deviations[norm] = min(deviations.get(norm, math.inf), least)

    with contextlib.ExitStack() as hooks:
        for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
            hooks.callback(norm.register_forward_pre_hook(measure).remove)
        yield deviations


def queries_and_keys(decoder: AlibiDecoder, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns the queries and keys, (B, H, T, D), of every layer in a pass over tokens, (B, T)."""
    outputs: dict[int, Tensor] = {}  # by the projection, as a layer makes the keys first
    pairs = [(layer.self_attn.q_proj, layer.self_attn.k_proj) for layer in decoder.layers]
    with contextlib.ExitStack() as hooks:
        for projection in (projection for pair in pairs for projection in pair):
            hook = projection.register_forward_hook(lambda module, _, out: outputs.update({id(module): out}))
            hooks.callback(hook.remove)
        decoder.extract_features(tokens, None)
    heads = decoder.layers[0].self_attn.num_heads
    q_and_k = ([outputs[id(p)].unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for p in pair] for pair in pairs)
    return [(q, k) for q, k in q_and_k]


@torch.no_grad()
def measure_text(model: BaseFairseqModel, stream: Tensor, content: dict[str, Any]) -> None:
    """Adds to each head its reach in a text, and the distances within which shares of its weight lie; see `SHARES`.

    `logits_in_text` is `logits_change` for this text. ValueError: the bias is by key, so that weights are not those of
    a distance.
    """
    decoder = model.decoder
    if decoder.position_method.bias_kind != "linear":
        raise ValueError(f"--data: {decoder.position_method.name} has no slopes to measure a text with; drop it")
    prepare_model(model, len(stream))
    with measured_deviations(decoder) as deviations:
        projected = queries_and_keys(decoder, source_of(stream, decoder.dictionary)[None])
    content["logits_in_text"] = finite(logits_change(decoder, content["epsilon"], deviations))
    slopes, heads = least_slopes_of(decoder), iter(content["heads"])
    for number, (q, k) in enumerate(projected):
        seen = reach(q, k, slopes[number], content["epsilon"]).clamp(max=len(stream) - 1)
        share = weight_by_distance(q[0], k[0], slopes[number]).cumsum(1)
        for head in range(slopes.size(1)):
            distances = [int((share[head] < part).sum()) for part in SHARES]
            next(heads).update(reach_in_text=finite(seen[head]), half_within=distances[0], most_within=distances[1])


def weight_by_distance(q: Tensor, k: Tensor, slopes: Tensor) -> Tensor:
    """The mean weight by distance, (H, T) float64, of causal attention: (H, T, D) queries and keys, (H,) slopes."""
    heads, length, dim = q.shape
    weight = torch.zeros(heads, length, dtype=torch.float64)
    positions = torch.arange(length)
    for rows in positions.split(256):
        distance = rows[:, None] - positions
        scores = (q[:, rows] @ k.mT).double() / math.sqrt(dim) - slopes[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
        weight.index_add_(1, distance.clamp(min=0).flatten(), scores.flatten(1))
    return weight / length


def reach_table(content: dict[str, Any]) -> str:
    """One row for each head."""
    names = {"layer": "layer", "head": "head", "slope": "slope", "excess": "score excess", "reach": "reach"}
    if "text" in content:
        names.update(reach_in_text="reach in the text", half_within="half within", most_within="99% within")
    rows = [["unbounded" if head[name] is None else head[name] for name in names] for head in content["heads"]]
    formats = ["d", "d", ".3g", ".1f", *[",.0f"] * (len(names) - 4)]
    reaches = [head["reach"] for head in content["heads"]]
    total = "unbounded" if None in reaches else f"{sum(reaches) + len(reaches):,.0f} keys in all layers"
    align = ["right"] * len(names)
    table = tabulate(rows, list(names.values()), "simple", floatfmt=formats, intfmt=",", colalign=align)
    numbers = [(content["logits"], "in any text"), (content.get("logits_in_text"), "in this text")]
    known = [f"{number:.2g} {where}" for number, where in numbers if number is not None]
    logits = f"logits change by at most {' and '.join(known)}" if known else "what it does to logits is not bounded"
    return (
        f"{table}\n\nepsilon {content['epsilon']:.3g}; whatever the text and its length, the heads see at most: {total}"
        f"\n{logits}"
    )
