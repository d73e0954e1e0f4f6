"""An evaluation on CUDA tensors without contents: what would make the host wait is found on any machine."""

from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, Watch, fake_cuda, network_on_cuda

from cosa_fast.config.parsing import load_config
from cosa_fast.evaluation.cam import Slots
from cosa_fast.evaluation.evaluator import Evaluator
from cosa_fast.evaluation.inference import inference
from cosa_fast.evaluation.part import Part
from cosa_fast.network.build import build_model

CLASSES, IMAGES, SIZE = 20, 5, (75, 100)
BACKBONES = {
    "ViT": ["model.backbone=vit_base_patch16_224", "model.arguments={depth: 2}"],
    "EfficientNet": ["model.backbone=test_efficientnet", "model.aux_layer=-1"],
}


def batches_on_cuda(overrides: list[str], has_masks: bool = True) -> Watch:
    """The second batch of an evaluation of both networks."""
    fixed = ["model.weights=none", "run.precision=fp32", "model.aux_layer=-2", "eval.coexistence=[]"]
    fixed += ["eval.scales=[1.0, 0.5]", "teacher.scales=[1.0, 1.5]"]
    config = load_config("voc.yaml", [*fixed, *overrides])
    with torch.device("meta"):
        built = {name: build_model(config.model, CLASSES) for name in ("on", "an")}
    names = [f"class{number}" for number in range(CLASSES)]
    with fake_cuda():
        networks: dict[str, Any] = {name: network_on_cuda(network) for name, network in built.items()}
        evaluator = Evaluator(config, names, DEVICE)
        counts = {name: evaluator.counts(has_masks, range(IMAGES), (0.4, 0.5)) for name in networks}
        classes = torch.empty(IMAGES, 3, dtype=torch.int64, device=DEVICE)
        slots = Slots(classes, torch.empty(IMAGES, 3, dtype=torch.bool, device=DEVICE))
        truth = torch.empty(IMAGES, *SIZE, dtype=torch.uint8, device=DEVICE)
        part = Part(range(IMAGES), range(IMAGES), slots, torch.empty(0), truth)
        images = torch.empty(IMAGES, 3, *SIZE, device=DEVICE)
        with inference(networks["on"]), inference(networks["an"]):
            evaluator.look(networks, counts, images, [part])  # makes what is made once
            with Watch() as watch:
                evaluator.look(networks, counts, images, [part])
    return watch


@pytest.mark.parametrize(
    "overrides",
    [
        BACKBONES["ViT"],
        [*BACKBONES["EfficientNet"], "eval.protocol=squashed"],
        [*BACKBONES["ViT"], "eval.flip=false", "teacher.flip=false", "model.aux_layer=null"],
    ],
)
def test_the_host_neither_reads_nor_sends_anything_for_a_batch(overrides: list[str]) -> None:
    """A data-dependent call would raise."""
    watch = batches_on_cuda(overrides)
    assert watch.calls > 100
    assert watch.on_cpu == []


def test_nor_does_it_without_masks() -> None:
    assert batches_on_cuda(BACKBONES["ViT"], has_masks=False).on_cpu == []
