"""Bad arguments end in a ValueError that names the argument, what came and what is wanted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cosa_fast import kernels
from cosa_fast.kernels.launch.runtime import INTERPRETED

B, C, H, W, h, w = 2, 3, 8, 6, 4, 3


def good_arguments() -> dict[str, dict[str, Any]]:
    """A call of every operator that is right."""
    grid = {"category": torch.ones(B, h, w, dtype=torch.uint8), "confidence": torch.rand(B, h, w)}
    full = {"category": torch.ones(B, H, W, dtype=torch.uint8), "confidence": torch.rand(B, H, W)}
    valid, labels, guide = torch.ones(B, H, W, dtype=torch.bool), torch.ones(B, C), torch.rand(B, 3, h, w)
    flat = {name: torch.zeros(5) for name in ("parameters", "gradients", "exp_avg", "exp_avg_sq", "ema")}
    sigmas = {"sigma_xy": 4.0, "sigma_rgb": 15.0}
    return {
        "fuse_cams": {
            "cams": [torch.rand(2 * B, C, h, w)], "image_labels": labels, "size": (H, W), "valid": valid,
        },
        "perplexity": {"confidence": torch.rand(4), "threshold": 0.4},
        "raw_cross_entropy": {"logits": torch.rand(B, C + 1, h, w), "threshold": 0.4, "valid": valid, **full},
        "seg_to_cam_loss": {
            "cam": torch.rand(B, C, h, w), "teacher_logits": [torch.rand(2 * B, C + 1, h, w)], "image_labels": labels,
            "size": (H, W), "valid": valid,
        },
        "contrastive_separation": {"cam": torch.rand(B, C, h, w), "threshold": 0.4, **grid},
        "histogram": {"confidence": torch.rand(B, h, w), "valid": None},
        "fit_mixture": {"histogram": torch.ones(256)},
        "adamw_ema_": {**flat, "step": torch.zeros((), dtype=torch.int64), "lr": 0.1, "momentum": 0.9},
        "bilateral_filter": {"values": torch.rand(B, C, h, w), "guide": guide, **sigmas},
        "dense_energy": {
            "probabilities": torch.rand(B, C, h, w), "guide": guide, "gate": torch.rand(B, h, w), **sigmas,
        },
    }  # fmt: skip


def long(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.int64)


BAD: list[tuple[str, str, Any]] = [
    ("fuse_cams", "cams", []),
    ("fuse_cams", "cams", torch.rand(2 * B, C, h, w)),
    ("fuse_cams", "cams", [torch.rand(B, C, h, w)]),
    ("fuse_cams", "cams", [torch.rand(2 * B, C + 1, h, w)]),
    ("fuse_cams", "cams", [long(2 * B, C, h, w)]),
    ("fuse_cams", "image_labels", torch.ones(B)),
    ("fuse_cams", "size", (8, 0)),
    ("fuse_cams", "size", 8),
    ("fuse_cams", "valid", torch.ones(B, H, W)),
    ("fuse_cams", "valid", torch.ones(B, H, W + 1, dtype=torch.bool)),
    ("perplexity", "confidence", 0.3),
    ("perplexity", "confidence", long(3)),
    ("perplexity", "threshold", 0.0),
    ("perplexity", "threshold", 1.0),
    ("perplexity", "threshold", torch.rand(2)),
    ("perplexity", "alpha", 1.0),
    ("perplexity", "alpha", 0.0),
    ("perplexity", "beta", -1.0),
    ("raw_cross_entropy", "logits", torch.rand(B, C + 1, h)),
    ("raw_cross_entropy", "confidence", torch.rand(B + 1, H, W)),
    ("raw_cross_entropy", "category", torch.rand(B, H, W)),
    ("raw_cross_entropy", "category", long(B, W, H)),
    ("raw_cross_entropy", "threshold", torch.tensor([0.3, 0.4])),
    ("raw_cross_entropy", "threshold", torch.tensor(1)),
    ("raw_cross_entropy", "threshold", float("nan")),
    ("raw_cross_entropy", "alpha", 1.5),
    ("raw_cross_entropy", "beta", float("inf")),
    ("raw_cross_entropy", "foreground_weight", 1.5),
    ("raw_cross_entropy", "ignore_band", (0.7, 0.25)),
    ("raw_cross_entropy", "ignore_band", 0.5),
    ("raw_cross_entropy", "ignore_band", [(0.1, 0.2)] * 3),
    ("raw_cross_entropy", "ignore_band", [(0.1, 1.2)]),
    ("seg_to_cam_loss", "cam", torch.rand(B, C)),
    ("seg_to_cam_loss", "teacher_logits", [torch.rand(2 * B, C, h, w)]),
    ("seg_to_cam_loss", "image_labels", torch.ones(B, C + 1)),
    ("seg_to_cam_loss", "temperature", 0.0),
    ("seg_to_cam_loss", "size", (8.0, 6)),
    ("contrastive_separation", "confidence", torch.rand(B, H, W)),
    ("contrastive_separation", "category", torch.rand(B, h, w)),
    ("contrastive_separation", "valid", torch.ones(B, H, W, dtype=torch.bool)),
    ("contrastive_separation", "vectors", "probabilities"),
    ("contrastive_separation", "image_labels", torch.ones(B, C + 1)),
    ("contrastive_separation", "temperature", -1.0),
    ("contrastive_separation", "epsilon", -0.1),
    ("contrastive_separation", "scope", "images"),
    ("contrastive_separation", "similarity", "euclid"),
    ("histogram", "confidence", long(3)),
    ("histogram", "valid", torch.ones(B, h, dtype=torch.bool)),
    ("histogram", "bins", 1),
    ("fit_mixture", "histogram", torch.ones(1)),
    ("fit_mixture", "histogram", torch.ones(4, 4)),
    ("fit_mixture", "state", torch.ones(5)),
    ("fit_mixture", "floor", 1.0),
    ("fit_mixture", "clamp", (0.9, 0.2)),
    ("fit_mixture", "smoothing", 1.0),
    ("adamw_ema_", "gradients", torch.zeros(6)),
    ("adamw_ema_", "ema", torch.zeros(5, dtype=torch.bfloat16)),
    ("adamw_ema_", "step", torch.zeros(())),
    ("adamw_ema_", "lr", torch.zeros(5)),
    ("adamw_ema_", "lr", -1.0),
    ("adamw_ema_", "lr_multiplier", torch.zeros(4)),
    ("adamw_ema_", "weight_decay", "none"),
    ("adamw_ema_", "betas", (0.9, 1.0)),
    ("adamw_ema_", "betas", (0.9,)),
    ("adamw_ema_", "momentum", 1.1),
    ("adamw_ema_", "ema_bf16", torch.zeros(5)),
    ("bilateral_filter", "values", torch.rand(B, C, h)),
    ("bilateral_filter", "guide", torch.rand(B, 1, h, w)),
    ("bilateral_filter", "sigma_xy", 0.0),
    ("dense_energy", "gate", torch.rand(B, 1, h, w)),
    ("dense_energy", "probabilities", long(B, C, h, w)),
    ("dense_energy", "sigma_rgb", float("nan")),
]


@pytest.mark.parametrize(
    ("operator", "argument", "value"), BAD, ids=[f"{o}-{a}-{i}" for i, (o, a, _) in enumerate(BAD)]
)
def test_bad_argument_is_named(operator: str, argument: str, value: Any) -> None:
    arguments = {**good_arguments()[operator], argument: value}
    with pytest.raises(ValueError, match=rf"^{argument}(\[\d\])?: got .+, want .+"):
        getattr(kernels, operator)(**arguments)


@pytest.mark.parametrize("operator", kernels.__all__)
def test_backends(operator: str) -> None:
    function: Callable[..., Any] = getattr(kernels, operator)
    for backend in ("auto", "reference", *(["triton"] if INTERPRETED else [])):
        function(**good_arguments()[operator], backend=backend)
    with pytest.raises(ValueError, match=r"^backend: got 'cuda', want"):
        function(**good_arguments()[operator], backend="cuda")


def test_lengths_that_must_agree_are_spelled_out() -> None:
    arguments = good_arguments()["contrastive_separation"]
    arguments["confidence"] = torch.rand(B, H, W)
    wanted = r"^confidence: got shape \(2, 8, 6\), want .*\(B, h, w\) with B = 2, h = 4, w = 3$"
    with pytest.raises(ValueError, match=wanted):
        kernels.contrastive_separation(**arguments)


def test_probability_vectors_need_image_labels() -> None:
    arguments = good_arguments()["contrastive_separation"]
    with pytest.raises(ValueError, match=r"^image_labels: got None, want a tensor of shape \(B, C\) for vectors ="):
        kernels.contrastive_separation(**arguments, vectors="probability")


def test_devices_must_agree() -> None:
    arguments = good_arguments()["dense_energy"]
    arguments["gate"] = arguments["gate"].to("meta")
    with pytest.raises(ValueError, match=r"^gate: got device meta, want the device of the other arguments, cpu"):
        kernels.dense_energy(**arguments)


def test_empty_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^histogram: got shape \(0,\)"):
        kernels.fit_mixture(torch.ones(0))


def test_many_classes_need_wide_categories() -> None:
    arguments = good_arguments()["raw_cross_entropy"] | {"logits": torch.rand(B, 256, h, w)}
    with pytest.raises(ValueError, match=r"^category: got uint8 for 255 classes, want int16"):
        kernels.raw_cross_entropy(**arguments)
    arguments["category"] = arguments["category"].short()
    kernels.raw_cross_entropy(**arguments)
