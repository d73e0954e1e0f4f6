"""How many floating-point operations a step's networks need, counted without computing anything."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cosa_fast.config.schema import Config
from cosa_fast.errors import first_line
from cosa_fast.network.build import SegmentationNetwork
from cosa_fast.network.model import CoSANet
from cosa_fast.network.resizing import resize_to_stride

Network = TypeVar("Network", bound=nn.Module)


class UncountableError(Exception):
    """A network that cannot run without data, so that its FLOPs cannot be counted; the message says why."""


def step_flops(network: SegmentationNetwork, config: Config, *, cotraining: bool) -> int:
    """FLOPs of one step on a whole batch, over all ranks: matrix products, convolutions and attention of ON (forward
    and backward) and, when co-training, of AN (forward, all scales and the flip); of a standalone network alone. A
    multiply-add counts 2.

    Counted on a copy of the network without data (device "meta"), so that neither results nor memory of the run are
    touched, and compiled blocks or captured steps do not matter. What torch has no formula for (element-wise work,
    losses, optimiser) and blocks that are computed a second time (model.checkpoint_blocks) do not count.
    Raises UncountableError where the backbone cannot run without data.
    """
    size = config.data.crop_size
    images = torch.empty(config.optim.batch_size, 3, size, size, device="meta")
    try:
        with FlopCounterMode(display=False) as counter:
            _learn(without_data(network), images, cotraining)
            if cotraining and isinstance(network, CoSANet):
                _assign(without_data(network), images, config)
    except (RuntimeError, NotImplementedError) as error:
        raise UncountableError(f"{config.model.backbone} does not run without data ({first_line(error)})") from error
    return counter.get_total_flops()


def _learn(network: SegmentationNetwork, images: Tensor, seg: bool) -> None:
    if isinstance(network, CoSANet):
        network.encoder.checkpoint_blocks = False
        network.encoder.backbone.grad_checkpointing = False
    outputs = [output for output in network.train()(images, seg=seg) if output is not None]
    torch.stack([output.sum() for output in outputs]).sum().backward()


@torch.no_grad()
def _assign(network: CoSANet, images: Tensor, config: Config) -> None:
    for scale in config.teacher.scales:
        scaled = resize_to_stride(images, scale, network.stride)
        network.eval()(torch.cat([scaled, scaled]) if config.teacher.flip else scaled)


def without_data(network: Network) -> Network:
    """A float32 copy whose parameters and buffers have shapes only, and that attends by no kernel of a device."""
    tensors: dict[int, Tensor] = {id(b): _shape_of(b) for b in network.buffers()}
    tensors |= {id(p): nn.Parameter(_shape_of(p), p.requires_grad) for p in network.parameters()}
    copied = copy.deepcopy(network, tensors)
    if isinstance(copied, CoSANet):
        copied.encoder.attend("sdpa")
    return copied


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.detach(), device="meta")
