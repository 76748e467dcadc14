"""How the ranks of torchrun share one run: with ``ddp`` each holds every weight, with ``fsdp`` its part of each.

``fsdp`` is FSDP2 (`torch.distributed.fsdp.fully_shard`): the weights of base, teachers and of what learns are cut along
their first dimension, and a block is whole on a rank only while it computes. Each rank loads whole weights into the
CPU's memory first and keeps its part. Checkpoints and students are written whole, so that any number of ranks goes on
with either. With one process both mean the same: nothing is shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shoulders.distributed.context import DistContext
from shoulders.hub.fast import unpack

PARTS = hasattr(FSDPModule, "reset_iter_state")  # whether this torch can do what is asked of it here; 2.13 can


def share(learner: nn.Module, base: nn.Module, teachers: nn.Module, kind: str, rank: DistContext) -> nn.Module:
    """Bring models to the ranks' devices, whole or in parts; returns the module that runs training steps.

    Args:
        learner: holds all that learns, and the base.
        base: frozen; it is also asked by itself.
        teachers: frozen.
        kind: ``ddp`` or ``fsdp``.
    """
    if kind == "ddp" or rank.world == 1:
        learner.to(rank.device)
        teachers.to(rank.device)
        return DistributedDataParallel(learner) if rank.world > 1 else learner
    # some base's modules return views; nothing here writes into what a module returns
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(rank.device.type, (rank.world,))
    for teacher in _roots(teachers):
        _shard_frozen(teacher, mesh)
    _shard_learner(learner, base, mesh)
    for model in (learner, teachers):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device != rank.device:  # scalars, and what stands outside of all that was cut
                tensor.data = tensor.data.to(rank.device)
    return learner


@contextmanager
def synced(module: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of one part of a step: its ranks average their gradients once, in the last part."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
        if last:
            _average_scalars(module)
    else:
        yield


@contextmanager
def whole(learner: nn.Module) -> Iterator[None]:
    """Within this context what learns is whole on every rank, so that any of it can be called by itself."""
    if not isinstance(learner, FSDPModule):
        yield
        return
    learner.unshard()
    try:
        yield
    finally:
        learner.reshard()


def gathered(tensors: Mapping[str, Tensor], rank: DistContext) -> dict[str, Tensor]:
    """Tensors on the CPU of the main rank, whole; every rank brings its parts, and the others get nothing."""
    found = {}
    for name, tensor in tensors.items():
        one = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank.is_main:
            found[name] = one.detach().cpu()
    return found


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, cut as ``like`` is; all of it where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def replicated(tensor: Tensor) -> Tensor:
    """A tensor in parts -> the same, whole on every rank."""
    return tensor.redistribute(placements=[Replicate()]) if isinstance(tensor, DTensor) else tensor


def apart(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in parts and whole ones, without an empty group: torch moves no list that holds both."""
    parts: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in parameters:
        (parts if isinstance(p, DTensor) else others).append(p)
    return [group for group in (parts, others) if group]


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm of ``most`` over all ranks; returns the norm before, as torch's own clipping."""
    groups = apart(parameters)
    norm = reduce(torch.hypot, map(_gradient_norm, groups))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, most, norm)
    return norm


def _gradient_norm(group: list[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in group if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    squared = nn.utils.get_total_norm(parts).square()
    dist.all_reduce(squared)
    return squared.sqrt()


def _average_scalars(learner: nn.Module) -> None:
    """What cannot be cut has its gradient averaged here."""
    gradients = [p.grad for p in _scalars(learner) if p.grad is not None]
    if gradients:
        total = torch.stack(gradients)
        dist.all_reduce(total)
        for gradient, mean in zip(gradients, total / dist.get_world_size(), strict=True):
            gradient.copy_(mean)


def _shard_learner(learner: nn.Module, base: nn.Module, mesh: DeviceMesh) -> None:
    unpack(base)
    scalars = set(_scalars(learner))
    for block in _blocks(base):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    # not the base itself: its class would change, by which transformers finds out what to record of it
    for part in base.children():
        if any(not isinstance(p, DTensor) for p in set(part.parameters()) - scalars):
            fully_shard(part, mesh=mesh, ignored_params=scalars)
    fully_shard(learner, mesh=mesh, ignored_params=scalars)
    # the base may be asked before the learner ever runs: torch would take the first of its blocks for the root
    fully_shard.state(learner)._lazy_init()  # type: ignore[attr-defined]


def _shard_frozen(model: nn.Module, mesh: DeviceMesh) -> None:
    unpack(model)
    scalars = set(_scalars(model))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)
    model.register_forward_hook(_forget)


def _forget(model: nn.Module, *_: object) -> None:
    """Torch notes the blocks of every forward for a backward, which a frozen model never runs: the notes would grow."""
    model.reset_iter_state()  # type: ignore[operator]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is whole at once: the blocks that transformers never splits, else what stands in lists; inner ones first."""
    parts = list(model.modules())[::-1]
    names = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
    named = [part for part in parts if type(part).__name__ in names]
    listed = [part for one in parts if isinstance(one, nn.ModuleList) for part in one]
    return [
        part
        for part in dict.fromkeys(named or listed)
        if any(p.ndim for p in part.parameters()) and not isinstance(part, nn.ModuleList | nn.ModuleDict)
    ]


def _roots(models: nn.Module) -> list[nn.Module]:
    """The models that a module holds, by name or not, as far as they have weights."""
    held = [child.children() if isinstance(child, nn.ModuleDict) else [child] for child in models.children()]
    return [model for models in held for model in models if any(p.ndim for p in model.parameters())]


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    """What has no dimension to be cut along: every rank keeps it."""
    return [p for p in model.parameters() if not p.ndim]
