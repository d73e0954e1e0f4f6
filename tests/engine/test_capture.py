"""Steps that cannot be captured, and what a captured one holds, with a stand-in for CUDA's streams and graphs: what of
it can be tested without a GPU."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cosa_fast import distributed
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine import fused
from cosa_fast.engine.capture import WARM_UP
from cosa_fast.engine.fused import FusedEngine

CLASSES = 5  # of the tiny data set
CPU = torch.device("cpu")
Same = Callable[[object, object], bool]


@dataclass
class Pretended:
    """What was asked of CUDA: the mode in which waiting is an error, and whether a capture works."""

    mode: str = "default"
    capture_fails: bool = False
    asked: list[str] = field(default_factory=list)


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Nothing runs beside anything here."""


class _Graph:
    def replay(self) -> None:
        """Would run the kernels again."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    found = Pretended()

    def set_mode(mode: Any) -> None:
        found.mode = mode

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        try:
            if found.capture_fails:
                raise ValueError("cannot copy from pageable memory while capturing\nmore of it")
            yield
        finally:
            if found.capture_fails:  # as torch: its end then fails too, with another error
                raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "Stream": lambda *_: _Stream(), "current_stream": _Stream, "stream": lambda _: nullcontext(), "graph": graph,
        "CUDAGraph": _Graph, "get_sync_debug_mode": lambda: found.mode, "set_sync_debug_mode": set_mode,
        "synchronize": lambda *_: found.asked.append("synchronize"), "max_memory_allocated": lambda *_: 7,
        "current_device": lambda: 0, "default_generators": [torch.default_generator],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(fused, "captures", lambda *_: True)
    monkeypatch.setattr("cosa_fast.engine.capture._clean_up_after_a_failed_capture", lambda _: None)
    return found


def learned(engine: FusedEngine, batches: list[Batch], steps: int) -> dict[str, Any]:
    """The state after so many steps; no metric is kept."""
    for step in range(steps):
        engine.step(batches[step % len(batches)])
    engine.check()
    return engine.state_dict()


@pytest.mark.parametrize("fault", ["waits", "fails"])
def test_what_cannot_be_captured_goes_on_uncaptured_and_says_why_once(
    fault: str, cuda: Pretended, make_config: Callable[..., Config], batches: list[Batch], same: Same,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = make_config("optim.cotrain_after=2", "optim.iterations=60", "model.arguments.drop_path_rate=0.5")
    engine = FusedEngine(config, CLASSES, CPU)
    cuda.capture_fails = fault == "fails"
    total = engine.objective.total

    def waiting(terms: Any) -> Any:  # after AN, the thresholds' update and ON
        if fault == "waits" and cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return total(terms)

    monkeypatch.setattr(engine.objective, "total", waiting)
    with caplog.at_level(logging.WARNING):
        found = learned(engine, batches, 2 + 2 * WARM_UP)
    monkeypatch.setattr(fused, "captures", lambda *_: False)
    assert same(found, learned(FusedEngine(config, CLASSES, CPU), batches, 2 + 2 * WARM_UP))
    assert cuda.mode == "default"
    assert (
        engine.not_captured
        == {
            "waits": f"a step waits for the device (test_capture.py:{waiting.__code__.co_firstlineno + 2})",
            "fails": "cannot copy from pageable memory while capturing",
        }[fault]
    )
    (record,) = [record for record in caplog.records if "captured" in record.message]
    assert engine.not_captured in record.message
    assert "\n" not in record.message


def test_an_error_that_has_nothing_to_do_with_the_capture_passes_through(
    cuda: Pretended, make_config: Callable[..., Config], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FusedEngine(make_config(), CLASSES, CPU)
    monkeypatch.setattr(engine.objective, "total", lambda _: [][0])
    with pytest.raises(IndexError):
        learned(engine, batches, WARM_UP)
    assert cuda.mode == "default"


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nothing refers to is freed: a cycle stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("how", ["release", "del", "phase", "load"])
def test_the_graph_goes_at_once(
    how: str, cuda: Pretended, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    """Not when a collector comes by: its collective operations must not outlive the process group."""
    engine = FusedEngine(make_config(f"optim.cotrain_after={WARM_UP + 1}", "optim.iterations=60"), CLASSES, CPU)
    state = learned(engine, batches, WARM_UP + 1)
    assert engine._captured is not None
    assert engine.replayed_peak == 7
    graph = weakref.ref(engine._captured._graph)
    assert isinstance(graph(), _Graph)
    if how == "release":
        engine.release()
    elif how == "del":
        del engine
    elif how == "phase":
        learned(engine, batches, 1)
    else:
        engine.load_state_dict(state)
    assert graph() is None
    assert ("synchronize" in cuda.asked) == (how != "del")


def test_graphs_go_before_their_process_group(
    cuda: Pretended, make_config: Callable[..., Config], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FusedEngine(make_config("optim.cotrain_after=60", "optim.iterations=60"), CLASSES, CPU)
    learned(engine, batches, WARM_UP + 1)
    held: list[object] = []
    monkeypatch.setattr(distributed, "_meet", lambda *_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: held.append(engine._captured))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with distributed.ranks_of_launch("cpu"):
        assert engine._captured is not None
    assert held == [None]
    assert cuda.asked == ["synchronize"]
