"""The loss path alone: from fixed network outputs of one batch to the gradients of ON's maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.steps.baseline import BaselineLosses
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.method.assignment import assign
from cosa_fast.method.objective import Objective
from cosa_fast.method.threshold import build_thresholds
from cosa_fast.network.model import Outputs

PATCH = 16


class NetworkOutputs:
    """Smooth random outputs of both networks, as a ViT with patches of 16 gives them; in bf16 on a GPU."""

    def __init__(self, config: Config, batch: Batch) -> None:
        device = batch.weak.device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(config.run.seed)
        count, classes = batch.labels.shape
        side = config.data.crop_size // PATCH

        def maps(rows: int, channels: int, size: int) -> Tensor:
            return torch.randn(rows, channels, size, size, generator=generator).to(device, self.dtype)

        sides = [max(1, round(side * scale)) for scale in config.teacher.scales]
        self.cams = [maps(2 * count, classes, size) for size in sides]
        self.cams_aux = [maps(2 * count, classes, size) for size in sides]
        self.segs = [maps(2 * count, classes + 1, size) for size in sides]
        self.cam, self.cam_aux = (maps(count, classes, side).requires_grad_() for _ in range(2))
        self.seg = maps(count, classes + 1, side).requires_grad_()
        self.logits = torch.zeros(count, classes, device=device)

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.cam, self.seg]

    def on(self) -> Outputs:
        """ON's outputs."""
        return Outputs(self.logits, self.cam, self.seg, self.logits, self.cam_aux)

    def an(self) -> list[Outputs]:
        """AN's outputs, one per scale; rows of images first, then those of their mirror images."""
        scales = zip(self.cams, self.segs, self.cams_aux, strict=True)
        return [Outputs(self.logits, cam, seg, self.logits, aux) for cam, seg, aux in scales]

    def pairs(self) -> list[tuple[Outputs, Outputs]]:
        """AN's outputs for images and for mirrored images, one pair per scale."""
        count = len(self.cam)

        def half(output: Outputs, rows: slice) -> Outputs:
            return output._replace(cam=output.cam[rows], seg=output.segmentation()[rows], cam_aux=output.cam_aux[rows])

        return [(half(each, slice(count)), half(each, slice(count, None))) for each in self.an()]


def fused_losses(config: Config, batch: Batch, *, compiled: bool = False) -> Callable[[], list[Tensor]]:
    """Labels, thresholds, c2s, c2s†, s2c, csc, energy and their gradients with the public kernels, as the engine calls
    them; `compiled`: the way to the loss by torch.compile, as far as it can."""
    network, objective = NetworkOutputs(config, batch), Objective(config)
    thresholds = build_thresholds(config.threshold, batch.weak.device, config.run.backend)

    def loss() -> Tensor:
        assignment = assign(network.an(), batch.labels, batch.valid, PATCH, config.run.backend)
        for threshold, confidence, category in zip(
            thresholds, assignment.grid_confidence, assignment.grid_category, strict=True
        ):
            threshold.update(confidence, assignment.grid_valid & (category > 0))
        xi = (thresholds[0].value, thresholds[1].value)
        return objective.total(objective.cotraining(network.on(), assignment, batch, xi, 0))

    return partial(_gradients, torch.compile(loss) if compiled else loss, network)


def baseline_losses(config: Config, batch: Batch) -> Callable[[], list[Tensor]]:
    """The same as it is usually written (baseline.py)."""
    network, losses = NetworkOutputs(config, batch), BaselineLosses(config)
    pairs = network.pairs()

    def loss() -> Tensor:
        terms = losses.cotraining(network.on(), pairs, batch)
        return torch.stack([getattr(config.loss, name) * term for name, term in terms.items()]).sum()

    return partial(_gradients, loss, network)


def _gradients(loss: Callable[[], Tensor], network: NetworkOutputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss(), network.leaves))
