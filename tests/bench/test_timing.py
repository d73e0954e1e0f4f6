"""The clocks: what they count, what they leave out, and how often they look."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import timing


def test_quantiles_lie_between_the_nearest_values() -> None:
    assert timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (pytest.approx(1.8), 3.0, pytest.approx(4.2))
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)


class FakeTime:
    """A clock that a run advances; the time outside runs does not count."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self.runs, self._seconds = 0.0, 0, seconds

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.runs += 1
        self.now += next(self._seconds)


def test_the_warm_up_is_not_counted_and_the_budget_is_kept() -> None:
    # Warm-up of 9 s, estimate of 2 ms, then runs of 1 and 3 ms in turn.
    fake = FakeTime(itertools.chain([9.0, 0.002], itertools.cycle([0.001, 0.003])))
    found = timing.time_run(fake.run, timing.HostClock(fake), budget_ms=20.0)
    assert fake.runs == 12
    assert found.repetitions == 10
    assert (found.ms, found.ms_20, found.ms_80) == (pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0))


@pytest.mark.parametrize(("seconds", "repetitions"), [(1.0, timing.FEWEST), (1e-9, timing.MOST)])
def test_repetitions_have_bounds(seconds: float, repetitions: int) -> None:
    fake = FakeTime(itertools.repeat(seconds))
    assert timing.time_run(fake.run, timing.HostClock(fake), 10.0).repetitions == repetitions


def test_extra_memory_is_what_a_run_holds_at_once() -> None:
    def run() -> None:
        first = torch.ones(1000)  # 4000 bytes
        second = first * 2
        del first
        torch.ones(250)
        del second

    assert 8000 <= timing.extra_memory(run, torch.device("cpu")) < 8100  # numbers become small tensors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnCuda:
    """What only a CUDA device can show."""

    def test_a_replay_computes_what_the_run_does_after_its_memory_could_be_reused(self) -> None:
        values, found = torch.arange(1000.0, device="cuda"), torch.empty(1000, device="cuda")

        def prepare() -> Any:
            kept = values * 2  # nobody else holds it
            return lambda: found.copy_(kept + 1)

        replay = timing.captured(prepare)
        found.zero_()
        torch.cuda.empty_cache()
        other = [torch.full((1000,), torch.nan, device="cuda") for _ in range(100)]
        replay()
        assert torch.equal(found, values * 2 + 1)
        assert len(other) == 100

    def test_a_run_that_waits_for_the_device_is_refused_and_the_next_is_captured(self) -> None:
        values = torch.ones(10, device="cuda")
        with pytest.raises(timing.NotCaptured, match="synchronizing"):
            timing.captured(lambda: lambda: values.sum().item())
        timing.captured(lambda: lambda: values.add_(1))()
        torch.cuda.synchronize()
