"""The CoSA objective: which losses, with which weights (METHOD section 5). The losses themselves are in
cosa_fast.kernels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.config.schema import Config, LossConfig
from cosa_fast.data_pipeline.batch import Batch, ignored
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.kernels import contrastive_separation, dense_energy, perplexity, raw_cross_entropy, seg_to_cam_loss
from cosa_fast.method.assignment import Assignment
from cosa_fast.method.normalisers import Normalisers
from cosa_fast.network.model import Outputs

# The energy is summed over pixels and channels; the published settings bring it to the size of the other losses with
# this.
ENERGY_INNER_WEIGHT = 1e-7


# The losses that AN's layers supervise, in the order of an Assignment.
LAYERS = ("c2s", "c2s_aux")


class Objective:
    """Turns ON's outputs and AN's assignment into loss terms, each the share of the images at hand (this rank's, or a
    part of them) in that of the whole batch.

    `weights` maps each active term to its λ.
    """

    def __init__(self, config: Config, ranks: Ranks = ALONE) -> None:
        self._shares = ranks.size * config.optim.accumulate
        self._normalisers = Normalisers(ranks, config.optim.accumulate)
        self._config = config.loss
        self._bands = None
        if config.threshold.mode == "band":
            self._bands = (config.threshold.band, config.threshold.band_aux)
        self._backend = config.run.backend
        self._normalisation: tuple[Tensor, Tensor] | None = None
        self._mean, self._std = config.data.mean, config.data.std
        aux = config.model.aux_layer is not None
        names = ["cls", "c2s", "s2c", "csc", "energy", *(["cls_aux", "c2s_aux"] if aux else [])]
        weights = {name: getattr(config.loss, name) for name in names}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Σ λ·term over the terms that were computed."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def classification(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """cls and cls† (eq. 1): multilabel soft margin of the image logits (B, C) against labels (B, C)."""
        logits = {"cls": outputs.logits, "cls_aux": outputs.logits_aux}
        return {
            name: F.multilabel_soft_margin_loss(value.float(), labels) / self._shares
            for name, value in logits.items()
            if name in self.weights and value is not None
        }

    def cotraining(
        self, outputs: Outputs, assignment: Assignment, batch: Batch, thresholds: tuple[Tensor, Tensor], noise_seed: int
    ) -> dict[str, Tensor]:
        """The terms that swap assignments between AN and ON: c2s, c2s†, s2c, csc and energy, as far as they have a
        weight. thresholds: (ξ, ξ†), 0-d."""
        terms = self._normalised(outputs, assignment, thresholds, batch, noise_seed)
        if "energy" in self.weights:
            terms["energy"] = ENERGY_INNER_WEIGHT * self._energy(outputs, assignment, batch) / self._shares
        return terms

    @torch.no_grad()
    def count(
        self, parts: Sequence[Batch], assignments: Sequence[Assignment], thresholds: tuple[Tensor, Tensor]
    ) -> None:
        """Where a batch is computed in several parts: sum up their normalisers, before the losses of the first. They
        depend on AN alone, so blank maps of ON will do."""
        with self._normalisers.counting():
            for part, assignment in zip(parts, assignments, strict=True):
                self._normalised(_blank_outputs(assignment), assignment, thresholds, part, 0)

    def _normalised(
        self,
        outputs: Outputs,
        assignment: Assignment,
        thresholds: tuple[Tensor, Tensor],
        batch: Batch,
        noise_seed: int,
    ) -> dict[str, Tensor]:
        """The terms that are divided by something counted in the whole batch."""
        terms = self._cam_to_seg(outputs, assignment, thresholds, batch)
        if "s2c" in self.weights:
            terms["s2c"] = self._seg_to_cam(outputs, assignment, batch, noise_seed)
        if "csc" in self.weights:
            terms["csc"] = self._contrastive(outputs, assignment, thresholds, batch)
        return terms

    def _cam_to_seg(
        self, outputs: Outputs, assignment: Assignment, thresholds: tuple[Tensor, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Eq. 5 for M' and M†' on the same segmentation logits, in one call: they share its softmax."""
        layers = [layer for layer, name in enumerate(LAYERS[: len(assignment.confidence)]) if name in self.weights]
        if not layers:
            return {}
        call = slice(layers[0], layers[-1] + 1)
        losses = raw_cross_entropy(
            outputs.segmentation(),
            assignment.confidence[call],
            assignment.category[call],
            torch.stack(list(thresholds[call])),
            batch.valid,
            alpha=self._config.alpha,
            beta=self._config.beta if self._config.reliability == "perplexity" else 0.0,
            foreground_weight=self._config.foreground_weight,
            ignore_band=None if self._bands is None else self._bands[call],
            whole=self._normalisers.of(" ".join(LAYERS[call])),
            backend=self._backend,
        )
        return dict(zip(LAYERS[call], losses.unbind(), strict=True))

    def _seg_to_cam(self, outputs: Outputs, assignment: Assignment, batch: Batch, noise_seed: int) -> Tensor:
        """Eqs. 7, 8."""
        guidance = _guidance_logits(self._config, assignment, batch, noise_seed)
        size = (batch.weak.shape[2], batch.weak.shape[3])
        valid = torch.ones_like(batch.valid) if self._config.s2c_padding else batch.valid
        if self._config.guidance == "truth" and batch.truth is not None:
            valid = valid & ~ignored(batch.truth)
        return seg_to_cam_loss(
            outputs.cam,
            guidance,
            batch.labels,
            size,
            valid,
            temperature=self._config.s2c_temperature,
            relu=self._config.s2c_relu,
            whole=self._normalisers.of("s2c"),
            backend=self._backend,
        )

    def _contrastive(
        self, outputs: Outputs, assignment: Assignment, thresholds: tuple[Tensor, Tensor], batch: Batch
    ) -> Tensor:
        """Eqs. 9, 10 on the token grid, with the low-perplexity pixels of M†' (of M' where there is no auxiliary
        head)."""
        layer = len(assignment.grid_confidence) - 1
        return contrastive_separation(
            outputs.cam,
            assignment.grid_category[layer],
            assignment.grid_confidence[layer],
            thresholds[layer],
            assignment.grid_valid,
            vectors=self._config.csc_vectors,
            image_labels=batch.labels,
            epsilon=self._config.csc_epsilon,
            temperature=self._config.csc_temperature,
            alpha=self._config.alpha,
            beta=self._config.beta,
            scope=self._config.csc_scope,
            similarity=self._config.csc_similarity,
            whole=self._normalisers.of("csc"),
            backend=self._backend,
        )

    def _energy(self, outputs: Outputs, assignment: Assignment, batch: Batch) -> Tensor:
        """METHOD section 5.5: the gated dense-CRF energy of the class probabilities at half resolution; image and valid
        mask are brought there as the release does it, by every second pixel."""
        size = (batch.strong.shape[2], batch.strong.shape[3])
        logits = F.interpolate(outputs.segmentation().float(), size=size, mode="bilinear", align_corners=False)
        roi = batch.valid[:, None, ::2, ::2].to(logits.dtype)
        probabilities = F.avg_pool2d(logits.softmax(1), 2)
        gate = (roi[:, 0] - probabilities.detach().amax(1)).clamp(min=0)
        probabilities = probabilities * roi
        guide = self._pixels(batch.strong[:, :, ::2, ::2])
        if self._bands is not None:
            low, high = self._bands[0]
            confidence = assignment.confidence[0, :, ::2, ::2]
            gate = torch.where((confidence > low) & (confidence < high), torch.ones_like(gate), gate)
        sigmas = (self._config.energy_sigma_xy * 0.5, self._config.energy_sigma_rgb)
        return dense_energy(probabilities, guide, gate, *sigmas, backend=self._backend)

    def _pixels(self, images: Tensor) -> Tensor:
        """Normalised images back in 0..255."""
        if self._normalisation is None:  # once: a copy from the host would synchronise every step
            mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (self._mean, self._std))
            self._normalisation = (mean, std)
        mean, std = self._normalisation
        return (images * std + mean) * 255

    @torch.no_grad()
    def diagnostics(self, assignment: Assignment, layer: int, threshold: Tensor) -> dict[str, Tensor]:
        """How a layer's pseudo-label looks on the token grid: mean perplexity, |Ω|, the foreground's share of the
        pixels and of the reliability mass. A share near 0 is the pull towards background that METHOD section 11 warns
        of."""
        config, inside = self._config, assignment.grid_valid
        confidence = assignment.grid_confidence[layer]
        perplexities = perplexity(confidence, threshold, config.alpha, config.beta, backend=self._backend)
        reliability = perplexities.reciprocal() * inside
        foreground = (confidence >= threshold) & inside
        count = inside.sum().clamp(min=1)
        return {
            "perplexity": (perplexities * inside).sum() / count,
            "omega": ((perplexities <= config.csc_epsilon) & inside).sum().float(),
            "foreground_share": foreground.sum() / count,
            "foreground_reliability": (reliability * foreground).sum() / reliability.sum().clamp(min=1e-6),
        }


def _blank_outputs(assignment: Assignment) -> Outputs:
    """ON's maps for as many images, all 0."""
    seg = assignment.seg_logits[0]
    _, count, *grid = assignment.grid_confidence.shape
    logits = assignment.grid_confidence.new_zeros(count, seg.shape[1], *grid)
    maps = logits[:, 1:]
    return Outputs(maps.flatten(2).amax(2), maps, logits, None, None)


def _guidance_logits(config: LossConfig, assignment: Assignment, batch: Batch, noise_seed: int) -> list[Tensor]:
    """What stands in for S' in s2c: AN's logits, or the oracle's of the ablation in fig. 1 (the truth, or noise)."""
    if config.guidance == "teacher":
        return assignment.seg_logits
    like = assignment.seg_logits[0]
    if config.guidance == "truth":
        if batch.truth is None:
            raise ValueError("truth: got a batch without masks, want masks for loss.guidance = truth")
        classes = torch.arange(like.shape[1], device=like.device).view(1, -1, 1, 1)
        one_hot = (batch.truth[:, None] == classes).to(like.dtype)
        return [torch.cat([one_hot, one_hot.flip(-1)])]
    generator = torch.Generator(device="cpu").manual_seed(noise_seed)
    return [torch.randn(like.shape, generator=generator).to(like)]
