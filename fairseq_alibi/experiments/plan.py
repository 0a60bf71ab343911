"""What a training run will take: parameters, memory per GPU by part, tokens and FLOPs per update, and what fits.

Nothing is trained and no GPU is needed: the model of a config is built on PyTorch's meta device, which has shapes only.

Letters: P parameters, N GPUs, n tokens in a batch of one GPU, L tokens in a block, C width, F feed-forward width,
H heads, V types; s_i the share of tokens in band i of an adaptive vocabulary, C_i the width of its embeddings, V_i its
types; e bytes of a number in activations (2 in half precision, else 4); d bytes of a number in a dropout mask (1 on a
GPU, e on a CPU). A term in [brackets] is there with that dropout only.

Lasting memory, bytes:
    weights     4 P; with fp16 or bf16 2 P + 4 P, as the optimizer has a float32 copy; with memory_efficient_fp16 2 P
    gradients   as the weights; with fully_sharded and fp16 4 P
    states      4 P for nag (momentum), 8 P for adam (two moments)
    in transit  for N > 1: legacy_ddp e min(P, 2^28), pytorch_ddp e P; for fully_sharded see below
fully_sharded divides the first three by N, zero_sharding=os the states. In transit fully_sharded then has, of e bytes
each, whole weights and gradients of what is computed: one layer and all that is no layer. All layers, where they are
smaller than min_params_to_wrap and not checkpointed; all weights with no_reshard_after_forward.

Passing memory, bytes: what autograd keeps of a batch for the backward pass, and the logits at their highest.
    a layer, per token
        e (8 C + F) + 4 H + 16 + [2 d C for dropout] + [(d + e) F for activation dropout]
        + 4 F where the activation function is not relu
        + e C for attention in one kernel on a GPU, not in tiles (see `attention.py`), for its output is laid out anew
        + 3 e H L for attention dropout under a mask on a CPU, for which PyTorch has no fused kernel
        checkpointed: e C, or 0 with offload_activations; and all of one layer while that is computed again, when the
        logits are gone, so that the peak has the larger one of the two
    beside the layers, per token
        e (C + sum of s_i C_i) + 8 + [d C for dropout] + [(d + e) C for adaptive softmax dropout]
        + e C + 8 for a norm after the last layer, + 2 e C where norms come after the parts of a layer
    logits and loss
        plain softmax: (8 + e) V n, for log-probabilities and their gradients are float32
        adaptive softmax: 3 e n (V_0 + its tails + sum of s_i V_i) + e n sum of s_i (C + 2 C_i), sums over the tails
    attention mask
        e H L^2, float32 on a CPU, where attention runs under a mask
When the optimizer steps, activations are gone; adam then makes a float32 temporary of its largest tensor (4 bytes a
parameter; fp16 has all parameters in one tensor), memory_efficient_fp16 two more. The peak is the higher moment's.

Not included: CUDA's own memory (some 0.5 GiB), the workspace of kernels, fragmentation. A tenth of the GPU is left free
for them. The tests count what autograd keeps; on a CPU the whole was measured too; on a GPU it has not been measured.

FLOPs per update, of T tokens: 6 T (weights that a token is multiplied with) + 6 T C (L + 1) per layer for attention:
two products of 2 C FLOPs for each pair of query and key, of which a causal model has (L + 1) / 2 per query, forward
once and backward twice. Activation checkpointing computes the layers' forward part once more, which is shown apart.
"""

import argparse
import functools
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import omegaconf_no_object_check
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tabulate import tabulate
from torch import nn
from yaml import YAMLError

from ..commands.arguments import positive_integer
from ..core.attention_inputs import TokenSpan
from ..data.wikitext103 import TYPES as WIKITEXT103_TYPES
from ..files.data_folders import made_up_dictionary, read_dictionary
from ..files.errors import one_line
from ..models.language_model import AlibiLanguageModel

#: Types of the vocabulary for configs whose names begin so, where neither the data nor --types says otherwise.
TYPES = {"wikitext103": WIKITEXT103_TYPES, "alibi_1_3b": 50_264}

#: float32 numbers per parameter that an optimizer of fairseq's keeps.
MOMENTS = {"nag": 1, "adam": 2}

#: Share of a GPU's memory that a run may take by these formulas.
USABLE = 0.9

#: What these formulas know nothing of.
UNKNOWN = ("common.amp", "distributed_training.cpu_offload", "distributed_training.pipeline_model_parallel")

#: What has to be a whole number of at least 1.
POSITIVE = (
    *("task.tokens_per_sample", "dataset.required_batch_size_multiple", "optimization.update_freq[0]"),
    *("distributed_training.distributed_world_size", "model.decoder_layers", "model.decoder_embed_dim"),
    *("model.decoder_ffn_embed_dim", "model.decoder_attention_heads"),
)

GIB = 2**30


def read_config(path: Path, overrides: Optional[list[str]] = None) -> DictConfig:
    """A config as fairseq-hydra-train gets it: defaults lists, overrides and fairseq's own defaults put together.

    Args:
        path: of a YAML file.
        overrides: `key=value`, as hydra takes them on the command line.

    Raises:
        ValueError: there is no such file, or hydra or fairseq refuses what stands in it.
    """
    if not path.is_file():
        raise ValueError(f"there is no config {path}: name a YAML file of configs/")
    try:
        hydra_init(path.stem)
        with initialize_config_dir(str(path.parent.resolve()), version_base="1.1"):
            cfg = compose(path.stem, overrides or [])
        add_defaults(cfg)
        with omegaconf_no_object_check():
            return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def find_dictionary(cfg: DictConfig, path: Path, types: Optional[int] = None) -> Dictionary:
    """The dictionary of a run: that of its data, or a made-up one.

    Args:
        cfg: see `read_config`.
        path: of the config, by whose name `TYPES` knows the vocabularies of configs/.
        types: size of a made-up dictionary in the place of the data's. Real text has fewer rare words than that, so
            that an adaptive softmax then needs less memory and fewer FLOPs.

    Raises:
        ValueError: there is neither data nor a known size.
    """
    if types:
        return made_up_dictionary(types)
    if cfg.task and not OmegaConf.is_missing(cfg.task, "data") and cfg.task.data:
        return read_dictionary(cfg.task.data)
    known = next((size for name, size in TYPES.items() if path.stem.startswith(name)), None)
    if known is None:
        raise ValueError(f"{path} does not say how large its vocabulary is: pass task.data=FOLDER or --types")
    return made_up_dictionary(known)


class Run:
    """A training run that has not been started.

    Args:
        cfg: see `read_config`.
        dictionary: of the data; its counts say how many tokens are in which band of an adaptive vocabulary.

    Raises:
        ValueError: the config is for another model, or has options that make no model or that are not planned for.
    """

    def __init__(self, cfg: DictConfig, dictionary: Dictionary):
        self.cfg, self.dictionary = cfg, dictionary
        name = OmegaConf.select(cfg, "model._name")
        if name != "alibi_lm":
            hint = " (an architecture's name does not apply its sizes under hydra)" if "alibi_lm" in str(name) else ""
            raise ValueError(f"model._name is {name}: only alibi_lm can be planned{hint}")
        for option in POSITIVE:
            if (OmegaConf.select(cfg, option) or 0) < 1:
                raise ValueError(f"{option} is {OmegaConf.select(cfg, option)}: set it to a whole number of at least 1")
        for option in UNKNOWN:
            if OmegaConf.select(cfg, option):
                raise ValueError(f"{option} cannot be planned: switch it off with {option}=false")
        self.optimizer = OmegaConf.select(cfg, "optimizer._name")
        if self.optimizer not in MOMENTS:
            raise ValueError(f"optimizer {self.optimizer} cannot be planned: use {' or '.join(MOMENTS)}")
        with torch.device("meta"):
            task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
            try:
                self.model = AlibiLanguageModel.build_model(cfg.model, task).train()
            except AssertionError as error:
                raise ValueError(f"the options make no model: {one_line(error)}") from error
        self.decoder = self.model.decoder
        common = cfg.common
        self.half = bool(common.fp16 or common.bf16)
        self.efficient = self.half and bool(common.memory_efficient_fp16 or common.memory_efficient_bf16)
        self.sharded = cfg.distributed_training.ddp_backend == "fully_sharded"
        self.device = torch.device("cpu" if common.cpu else "cuda")
        self.element = 2 if self.half else 4
        self.length = cfg.task.tokens_per_sample
        self.width = self.decoder.layers[0].embed_dim

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by part, those that are tied in the part where they come first."""
        found = {"embeddings": 0, "layers": 0, "output": 0}
        for name, parameter in self.model.named_parameters():
            if name.startswith(("decoder.embed_", "decoder.project_in_dim")):
                found["embeddings"] += parameter.numel()
            elif name.startswith(("decoder.adaptive_softmax", "decoder.output_projection", "decoder.project_out_dim")):
                found["output"] += parameter.numel()
            else:
                found["layers"] += parameter.numel()
        return found

    @functools.cached_property
    def bands(self) -> list[tuple[float, int, int]]:
        """(share of tokens, width of embeddings, types) of each band of an adaptive softmax; none of a plain one."""
        softmax = self.decoder.adaptive_softmax
        if softmax is None:
            return []
        counts, found, first = self.dictionary.count, [], 0
        for number, last in enumerate(softmax.cutoff):
            width = int(softmax.input_dim // softmax.factor**number)
            found.append((sum(counts[first:last]) / max(1, sum(counts)), width, last - first))
            first = last
        return found

    def lasting_memory(self, gpus: int) -> dict[str, float]:
        """Bytes by part that one of `gpus` GPUs needs all the time."""
        count, share = sum(self.parameters.values()), 1 / gpus if self.sharded else 1.0
        copies = 2 + 4 if self.half and not self.efficient else self.element
        states = 1 / gpus if self.cfg.distributed_training.zero_sharding == "os" else share
        return {
            "weights": copies * count * share,
            "gradients": (4 if self.sharded and not self.efficient else copies) * count * share,
            "optimizer states": 4 * MOMENTS[self.optimizer] * count * states,
            "in transit between GPUs": self.in_transit(gpus),
        }

    def in_transit(self, gpus: int) -> int:
        """Bytes of weights and gradients on one GPU that are being gathered, summed or divided."""
        options, count = self.cfg.distributed_training, sum(self.parameters.values())
        if self.sharded:
            layer = sum(parameter.numel() for parameter in self.decoder.layers[0].parameters())
            own = self.cfg.model.checkpoint_activations or layer >= self.cfg.model.min_params_to_wrap
            at_once = count - (len(self.decoder.layers) - 1) * layer if own else count
            return self.element * (at_once + (count if options.no_reshard_after_forward else at_once))
        if gpus == 1 or options.gradient_as_bucket_view:
            return 0
        return self.element * (min(count, 2**28) if options.ddp_backend in ("legacy_ddp", "no_c10d") else count)

    def step_memory(self, gpus: int) -> float:
        """Bytes of temporaries while the optimizer steps, see the module."""
        if self.sharded:
            largest = sum(self.parameters.values()) / gpus
        elif self.half and not (self.efficient or self.cfg.common.bf16 or self.cfg.common.fp16_no_flatten_grads):
            largest = sum(self.parameters.values())
        else:
            largest = max(parameter.numel() for parameter in self.model.parameters())
        return 4 * largest * ((self.optimizer == "adam") + 2 * self.efficient)

    @functools.cached_property
    def masked(self) -> bool:
        """Whether attention runs under a mask of length x length."""
        return not self.decoder.setup.runs_without_mask(
            self.device, TokenSpan(self.length, self.length, 0), training=True
        )

    def layer_memory(self) -> float:
        """Bytes per token that autograd keeps of a layer, see the module."""
        layer, e, width, d = self.decoder.layers[0], self.element, self.width, self.mask_element
        heads, ffn = layer.nh, layer.fc1.out_features
        attention_dropout = layer.self_attn.dropout_module.p
        on_gpu = self.device.type == "cuda"
        method = self.decoder.position_method
        tiled = not self.masked and method.has_distance_bias and (attention_dropout or method.bias_kind != "linear")
        found = e * ((9 if on_gpu and not tiled else 8) * width + ffn) + 4 * heads + 16
        if self.cfg.model.activation_fn != "relu":
            found += 4 * ffn  # its input, which fairseq's gelu makes float32
        if layer.dropout_module.p:
            found += 2 * d * width
        if layer.activation_dropout_module.p:
            found += (d + e) * ffn
        if self.masked and not on_gpu and attention_dropout:
            found += 3 * e * heads * self.length
        return found

    @property
    def mask_element(self) -> int:
        """Bytes of a number in a dropout mask."""
        return 1 if self.device.type == "cuda" else self.element

    def activations(self, tokens: int) -> float:
        """Bytes that autograd keeps of a batch of `tokens` tokens in the forward pass, the logits not included."""
        e, d, width, options = self.element, self.mask_element, self.width, self.cfg.model
        layer = self.layer_memory()
        if options.checkpoint_activations:
            layer = 0 if options.offload_activations else e * width
        rest = 8.0 + e * (width + (sum(share * own for share, own, _ in self.bands) if options.adaptive_input else 0))
        if self.decoder.dropout_module.p:
            rest += d * width
        if self.bands and options.adaptive_softmax_dropout:
            rest += (d + e) * width
        if self.decoder.layer_norm is not None:
            rest += e * width + 8
        if not options.decoder_normalize_before:
            rest += 2 * e * width  # the first layer copies its input, which lies batch first, for each of q, k and v
        return tokens * (len(self.decoder.layers) * layer + rest)

    def logits(self, tokens: int) -> float:
        """Bytes of logits, log-probabilities and their gradients of `tokens` tokens at their highest."""
        e = self.element
        if not self.bands:
            return (8 + e) * tokens * len(self.dictionary)
        head, *tails = self.bands
        count = head[2] + len(tails) + sum(share * types for share, _, types in tails)
        return tokens * (3 * e * count + e * sum(share * (self.width + 2 * own) for share, own, _ in tails))

    def mask(self) -> int:
        """Bytes of the attention mask, 0 without one."""
        if not self.masked:
            return 0
        mask = self.decoder.position_method.future_mask(self.length, self.length, device=torch.device("meta"))
        return mask.numel() * (4 if self.device.type == "cpu" else self.element)

    def memory(self, gpus: int, rows: int) -> dict[str, float]:
        """Bytes on one GPU by part, with their peak, for batches of `rows` blocks."""
        tokens, lasting = rows * self.length, self.lasting_memory(gpus)
        passing = {
            "activations": self.activations(tokens),
            "one layer, computed again": tokens * self.layer_memory() if self.cfg.model.checkpoint_activations else 0,
            "logits and loss": self.logits(tokens),
        }
        kept, *in_turn = passing.values()
        peak = sum(lasting.values()) + self.mask() + max(kept + max(in_turn), self.step_memory(gpus))
        return {**lasting, "attention mask": self.mask(), **passing, "peak": peak}

    def rows(self, max_tokens: int) -> int:
        """Blocks in a batch that fairseq makes with these max-tokens, after its rounding to a multiple."""
        multiple = self.cfg.dataset.required_batch_size_multiple
        rows = min(max_tokens // self.length, self.cfg.dataset.batch_size or math.inf)
        return rows - rows % multiple if rows > multiple else rows

    def blocks_per_update(self) -> int:
        """Blocks that the config has in an update, on as many GPUs as it says; the first update_freq counts.

        Raises:
            ValueError: the config does not say it, or its batches hold no block.
        """
        max_tokens = self.cfg.dataset.max_tokens
        if not max_tokens or max_tokens < 1:
            raise ValueError("dataset.max_tokens is not set: set it to the tokens of a batch, for example 9216")
        rows = self.rows(max_tokens)
        if not rows:
            raise ValueError(f"dataset.max_tokens={max_tokens} holds no block of {self.length} tokens: raise it")
        world = self.cfg.distributed_training.distributed_world_size
        return rows * world * self.cfg.optimization.update_freq[0]

    def batches(self, gpus: int) -> list[tuple[int, int]]:
        """(blocks in a batch, update_freq) that give the config's update on `gpus` GPUs, the largest batch first.

        Raises:
            ValueError: so many GPUs cannot share it.
        """
        blocks = self.blocks_per_update()
        if blocks % gpus:
            fitting = ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0)
            raise ValueError(
                f"{gpus} GPUs cannot share the {blocks} blocks of {self.length:,} tokens that the config has in an "
                f"update: pass --gpus {fitting}"
            )
        own = blocks // gpus
        divisors = [rows for rows in range(own, 0, -1) if own % rows == 0]
        return [(rows, own // rows) for rows in divisors if self.rows(rows * self.length) == rows]

    def flops(self, tokens: int) -> dict[str, float]:
        """FLOPs of an update of `tokens` tokens: `model`, and `recomputed` by activation checkpointing."""
        layers = sum(parameter.numel() for parameter in self.decoder.layers.parameters() if parameter.dim() == 2)
        attention = len(self.decoder.layers) * self.width * (self.length + 1)
        if self.bands:
            head, *tails = self.bands
            output = self.width * (head[2] + len(tails))
            output += sum(share * own * (self.width + types) for share, own, types in tails)
        else:
            output = len(self.dictionary) * self.decoder.output_embed_dim
        projections = sum(
            module.weight.numel()
            for module in (self.decoder.project_in_dim, self.decoder.project_out_dim)
            if isinstance(module, nn.Linear)
        )
        if self.bands and self.cfg.model.adaptive_input:
            projections += sum(share * own * self.width for share, own, _ in self.bands)
        return {
            "model": 6 * tokens * (layers + output + projections + attention),
            "recomputed": 2 * tokens * (layers + attention) if self.cfg.model.checkpoint_activations else 0,
        }


def plan(run: Run, gpus: int, gpu_memory: float) -> tuple[str, Optional[tuple[int, int]]]:
    """The tables of a run.

    Args:
        run: to be planned.
        gpus: number of GPUs.
        gpu_memory: of each, GiB.

    Returns:
        The text, and the largest batch that fits, see `Run.batches`; None where none does.

    Raises:
        ValueError: see `Run.batches`.
    """
    batches = run.batches(gpus)
    fits = {rows: run.memory(gpus, rows)["peak"] <= USABLE * gpu_memory * GIB for rows, _ in batches}
    best = next((batch for batch in batches if fits[batch[0]]), None)
    rows = (best or batches[-1])[0]
    tokens = run.blocks_per_update() * run.length
    flops = run.flops(tokens)
    counts = run.parameters
    count_rows: list[list[Any]] = [*map(list, counts.items()), ["all", sum(counts.values())]]
    memory = [[part, size / GIB] for part, size in run.memory(gpus, rows).items() if size]
    per_update: list[list[Any]] = [["tokens", f"{tokens:,}"], ["FLOPs", f"{flops['model']:.3g}"]]
    if flops["recomputed"]:
        per_update.append(["FLOPs of checkpointing", f"{flops['recomputed']:.3g}"])
    choices = [
        [rows * run.length, freq, run.memory(gpus, rows)["peak"] / GIB, "yes" if fits[rows] else "no"]
        for rows, freq in batches
    ]
    batch = f"GiB per GPU, {rows * run.length:,} tokens"
    tables = [
        tabulate(count_rows, ["parameters of", ""], intfmt=","),
        tabulate(memory, [batch, ""], floatfmt=".3f"),
        tabulate(per_update, ["an update", ""], colalign=("left", "right")),
        tabulate(choices, ["max-tokens", "update-freq", "GiB", "fits"], intfmt=",", floatfmt=".3f"),
    ]
    return "\n\n".join(tables), best


def number_of_gib(text: str) -> float:
    """An argparse type: a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no such number: pass the GiB of a GPU, for example 80")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fairseq-alibi plan`."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of configs/")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for fairseq-hydra-train, after CONFIG")
    parser.add_argument("--gpus", type=positive_integer, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--gpu-memory", type=number_of_gib, required=True, metavar="GIB", help="memory of a GPU, in GiB"
    )
    parser.add_argument(
        "--types",
        type=positive_integer,
        metavar="V",
        help="size of the vocabulary, special symbols included; default: that of the dict.txt in task.data, else of "
        "the corpus that a config of configs/ is for",
    )


def main(args: argparse.Namespace) -> None:
    """`fairseq-alibi plan`: prints the tables, and the options for the largest batch that fits."""
    cfg = read_config(args.config, args.overrides)
    run = Run(cfg, find_dictionary(cfg, args.config, args.types))
    text, best = plan(run, args.gpus, args.gpu_memory)
    print(text)
    if best is None:
        raise ValueError(
            f"not one block of {run.length:,} tokens fits {args.gpu_memory:g} GiB: try "
            "++model.checkpoint_activations=true, common.memory_efficient_fp16=true, or fully_sharded and more --gpus"
        )
    rows, update_freq = best
    print(
        f"\nfairseq-hydra-train --config-dir {args.config.parent} --config-name {args.config.stem} "
        f"dataset.max_tokens={rows * run.length} optimization.update_freq=[{update_freq}] "
        f"distributed_training.distributed_world_size={args.gpus}"
    )
