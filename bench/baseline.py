"""The method as it is usually written in PyTorch: what cosa_fast is compared with.

float32 (or autocast), eager operators; every map upsampled to full resolution with all of its classes; loops over
images, classes and parameters; background and foreground in separate cross entropies; an (N, N) similarity matrix; the
mixture fitted by scikit-learn on the CPU in every step; numbers read back with .item(). The same losses as the fused
engine's with its default options, from the same network and batch.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cosa_fast.assignment import resize_to_stride
from cosa_fast.config import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.model import CoSANet, build_model
from cosa_fast.optim import build_optimizer, set_learning_rate

IGNORE = 255
SPLITS = np.linspace(0.05, 0.95, 181)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h, w) → (B, K, H, W)."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class BaselineLosses:
    """CPLs, thresholds and co-training losses from two networks' outputs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.queues: dict[str, list[np.ndarray]] = {"cam": [], "cam_aux": []}

    def pseudo_labels(self, cams: list[tuple[Tensor, Tensor]], batch: Batch) -> tuple[Tensor, Tensor]:
        """Confidence and category (B, H, W) of [(plain, flipped)] CAMs, one pair per scale."""
        size = (batch.weak.shape[2], batch.weak.shape[3])
        fused = torch.zeros((*batch.labels.shape, *size), device=batch.weak.device)
        for plain, flipped in cams:
            fused += torch.maximum(upsample(plain.float(), size), upsample(flipped.float(), size).flip(-1)).relu()
        for image in range(len(fused)):
            inside = batch.valid[image]
            for category in range(fused.shape[1]):
                low, high = fused[image, category][inside].min(), fused[image, category][inside].max()
                fused[image, category] = (fused[image, category] - low) / (high - low + 1e-5)
        fused = fused * batch.labels[:, :, None, None]
        confidence, category = fused.max(1)
        return confidence * batch.valid, category + 1

    def threshold(self, name: str, confidence: Tensor, valid: Tensor) -> float:
        """ξ by scikit-learn on the samples of the queue."""
        config, queue = self.config.threshold, self.queues[name]
        samples = F.avg_pool2d(confidence[:, None], 16)[F.avg_pool2d(valid[:, None].float(), 16) > 0.5]
        queue.append(samples.cpu().numpy())
        del queue[: -config.queue_length]
        values = np.concatenate(queue)
        values = values[values > config.floor][:, None]
        if len(values) < 10:
            return sum(config.clamp) / 2
        mixture = GaussianMixture(2, tol=1e-5, max_iter=200, random_state=0).fit(values)
        means, variances = mixture.means_[:, 0], mixture.covariances_[:, 0, 0]
        density = np.log(mixture.weights_) - 0.5 * ((values - means) ** 2 / variances + np.log(variances))
        low, high = np.argsort(means)
        above = values >= SPLITS
        likelihood = (above * density[:, [high]] + ~above * density[:, [low]]).sum(0)
        return float(np.clip(SPLITS[likelihood.argmax()], *config.clamp))

    def perplexity(self, confidence: Tensor, threshold: float) -> Tensor:
        """Eq. 4."""
        above = (confidence - threshold) / (1 - threshold)
        below = (threshold - confidence) / threshold
        distance = torch.where(confidence >= threshold, above, below).clamp(1e-4, 1)
        return (-torch.log(self.config.loss.alpha * distance)) ** self.config.loss.beta

    def cam_to_seg(self, seg: Tensor, confidence: Tensor, category: Tensor, threshold: float, valid: Tensor) -> Tensor:
        """Eq. 5 with the 0.5/0.5 balance, as two cross entropies of the upsampled logits."""
        label = torch.where(confidence >= threshold, category, 0).masked_fill(~valid, IGNORE)
        reliability = 1 / self.perplexity(confidence, threshold)
        logits = upsample(seg.float(), (label.shape[1], label.shape[2]))
        sides = []
        for side in (label.masked_fill(label > 0, IGNORE), label.masked_fill(label == 0, IGNORE)):
            entropy = F.cross_entropy(logits, side, ignore_index=IGNORE, reduction="none")
            weight = reliability * (side != IGNORE)
            sides.append((weight * entropy).sum() / weight.sum().clamp(min=1e-6))
        return 0.5 * sides[0] + 0.5 * sides[1]

    def seg_to_cam(self, cam: Tensor, segs: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
        """Eqs. 7, 8 with the softmax over the whole upsampled map, image by image."""
        size = (batch.weak.shape[2], batch.weak.shape[3])
        summed = sum(upsample(a.float(), size) + upsample(b.float(), size).flip(-1) for a, b in segs)
        assert isinstance(summed, Tensor)
        target = torch.zeros_like(summed[:, 1:])
        for image, labels in enumerate(batch.labels):
            present = labels.nonzero()[:, 0]
            channels = torch.cat([present.new_zeros(1), present + 1])
            probability = (summed[image, channels] / self.config.loss.s2c_temperature).softmax(0)
            target[image, present] = probability[1:]
        target = F.interpolate(target, size=cam.shape[2:], mode="bilinear", align_corners=False)
        return F.binary_cross_entropy_with_logits(cam.float(), target.detach())

    def contrast(self, cam: Tensor, confidence: Tensor, category: Tensor, threshold: float) -> Tensor:
        """Eqs. 9, 10 with the (N, N) matrix of each image."""
        config, grid = self.config.loss, cam.shape[2:]
        confidence = F.interpolate(confidence[:, None], size=grid, mode="bilinear", align_corners=False)[:, 0]
        category = F.interpolate(category[:, None].float(), size=grid, mode="nearest")[:, 0].long()
        label = torch.where(confidence >= threshold, category, 0)
        chosen = self.perplexity(confidence, threshold) <= config.csc_epsilon
        total, count = cam.new_zeros((), dtype=torch.float32), 0
        for image in range(len(cam)):
            vectors = F.normalize(cam[image].float().flatten(1).T[chosen[image].flatten()], dim=1)
            labels = label[image][chosen[image]]
            count += len(labels)
            score = vectors @ vectors.T / config.csc_temperature
            equal = labels[:, None] == labels[None]
            positive = equal & ~torch.eye(len(labels), dtype=torch.bool, device=cam.device)
            if equal.all() or not positive.any():
                continue
            negatives = score.masked_fill(equal, -torch.inf).logsumexp(1, keepdim=True)
            terms = F.softplus(negatives - score) * positive
            total = total + (terms.sum(1) / positive.sum(1).clamp(min=1)).sum()
        return total / max(count, 1)


class Baseline:
    """The step: two networks, six separate forward passes of the teacher, torch.optim.AdamW, an EMA loop."""

    def __init__(self, config: Config, num_classes: int, device: torch.device, *, bf16: bool, compiled: bool) -> None:
        torch.manual_seed(config.run.seed)
        self.config, self.device, self.bf16 = config, device, bf16
        self.student = build_model(config.model, num_classes).to(device).train()
        self.teacher: CoSANet = build_model(config.model, num_classes).to(device).eval()
        self.teacher.load_state_dict(self.student.state_dict())
        self.optimizer = build_optimizer(self.student, config.optim)
        self.losses = BaselineLosses(config)
        self.iteration = 0
        if compiled:
            self.student.compile()
            self.teacher.compile()

    def step(self, batch: Batch) -> dict[str, Any]:
        """One co-training iteration; returns floats."""
        set_learning_rate(self.optimizer, self.iteration, self.config.optim)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            terms = self._terms(batch)
        config = self.config.loss
        loss = (
            terms["cls"] + terms["cls_aux"] + config.c2s * terms["c2s"] + config.c2s_aux * terms["c2s_aux"]
            + config.s2c * terms["s2c"] + config.csc * terms["csc"]
        )  # fmt: skip
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        momentum = self.config.teacher.momentum
        with torch.no_grad():
            for own, online in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                own.data = momentum * own.data + (1 - momentum) * online.data
        self.iteration += 1
        return {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.student(batch.strong)
        with torch.no_grad():
            pairs = []
            for scale in self.config.teacher.scales:
                images = resize_to_stride(batch.weak, scale, self.teacher.stride)
                pairs.append((self.teacher(images), self.teacher(images.flip(-1))))
            maps = {
                "cam": self.losses.pseudo_labels([(a.cam, b.cam) for a, b in pairs], batch),
                "cam_aux": self.losses.pseudo_labels([(a.cam_aux, b.cam_aux) for a, b in pairs], batch),
            }
        xi = {name: self.losses.threshold(name, confidence, batch.valid) for name, (confidence, _) in maps.items()}
        assert outputs.logits_aux is not None
        return {
            "cls": F.multilabel_soft_margin_loss(outputs.logits.float(), batch.labels),
            "cls_aux": F.multilabel_soft_margin_loss(outputs.logits_aux.float(), batch.labels),
            "c2s": self.losses.cam_to_seg(outputs.segmentation(), *maps["cam"], xi["cam"], batch.valid),
            "c2s_aux": self.losses.cam_to_seg(outputs.segmentation(), *maps["cam_aux"], xi["cam_aux"], batch.valid),
            "s2c": self.losses.seg_to_cam(outputs.cam, [(a.segmentation(), b.segmentation()) for a, b in pairs], batch),
            "csc": self.losses.contrast(outputs.cam, *maps["cam_aux"], xi["cam_aux"]),
        }
