"""The method as it is usually written in PyTorch: what cosa_fast is compared with.

float32 (or autocast), eager operators; every map upsampled to full resolution with all of its classes; loops over
images, classes and parameters; background and foreground in separate cross entropies; an (N, N) similarity matrix; the
mixture fitted by scikit-learn on the CPU in every step; the energy of the published recipe filtered image by image on
the CPU, with a copy there and a copy back; numbers read back with .item(). The same losses as the fused engine's, from
the same network and batch; only the energy's filter is the field's approximate one (lattice.py), as the exact one
would take many times as long on a CPU.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.steps.lattice import lattice_filter
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.optim import build_optimizer, set_learning_rate
from cosa_fast.errors import UserError
from cosa_fast.method.assignment import resize_to_stride
from cosa_fast.method.objective import ENERGY_INNER_WEIGHT
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet, Outputs

IGNORE = 255
SPLITS = np.linspace(0.05, 0.95, 181)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h, w) → (B, K, H, W)."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class _LatticeEnergy(torch.autograd.Function):
    """−Σ S·A(S)·gate / B, filtered on the CPU; its gradient is −2·gate·A(S)/B."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float) -> Any:
        _, classes, height, width = probabilities.shape
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        position = np.stack([rows, columns]).reshape(2, -1) / sigma_xy
        filtered = []
        for values, colours in zip(probabilities.cpu().numpy(), guide.cpu().numpy(), strict=True):
            features = np.concatenate([position, colours.reshape(3, -1) / sigma_rgb]).T.astype(np.float32)
            out = lattice_filter(np.ascontiguousarray(values.reshape(classes, -1).T), features)
            filtered.append(torch.from_numpy(np.ascontiguousarray(out.T)).reshape(classes, height, width))
        gated = torch.stack(filtered).to(probabilities.device) * gate[:, None] / len(gate)
        ctx.save_for_backward(gated)
        return -(probabilities * gated).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * -2 * ctx.saved_tensors[0], None, None, None, None


class BaselineLosses:
    """CPLs, thresholds and co-training losses from two networks' outputs.

    UserError where the configuration asks for an ablation that the baseline does not have.
    """

    def __init__(self, config: Config) -> None:
        _require_recipe(config)
        self.config = config
        self.beta = config.loss.beta if config.loss.reliability == "perplexity" else 0.0
        banded = config.threshold.mode == "band"
        self.bands = {"cam": config.threshold.band, "cam_aux": config.threshold.band_aux} if banded else {}
        self.queues: dict[str, list[np.ndarray]] = {"cam": [], "cam_aux": []}
        self.fitted: dict[str, float] = {}

    def cotraining(self, outputs: Outputs, pairs: list[tuple[Outputs, Outputs]], batch: Batch) -> dict[str, Tensor]:
        """The co-training terms that have a weight, from ON's outputs and AN's [(plain, flipped)] of every scale."""
        weights = self.config.loss
        size, grid = (batch.weak.shape[2], batch.weak.shape[3]), (outputs.cam.shape[2], outputs.cam.shape[3])
        valid_grid = F.adaptive_avg_pool2d(batch.valid.float(), grid) >= 0.5
        seg = outputs.segmentation()
        with torch.no_grad():
            aux = [(a.cam_aux, b.cam_aux) for a, b in pairs]
            last = self.config.teacher.aux_scales == "last"
            cams = {"cam": [(a.cam, b.cam) for a, b in pairs], "cam_aux": aux[-1:] if last else aux}
            maps = {name: self.on_pixels(each, batch, size) for name, each in cams.items()}
            coarse = {name: self.fuse(each, batch.labels, valid_grid, grid) for name, each in cams.items()}
            xi = {name: self.threshold(name, confidence[valid_grid]) for name, (confidence, _) in coarse.items()}
        terms = {
            "c2s": self.cam_to_seg(seg, "cam", *maps["cam"], xi["cam"], batch.valid),
            "c2s_aux": self.cam_to_seg(seg, "cam_aux", *maps["cam_aux"], xi["cam_aux"], batch.valid),
        }
        if weights.s2c > 0:
            terms["s2c"] = self.seg_to_cam(
                outputs.cam,
                [(a.segmentation(), b.segmentation()) for a, b in pairs],
                batch.labels,
                torch.ones_like(batch.valid) if weights.s2c_padding else batch.valid,
            )
        if weights.csc > 0:
            vectors = self.vectors(outputs.cam.float(), batch.labels)
            terms["csc"] = self.contrast(vectors, *coarse["cam_aux"], xi["cam_aux"], valid_grid)
        if weights.energy > 0:
            terms["energy"] = ENERGY_INNER_WEIGHT * self.energy(seg, maps["cam"][0], batch)
        return terms

    def on_pixels(self, cams: list[tuple[Any, Any]], batch: Batch, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Confidence and category on the pixel grid, made there or at half of it, as threshold.grid says."""
        confidence, category = self.fuse(cams, batch.labels, batch.valid, size)
        if self.config.threshold.grid == "full":
            return confidence, category
        halved = F.avg_pool2d(confidence[None], 2)
        return upsample(halved, size)[0], category[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)

    def fuse(
        self, cams: list[tuple[Any, Any]], labels: Tensor, valid: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Confidence and category (B, H, W) of [(plain, flipped)] CAMs, one pair per scale."""
        fused = torch.zeros((*labels.shape, *size), device=labels.device)
        for plain, flipped in cams:
            fused += torch.maximum(upsample(plain.float(), size), upsample(flipped.float().flip(-1), size)).relu()
        for image in range(len(fused)):
            inside = valid[image]
            for category in range(fused.shape[1]):
                low, high = fused[image, category][inside].min(), fused[image, category][inside].max()
                fused[image, category] = (fused[image, category] - low) / (high - low + 1e-5)
        fused = fused * labels[:, :, None, None]
        confidence, category = fused.max(1)
        return confidence * valid, category + 1

    def threshold(self, name: str, samples: Tensor) -> float:
        """ξ: that of the configuration, or by scikit-learn on the samples of the queue."""
        config, queue = self.config.threshold, self.queues[name]
        if config.mode != "dynamic":
            return config.value if name == "cam" else config.value_aux
        queue.append(samples.cpu().numpy())
        del queue[: -config.queue_length]
        values = np.concatenate(queue)
        values = values[values > config.floor][:, None]
        if len(values) < 10:
            return self.fitted.get(name, sum(config.clamp) / 2)
        from sklearn.mixture import GaussianMixture  # the only thing measured that needs it

        mixture = GaussianMixture(2, tol=1e-5, max_iter=200, random_state=0).fit(values)
        means, variances = mixture.means_[:, 0], mixture.covariances_[:, 0, 0]
        density = np.log(mixture.weights_) - 0.5 * ((values - means) ** 2 / variances + np.log(variances))
        low, high = np.argsort(means)
        above = values >= SPLITS
        likelihood = (above * density[:, [high]] + ~above * density[:, [low]]).sum(0)
        found = float(np.clip(SPLITS[likelihood.argmax()], *config.clamp))
        before = self.fitted.get(name, found)
        self.fitted[name] = config.smoothing * before + (1 - config.smoothing) * found
        return self.fitted[name]

    def perplexity(self, confidence: Tensor, threshold: float) -> Tensor:
        """Eq. 4."""
        above = (confidence - threshold) / (1 - threshold)
        below = (threshold - confidence) / threshold
        distance = torch.where(confidence >= threshold, above, below).clamp(1e-4, 1)
        return (-torch.log(self.config.loss.alpha * distance)) ** self.beta

    def cam_to_seg(
        self, seg: Tensor, name: str, confidence: Tensor, category: Tensor, threshold: float, valid: Tensor
    ) -> Tensor:
        """Eq. 5 with the class balance, as two cross entropies of the upsampled logits."""
        low, high = self.bands.get(name, (threshold, threshold))
        label = torch.where(confidence >= high, category, 0)
        label = label.masked_fill((confidence > low) & (confidence < high), IGNORE).masked_fill(~valid, IGNORE)
        reliability = 1 / self.perplexity(confidence, threshold)
        logits = upsample(seg.float(), (label.shape[1], label.shape[2]))
        background, foreground = label.masked_fill(label > 0, IGNORE), label.masked_fill(label == 0, IGNORE)
        sides = []
        for side in (background, foreground):
            entropy = F.cross_entropy(logits, side, ignore_index=IGNORE, reduction="none")
            weight = reliability * (side != IGNORE)
            sides.append((weight * entropy).sum() / weight.sum().clamp(min=1e-6))
        share = self.config.loss.foreground_weight
        assert share is not None
        return (1 - share) * sides[0] + share * sides[1]

    def seg_to_cam(self, cam: Tensor, segs: list[tuple[Tensor, Tensor]], labels: Tensor, valid: Tensor) -> Tensor:
        """Eqs. 7, 8 with the softmax over the whole upsampled map, image by image."""
        size = (valid.shape[1], valid.shape[2])
        summed = sum(upsample(a.float(), size) + upsample(b.float(), size).flip(-1) for a, b in segs)
        assert isinstance(summed, Tensor)
        target = torch.zeros_like(summed[:, 1:])
        for image, row in enumerate(labels):
            present = row.nonzero()[:, 0]
            channels = torch.cat([present.new_zeros(1), present + 1])
            probability = (summed[image, channels] / self.config.loss.s2c_temperature).softmax(0)
            target[image, present] = probability[1:]
        grid = (cam.shape[2], cam.shape[3])
        # Both this target and the share of valid pixels are read at the same pixels.
        inside = upsample(valid[:, None].float(), grid) == 1
        logits = cam.float().relu() if self.config.loss.s2c_relu else cam.float()
        terms = F.binary_cross_entropy_with_logits(logits, upsample(target, grid).detach(), reduction="none")
        return (terms * inside).sum() / (inside.sum() * cam.shape[1]).clamp(min=1)

    def vectors(self, cam: Tensor, labels: Tensor) -> Tensor:
        """What csc compares: the CAM, or its probabilities behind a channel for the background (B, C + 1, h, w)."""
        if self.config.loss.csc_vectors == "logits":
            return cam
        probability = labels[:, :, None, None] * cam.sigmoid()
        return torch.cat([1 - probability.amax(1, keepdim=True), probability], 1)

    def contrast(self, maps: Tensor, confidence: Tensor, category: Tensor, threshold: float, valid: Tensor) -> Tensor:
        """Eqs. 9, 10 with the (N, N) matrix of each image."""
        config = self.config.loss
        label = torch.where(confidence >= threshold, category, 0)
        chosen = (self.perplexity(confidence, threshold) <= config.csc_epsilon) & valid
        total, count = maps.new_zeros(()), 0
        for image in range(len(maps)):
            vectors = F.normalize(maps[image].flatten(1).T[chosen[image].flatten()], dim=1)
            labels = label[image][chosen[image]]
            count += len(labels)
            score = vectors @ vectors.T / config.csc_temperature
            equal = labels[:, None] == labels[None]
            positive = equal & ~torch.eye(len(labels), dtype=torch.bool, device=maps.device)
            if equal.all() or not positive.any():
                continue
            negatives = score.masked_fill(equal, -torch.inf).logsumexp(1, keepdim=True)
            terms = F.softplus(negatives - score) * positive
            total = total + (terms.sum(1) / positive.sum(1).clamp(min=1)).sum()
        return total / max(count, 1)

    def energy(self, seg: Tensor, confidence: Tensor, batch: Batch) -> Tensor:
        """METHOD section 5.5 at half resolution."""
        config, data = self.config.loss, self.config.data
        roi = batch.valid[:, None, ::2, ::2].float()
        logits = upsample(seg.float(), (batch.strong.shape[2], batch.strong.shape[3]))
        probabilities = F.avg_pool2d(logits.softmax(1), 2)
        mean, std = (batch.strong.new_tensor(value).view(1, 3, 1, 1) for value in (data.mean, data.std))
        guide = (batch.strong[:, :, ::2, ::2] * std + mean) * 255
        gate = (roi[:, 0] - probabilities.detach().amax(1)).clamp(min=0)
        probabilities = probabilities * roi
        if "cam" in self.bands:
            low, high = self.bands["cam"]
            gate[((confidence > low) & (confidence < high))[:, ::2, ::2]] = 1
        sigma_xy, sigma_rgb = config.energy_sigma_xy / 2, config.energy_sigma_rgb
        # Out of autocast: NumPy has no bfloat16.
        return _LatticeEnergy.apply(probabilities.float(), guide, gate, sigma_xy, sigma_rgb)


def _require_recipe(config: Config) -> None:
    """UserError for what the baseline leaves out."""
    wanted = {"loss.guidance": "teacher", "loss.csc_scope": "image", "loss.csc_similarity": "cosine"}
    for key, value in wanted.items():
        section, name = key.split(".")
        found = getattr(getattr(config, section), name)
        if found != value:
            raise UserError(f"{key} = {found}: the baseline only has {value}; or compare with --providers ours")
    for key, present in {
        "model.aux_layer": config.model.aux_layer is not None,
        "loss.foreground_weight": config.loss.foreground_weight is not None,
        "teacher.flip": config.teacher.flip,
    }.items():
        if not present:
            raise UserError(f"{key}: the baseline does not know it switched off; or compare with --providers ours")


class Baseline:
    """The step: two networks, six separate forward passes of AN, torch.optim.AdamW, an EMA loop."""

    def __init__(self, config: Config, num_classes: int, device: torch.device, *, bf16: bool, compiled: bool) -> None:
        torch.manual_seed(config.run.seed)
        self.config, self.device, self.bf16 = config, device, bf16
        self.on = build_model(config.model, num_classes).to(device).train()
        self.an: CoSANet = build_model(config.model, num_classes).to(device).eval()
        self.an.load_state_dict(self.on.state_dict())
        self.optimizer = build_optimizer(self.on, config.optim)
        self.losses = BaselineLosses(config)
        self.iteration = 0
        if compiled:
            self.on.compile()
            self.an.compile()

    def step(self, batch: Batch) -> dict[str, Any]:
        """One co-training iteration; returns floats."""
        set_learning_rate(self.optimizer, self.iteration, self.config.optim)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            terms = self._terms(batch)
        weights = self.config.loss
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        assert isinstance(loss, Tensor)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        momentum = self.config.teacher.momentum
        with torch.no_grad():
            for mean, parameter in zip(self.an.parameters(), self.on.parameters(), strict=True):
                mean.data = momentum * mean.data + (1 - momentum) * parameter.data
        self.iteration += 1
        return {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.on(batch.strong)
        with torch.no_grad():
            pairs = []
            for scale in self.config.teacher.scales:
                images = resize_to_stride(batch.weak, scale, self.an.stride)
                pairs.append((self.an(images), self.an(images.flip(-1))))
        return {
            "cls": F.multilabel_soft_margin_loss(outputs.logits.float(), batch.labels),
            "cls_aux": F.multilabel_soft_margin_loss(outputs.logits_aux.float(), batch.labels),
            **self.losses.cotraining(outputs, pairs, batch),
        }
