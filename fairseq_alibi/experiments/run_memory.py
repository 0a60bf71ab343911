"""Memory of a training run on one GPU, by part; the tables of `fairseq-alibi plan`.

Memory that stays: weights, gradients, states of the optimizer, and what is in transit between GPUs. Memory of a batch:
what autograd keeps for the backward pass, which is measured (see `layer_measurement`), and the logits at their highest.
When the optimizer steps, the memory of the batch is free again. The peak is that of the higher moment.

Not included: CUDA's own memory (about 0.5 GiB), the workspace of kernels, fragmentation. `plan` leaves a tenth of the
GPU free for them. The tests compare with what autograd keeps; on a CPU the whole was measured too; on a GPU it has not
been measured.

Letters: P parameters, n tokens in a batch of one GPU, C width, V types; e bytes of a number in activations (2 in half
precision, else 4); d bytes of a number in a dropout mask (1 on a GPU, e on a CPU).
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from tabulate import tabulate

from .planned_run import PlannedRun
from .run_config import MOMENTS

USABLE = 0.9  # share of a GPU's memory that a run may take by these formulas

GIB = 2**30


def lasting_memory(run: PlannedRun, gpus: int) -> dict[str, float]:
    """Returns the bytes by part that one of `gpus` GPUs needs all the time.

    Weights and gradients take 4 P bytes each. In half precision they take 2 P, and unless it is memory-efficient the
    optimizer has a float32 copy of both, 4 P. fully_sharded divides all three parts by the number of GPUs, and in half
    precision its weights and gradients are float32 alone; zero_sharding=os divides the states.
    """
    count, share = sum(run.parameters.values()), 1 / gpus if run.sharded else 1.0
    copies = run.element if run.efficient or not run.half else 4 if run.sharded else 2 + 4
    states = 1 / gpus if run.cfg.distributed_training.zero_sharding == "os" else share
    return {
        "weights": copies * count * share,
        "gradients": copies * count * share,
        "optimizer states": 4 * MOMENTS[run.optimizer] * count * states,
        "in transit between GPUs": transit_memory(run, gpus),
    }


def gathered_memory(run: PlannedRun) -> tuple[int, int]:
    """Returns the bytes of whole weights that fully_sharded gathers together: of a layer, of what is outside of layers.

    Layers smaller than min_params_to_wrap that are not checkpointed are gathered with what is outside of them.
    """
    layer, count = run.layer_parameters, sum(run.parameters.values())
    if not run.cfg.model.checkpoint_activations and layer < run.cfg.model.min_params_to_wrap:
        layer = 0
    return run.element * layer, run.element * (count - run.layers * layer)


def transit_memory(run: PlannedRun, gpus: int) -> int:
    """Returns the bytes of weights and gradients on one GPU that are being gathered, summed or divided.

    legacy_ddp sums at most 2^28 numbers at once, pytorch_ddp has a bucket for each gradient. In the backward pass of a
    layer fully_sharded has its whole weights and gradients, those outside of layers, the weights of the next layer, and
    the gradients of the one before until they have been sent; all weights with no_reshard_after_forward.
    """
    options, count = run.cfg.distributed_training, sum(run.parameters.values())
    if run.sharded:
        layer, outside = gathered_memory(run)
        ahead = layer * min(run.layers - 1, 1 + (gpus > 1))
        return outside + layer + (run.element * count if options.no_reshard_after_forward else outside + layer + ahead)
    if gpus == 1 or options.gradient_as_bucket_view:
        return 0
    return run.element * (min(count, 2**28) if options.ddp_backend in ("legacy_ddp", "no_c10d") else count)


def step_memory(run: PlannedRun, gpus: int) -> float:
    """Returns the bytes of temporaries while the optimizer steps.

    adam makes a float32 temporary of its largest tensor; fp16 has all parameters in one tensor. A memory-efficient
    optimizer makes two more.
    """
    largest: float = max(parameter.numel() for parameter in run.model.parameters())
    if run.sharded:
        largest /= gpus
    elif run.half and not (run.efficient or run.cfg.common.bf16 or run.cfg.common.fp16_no_flatten_grads):
        largest = sum(run.parameters.values())
    return 4 * largest * ((run.optimizer == "adam") + 2 * run.efficient)


def kept_of_layer(run: PlannedRun, rows: int) -> int:
    """Returns the bytes that autograd keeps of a layer in the forward pass.

    A checkpointed layer keeps its input, e C bytes per token, or nothing with offload_activations.
    """
    if not run.cfg.model.checkpoint_activations:
        return rows * run.cost.layer_bytes
    return 0 if run.cfg.model.offload_activations else run.element * run.width * rows * run.length


def activation_memory(run: PlannedRun, rows: int) -> float:
    """Returns the bytes that autograd keeps of a batch of `rows` blocks in the forward pass, without the logits.

    Adaptive parts are not measured, because what they keep depends on the tokens: the input keeps the embeddings of
    each band, the softmax the mask and the result of its dropout.
    """
    options, tokens = run.cfg.model, rows * run.length
    other: float = rows * run.cost.other_bytes
    if run.bands and options.adaptive_input:
        other += tokens * run.element * sum(band.share * band.width for band in run.bands)
    if run.bands and options.adaptive_softmax_dropout:
        other += tokens * (run.dropout_element + run.element) * run.width
    return run.layers * kept_of_layer(run, rows) + other


def logits_memory(run: PlannedRun, tokens: int) -> float:
    """Returns the bytes of logits, log-probabilities and their gradients of `tokens` tokens at their highest.

    A plain softmax takes (8 + e) V n bytes, because log-probabilities and their gradients are float32. An adaptive one
    takes 3 e for each logit of the head and of the tails that tokens are in, and e for what enters the tails.
    """
    e = run.element
    if not run.bands:
        return (8 + e) * tokens * len(run.dictionary)
    head, *tails = run.bands
    count = head.types + len(tails) + sum(band.share * band.types for band in tails)
    return tokens * (3 * e * count + e * sum(band.share * (run.width + 2 * band.width) for band in tails))


def mask_memory(run: PlannedRun) -> int:
    """Returns the bytes of the attention mask: e H L^2, in float32 on a CPU; 0 without a mask."""
    if not run.masked:
        return 0
    mask = run.decoder.position_method.future_mask(run.length, run.length, device="meta")
    return mask.numel() * (4 if run.device.type == "cpu" else run.element)


def sharded_peak(run: PlannedRun, gpus: int, rows: int) -> float:
    """Returns the bytes on one GPU at the highest of four moments of fully_sharded, without the mask.

    - The logits: no layer has whole gradients; the weights of the last one are gathered ahead.
    - The backward pass of a layer: its first gradient, of its last matrix, meets all of its activations, the last none.
    - The end: of embeddings that are tied to the output layer there are two gradients and their sum.
    - The step of the optimizer.

    The divided gradients are there from the batch before. Those of an update's only batch come while activations go.
    """
    model, e, count = run.cfg.model, run.element, sum(run.parameters.values())
    (layer, outside), whole_layer = gathered_memory(run), e * run.layer_parameters
    kept, computed, activations = kept_of_layer(run, rows), rows * run.cost.layer_bytes, activation_memory(run, rows)
    weights, gradients, states, transit = lasting_memory(run, gpus).values()
    one_batch = rows * gpus == run.blocks_per_update()
    new = gradients * run.layer_parameters / count if one_batch else 0.0  # divided gradients of a layer

    logits = max(outside + layer * (gpus > 1), e * count * run.cfg.distributed_training.no_reshard_after_forward)
    logits += activations + logits_memory(run, rows * run.length)
    first = run.width * model.decoder_ffn_embed_dim + rows * run.length * (run.width + model.decoder_ffn_embed_dim)
    backward = transit + activations + max(0, computed + e * first - whole_layer)
    backward -= 0 if model.checkpoint_activations else computed
    backward -= min(layer, kept) * (run.layers > 1)  # the last layer has none before it, and the others not its input
    backward += (run.layers - 1) * (max(0, new - kept) if layer else -min(whole_layer, kept))
    tied = run.parameters["embeddings"] * (run.parameters["output"] < run.parameters["embeddings"])
    end = 2 * outside + 2 * e * tied + layer + run.layers * new * (layer > 0)
    step = step_memory(run, gpus) + gradients * one_batch
    return weights + states + gradients * (not one_batch) + max(logits, backward, end, step)


def memory_by_part(run: PlannedRun, gpus: int, rows: int) -> dict[str, float]:
    """Returns the bytes on one GPU by part, with their `peak`, for batches of `rows` blocks.

    With activation checkpointing the logits are gone when the layers are computed again, so that the peak has the
    larger one of the two.
    """
    lasting, mask = lasting_memory(run, gpus), mask_memory(run)
    activations = activation_memory(run, rows)
    layer = rows * run.cost.layer_bytes if run.cfg.model.checkpoint_activations else 0
    logits = logits_memory(run, rows * run.length)
    if run.sharded:
        peak = mask + sharded_peak(run, gpus, rows)
    else:
        peak = sum(lasting.values()) + mask + max(activations + max(layer, logits), step_memory(run, gpus))
    return {
        **lasting,
        "attention mask": mask,
        "activations": activations,
        "one layer, computed again": layer,
        "logits and loss": logits,
        "peak": peak,
    }


def plan_tables(run: PlannedRun, gpus: int, gpu_memory: float) -> tuple[str, Optional[tuple[int, int]]]:
    """Returns the tables of a run, and the largest batch that fits, see `PlannedRun.batches`; None where none does.

    `gpu_memory` is that of each GPU, in GiB.
    """
    batches = run.batches(gpus)
    peaks = {rows: memory_by_part(run, gpus, rows)["peak"] / GIB for rows, _ in batches}
    fits = {rows: peak <= USABLE * gpu_memory for rows, peak in peaks.items()}
    best = next((batch for batch in batches if fits[batch[0]]), None)
    rows = (best or batches[-1])[0]
    tokens = run.blocks_per_update() * run.length
    flops = run.flops(tokens)
    counts: list[list[Any]] = [*map(list, run.parameters.items()), ["all", sum(run.parameters.values())]]
    memory = [[part, size / GIB] for part, size in memory_by_part(run, gpus, rows).items() if size]
    per_update: list[list[Any]] = [["tokens", f"{tokens:,}"], ["FLOPs", f"{flops['model']:.3g}"]]
    if flops["recomputed"]:
        per_update.append(["FLOPs of checkpointing", f"{flops['recomputed']:.3g}"])
    choices = [[rows * run.length, freq, peaks[rows], "yes" if fits[rows] else "no"] for rows, freq in batches]
    tables = [
        tabulate(counts, ["parameters of", ""], intfmt=","),
        tabulate(memory, [f"GiB per GPU, {rows * run.length:,} tokens", ""], floatfmt=".3f"),
        tabulate(per_update, ["an update", ""], colalign=("left", "right")),
        tabulate(choices, ["max-tokens", "update-freq", "GiB", "fits"], intfmt=",", floatfmt=".3f"),
    ]
    return "\n\n".join(tables), best


def training_command(config: Path, overrides: Sequence[str], settings: dict[str, Any]) -> str:
    """Returns the command that trains the planned run; `settings` take the place of overrides of the same key."""
    kept = [override for override in overrides if override.lstrip("+~").partition("=")[0] not in settings]
    command = ["fairseq-hydra-train", "--config-dir", str(config.parent), "--config-name", config.stem, *kept]
    return shlex.join([*command, *(f"{key}={value}" for key, value in settings.items())])
