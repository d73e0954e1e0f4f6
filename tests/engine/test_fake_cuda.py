"""The fused step on CUDA tensors without contents: what would stop its capture in a CUDA graph is found on any machine.

Whole steps, forward, backward and optimiser, of both phases, over the backbone families of METHOD section 1.
"""

from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, Watch, backward, fake_cuda, network_on_cuda
from torch import Tensor

from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.kernels.launch.runtime import HAS_TRITON
from cosa_fast.network.attention_backends import CUDNN
from cosa_fast.network.build import build_model

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

CLASSES, IMAGES = 20, 4
SHALLOW = "model.arguments={depth: 2}"
FAMILIES = {
    "ViT": ["model.backbone=vit_base_patch16_224", SHALLOW],
    "other patch size": ["model.backbone=vit_base_patch8_224", SHALLOW],
    "DeiT, distilled": ["model.backbone=deit_tiny_distilled_patch16_224", SHALLOW],
    "CLIP": ["model.backbone=vit_base_patch16_clip_224", SHALLOW],
    "SigLIP": ["model.backbone=vit_base_patch16_siglip_224", SHALLOW],
    "DINOv2, registers": ["model.backbone=vit_small_patch14_reg4_dinov2", SHALLOW],
    "DINOv3": ["model.backbone=vit_small_patch16_dinov3", SHALLOW],
    "EVA-02": ["model.backbone=eva02_tiny_patch14_224", SHALLOW],
    "rotary ViT": ["model.backbone=vit_base_patch16_rope_reg1_gap_256", SHALLOW],
    "mixed rotary ViT": ["model.backbone=vit_small_patch16_rope_mixed_224", SHALLOW],
    "ConvNeXt": ["model.backbone=test_convnext", "model.aux_layer=-1"],
    "EfficientNet": ["model.backbone=test_efficientnet", "model.aux_layer=-1"],
    "ResNet": ["model.backbone=resnet18", "model.aux_layer=-1"],
}
VARIANTS = {
    "classification": ["optim.cotrain_after=100"],
    "float32": ["run.precision=fp32"],
    "packed attention": ["teacher.attention=packed"],
    "flash and efficient attention": ["model.attention=flash", "teacher.attention=efficient"],
    "cuDNN's attention": ["model.attention=cudnn", "teacher.attention=cudnn"],
    "varlen attention": ["model.attention=varlen", "teacher.attention=varlen"],
    "a batch in parts": ["optim.accumulate=2"],
    "drop-path": ["model.arguments.drop_path_rate=0.2"],
    "energy": ["loss.energy=0.05"],
    "pairs over the batch": ["loss.csc_scope=batch", "loss.csc_vectors=logits"],
    "without F†": ["model.aux_layer=null"],
    "without the flip": ["teacher.flip=false"],
    "fixed thresholds": ["threshold.mode=fixed"],
    "detached features": ["model.detach=features"],
    "positions as released": ["model.position_resampling=plain", "model.backbone=vit_base_patch16_224"],
}


class _Engine(FusedEngine):
    """FusedEngine whose backward pass needs no driver."""

    def _backward(self, loss: Tensor, first: bool) -> None:
        self.networks.clear_gradients()
        for leaf, gradient in backward(loss).items():
            leaf.grad = gradient
        self.networks.collect_gradients(add=not first)


def second_step(overrides: list[str], name: str = "voc.yaml") -> tuple[Watch, dict[str, Any], Config]:
    """What an engine's second step does, its metrics, and the configuration."""
    fixed = ["model.weights=none", "run.compile=off", "run.capture=off", f"optim.batch_size={IMAGES}"]
    phase = ["run.precision=bf16", "optim.cotrain_after=0", "model.aux_layer=-2"]
    config = load_config(name, [*fixed, *phase, *overrides])
    with torch.device("meta"):
        network = build_model(config.model, CLASSES)
    size = config.data.crop_size
    with fake_cuda(), pytest.MonkeyPatch.context() as patch:
        # Whether a kernel runs on a device shows on the device alone, and only there is there a cuDNN.
        patch.setattr("cosa_fast.network.attention_choice.run_once", lambda *_: None)
        patch.setattr(torch.backends.cudnn, "version", lambda: CUDNN)
        engine = _Engine(config, CLASSES, DEVICE, network=network_on_cuda(network))
        views = (torch.empty(IMAGES, 3, size, size, device=DEVICE) for _ in range(2))
        labels = torch.empty(IMAGES, CLASSES, device=DEVICE)
        valid = torch.empty(IMAGES, size, size, dtype=torch.bool, device=DEVICE)
        batch = Batch(*views, labels, valid, [])
        engine.step(batch)  # makes what is made once
        with Watch() as watch:
            metrics = engine.step(batch)
    return watch, metrics, config


def check(watch: Watch, metrics: dict[str, Any], expected: set[str]) -> None:
    assert watch.on_cpu == []
    assert expected <= metrics.keys()
    for name, value in metrics.items():
        assert (value.device.type, value.shape) == ("cuda", ()), name
        assert value.dtype == torch.float32, name


COTRAINING = {"loss", "cls", "c2s", "s2c", "csc", "xi", "omega"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_stays_on_the_device(family: str) -> None:
    watch, metrics, _ = second_step(FAMILIES[family])
    check(watch, metrics, COTRAINING | {"cls_aux", "c2s_aux"})


# torch's builds for CUDA ask the driver which kernels of attention there are.
BY_DRIVER = ("flash and efficient attention", "cuDNN's attention")
NO_DRIVER = pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(), reason="this torch needs a driver to choose"
)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[NO_DRIVER] if name in BY_DRIVER else []) for name in VARIANTS]
)
def test_a_step_of_every_kind_stays_on_the_device(variant: str) -> None:
    watch, metrics, config = second_step([*FAMILIES["DeiT, distilled"], *VARIANTS[variant]])
    check(watch, metrics, {"loss", "cls"} if config.optim.cotrain_after else COTRAINING)


def test_a_step_of_the_published_recipe_stays_on_the_device() -> None:
    watch, metrics, _ = second_step(FAMILIES["ViT"], "voc_published.yaml")
    check(watch, metrics, {"loss", "c2s", "c2s_aux", "s2c", "energy"})


def test_what_is_looked_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value read back, and a tensor of the host's."""
    overrides = FAMILIES["DeiT, distilled"]
    diagnostics = "cosa_fast.method.objective.Objective.diagnostics"
    monkeypatch.setattr(diagnostics, lambda *_: {"omega": torch.tensor(1.0).to(DEVICE), "foreground_share": 0.0})
    monkeypatch.setattr(_Engine, "_statistics", lambda self, a: self.objective.diagnostics(a, 0, a.confidence))
    found = second_step(overrides)[0].on_cpu
    assert any("test_fake_cuda.py" in call for call in found)
    monkeypatch.setattr(diagnostics, lambda self, assignment, *_: {"omega": assignment.confidence.sum().item()})
    with pytest.raises(Exception, match=r"_local_scalar_dense"):
        second_step(overrides)
