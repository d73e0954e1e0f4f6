"""Phases, moving average, optimiser groups, schedule, and what a step does when a number is not finite."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cosa_fast.config.schema import Config, OptimConfig, TeacherConfig
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.base import NonFiniteLoss
from cosa_fast.engine.optim import learning_rate
from cosa_fast.engine.plain import Engine
from cosa_fast.method.assignment import AssignmentNetwork

MakeEngine = Callable[..., Engine]
Same = Callable[[object, object], bool]


def snapshot(engine: Engine) -> dict:
    """A deep copy of the engine's state."""

    def copy(value: object) -> object:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return [copy(item) for item in value] if isinstance(value, list) else value

    state = copy(engine.state_dict())
    assert isinstance(state, dict)
    return state


# Phases


def test_before_cotraining_only_the_classification_runs(
    make_engine: MakeEngine, batches: list[Batch], watch: Callable, same: Same
) -> None:
    engine = make_engine("optim.cotrain_after=2")
    assigning, decoder = watch(engine.an.master), watch(engine.on.master.decoder)
    start = {name: value.clone() for name, value in engine.on.master.decoder.state_dict().items()}
    for batch in batches[:2]:
        assert not engine.cotraining
        assert set(engine.step(batch)) == {"loss", "cls", "cls_aux", "lr"}

    assert assigning.shapes == []
    assert decoder.shapes == []
    assert all(p.grad is None for p in engine.on.master.decoder.parameters())
    # Not even weight decay.
    assert same(start, dict(engine.on.master.decoder.state_dict()))
    assert all(threshold.state_dict()["queue"].sum() == 0 for threshold in engine.thresholds)


def test_without_aux_the_first_phase_has_cls_alone(make_engine: MakeEngine, batches: list[Batch]) -> None:
    engine = make_engine("optim.cotrain_after=1", "model.aux_layer=null")
    assert set(engine.step(batches[0])) == {"loss", "cls", "lr"}


def test_cotraining_begins_at_the_configured_iteration(
    make_engine: MakeEngine, batches: list[Batch], watch: Callable
) -> None:
    engine = make_engine("optim.cotrain_after=2")
    calls = watch(engine.an.master)
    names = []
    for batch in batches:
        before = len(calls.shapes)
        names.append("s2c" in engine.step(batch))
        assert (len(calls.shapes) > before) == names[-1]

    assert names == [False, False, True, True]
    assert all(p.grad is not None for p in engine.on.master.decoder.parameters())


def test_c2s_starts_near_the_logarithm_of_the_number_of_classes(make_engine: MakeEngine, batches: list[Batch]) -> None:
    metrics = make_engine().step(batches[1])
    for name in ("c2s", "c2s_aux"):
        assert float(metrics[name]) == pytest.approx(math.log(6), abs=0.05)


def test_online_network_sees_the_strong_view_and_the_assignment_network_the_weak_one(
    make_engine: MakeEngine, batches: list[Batch]
) -> None:
    engine = make_engine("teacher.scales=[1.0]", "teacher.flip=false")
    seen: dict[str, Tensor] = {}
    for name, network in (("strong", engine.on.master), ("weak", engine.an.master)):
        network.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    batch = next(batch for batch in batches if not torch.equal(batch.weak, batch.strong))
    engine.step(batch)

    assert torch.equal(seen["strong"], batch.strong)
    assert torch.equal(seen["weak"], batch.weak)


# Moving average


def test_assignment_network_starts_as_a_copy_of_its_own(make_engine: MakeEngine, same: Same) -> None:
    engine = make_engine()
    assert same(dict(engine.an.master.state_dict()), dict(engine.on.master.state_dict()))
    online = {p.data_ptr() for p in engine.on.master.parameters()}
    assert not [p for p in engine.an.master.parameters() if p.data_ptr() in online or p.requires_grad]


def test_moving_average_follows_the_formula(make_engine: MakeEngine, batches: list[Batch]) -> None:
    """Θ' ← mΘ' + (1 − m)Θ in float64, over the phase change."""
    engine = make_engine("teacher.momentum=0.9994", "optim.cotrain_after=2")
    expected = {name: value.double() for name, value in engine.an.master.state_dict().items()}
    for batch in batches:
        engine.step(batch)
        online = engine.on.master.state_dict()
        expected = {name: 0.9994 * value + (1 - 0.9994) * online[name].double() for name, value in expected.items()}

    for name, value in engine.an.master.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-8)
    moved = engine.an.master.state_dict()["classifier.weight"]
    assert not torch.equal(moved, engine.on.master.state_dict()["classifier.weight"])
    assert not [p for p in engine.an.master.parameters() if p.grad is not None]


def test_moving_average_takes_floating_buffers_along_and_copies_integers() -> None:
    online: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    an = AssignmentNetwork(online, TeacherConfig(momentum=0.75))
    online.train()(torch.randn(2, 3, 5, 5) + 4)
    an.update()

    own = an.master.get_submodule("1")
    torch.testing.assert_close(own.running_mean, 0.25 * online[1].running_mean)
    assert own.num_batches_tracked == 1
    assert not own.training


def test_assignment_network_survives_the_train_mode_of_the_online_one(
    make_engine: MakeEngine, batches: list[Batch]
) -> None:
    engine = make_engine()
    engine.step(batches[0])
    assert engine.on.master.training
    assert not [m for m in engine.an.master.modules() if m.training]


# Schedule and optimiser


def test_warmup_ends_at_the_rate_and_the_decay_counts_from_the_first_iteration() -> None:
    config = OptimConfig()
    assert learning_rate(0, config) == 1e-6
    assert learning_rate(750, config) == pytest.approx((1e-6 + 6e-5) / 2)
    # The jump at the end of the warm-up is the method's own: t is counted from 0.
    assert learning_rate(1499, config) == pytest.approx(6e-5, rel=1e-3)
    assert learning_rate(1500, config) == pytest.approx(6e-5 * (1 - 1500 / 32000) ** 0.9)
    assert learning_rate(16000, config) == pytest.approx(6e-5 * 0.5**0.9)
    assert 0 < learning_rate(31999, config) < 1e-8
    assert learning_rate(32000, config) == 0


def test_without_warmup_the_first_rate_is_the_full_one() -> None:
    assert learning_rate(0, OptimConfig(warmup=0)) == 6e-5


def test_rates_of_the_groups_in_real_steps(
    make_engine: MakeEngine, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    engine = make_engine("optim.head_multiplier=7")
    for iteration, batch in enumerate(batches):
        metrics = engine.step(batch)
        rate = learning_rate(iteration, make_config().optim)
        assert float(metrics["lr"]) == pytest.approx(rate)
        assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([rate, 7 * rate])


def test_optimiser_holds_every_trainable_parameter_once_and_no_frozen_one(make_engine: MakeEngine) -> None:
    engine = make_engine("optim.weight_decay=0.03", "optim.betas=[0.8, 0.99]")
    held = [p for group in engine.optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in engine.on.master.named_parameters()}

    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in engine.on.master.parameters() if p.requires_grad}
    assert "encoder.backbone.pos_embed" not in {names[id(p)] for p in held}
    heads = {names[id(p)].split(".")[0] for p in engine.optimizer.param_groups[1]["params"]}
    assert heads == {"classifier", "classifier_aux", "decoder"}
    assert all(g["weight_decay"] == 0.03 and g["betas"] == (0.8, 0.99) for g in engine.optimizer.param_groups)


def test_first_step_is_adamw(make_engine: MakeEngine, batches: list[Batch]) -> None:
    """One parameter by hand: Θ ← Θ(1 − lr·wd) − lr·g/(|g| + ε) in the first step."""
    engine = make_engine("optim.warmup=0", "optim.lr=1e-4", "optim.head_multiplier=10")
    before = engine.on.master.classifier.weight.detach().double()
    engine.step(batches[0])
    gradient = engine.on.master.classifier.weight.grad
    assert gradient is not None

    expected = before * (1 - 1e-3 * 0.01) - 1e-3 * gradient.double() / (gradient.double().abs() + 1e-8)
    torch.testing.assert_close(engine.on.master.classifier.weight.detach().double(), expected, rtol=1e-5, atol=1e-8)


# Restored states


def test_options_of_the_optimiser_come_from_the_configuration(make_engine: MakeEngine, batches: list[Batch]) -> None:
    """Resuming with other settings means those settings, not the checkpoint's."""
    first = make_engine()
    first.step(batches[0])
    other = make_engine("optim.head_multiplier=3", "optim.weight_decay=0.5", "optim.betas=[0.5, 0.6]")
    other.load_state_dict(snapshot(first))
    other.step(batches[1])

    encoder, heads = other.optimizer.param_groups
    assert heads["lr"] == pytest.approx(3 * encoder["lr"])
    assert all(group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0.5, 0.6) for group in (encoder, heads))


def test_a_restored_engine_goes_on_bit_for_bit(make_engine: MakeEngine, batches: list[Batch], same: Same) -> None:
    engine, other = make_engine(), make_engine("run.seed=5")
    engine.step(batches[0])
    other.load_state_dict(snapshot(engine))
    for batch in batches[1:3]:
        assert same(engine.step(batch), other.step(batch))
    assert same(engine.state_dict(), other.state_dict())


def test_random_layers_go_on_bit_for_bit(make_engine: MakeEngine, batches: list[Batch], same: Same) -> None:
    """Stochastic depth draws from the global generator, whose state is in no checkpoint."""
    dropping = "model.arguments.drop_path_rate=0.5"
    engine = make_engine(dropping)
    engine.step(batches[0])
    state = snapshot(engine)
    straight = [engine.step(batch) for batch in batches[1:]]
    torch.rand(7)
    other = make_engine(dropping)
    other.load_state_dict(state)

    assert same(straight, [other.step(batch) for batch in batches[1:]])


# Numbers that are not finite


def poison_parameter(engine: Engine) -> None:
    engine.on.master.classifier.weight.data[0, 0] = float("nan")


def poison_decoder(engine: Engine) -> None:
    engine.on.master.decoder.conv8.weight.data[0, 0] = float("inf")


def poison_an_decoder(engine: Engine) -> None:
    engine.an.master.decoder.conv8.weight.data[:] = float("nan")


def poison_gradient(engine: Engine) -> None:
    engine.on.master.decoder.conv6.weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("poison", "term"),
    [
        (poison_parameter, "cls"),
        (poison_decoder, "c2s"),
        (poison_an_decoder, "s2c"),
        (poison_gradient, "gradient"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    poison: Callable[[Engine], None], term: str, make_engine: MakeEngine, batches: list[Batch], same: Same
) -> None:
    engine = make_engine()
    engine.step(batches[0])
    poison(engine)
    before = snapshot(engine)

    with pytest.raises(NonFiniteLoss, match=rf"iteration 1: {term} ") as caught:
        engine.step(batches[1])

    assert (caught.value.iteration, caught.value.term) == (1, term)
    after = engine.state_dict()
    for state in (before, after):
        # NaN equals nothing, and the rate of the failed step is not part of what was learned.
        state["student"] = {name: value.nan_to_num() for name, value in state["student"].items()}
        state["teacher"] = {name: value.nan_to_num() for name, value in state["teacher"].items()}
        for group in state["optimizer"]["param_groups"]:
            group.pop("lr")
    assert same(before, after)


def test_thresholds_return_to_the_last_good_step(make_engine: MakeEngine, batches: list[Batch], same: Same) -> None:
    """After the failed step the engine behaves as if it had never seen that batch."""
    engine, untouched = make_engine(), make_engine()
    for each in (engine, untouched):
        each.step(batches[0])
    handle = engine.on.master.decoder.conv6.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLoss, match="gradient"):
        engine.step(batches[1])
    handle.remove()

    assert same(engine.step(batches[2]), untouched.step(batches[2]))
    assert same(engine.state_dict(), untouched.state_dict())


def test_an_infinite_loss_weight_is_found(make_engine: MakeEngine, batches: list[Batch]) -> None:
    engine = make_engine("loss.csc=1")
    engine.objective.weights["csc"] = float("inf")  # a configuration may not say so
    with pytest.raises(NonFiniteLoss, match="iteration 0: loss"):
        engine.step(batches[0])


def test_an_exploding_rate_is_found_in_the_step_after(make_engine: MakeEngine, batches: list[Batch]) -> None:
    engine = make_engine("optim.lr=1e30", "optim.warmup=0")
    engine.step(batches[0])
    with pytest.raises(NonFiniteLoss, match="iteration 1"):
        engine.step(batches[1])
