"""What training keeps and computes for a sequence, measured on fake tensors, which have shapes but no memory.

The model of a run is built with one or two layers and a vocabulary of a few types. Two passes that differ in one thing,
a layer or a sequence, differ in what that thing takes. Masks, weights and whatever else the passes share cancel out.
"""

import contextlib
import copy
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from omegaconf import DictConfig, open_dict
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..core.attention_inputs import TokenSpan
from ..models.decoder import AlibiDecoder
from ..models.language_model import AlibiLanguageModel


class SequenceCost(NamedTuple):
    """What one sequence takes."""

    layer_bytes: int  # that autograd keeps of a layer for the backward pass
    other_bytes: int  # that it keeps beside the layers: of embeddings, the last norm and the output layer's input
    layer_flops: int  # of a layer's matrix products forward, without those inside attention


class GpuKernels(TorchFunctionMode):
    """Makes a pass on a CPU keep what it would keep on a GPU.

    Dropout keeps one byte for each number. Attention keeps queries, keys, values, its output, and a float32 number for
    each query and head, with dropout too. With `copies_output` the output projection needs a copy of the output.
    """

    def __init__(self, copies_output: bool):
        super().__init__()
        self.copies_output = copies_output

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if function is F.dropout:
            x, p, training = (lambda input, p=0.5, training=True, inplace=False: (input, p, training))(*args, **kwargs)
            return torch.native_dropout(x, p, True)[0] if training and p else x
        if function is F.scaled_dot_product_attention:
            # This kernel of the CPU keeps what those of GPUs keep. What a mask keeps is left out.
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out = kernel(*args, attn_mask=kwargs["attn_mask"].detach())[0]
            return out.clone(memory_format=torch.contiguous_format) if self.copies_output else out
        return function(*args, **kwargs)


def build_model(options: DictConfig, dictionary: Dictionary, **changes: Any) -> AlibiLanguageModel:
    """Builds the model of a run in training mode, with some of its options changed; ValueError if they make none."""
    options = copy.deepcopy(options)
    with open_dict(options):
        options.update(changes)
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    try:
        return AlibiLanguageModel.build_model(options, task).train()
    except (AssertionError, RuntimeError, OverflowError, TypeError) as error:  # what fairseq and torch raise for sizes
        raise ValueError(f"the options make no model: {' '.join(str(error).split())[:300] or repr(error)}") from error


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new weights have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def kept_tensors(parameters: set[int]) -> Iterator[dict[int, Tensor]]:
    """A context that collects the tensors which autograd keeps, by their storage, without those of `parameters`."""
    tensors: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in parameters:
            tensors[storage] = tensor  # the tensor itself, so that its storage is not reused
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield tensors


def run_without_padding(decoder: AlibiDecoder, tokens: Tensor) -> Tensor:
    """Returns the features (B, T, C) of tokens (B, T) that are known to hold no padding, on fake tensors too."""
    length = tokens.size(1)
    x = decoder.embed(tokens, length)
    inputs = decoder.setup.inputs(x, TokenSpan(length, length, 0), training=True)
    x = x.transpose(0, 1)
    for layer in decoder.layers:
        x = layer(x, inputs)[0]
    for module in (decoder.layer_norm, decoder.project_out_dim):
        x = x if module is None else module(x)
    return x.transpose(0, 1)


def measure_pass(
    options: DictConfig, layers: int, rows: int, length: int, dtype: torch.dtype, kernels: Optional[GpuKernels]
) -> tuple[int, int]:
    """Runs a forward pass of a model of `layers` layers on fake tensors; `kernels` are a GPU's, None for a CPU's.

    Returns the bytes that autograd keeps, the weights not counted; and FLOPs, those of attention not counted.
    """
    plain = {"adaptive_input": False, "adaptive_softmax_cutoff": None, "tie_adaptive_weights": False}
    own = {"decoder_layers": layers, "checkpoint_activations": False, "attention": "mask"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        with default_dtype(dtype):  # weights on fake tensors cannot be converted
            decoder = build_model(options, Dictionary(), **plain, **own).decoder
        tokens = torch.full((rows, length), 3)
        weights = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
        with (
            kept_tensors(weights) as tensors,
            FlopCounterMode(display=False) as counter,
            kernels or contextlib.nullcontext(),
        ):
            features = run_without_padding(decoder, tokens)
            F.linear(features, features.new_empty(1, features.size(-1), requires_grad=True))  # keeps its input
        kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    flops = counter.get_flop_counts()["Global"]
    return kept, sum(count for operation, count in flops.items() if "attention" not in str(operation))


def measure_sequence(
    options: DictConfig, length: int, dtype: torch.dtype, kernels: Optional[GpuKernels]
) -> SequenceCost:
    """Measures what one sequence of a run takes. Arguments: see `measure_pass`."""
    base, _ = measure_pass(options, 1, 2, length, dtype, kernels)  # two rows: a layout may differ with a single one
    more_layers, _ = measure_pass(options, 2, 2, length, dtype, kernels)
    more_rows, _ = measure_pass(options, 1, 3, length, dtype, kernels)
    layer = (more_layers - base) // 2
    # With dropout of attention weights a CPU would count the products inside attention too.
    _, one = measure_pass(options, 1, 1, length, dtype, GpuKernels(copies_output=False))
    _, two = measure_pass(options, 2, 1, length, dtype, GpuKernels(copies_output=False))
    return SequenceCost(layer, more_rows - base - layer, two - one)
