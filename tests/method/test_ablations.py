"""Every ablation of the method is one override, and changes what it should and nothing else, in real steps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.plain import Engine

MakeEngine = Callable[..., Engine]
FirstStep = Callable[..., dict[str, Tensor]]

TERMS = ("cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc")
ASSIGNED = {"c2s", "c2s_aux", "s2c", "csc", "perplexity", "omega", "foreground_share", "foreground_reliability"}
ASSIGNED |= {"foreground_share_aux", "xi", "xi_aux"}

# Override -> the metrics of the first step that differ from the default's. All others must be equal bit for bit.
CHANGES = {
    "loss.reliability=none": {"c2s", "c2s_aux"},
    "loss.foreground_weight=null": {"c2s", "c2s_aux"},
    "loss.foreground_weight=0.8": {"c2s", "c2s_aux"},
    "loss.guidance=truth": {"s2c"},
    "loss.guidance=noise": {"s2c"},
    "loss.s2c_relu=true": {"s2c"},
    "loss.s2c_temperature=1.0": {"s2c"},
    "loss.csc_vectors=logits": {"csc"},
    "loss.csc_temperature=0.2": {"csc"},
    "loss.csc_scope=batch": {"csc"},
    "loss.csc_similarity=dot": {"csc"},
    "loss.csc_epsilon=0.5": {"csc", "omega"},
    "loss.alpha=0.5": {"c2s", "c2s_aux", "csc", "perplexity", "omega", "foreground_reliability"},
    # P <= 1 and P^2 <= 1 are the same pixels: Omega stays.
    "loss.beta=2.0": {"c2s", "c2s_aux", "perplexity", "foreground_reliability"},
    "threshold.mode=fixed": ASSIGNED - {"s2c"},
    "threshold.floor=0.3": ASSIGNED - {"s2c"},
    "teacher.scales=[1.0]": ASSIGNED,
    "teacher.flip=false": ASSIGNED,
    "model.aux_layer=-3": {"cls_aux", "c2s_aux", "csc", "omega", "xi_aux", "foreground_share_aux"},
    "teacher.momentum=0.5": set(),
    "threshold.queue_length=1": set(),
    "model.detach=both": set(),
}


@pytest.mark.parametrize("override", CHANGES)
def test_one_override_changes_exactly_its_part_of_the_first_step(override: str, first_step: FirstStep) -> None:
    usual, changed = first_step(), first_step(override)

    assert changed.keys() == usual.keys()
    different = {name for name in usual if not torch.equal(usual[name], changed[name])}
    assert different - {"loss"} == CHANGES[override]
    assert all(torch.isfinite(value) for value in changed.values())


@pytest.mark.parametrize("term", TERMS)
def test_a_loss_weight_scales_its_term_in_the_total_only(
    term: str, first_step: FirstStep, make_config: Callable[..., Config]
) -> None:
    weight = getattr(make_config().loss, term)
    usual, doubled = first_step(), first_step(f"loss.{term}={2 * weight}")

    assert all(torch.equal(usual[name], doubled[name]) for name in usual if name != "loss")
    torch.testing.assert_close(doubled["loss"] - usual["loss"], weight * usual[term], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_a_loss_weight_of_zero_removes_the_term(term: str, first_step: FirstStep) -> None:
    """Not computed at all: 0 times NaN is NaN."""
    usual, without = first_step(), first_step(f"loss.{term}=0")

    assert usual.keys() - without.keys() == {term}
    assert all(torch.equal(usual[name], without[name]) for name in without if name != "loss")


def test_the_total_is_the_weighted_sum_of_the_terms(first_step: FirstStep, make_config: Callable[..., Config]) -> None:
    metrics, loss = first_step("loss.energy=0.05"), make_config("loss.energy=0.05").loss

    total = sum(getattr(loss, term) * metrics[term].double() for term in (*TERMS, "energy"))
    torch.testing.assert_close(metrics["loss"].double(), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("balance", [None, 0.5, 0.3])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1.0), (0.5, 2.0), (0.8, 0.0)])
def test_c2s_is_equation_5_with_and_without_raw_and_balance(
    balance: float | None, alpha: float, beta: float, make_engine: MakeEngine, batches: list[Batch]
) -> None:
    """The engine's c2s and c2s† against the formula; beta = 0 stands for RAW off."""
    raw = [f"loss.alpha={alpha}", f"loss.beta={beta}"] if beta else ["loss.reliability=none"]
    weight = f"loss.foreground_weight={'null' if balance is None else balance}"
    engine, batch = make_engine(*raw, weight), batches[0]
    with torch.no_grad():
        seg = engine.on.master(batch.strong).seg
        assignment = engine.an.assign(engine.an.forward(batch.weak), batch.labels, batch.valid)

    metrics = engine.step(batch)

    for layer, suffix in enumerate(("", "_aux")):
        confidence, xi = assignment.confidence[layer].double(), metrics[f"xi{suffix}"].double()
        foreground = confidence >= xi
        distance = torch.where(foreground, (confidence - xi) / (1 - xi), (xi - confidence) / xi).clamp(min=1e-4)
        reliability = (-(alpha * distance).log()).pow(-beta)
        target = torch.where(foreground, assignment.category[layer].long(), 0)
        logits = F.interpolate(seg.double(), size=(64, 64), mode="bilinear", align_corners=False)
        entropy = F.cross_entropy(logits, target, reduction="none")

        def mean(where: Tensor, r: Tensor = reliability, ce: Tensor = entropy) -> Tensor:
            return (r * ce)[where].sum() / r[where].sum()

        valid = batch.valid
        parts = mean(valid & foreground), mean(valid & ~foreground)
        expected = mean(valid) if balance is None else balance * parts[0] + (1 - balance) * parts[1]
        torch.testing.assert_close(metrics[f"c2s{suffix}"].double(), expected, rtol=2e-5, atol=0)


def test_dynamic_threshold_off_holds_xi(make_engine: MakeEngine, batches: list[Batch]) -> None:
    fixed, dynamic = make_engine("threshold.mode=fixed"), make_engine()
    seen = [{(float(m["xi"]), float(m["xi_aux"])) for m in map(e.step, batches)} for e in (fixed, dynamic)]

    assert len(seen[0]) == 1
    assert seen[0].pop() == pytest.approx((0.45, 0.45))
    assert len(seen[1]) == len(batches)


@pytest.mark.parametrize("key", ["value", "value_aux"])
def test_fixed_thresholds_are_set_apart(key: str, first_step: FirstStep) -> None:
    metrics = first_step("threshold.mode=fixed", f"threshold.{key}=0.6")

    assert float(metrics["xi"]) == pytest.approx(0.6 if key == "value" else 0.45)
    assert float(metrics["xi_aux"]) == pytest.approx(0.6 if key == "value_aux" else 0.45)


def test_queue_length_decides_how_many_batches_xi_remembers(make_engine: MakeEngine, batches: list[Batch]) -> None:
    # lr = 0 keeps the networks equal.
    engines = [make_engine(f"threshold.queue_length={n}", "optim.lr=0", "optim.warmup=0") for n in (2, 4)]
    xi = [[float(engine.step(batch)["xi"]) for batch in batches][-1] for engine in engines]
    short, long = (engine.thresholds[0].state_dict()["queue"] for engine in engines)

    assert torch.equal(short, long[2:])
    assert abs(xi[0] - xi[1]) > 1e-3


def test_momentum_shows_from_the_second_step(make_engine: MakeEngine, batches: list[Batch]) -> None:
    engines = [make_engine(f"teacher.momentum={m}") for m in (0.9, 0.1)]
    metrics = [[engine.step(batch) for batch in batches[:2]] for engine in engines]

    assert torch.equal(metrics[0][0]["s2c"], metrics[1][0]["s2c"])
    assert torch.equal(metrics[0][1]["cls"], metrics[1][1]["cls"])
    assert not torch.equal(metrics[0][1]["s2c"], metrics[1][1]["s2c"])


def test_ema_off_makes_the_assignment_network_the_online_one(
    make_engine: MakeEngine, batches: list[Batch], same: Callable[[object, object], bool]
) -> None:
    engine = make_engine("teacher.momentum=0")
    for batch in batches[:3]:
        before = {name: value.clone() for name, value in engine.on.master.state_dict().items()}
        engine.step(batch)
        assert not same(before, dict(engine.on.master.state_dict()))
        assert same(dict(engine.an.master.state_dict()), dict(engine.on.master.state_dict()))


def test_aux_off_has_no_dagger_terms_and_csc_on_the_main_cam(make_engine: MakeEngine, batches: list[Batch]) -> None:
    engine = make_engine("model.aux_layer=null")
    assert engine.on.master.classifier_aux is None
    metrics = engine.step(batches[0])

    assert not [name for name in metrics if name.endswith("_aux")]
    assert {"cls", "c2s", "s2c", "csc"} < metrics.keys()
    assert metrics["omega"] > 0
    assert metrics["csc"] > 0


def test_swapping_off_still_teaches_the_segmentation(make_engine: MakeEngine, batches: list[Batch]) -> None:
    """Without s2c nothing flows from the segmentation to the CAMs; CAMs go on teaching the segmentation."""
    engine = make_engine("loss.s2c=0")
    metrics = engine.step(batches[0])

    assert "s2c" not in metrics
    assert {"c2s", "c2s_aux"} < metrics.keys()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in engine.on.master.decoder.parameters())


@pytest.mark.parametrize(
    ("detach", "encoder", "classifier"),
    [("none", True, True), ("features", False, True), ("weights", True, False), ("both", False, False)],
)
def test_detach_says_where_the_gradient_of_s2c_arrives(
    detach: str, encoder: bool, classifier: bool, make_engine: MakeEngine, batches: list[Batch]
) -> None:
    """The gradient of a step with s2c against that of a step without it."""
    gradients = []
    for weight in (1.0, 0.0):
        engine = make_engine(f"model.detach={detach}", f"loss.s2c={weight}", "loss.csc=0")
        engine.step(batches[0])
        last_block = engine.on.master.encoder.backbone.blocks[-1].mlp.fc2.weight.grad
        gradients.append([p.grad for p in (engine.on.master.classifier.weight, engine.on.master.decoder.conv6.weight)])
        gradients[-1].append(last_block)

    differs = [not torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert differs == [classifier, False, encoder]


@pytest.mark.parametrize(
    ("overrides", "sides", "rows"),
    [
        ((), [64, 32, 96], 4),
        (("teacher.flip=false",), [64, 32, 96], 2),
        (("teacher.scales=[1.0]",), [64], 4),
        (("teacher.scales=[0.75, 1.25]",), [48, 80], 4),
    ],
)
def test_teacher_runs_at_its_scales_and_flips(
    overrides: tuple[str, ...],
    sides: list[int],
    rows: int,
    make_engine: MakeEngine,
    batches: list[Batch],
    watch: Callable,
) -> None:
    engine = make_engine(*overrides)
    calls = watch(engine.an.master)
    engine.step(batches[0])

    assert calls.shapes == [(rows, 3, side, side) for side in sides]


def test_truth_guidance_needs_masks_and_follows_them(make_engine: MakeEngine, batches: list[Batch]) -> None:
    batch = batches[1]
    assert batch.truth is not None
    blank = Batch(batch.weak, batch.strong, batch.labels, batch.valid, batch.ids, torch.zeros_like(batch.truth))
    none = Batch(batch.weak, batch.strong, batch.labels, batch.valid, batch.ids)
    values = [make_engine("loss.guidance=truth").step(each)["s2c"] for each in (batch, blank)]

    assert not torch.equal(*values)
    with torch.no_grad():
        cam = make_engine().on.master(batch.strong).cam
    # All background: every target is 0 (the two votes for background over tau leave no rest).
    torch.testing.assert_close(values[1], F.softplus(cam).mean(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="masks"):
        make_engine("loss.guidance=truth").step(none)


def test_noise_guidance_is_reproducible_and_new_every_iteration(make_engine: MakeEngine, batches: list[Batch]) -> None:
    still = ("loss.guidance=noise", "optim.lr=0", "optim.warmup=0")
    runs = [
        [float(engine.step(batches[0])["s2c"]) for _ in range(2)]
        for engine in (make_engine(*still), make_engine(*still))
    ]

    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    engine = make_engine(*still, "run.seed=1")
    engine.load_state_dict(make_engine(*still).state_dict())
    assert float(engine.step(batches[0])["s2c"]) != runs[0][0]


def test_epsilon_zero_leaves_no_pixel_and_no_contrast(first_step: FirstStep, batches: list[Batch]) -> None:
    none, every = first_step("loss.csc_epsilon=0"), first_step("loss.csc_epsilon=1000")

    assert float(none["omega"]) == float(none["csc"]) == 0
    cells = F.adaptive_avg_pool2d(batches[0].valid.float(), 8) >= 0.5
    assert float(every["omega"]) == float(cells.sum())


def test_head_multiplier_moves_the_heads_only(make_engine: MakeEngine, batches: list[Batch]) -> None:
    usual, still = make_engine(), make_engine("optim.head_multiplier=0")
    start = still.on.master.classifier.weight.detach().clone()
    for engine in (usual, still):
        engine.step(batches[0])

    assert torch.equal(still.on.master.classifier.weight, start)
    assert not torch.equal(usual.on.master.classifier.weight, start)
    block = "encoder.backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(usual.on.master.state_dict()[block], still.on.master.state_dict()[block])


@pytest.mark.parametrize("name", ["voc_published.yaml", "coco_published.yaml"])
def test_published_recipe_runs_with_energy_and_bands(
    name: str, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    published = load_config(name)
    keys = ("c2s", "c2s_aux", "s2c_relu", "csc", "energy", "reliability", "foreground_weight")
    overrides = [f"loss.{key}={getattr(published.loss, key)}".replace("True", "true") for key in keys]
    band = f"threshold.band={list(published.threshold.band)}"
    config = make_config("optim.cotrain_after=0", *overrides, band, "loss.csc=0", "threshold.mode=band")
    engine = Engine(config, 5, torch.device("cpu"))
    with torch.no_grad():
        seg = engine.on.master(batches[0].strong).seg
        assignment = engine.an.assign(engine.an.forward(batches[0].weak), batches[0].labels, batches[0].valid)

    metrics = engine.step(batches[0])

    assert {"energy", "c2s", "c2s_aux", "s2c"} < metrics.keys()
    assert "csc" not in metrics
    assert metrics["energy"] < 0
    low, high = published.threshold.band
    logits = F.interpolate(seg, size=(64, 64), mode="bilinear", align_corners=False)
    confidence = assignment.confidence[0]
    target = torch.where(confidence >= high, assignment.category[0].long(), 0)
    entropy = F.cross_entropy(logits, target, reduction="none")
    foreground = entropy[batches[0].valid & (confidence >= high)].mean()
    background = entropy[batches[0].valid & (confidence <= low)].mean()
    torch.testing.assert_close(metrics["c2s"], 0.5 * foreground + 0.5 * background, rtol=1e-5, atol=0)


@pytest.mark.parametrize("key", ["band", "band_aux"])
def test_bands_act_on_their_own_layer(key: str, first_step: FirstStep) -> None:
    recipe = ("threshold.mode=band", "loss.csc=0", "loss.reliability=none")
    usual, changed = first_step(*recipe), first_step(*recipe, f"threshold.{key}=[0.4,0.5]")

    different = {term for term in ("c2s", "c2s_aux", "s2c") if not torch.equal(usual[term], changed[term])}
    assert different == {"c2s" if key == "band" else "c2s_aux"}


def test_energy_opens_its_gate_where_the_pseudo_label_is_ignored(first_step: FirstStep) -> None:
    recipe = ("threshold.mode=band", "loss.csc=0", "loss.reliability=none", "loss.energy=0.05")
    narrow, wide = (first_step(*recipe, f"threshold.band={band}") for band in ("[0.5,0.5]", "[0.01,0.99]"))

    assert wide["energy"] < narrow["energy"] < 0
