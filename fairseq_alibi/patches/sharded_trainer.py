"""fairseq's trainer on torch's FSDP2 (`fully_shard`); fairseq 0.12.2 itself needs fairscale to divide parameters.

Each process keeps a share of every parameter, gradient and optimizer state: rows of dimension 0. A layer has its whole
weights while it computes; what is outside of layers has them from the forward pass to the end of the backward pass, so
that a criterion can use the output layer. fairseq's optimizers get the shares as plain tensors, not as DTensors.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq import optim
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import DistributedTimeoutWrapper
from fairseq.models.transformer.transformer_config import DEFAULT_MIN_PARAMS_TO_WRAP
from fairseq.optim import lr_scheduler
from fairseq.trainer import Trainer
from fairseq.utils import has_parameters, safe_getattr
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ..files.shard_sets import KEY, remove_unused_folders, write_shards
from ..models.layers import DecoderLayer
from .option_checks import checked_optimizer
from .patch import CommandError
from .sharding import BACKEND

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def switched_off(cfg: FairseqConfig, *names: str) -> Iterator[None]:
    """A context in which options, named as GROUP.OPTION, are False."""
    owners = [(cfg[group], option) for group, option in (name.split(".") for name in names)]
    values = [getattr(owner, option) for owner, option in owners]
    try:
        for owner, option in owners:
            setattr(owner, option, False)
        yield
    finally:
        for (owner, option), value in zip(owners, values):
            setattr(owner, option, value)


def shard_model(model: nn.Module, cfg: FairseqConfig, device: torch.device, precision: MixedPrecisionPolicy) -> None:
    """Divides each layer that is large enough, as the options say, and then the rest of a model together.

    CommandError: a parameter has no rows.
    """
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            raise CommandError(f"{BACKEND} cannot divide {name}, a single number: use --ddp-backend legacy_ddp")
    if not dist.is_initialized():  # one process, which fairseq gives no group
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    options: Any = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": precision,
        "offload_policy": CPUOffloadPolicy() if cfg.distributed_training.cpu_offload else OffloadPolicy(),
    }
    # Called before FSDP's own hook, because it is registered before.
    model.register_forward_hook(fill_missing_gradients)
    least = safe_getattr(cfg.model, "min_params_to_wrap", DEFAULT_MIN_PARAMS_TO_WRAP)  # of a translation it is unset
    least = 0 if safe_getattr(cfg.model, "checkpoint_activations") else least
    reshard = not cfg.distributed_training.no_reshard_after_forward
    for layer in [module for module in model.modules() if isinstance(module, DecoderLayer)]:
        if sum(parameter.numel() for parameter in layer.parameters()) >= least:
            fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    model.register_load_state_dict_pre_hook(shard_loaded_parameters)


def fill_missing_gradients(model: nn.Module, _: Any, output: Any) -> None:
    """A forward hook that makes the backward pass leave a gradient in every parameter outside of layers.

    A band of an adaptive vocabulary has no gradient in a batch without its words. FSDP sums the gradients that exist,
    as one tensor, and this tensor has to be of the same size in all processes.
    """
    queued = False

    def fill() -> None:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None and not isinstance(parameter, DTensor):
                parameter.grad = torch.zeros_like(parameter)

    def queue(_: Tensor) -> None:
        nonlocal queued
        if not queued:  # FSDP queues its sum after this, in a hook of the same tensor
            torch.autograd.Variable._execution_engine.queue_callback(fill)  # type: ignore[attr-defined]
            queued = True

    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(queue)


def shard_loaded_parameters(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """A hook of `load_state_dict` that replaces whole parameters by the share of this process."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state and isinstance(parameter, DTensor) and not isinstance(state[name], DTensor):
            state[name] = as_shard(own_rows(state[name], parameter), parameter)


def own_rows(whole: Tensor, like: DTensor) -> Tensor:
    """Returns a copy of the rows that this process has of a tensor which is divided like another."""
    rows = -(-whole.size(0) // like.device_mesh.size())  # as torch.chunk
    return whole[like.device_mesh.get_local_rank() * rows :][:rows].clone()


def as_shard(own: Tensor, like: DTensor) -> DTensor:
    """Returns the whole of which the tensor `own` has the rows of this process, divided like another tensor."""
    own = own.to(like.device_mesh.device_type)
    sizes: Any = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, **sizes)


class ShardedTrainer(Trainer):
    """fairseq's trainer for a model whose parameters are divided among the processes."""

    is_fsdp = False  # type: ignore[assignment]  # what fairseq does where it is True needs fairscale
    use_distributed_wrapper = True  # type: ignore[assignment]  # the property `model` moves the model to its device
    should_save_checkpoint_on_current_rank = property(lambda self: self.is_data_parallel_master)

    def __init__(self, cfg: FairseqConfig, *args: Any):
        if has_parameters(args[2]):
            raise CommandError(f"{BACKEND}: the criterion has parameters, which are not divided: pass legacy_ddp")
        self._wrapped_model: Any = None
        self.updating = False
        self.gathered: dict[str, Any] = {}
        #: Each divided parameter, and the tensor of its share that the optimizer has.
        self.shares: list[tuple[Any, nn.Parameter]] = []
        # fairseq would convert the model to half precision, and offload with fairscale alone.
        with switched_off(cfg, "common.fp16", "common.bf16", "distributed_training.cpu_offload"):
            super().__init__(cfg, *args)

    @property
    def model(self) -> nn.Module:
        """See `Trainer.model`."""
        if self._wrapped_model is None:
            self._model: Any
            options, common = self.cfg.distributed_training, self.cfg.common
            half = torch.float16 if common.fp16 else torch.bfloat16 if common.bf16 else None
            efficient = common.memory_efficient_fp16 or common.memory_efficient_bf16
            if half and efficient:
                self._model.to(half)
            precision = MixedPrecisionPolicy(
                param_dtype=None if efficient else half,
                reduce_dtype=torch.float32 if half and options.fp32_reduce_scatter else None,
            )
            shard_model(self._model, self.cfg, self.device, precision)
            self._model.all_reduce_grads = self._hand_out_gradients  # fairseq's optimizers call it after each backward
            self._wrapped_model = self._model
            if options.heartbeat_timeout > 0:
                self._wrapped_model = DistributedTimeoutWrapper(self._model, timeout=options.heartbeat_timeout)
        return self._wrapped_model

    def _build_optimizer(self) -> None:
        """See `Trainer._build_optimizer`. With half precision the weights may be float32 already: there is no copy."""
        assert self.model is not None
        self._model.reshard()  # only divided parameters are DTensors
        divided: Any = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self.shares = [(parameter, nn.Parameter(parameter.detach().to_local())) for parameter in divided]
        shares = [share for _, share in self.shares]
        with checked_optimizer(self):
            if self.cfg.common.fp16 or self.cfg.common.bf16:
                build, more = optim.MemoryEfficientFP16Optimizer.build_optimizer, {"allow_unsupported": True}
                self._optimizer = build(self.cfg, shares, **more)
            else:
                self._optimizer = optim.build_optimizer(self.cfg.optimizer, shares)
            if not self._optimizer.supports_flat_params:
                needs = f"--optimizer {self.cfg.optimizer._name} needs whole parameters"
                raise CommandError(f"{needs} and cannot run with {BACKEND}: pass adam")
            self._lr_scheduler = lr_scheduler.build_lr_scheduler(self.cfg.lr_scheduler, self.optimizer)
            self._lr_scheduler.step_update(0)
        load = self._optimizer.load_state_dict
        self._optimizer.load_state_dict = lambda state, overrides=None: load(own_states(state, self.shares), overrides)

    def _hand_out_gradients(self) -> None:
        """Gives the optimizer's tensors the memory and the gradients of the divided parameters."""
        for parameter, share in self.shares:
            share.data = parameter.detach().to_local()  # older releases of torch move it before the first pass
            share.grad = None if parameter.grad is None else parameter.grad.detach().to_local()

    def zero_grad(self) -> None:
        """See `Trainer.zero_grad`."""
        super().zero_grad()
        for parameter, _ in self.shares:
            parameter.grad = None

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """See `Trainer.clip_grad_norm`."""

        def over_all_processes(norm: Tensor) -> Tensor:
            square = norm.to(self.device).float() ** 2
            dist.all_reduce(square)
            return square.sqrt()

        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=over_all_processes)

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        """See `Trainer.train_step`."""
        self.updating = True
        try:
            return super().train_step(samples, raise_oom)
        finally:
            self.updating = False

    def consolidate_optimizer(self) -> None:
        """See `Trainer.consolidate_optimizer`; all processes call it before the first of them saves.

        Gathers the whole model and optimizer state in the memory of the first process' CPU; with --use-sharded-state
        each process writes its share instead.
        """
        if self.updating:  # an update failed, maybe in this process only: the others would not take part
            return
        states: dict[int, dict[str, Any]] = {}
        optimizer = None
        if not self.cfg.checkpoint.no_save_optimizer_state:
            optimizer = self.optimizer.state_dict()
            for number, values in optimizer["state"].items():
                parameter, share = self.shares[number]
                tensors = {name: as_shard(x, parameter) for name, x in values.items() if has_shape_of(x, share)}
                optimizer["state"][number] = {name: x for name, x in values.items() if name not in tensors}
                states[number] = tensors
        self.gathered = {"model": {}, "last_optimizer_state": optimizer}
        if self.cfg.distributed_training.use_sharded_state:
            self._write_shards(states)
            return
        self.gathered["model"] = {name: self._gather(value) for name, value in self._model.state_dict().items()}
        for number, tensors in states.items():
            whole = {name: self._gather(value) for name, value in tensors.items()}
            self.gathered["last_optimizer_state"]["state"][number].update(whole)

    def _write_shards(self, states: dict[int, dict[str, Any]]) -> None:
        """Writes the share of this process of the model and of the optimizer's states by parameter."""
        folder = Path(self.cfg.checkpoint.save_dir) / f"shards-{self.get_num_updates()}-{time.time_ns():x}"
        if self.is_data_parallel_master:  # the others wait
            remove_unused_folders(folder.parent)
        folders = [folder]
        dist.broadcast_object_list(folders)
        tensors = {f"model/{name}": value.detach() for name, value in self._model.state_dict().items()}
        for number, values in states.items():
            tensors.update({f"optimizer/{number}/{name}": value for name, value in values.items()})
        self.gathered[KEY] = write_shards(folders[0], tensors)

    def _gather(self, value: Any) -> Tensor:
        """Returns the whole of a divided tensor in the first process, nothing in the others; of others, the value."""
        if not isinstance(value, DTensor):
            return value
        own: Any = value.detach()
        whole = as_shard(own.to_local(), value).full_tensor()
        return whole.cpu() if self.is_data_parallel_master else whole.new_empty(0)

    def state_dict(self) -> dict[str, Any]:
        """See `Trainer.state_dict`; of the first process, after `consolidate_optimizer`."""
        self._gathered_optim_state = self.gathered["last_optimizer_state"]
        return {**super().state_dict(), **self.gathered}

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> None:
        """See `Trainer.save_checkpoint`."""
        if self.updating:
            logger.error("%s is not saved: the other processes, which have a share of it, may be elsewhere", filename)
            return
        super().save_checkpoint(filename, extra_state)
        self.gathered = {}


def own_states(state: dict[str, Any], shares: list[tuple[Any, nn.Parameter]]) -> dict[str, Any]:
    """Returns the share of this process of the whole state of an optimizer."""
    own = {}
    for number, values in state["state"].items():
        parameter, _ = shares[number]
        own[number] = {name: own_rows(x, parameter) if has_shape_of(x, parameter) else x for name, x in values.items()}
    return {**state, "state": own}


def has_shape_of(value: Any, other: Tensor) -> bool:
    """Returns whether a value in an optimizer's state has a number for each number of a parameter."""
    return isinstance(value, Tensor) and value.shape == other.shape
