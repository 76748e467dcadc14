"""How models are spread over ranks: ``ddp`` keeps every weight on every rank, ``fsdp`` keeps one shard of each.

``fsdp`` is FSDP2 (`torch.distributed.fsdp.fully_shard`): the weights of the base, of the teachers and of all trainable
modules are split along their first dimension, and the weights of a block are complete on a rank only while the block
computes. Each rank first loads complete weights into CPU memory and then keeps its shard. Checkpoints and students are
saved unsharded, so a run resumes with either kind on any number of ranks. With one process both kinds are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shoulders.distributed.context import DistContext
from shoulders.hub.fast import unpack

FSDP_SUPPORTED = hasattr(FSDPModule, "reset_iter_state")  # torch 2.13 or newer, see `_reset_iter_state`


def wrap_model(module: nn.Module, base: nn.Module, teachers: nn.Module, kind: str, dist: DistContext) -> nn.Module:
    """Move the models to the device of this rank, complete or sharded; returns the module that runs training steps.

    Args:
        module: holds the base and everything that is trained.
        base: the frozen backbone, which also runs alone.
        teachers: frozen.
        kind: ``ddp`` or ``fsdp``.
        dist: this process.
    """
    if kind == "ddp" or dist.world_size == 1:
        module.to(dist.device)
        teachers.to(dist.device)
        return DistributedDataParallel(module) if dist.world_size > 1 else module
    # modules of some bases return views; this package never writes into the output of a module
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    for teacher in _models_in(teachers):
        _shard_frozen(teacher, mesh)
    _shard_trained(module, base, mesh)
    for model in (module, teachers):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device != dist.device:  # scalars and buffers: nothing above sharded them
                tensor.data = tensor.data.to(dist.device)
    return module


@contextmanager
def sync_gradients(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Run forward and backward of one micro-batch; the ranks average their gradients in the last one only."""
    if isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
        yield
        if is_last:
            _average_scalars(module)
    else:
        yield


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Keep the weights of a module complete on every rank in this context, so that its submodules can run alone."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gather_state(tensors: Mapping[str, Tensor], dist: DistContext) -> dict[str, Tensor]:
    """Unshard tensors and copy them to the CPU of the main rank; the other ranks get an empty dict.

    Every rank has to call this with the same names in the same order.
    """
    state = {}
    for name, tensor in tensors.items():
        complete = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.is_main:
            state[name] = complete.detach().cpu()
    return state


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that is complete on every rank as ``like`` is sharded; the tensor itself if ``like`` is not."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def replicate(tensor: Tensor) -> Tensor:
    """Make a sharded tensor complete on every rank."""
    return tensor.redistribute(placements=[Replicate()]) if isinstance(tensor, DTensor) else tensor


def split_by_dtensor(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters into sharded and complete ones, without empty groups: torch accepts no list of both kinds."""
    sharded: list[nn.Parameter] = []
    complete: list[nn.Parameter] = []
    for p in parameters:
        (sharded if isinstance(p, DTensor) else complete).append(p)
    return [group for group in (sharded, complete) if group]


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a global norm of ``max_norm``; returns the norm before, as torch's function does."""
    groups = split_by_dtensor(parameters)
    norm = reduce(torch.hypot, map(_gradient_norm, groups))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _gradient_norm(group: list[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in group if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    local = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    squared = nn.utils.get_total_norm(local).square()
    distributed.all_reduce(squared)
    return squared.sqrt()


def _average_scalars(module: nn.Module) -> None:
    """Average the gradients of scalar parameters over the ranks, which FSDP does not do: they are not sharded."""
    gradients = [p.grad for p in _scalars(module) if p.grad is not None]
    if gradients:
        total = torch.stack(gradients)
        distributed.all_reduce(total)
        for gradient, mean in zip(gradients, total / distributed.get_world_size(), strict=True):
            gradient.copy_(mean)


def _shard_trained(module: nn.Module, base: nn.Module, mesh: DeviceMesh) -> None:
    unpack(base)
    scalars = set(_scalars(module))
    for block in _blocks(base):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    # fully_shard changes the class of a module, and transformers looks up which outputs to record by the class of the
    # base: so the children of the base are sharded, not the base itself
    for child in base.children():
        if any(not isinstance(p, DTensor) for p in set(child.parameters()) - scalars):
            fully_shard(child, mesh=mesh, ignored_params=scalars)
    fully_shard(module, mesh=mesh, ignored_params=scalars)
    # the base may run before the module does, and torch would then take its first block for the root
    fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]


def _shard_frozen(model: nn.Module, mesh: DeviceMesh) -> None:
    unpack(model)
    scalars = set(_scalars(model))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)
    model.register_forward_hook(_reset_iter_state)


def _reset_iter_state(model: nn.Module, *_: object) -> None:
    """Delete what torch records of each forward for the backward: a frozen model runs none, so the records pile up."""
    model.reset_iter_state()  # type: ignore[operator]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The units of sharding, inner ones first: modules that transformers never splits, else the modules in lists."""
    modules = list(model.modules())[::-1]
    names = {name for module in modules for name in getattr(module, "_no_split_modules", None) or ()}
    named = [module for module in modules if type(module).__name__ in names]
    listed = [module for container in modules if isinstance(container, nn.ModuleList) for module in container]
    return [
        module
        for module in dict.fromkeys(named or listed)
        if any(p.ndim for p in module.parameters()) and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]


def _models_in(models: nn.Module) -> list[nn.Module]:
    """The models that a module holds, directly or in a `ModuleDict`, except those without weights."""
    children = [child.children() if isinstance(child, nn.ModuleDict) else [child] for child in models.children()]
    return [model for group in children for model in group if any(p.ndim for p in model.parameters())]


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    """Parameters without a dimension, which cannot be split: every rank keeps them."""
    return [p for p in model.parameters() if not p.ndim]
