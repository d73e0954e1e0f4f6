"""The captured step on a GPU: no synchronisation, and the numbers of the ordinary one. What also says something on a
CPU runs there too."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine import capture
from cosa_fast.engine.base import EngineBase, NonFiniteLoss
from cosa_fast.engine.capture import WARM_UP, captures, left_out
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import UserError
from cosa_fast.network.attention_backends import refusal
from cosa_fast.run.log import MeanMetrics

CLASSES = 5  # of the tiny data set
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
# On a GPU both phases reach replays of their captured step: three ordinary steps, the capture, two more.
PHASE = WARM_UP + 3 if torch.cuda.is_available() else 2
BOTH = (f"optim.cotrain_after={PHASE}", f"optim.iterations={10 * PHASE}", "optim.lr=1e-4", "optim.warmup=0")
EXACT = ("run.precision=fp32", "run.tf32=false", "run.compile=off")


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """no_synchronisation(): from here to the end of the test, waiting for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def run(engine: EngineBase, batches: list[Batch], steps: int) -> list[dict[str, Tensor]]:
    """Metrics of the next steps; a captured step overwrites those of the last one."""
    start = engine.iteration
    on_device = [batch.to(engine.device) for batch in batches]
    found = []
    for iteration in range(start, start + steps):
        metrics = engine.step(on_device[iteration % len(batches)])
        found.append({name: value.clone() for name, value in metrics.items()})
    engine.check()
    return found


def assert_alike(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], rtol: float) -> None:
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.keys() == b.keys()
        for name in ("loss", "cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc", "lr"):
            if name in b:
                difference = float((a[name].double().cpu() - b[name].double().cpu()).abs())
                assert difference <= rtol * float(b[name].abs()) + rtol / 10, (step, name, a[name], b[name])


def weights(engine: EngineBase) -> Tensor:
    return torch.cat([p.detach().flatten() for n in (engine.on.master, engine.an.master) for p in n.parameters()])


def is_captured(engine: FusedEngine) -> bool:
    return engine._captured is not None and engine._captured.captured


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", [[], ["loss.energy=1.0"], ["optim.accumulate=2"], ["teacher.attention=packed"]])
def test_single_precision_follows_the_plain_engine(
    device: str, recipe: list[str], make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    config = make_config(*BOTH, *EXACT, *recipe)
    plain, fused = (kind(config, CLASSES, torch.device(device)) for kind in (Engine, FusedEngine))
    steps = 2 * PHASE
    expected, found = (run(engine, batches, steps) for engine in (plain, fused))
    assert_alike(found, expected, 1e-4)
    assert (weights(fused) - weights(plain)).norm() / weights(plain).norm() < 1e-4
    assert is_captured(fused) == (device == "cuda")


@pytest.mark.parametrize(
    "kind",
    [
        "flash",
        "packed",
        *(pytest.param(k, marks=[pytest.mark.gpu, NO_GPU]) for k in ("cudnn", "efficient", "varlen", "xformers")),
    ],
)
def test_networks_learn_alike_by_every_kernel(
    kind: str, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    """Captured as well, where there is a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)
    if (reason := refusal(kind, device, dtype)) is not None:
        pytest.skip(reason)
    engines = [
        FusedEngine(
            make_config(
                *BOTH, *EXACT, f"run.precision={precision}", f"model.attention={name}", f"teacher.attention={name}"
            ),
            CLASSES,
            device,
        )
        for name in ("sdpa", kind)
    ]
    assert engines[1].attentions == (kind, kind)
    expected, found = (run(engine, batches, 2 * PHASE) for engine in engines)
    assert_alike(found, expected, 1e-4 if device.type == "cpu" else 0.05)


@pytest.mark.parametrize("engine", [Engine, FusedEngine])
@pytest.mark.parametrize("key", ["model", "teacher"])
def test_a_kernel_that_cannot_run_ends_the_run_before_weights_are_read(
    key: str, engine: type[EngineBase], make_config: Callable[..., Config]
) -> None:
    config = make_config(f"{key}.attention=cudnn", "model.weights=/nowhere.pth")
    with pytest.raises(UserError, match=f"^{key}.attention=cudnn: needs a GPU, .*; set it to auto or sdpa$"):
        engine(config, CLASSES, torch.device("cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_random_layers_follow_the_seed_of_the_step(
    device: str, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    config = make_config(*BOTH, *EXACT, "model.arguments.drop_path_rate=0.5")
    plain, fused = (kind(config, CLASSES, torch.device(device)) for kind in (Engine, FusedEngine))
    # One batch, over and over: without new random numbers a replay would draw the same paths.
    expected, found = (run(engine, batches[:1], PHASE) for engine in (plain, fused))
    assert_alike(found, expected, 1e-4)
    assert len({round(float(metrics["cls"]), 6) for metrics in found}) == PHASE


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_engine_goes_on_as_one_that_never_stopped(
    device: str, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    config = make_config(*BOTH, *EXACT)
    first, second = (FusedEngine(config, CLASSES, torch.device(device)) for _ in range(2))
    run(first, batches, 2 * PHASE - 1)
    state = first.state_dict()
    second.load_state_dict(state)
    expected = run(first, batches, WARM_UP + 2)
    assert_alike(run(second, batches, WARM_UP + 2), expected, 1e-5)
    assert (weights(first) - weights(second)).norm() / weights(first).norm() < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_number_in_a_replay_changes_nothing(
    device: str, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    engine = FusedEngine(make_config(*BOTH, *EXACT), CLASSES, torch.device(device))
    run(engine, batches, 2 * PHASE - 1)
    before, xi = weights(engine).clone(), [value.clone() for value in engine.threshold_values]
    bad = batches[0].map(torch.clone).to(engine.device)
    bad.strong[0, 0, 3, 3] = float("nan")
    engine.step(bad)
    engine.step(batches[1].to(engine.device))
    with pytest.raises(NonFiniteLoss, match=f"iteration {2 * PHASE - 1}: cls is not finite"):
        engine.check()
    assert torch.equal(weights(engine), before)
    assert all(torch.equal(a, b) for a, b in zip(engine.threshold_values, xi, strict=True))
    run(engine, batches, 2)
    assert not torch.equal(weights(engine), before)


@pytest.mark.parametrize("recipe", [[], ["loss.energy=1.0"], ["optim.accumulate=2"], ["teacher.attention=packed"]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.gpu
@NO_GPU
def test_no_step_between_log_points_waits_for_the_device(
    precision: str, recipe: list[str], make_config: Callable[..., Config], batches: list[Batch],
    no_synchronisation: Callable[[], None],
) -> None:  # fmt: skip
    overrides = [f"run.precision={precision}", "run.compile=off", *recipe]
    metrics = MeanMetrics()
    for cotrain_after in (0, 100):
        config = make_config("optim.iterations=200", f"optim.cotrain_after={cotrain_after}", *overrides)
        engine = FusedEngine(config, CLASSES, torch.device("cuda"))
        run(engine, batches, WARM_UP + 1)
        assert is_captured(engine)
        ready = [batch.to("cuda") for batch in batches]
        no_synchronisation()
        for batch in [*ready, *batches]:  # from the device, and from the host's memory
            metrics.update(engine.step(batch.to("cuda")))
        torch.cuda.set_sync_debug_mode("default")
        engine.check()


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_step_gives_what_the_ordinary_one_gives(
    precision: str, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    found = {}
    for choice in ("auto", "off"):
        config = make_config(*BOTH, *EXACT, f"run.precision={precision}", f"run.capture={choice}")
        engine = FusedEngine(config, CLASSES, torch.device("cuda"))
        found[choice] = run(engine, batches, 2 * PHASE)
        assert is_captured(engine) == (choice == "auto")
    assert_alike(found["auto"], found["off"], 1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.gpu
@NO_GPU
def test_compiled_blocks_give_what_eager_ones_give(make_config: Callable[..., Config], batches: list[Batch]) -> None:
    found = {}
    for compiled in ("on", "off"):
        config = make_config(*BOTH, "run.precision=bf16", f"run.compile={compiled}")
        found[compiled] = run(FusedEngine(config, CLASSES, torch.device("cuda")), batches, 2 * PHASE)
    assert_alike(found["on"], found["off"], 0.05)


@pytest.mark.gpu
@NO_GPU
def test_the_first_phase_leaves_no_graph_behind(make_config: Callable[..., Config], batches: list[Batch]) -> None:
    engine = FusedEngine(make_config(*BOTH, *EXACT), CLASSES, torch.device("cuda"))
    run(engine, batches, PHASE)
    assert engine._captured is not None
    graph = weakref.ref(engine._captured)
    run(engine, batches, 1)
    gc.collect()
    assert graph() is None


def test_what_needs_the_host_is_not_captured(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    assert captures(make_config(), cuda)
    assert not captures(make_config(), torch.device("cpu"))
    for override in (
        "run.capture=off", "run.backend=reference", "loss.guidance=noise", "model.checkpoint_blocks=true",
    ):  # fmt: skip
        assert not captures(make_config(override), cuda), override
        assert left_out(make_config(override), cuda) == override
        assert left_out(make_config(override), torch.device("cpu")) is None
    monkeypatch.setattr(capture, "HAS_TRITON", False)
    assert not captures(make_config(), cuda)
