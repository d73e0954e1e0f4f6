"""What the published recipes share with the official release, held against its formulas in this file's own words."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.views.parameters import AugmentConfig, AugmentParameters, Box, draw
from cosa_fast.data_pipeline.views.pixels import normalise, render
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.optim import learning_rate
from cosa_fast.engine.plain import Engine
from cosa_fast.kernels import dense_energy, raw_cross_entropy
from cosa_fast.method.assignment import assign
from cosa_fast.network.model import Outputs

SHARED = Path(os.environ.get("COSA_SHARED", Path(__file__).parents[3] / "shared"))
PUBLISHED = ["voc_published.yaml", "coco_published.yaml"]
MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rates_are_those_of_the_authors_logs(name: str) -> None:
    config = load_config(name).optim
    logged = {199: 7.960e-06, 999: 3.996e-05, 1399: 5.596e-05}
    logged |= {1599: 5.729e-05, 5999: 4.977e-05} if name == "voc_published.yaml" else {1599: 5.856e-05, 9999: 5.092e-05}
    for index, rate in logged.items():
        assert float(f"{learning_rate(index, config):.3e}") == rate


@pytest.mark.parametrize(("name", "last"), [("voc_published.yaml", 6000), ("coco_published.yaml", 10000)])
def test_the_last_index_before_cotraining(name: str, last: int, make_config: MakeConfig) -> None:
    """Theirs co-train where the 0-based index exceeds the number."""
    assert load_config(name).optim.cotrain_after == last + 1
    engine = Engine(make_config("optim.cotrain_after=3", "optim.iterations=9"), 5, torch.device("cpu"))
    for index, cotrains in ((2, False), (3, True)):
        engine.iteration = index
        assert engine.cotraining == cotrains


@pytest.mark.parametrize("kind", [Engine, FusedEngine])
def test_the_head_decays_and_adam_counts_before_cotraining(
    kind: type[Engine] | type[FusedEngine], make_config: MakeConfig, batches: list[Batch]
) -> None:
    config = make_config(
        "optim.update_unused=true", "optim.cotrain_after=2", "optim.warmup=0", "optim.weight_decay=0.1"
    )
    engine = kind(config, 5, torch.device("cpu"))
    start = engine.on.master.decoder.conv7.weight.detach().clone()
    for batch in batches[:2]:
        engine.step(batch)
    decay = [1 - 10 * learning_rate(index, config.optim) * 0.1 for index in (0, 1)]
    torch.testing.assert_close(engine.on.master.decoder.conv7.weight.detach(), start * decay[0] * decay[1])
    engine.step(batches[2])
    steps = {float(each["step"]) for each in engine.state_dict()["optimizer"]["state"].values()}
    assert steps == {3.0}


def test_both_engines_move_unused_parameters_alike(make_config: MakeConfig, batches: list[Batch]) -> None:
    config = make_config("optim.update_unused=true", "optim.cotrain_after=1", "run.precision=fp32")
    plain, fused = Engine(config, 5, torch.device("cpu")), FusedEngine(config, 5, torch.device("cpu"))
    for batch in batches[:3]:
        for engine in (plain, fused):
            engine.step(batch)
    pairs = zip(plain.on.master.parameters(), fused.on.master.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_heads_begin_as_layers_of_torch_do(make_config: MakeConfig) -> None:
    """Uniform within ±1/√fan_in. With a ViT-B's sizes: conv6 0.0069, conv7 0.0085, conv8 0.0255, classifiers 0.0208."""
    network = Engine(
        make_config("model.head_start=uniform", "model.decoder_width=128"), 5, torch.device("cpu")
    ).on.master
    layers = [network.classifier, network.classifier_aux, *network.decoder.children()]
    for layer in layers:
        weight = layer.weight.detach()
        bound = weight[0].numel() ** -0.5
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert load_config("voc_published.yaml").model.head_start == "uniform"


def cams(seed: int, classes: int = 4, batch: int = 2, sides: tuple[int, ...] = (14, 7, 21)) -> list[Outputs]:
    """AN's outputs: smooth CAMs of a few blobs at three scales, and mirrored ones that agree but for noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse, coarse_aux = (torch.randn(batch, classes, 5, 5, generator=generator) for _ in range(2))
    outputs = []
    for side in sides:
        maps = []
        for each in (coarse, coarse_aux):
            smooth = F.interpolate(each, size=(side, side), mode="bicubic")
            noise = 0.1 * torch.randn(2 * batch, classes, side, side, generator=generator)
            maps.append(torch.cat([smooth, smooth.flip(-1)]) + noise)
        outputs.append(
            Outputs(maps[0].amax((2, 3)), maps[0], torch.zeros(2 * batch, classes + 1, side, side), None, maps[1])
        )
    return outputs


def released_cams(maps: list[Tensor], size: int) -> Tensor:
    """Their maps before image labels: (B, C, size, size)."""
    count = len(maps[0]) // 2
    total = torch.zeros(count, maps[0].shape[1], size, size)
    for each in maps:
        wide = F.interpolate(each, size=(size, size), mode="bilinear", align_corners=False)
        total += torch.maximum(wide[:count], wide[count:].flip(-1)).relu()
    total = total - total.amin((2, 3), keepdim=True)
    return total / (total.amax((2, 3), keepdim=True) + 1e-5)


def released_label(cam: Tensor, labels: Tensor, low: float, high: float) -> Tensor:
    """Their pseudo-label (B, H, W): per threshold, softmax of [threshold; CAMs of the present classes] at half
    resolution, enlarged; a class where the high one says so, background where the low one does, else 255."""
    chosen = []
    for threshold in (high, low):
        channels = torch.cat([torch.full_like(cam[:, :1], threshold), cam], 1)
        half = F.interpolate(channels, scale_factor=0.5, mode="bilinear", align_corners=False)
        absent = torch.cat([torch.zeros(len(labels), 1), 1 - labels], 1).bool()[:, :, None, None]
        wide = F.interpolate(half.masked_fill(absent, -torch.inf).softmax(1), scale_factor=2, mode="bilinear")
        chosen.append(wide.argmax(1))
    return torch.where(chosen[0] > 0, chosen[0], torch.where(chosen[1] > 0, 255, 0))


def test_half_grid_makes_the_release_s_pseudo_labels_but_for_few_pixels() -> None:
    band, size, labels = (0.2, 0.7), 224, torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    shares: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(4):
        outputs, valid = cams(seed), torch.ones(2, size, size, dtype=torch.bool)
        expected = released_label(released_cams([each.cam for each in outputs], size), labels, *band)
        for half in shares:
            found = assign(outputs, labels, valid, 16, half_grid=half)
            confidence, category = found.confidence[0], found.category[0].long()
            mine = torch.where(confidence >= band[1], category, torch.where(confidence <= band[0], 0, 255))
            shares[half].append(float((mine != expected).float().mean()))
    assert max(shares[True]) < 0.004, shares
    assert np.mean(shares[True]) < 0.5 * np.mean(shares[False]), shares


def test_the_auxiliary_map_comes_of_the_last_scale() -> None:
    size, labels = 224, torch.ones(2, 4)
    outputs, valid = cams(5), torch.ones(2, size, size, dtype=torch.bool)
    last, every = (assign(outputs, labels, valid, 16, aux_scales=which) for which in ("last", "all"))
    expected = released_cams([outputs[-1].cam_aux], size)
    torch.testing.assert_close(last.confidence[1], expected.amax(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(last.confidence[0], every.confidence[0])
    assert not torch.equal(last.confidence[1], every.confidence[1])
    assert all(load_config(name).teacher.aux_scales == "last" for name in PUBLISHED)


@torch.no_grad()
def test_s2c_is_the_release_s_where_it_sees_padding(make_config: MakeConfig, batches: list[Batch]) -> None:
    recipe = ["optim.cotrain_after=0", "loss.s2c_relu=true", "loss.csc=0"]
    batch = batches[0]
    assert not batch.valid.all()
    found = {}
    for padding in ("true", "false"):
        engine = Engine(make_config(*recipe, f"loss.s2c_padding={padding}"), 5, torch.device("cpu"))
        seen, outputs = engine.on.master(batch.strong), engine.an.forward(batch.weak)
        assignment = engine.an.assign(outputs, batch.labels, batch.valid)
        found[padding] = engine.objective.cotraining(seen, assignment, batch, engine.threshold_values, 0)["s2c"]
    size, count = batch.weak.shape[2:], len(batch.weak)
    seg = sum(
        wide[:count] + wide[count:].flip(-1)
        for wide in (F.interpolate(each.seg, size=size, mode="bilinear", align_corners=False) for each in outputs)
    )
    absent = torch.cat([torch.zeros(count, 1), 1 - batch.labels], 1).bool()[:, :, None, None]
    target = (seg.masked_fill(absent, -1e5) / 0.01).softmax(1)[:, 1:]
    target = F.interpolate(target, size=seen.cam.shape[2:], mode="bilinear", align_corners=False)
    flat = [maps.permute(0, 2, 3, 1).reshape(-1, 5) for maps in (seen.cam.relu(), target)]
    torch.testing.assert_close(found["true"], F.multilabel_soft_margin_loss(*flat), rtol=1e-4, atol=1e-6)
    assert found["false"] != found["true"]


def lattice(values: np.ndarray, guide: np.ndarray, sigma_xy: float, sigma_rgb: float) -> np.ndarray:
    """pydensecrf's lattice filter of (K, H, W) values that sum to 1 over K, read off one step of its inference: that
    multiplies them by exp(weight·filtered) and normalises. Filtered ones give what the normalisation took away."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")

    def step(start: np.ndarray, weight: float) -> np.ndarray:
        classes, height, width = start.shape
        field = densecrf.DenseCRF2D(width, height, classes)
        field.setUnaryEnergy(np.ascontiguousarray(-np.log(start).reshape(classes, -1), dtype=np.float32))
        field.addPairwiseBilateral(
            sxy=sigma_xy, srgb=sigma_rgb, rgbim=guide, compat=weight, normalization=densecrf.NO_NORMALIZATION
        )
        state = field.startInference()
        field.stepInference(*state)
        return np.array(state[0], dtype=np.float64).reshape(start.shape)

    weight, rare = 2.0 / values[0].size ** 0.5, np.exp(-10.0)
    certain = np.stack([np.full(values.shape[1:], 1 - rare), np.full(values.shape[1:], rare)])
    moved = step(certain, weight)
    ones = (np.log(moved[0] / moved[1]) - np.log((1 - rare) / rare)) / weight
    relative = np.log(step(values, weight) / values) / weight
    return relative - relative.mean(0) + ones / len(values)


@pytest.mark.skipif(not (SHARED / "data/voc_animals").exists(), reason="no real images: set COSA_SHARED")
def test_the_energy_s_weight_brings_value_and_gradient_to_the_lattice_s() -> None:
    """Theirs is 0.05 of the lattice's sums."""
    weight, ratios = load_config("voc_published.yaml").loss.energy, []
    for path in sorted((SHARED / "data/voc_animals/JPEGImages").glob("*.jpg"))[:40:10]:
        with Image.open(path) as image:
            guide = np.ascontiguousarray(np.array(image.convert("RGB").resize((72, 64)), dtype=np.uint8))
        generator = torch.Generator().manual_seed(len(ratios))
        logits = F.interpolate(3 * torch.randn(1, 5, 4, 4, generator=generator), size=(64, 72), mode="bilinear")
        values = logits.softmax(1).requires_grad_()
        gate = 1 - values.detach().amax(1)
        pixels = torch.from_numpy(guide).permute(2, 0, 1)[None].float()
        loss = weight * dense_energy(values, pixels, gate, 50 * 64 / 224, 15.0)
        loss.backward()
        filtered = lattice(values.detach()[0].numpy(), guide, 50 * 64 / 224, 15.0) * gate[0].numpy()
        theirs = -0.05 * float((values.detach()[0].numpy() * filtered).sum())
        gradient = values.grad
        assert gradient is not None
        ratios.append([float(loss.detach()) / theirs, float(gradient.norm()) / (0.1 * np.sqrt((filtered**2).sum()))])
    assert np.median(ratios, 0) == pytest.approx([1, 1], abs=0.1), ratios


def test_the_energy_sees_every_second_pixel(make_config: MakeConfig, batches: list[Batch]) -> None:
    """Its guide: what lies on other pixels changes nothing."""
    config = make_config("optim.cotrain_after=0", "loss.energy=1", "loss.csc=0")
    engine, batch = Engine(config, 5, torch.device("cpu")), batches[0]
    with torch.no_grad():
        seen = engine.on.master(batch.strong)
        assignment = engine.an.assign(engine.an.forward(batch.weak), batch.labels, batch.valid)
        noisy = batch.map(torch.clone)
        noisy.strong[:, :, 1::2] += 1
        noisy.strong[:, :, :, 1::2] -= 1
        energies = [
            engine.objective.cotraining(seen, assignment, each, engine.threshold_values, 0)["energy"]
            for each in (batch, noisy)
        ]
    assert torch.equal(*energies)


# What is declared not to be equal, and has no test elsewhere: that it is as declared.


def test_the_class_balance_is_the_whole_batch_s_and_not_that_of_its_parts() -> None:
    """Theirs: the mean over two GPUs, each of which balances its own two images."""
    generator = torch.Generator().manual_seed(0)
    logits, confidence = torch.randn(4, 3, 4, 4, generator=generator), torch.rand(4, 16, 16, generator=generator)
    logits[:2] *= 3
    confidence[:2] *= 0.6  # little foreground in the first part, and that at higher losses
    category = torch.randint(1, 3, confidence.shape, generator=generator)
    up = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
    label = category.where(confidence >= 0.5, 0)
    entropy = F.cross_entropy(up, label, reduction="none")

    def balanced(images: slice) -> Tensor:
        sides = (entropy[images][side] for side in (label[images] == 0, label[images] > 0))
        return torch.stack([side.mean() for side in sides]).mean()

    found = raw_cross_entropy(logits, confidence, category, 0.5, beta=0.0, foreground_weight=0.5)
    torch.testing.assert_close(found, balanced(slice(4)))
    theirs = (balanced(slice(2)) + balanced(slice(2, 4))) / 2
    assert (found - theirs).abs() > 0.01 * theirs


@pytest.mark.parametrize("operation", ["identity", "autocontrast", "equalize"])
def test_blur_and_colours_see_real_pixels_alone(operation: str) -> None:
    """Theirs see black around them."""
    pixels = np.random.default_rng(0).integers(60, 180, (20, 24, 3), dtype=np.uint8)
    image, config = Image.fromarray(pixels), AugmentConfig(crop_size=40, padding="black")
    drawn = AugmentParameters((20, 24), False, Box(0, 0, 20, 24), Box(9, 5, 20, 24), 1.5, operation, 5)
    strong = render(image, None, drawn, config).strong[:, 9:29, 5:29]
    padded = Image.new("RGB", (40, 40))
    padded.paste(image, (5, 9))
    views = []
    for each in (image, padded):
        blurred = each.filter(ImageFilter.GaussianBlur(1.5))
        views.append(
            normalise(
                getattr(ImageOps, operation)(blurred) if operation != "identity" else blurred, config.mean, config.std
            )
        )
    torch.testing.assert_close(strong, views[0])
    assert (strong - views[1][:, 9:29, 5:29]).abs().max() > 0.1


def test_scaled_sizes_are_rounded() -> None:
    """Theirs are cut off: a pixel less in half of all views. A very wide image shows its scale."""
    drawn = [draw(0, position, (375, 10**7), AugmentConfig()).scaled_size for position in range(200)]
    scaled = [375 * width / 10**7 for _, width in drawn]
    assert all(abs(height - exact) <= 0.5 + 1e-4 for (height, _), exact in zip(drawn, scaled, strict=True))
    assert 0.4 < np.mean([height > int(exact) for (height, _), exact in zip(drawn, scaled, strict=True)]) < 0.6
