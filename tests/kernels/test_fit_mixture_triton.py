"""The fit_mixture kernel against the fit in numpy that defines it."""

import sys

import numpy as np
import pytest
import torch
from kernel_support import assert_fullgraph, assert_no_copies, layouts
from numpy.typing import NDArray
from torch import Tensor

from cosa_fast.kernels import fit_mixture, histogram
from cosa_fast.kernels.fit_mixture import _fit_mixture, _run
from cosa_fast.kernels.reference import mixture

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
SHAPES: dict[str, Array] = {
    "separated": np.concatenate([RNG.normal(0.2, 0.05, 20000), RNG.normal(0.75, 0.1, 8000)]),
    "skewed": np.concatenate([RNG.beta(1, 6, 30000), RNG.beta(6, 2, 10000)]),
    "decay and plateau": np.concatenate([RNG.exponential(0.12, 30000), RNG.uniform(0.4, 1, 9000)]),
    "spike at zero": np.concatenate([np.zeros(50000), RNG.normal(0.3, 0.08, 9000), RNG.normal(0.8, 0.08, 6000)]),
    "foreground wider": np.concatenate([RNG.normal(0.15, 0.03, 9000), RNG.normal(0.5, 0.2, 20000)]),
    "swapped order": np.concatenate([RNG.normal(0.5, 0.2, 9000), RNG.normal(0.55, 0.02, 20000)]),
}
SLOW = np.concatenate([RNG.normal(0.3, 0.12, 20000), RNG.normal(0.6, 0.15, 8000)])  # overlapping: some 40 turns


def counts_of(samples: Array, device: torch.device | str = "cpu", bins: int = 256) -> Tensor:
    return histogram(torch.tensor(samples.clip(0, 1)), None, bins).to(device)


def assert_agrees(counts: Tensor, state: Tensor | None = None, **parameters: object) -> Tensor:
    """Threshold and state agree with the definition within 1e-6; returns the new state."""
    threshold, found = fit_mixture(counts, state, backend="triton", **parameters)  # type: ignore[arg-type]
    wanted, expected = fit_mixture(counts, state, backend="reference", **parameters)  # type: ignore[arg-type]
    assert found.dtype == threshold.dtype == torch.float32
    assert found.isfinite().all()
    assert threshold == found[0]
    torch.testing.assert_close(threshold, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_definition_cold_and_warm(kernel_device: torch.device, shape: str) -> None:
    counts = counts_of(SHAPES[shape], kernel_device)
    state = assert_agrees(counts, clamp=(0.01, 0.99))
    assert state[1] > 0
    assert_agrees(counts, state, clamp=(0.01, 0.99))


@pytest.mark.parametrize("bins", [2, 7, 64, 1000])
def test_any_number_of_bins(kernel_device: torch.device, bins: int) -> None:
    assert_agrees(counts_of(SHAPES["spike at zero"], kernel_device, bins))


def test_slow_convergence_of_overlapping_components(kernel_device: torch.device) -> None:
    assert_agrees(counts_of(SLOW, kernel_device, 64))


def test_fits_that_run_out_of_turns_end_where_the_definition_ends(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (mixture, sys.modules[_run.__module__]):
        monkeypatch.setattr(module, "MAX_ITERATIONS", 4)
    stale = torch.tensor([0.5, 0.5, 0.74, 0.76, 1e-2, 1e-2], device=kernel_device)
    for previous in (None, stale):
        assert_agrees(counts_of(SLOW, kernel_device, 64), previous)


@pytest.mark.parametrize("seed", range(6))
def test_random_sparse_histograms_in_a_chain_of_states(kernel_device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = None
    for _ in range(2):
        sparse = torch.rand(40, generator=generator) < 0.2
        counts = (torch.rand(40, generator=generator) * 10 ** (seed % 7)).floor() * sparse
        state = assert_agrees(counts.to(kernel_device), state)


def test_a_misleading_warm_start_is_left_for_the_likelier_fit(kernel_device: torch.device) -> None:
    counts = counts_of(SHAPES["separated"], kernel_device)
    stale = torch.tensor([0.5, 0.5, 0.74, 0.76, 1e-2, 1e-2], device=kernel_device)
    state = assert_agrees(counts, stale)
    torch.testing.assert_close(state[1:], fit_mixture(counts)[1][1:], atol=1e-4, rtol=0)


def test_smoothing_mixes_with_the_previous_threshold_only_after_a_fit(kernel_device: torch.device) -> None:
    counts = counts_of(SHAPES["spike at zero"], kernel_device, 64)
    fitted = torch.tensor([0.3, 0.4, 0.3, 0.8, 6e-3, 6e-3], device=kernel_device)
    fresh = assert_agrees(counts, None, smoothing=0.75)[0]
    torch.testing.assert_close(assert_agrees(counts, fitted, smoothing=0.75)[0], 0.25 * fresh + 0.75 * 0.3)
    unfitted = torch.tensor([0.3, 0.0, 0.0, 0.0, 0.0, 0.0], device=kernel_device)
    torch.testing.assert_close(assert_agrees(counts, unfitted, smoothing=0.75)[0], fresh)
    assert_agrees(counts, fitted, smoothing=0.0)


@pytest.mark.parametrize(("clamp", "wanted"), [((0.7, 0.9), 0.7), ((0.1, 0.3), 0.3), ((0.4, 0.4), 0.4)])
def test_threshold_stays_inside_the_clamp(
    kernel_device: torch.device, clamp: tuple[float, float], wanted: float
) -> None:
    counts = counts_of(SHAPES["spike at zero"], kernel_device, 64)
    previous = torch.tensor([0.95, 0.4, 0.3, 0.8, 6e-3, 6e-3], device=kernel_device)
    for state in (None, previous):
        assert float(assert_agrees(counts, state, clamp=clamp, smoothing=0.0)[0]) == pytest.approx(wanted)


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.25, 0.45, 0.9999])
def test_bins_at_or_below_the_floor_take_no_part(kernel_device: torch.device, floor: float) -> None:
    counts = torch.tensor([90.0, 50, 9, 1, 2, 7, 20, 40, 7, 0], device=kernel_device)  # centres 0.05, 0.15, ...
    used = counts.clone()
    used[: round(floor * 10 + 0.01) + (floor in (0.05, 0.25, 0.45))] = torch.nan  # must not be read as samples
    assert_agrees(counts, floor=floor)
    assert_agrees(used, floor=floor)


def only(*filled: int, value: float = 1000.0) -> Tensor:
    counts = torch.zeros(256)
    counts[list(filled)] = value
    return counts


@pytest.mark.parametrize("degenerate", [
    torch.zeros(256),
    only(130),
    only(255),
    only(0, 5, 11),  # everything at or below the floor
    only(3, 200),  # one-sided: one bin above the floor
    only(40, 200, value=torch.nan),
    only(40, 200, value=torch.inf),
    only(40, 41) + 1e9 * only(200),  # a component without mass
], ids=["empty", "one", "last", "floor", "one-sided", "nan", "inf", "no mass"])  # fmt: skip
def test_no_mixture_keeps_the_previous_threshold_or_the_middle(
    kernel_device: torch.device, degenerate: Tensor, poisoned: None
) -> None:
    degenerate = degenerate.to(kernel_device)
    assert float(assert_agrees(degenerate, clamp=(0.2, 0.8))[0]) == pytest.approx(0.5)
    fitted = torch.tensor([0.61, 0.3, 0.25, 0.75, 0.01, 0.02], device=kernel_device)
    assert torch.equal(assert_agrees(degenerate, fitted, clamp=(0.2, 0.8)), fitted)


def test_two_filled_bins_split_between_them(kernel_device: torch.device) -> None:
    state = assert_agrees(only(64, 192).to(kernel_device))
    assert float(state[0]) == pytest.approx(128.5 / 256, abs=1e-3)


def test_the_previous_state_is_not_written(kernel_device: torch.device) -> None:
    state = torch.tensor([0.61, 0.3, 0.25, 0.75, 0.01, 0.02], device=kernel_device)
    copy = state.clone()
    threshold, following = fit_mixture(torch.zeros(256, device=kernel_device), state, backend="triton")
    threshold += 1
    following += 1
    assert torch.equal(state, copy)
    assert following[0] == copy[0] + 1


def test_any_type_and_stride_of_counts_is_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    counts = only(64, 65, 192).to(kernel_device)
    expected = fit_mixture(counts, backend="triton")[1]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        typed = counts.to(dtype)  # 1000 is exact in all of them
        assert torch.equal(fit_mixture(typed, backend="triton")[1], expected)
    state = torch.tensor([0.61, 0.3, 0.25, 0.75, 0.01, 0.02], device=kernel_device)
    for name, view in layouts(counts):
        assert torch.equal(fit_mixture(view, backend="triton")[1], expected), name
        out = torch.empty(6, device=kernel_device)
        for previous in (None, state):
            assert_no_copies(
                lambda view=view, previous=previous, out=out: _run(view, previous, 0.05, 0.2, 0.9, 0.9, out[0], out)
            )
    for name, view in layouts(state):
        found = fit_mixture(counts, view, backend="triton")[1]
        assert torch.equal(found, fit_mixture(counts, state, backend="triton")[1]), name


def test_far_bins_are_addressed(kernel_device: torch.device) -> None:
    counts = only(64, 65, 192).bfloat16().to(kernel_device)
    stride = 2**31 // 190
    memory = torch.empty(255 * stride + 1, dtype=torch.bfloat16, device=kernel_device)
    far = memory.as_strided((256,), (stride,)).copy_(counts)
    assert torch.equal(fit_mixture(far, backend="triton")[1], fit_mixture(counts, backend="triton")[1])


def test_registration_and_repeatability(kernel_device: torch.device) -> None:
    counts = only(64, 65, 192).to(kernel_device)
    _, state = fit_mixture(counts, backend="triton")
    torch.library.opcheck(_fit_mixture, (counts, None, 0.05, 0.2, 0.9, 0.9))
    torch.library.opcheck(_fit_mixture, (counts, state, 0.05, 0.2, 0.9, 0.9))
    assert_fullgraph(lambda c, s: fit_mixture(c, s, backend="triton"), counts, state)
