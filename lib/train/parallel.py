"""A module that several processes train together: replicated (DDP) or sharded (FSDP2).

Replicated, every process holds everything and gradients are averaged. Sharded, each holds its part
of the decoder blocks' parameters, gradients and moments, and a block is gathered while it is at
work; embeddings and head are frozen and stay whole.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lib.base.workers import world_size
from lib.objective.loss import LossModule


def parallel(module: LossModule, device: torch.device, *, shard: bool) -> nn.Module:
    """The module as the processes train it; itself where there is one.

    Sharding replaces the parameters of the decoder blocks: look them up again afterwards.
    """
    if world_size() == 1:
        return module
    if shard:
        _shard(module.model.base_model, device)
        return module
    # indices do not change while they are in use: nothing but gradients has to be exchanged
    options = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=device.type == "cpu", device_placement=False, kwargs_handlers=[options]
    )
    wrapped = accelerator.prepare_model(module, device_placement=False)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def _shard(decoder: nn.Module, device: torch.device) -> None:
    mesh = torch.distributed.init_device_mesh(device.type, (world_size(),))
    blocks = decoder.get_submodule("layers")
    for block in blocks.children():
        fully_shard(block, mesh=mesh)
    inside = set(blocks.parameters())
    whole = {parameter for parameter in decoder.parameters() if parameter not in inside}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


@contextlib.contextmanager
def no_exchange(module: nn.Module) -> Iterator[None]:
    """Gradients of what runs inside are kept here until the next exchange."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.set_requires_gradient_sync(False)
    yield
    for part in sharded:
        part.set_requires_gradient_sync(True)


def whole(value: Tensor) -> Tensor:
    """A parameter or a statistic with all its shards; every process has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """``value`` sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def without_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose parameters hold nothing; buffers are the same."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    return copy.deepcopy(model, memo)


def gathered(model: PreTrainedModel, empty: PreTrainedModel) -> PreTrainedModel:
    """``empty`` with the whole parameters of ``model``, which was sharded; all have to ask."""
    values = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    empty.load_state_dict(values, assign=True)
    empty.tie_weights()
    return empty
