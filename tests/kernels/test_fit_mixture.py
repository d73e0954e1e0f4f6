"""fit_mixture: the definition against the likeliest mixture, the kernel against the definition; degenerate
histograms."""

import sys

import numpy as np
import pytest
import torch
from kernel_support import assert_fullgraph, assert_no_copies, layouts
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import norm
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cosa_fast.kernels import fit_mixture, histogram
from cosa_fast.kernels.fit_mixture import _fit_mixture, _run
from cosa_fast.kernels.reference import mixture
from cosa_fast.kernels.reference.mixture import fit, split

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
SHAPES: dict[str, Array] = {
    "separated": np.concatenate([RNG.normal(0.2, 0.05, 20000), RNG.normal(0.75, 0.1, 8000)]),
    "overlapping": np.concatenate([RNG.normal(0.3, 0.12, 20000), RNG.normal(0.6, 0.15, 8000)]),  # some 40 turns
    "skewed": np.concatenate([RNG.beta(1, 6, 30000), RNG.beta(6, 2, 10000)]),
    "decay and plateau": np.concatenate([RNG.exponential(0.12, 30000), RNG.uniform(0.4, 1, 9000)]),
    "spike at zero": np.concatenate([np.zeros(50000), RNG.normal(0.3, 0.08, 9000), RNG.normal(0.8, 0.08, 6000)]),
    "foreground wider": np.concatenate([RNG.normal(0.15, 0.03, 9000), RNG.normal(0.5, 0.2, 20000)]),
    "swapped order": np.concatenate([RNG.normal(0.5, 0.2, 9000), RNG.normal(0.55, 0.02, 20000)]),
}
FITTED = (0.61, 0.3, 0.25, 0.75, 0.01, 0.02)


def counts_of(shape: str, device: torch.device | str = "cpu", bins: int = 256) -> Tensor:
    return histogram(torch.tensor(SHAPES[shape].clip(0, 1)), None, bins).to(device)


def only(*filled: int, value: float = 1000.0) -> Tensor:
    counts = torch.zeros(256)
    counts[list(filled)] = value
    return counts


def state_of(device: torch.device, *values: float) -> Tensor:
    return torch.tensor(values, device=device)


def assert_agrees(counts: Tensor, state: Tensor | None = None, **parameters: object) -> Tensor:
    """Threshold and state of the kernel agree with the definition within 1e-6; returns the new state."""
    threshold, found = fit_mixture(counts, state, backend="triton", **parameters)  # type: ignore[arg-type]
    wanted, expected = fit_mixture(counts, state, backend="reference", **parameters)  # type: ignore[arg-type]
    assert found.dtype == threshold.dtype == torch.float32
    assert found.isfinite().all()
    assert threshold == found[0]
    torch.testing.assert_close(threshold, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    return found


# --- the definition ------------------------------------------------------------------------------------------------


def best_split(samples: Array) -> float:
    """Eq. 6 on the raw samples above the floor, with the likeliest mixture: scikit-learn's, which would take thousands
    of iterations to converge, and then a general optimiser's."""
    samples = np.sort(samples.clip(0, 1)[samples > 0.05])
    model = GaussianMixture(2, tol=1e-4, random_state=0).fit(samples[:, None])
    order = np.argsort(model.means_[:, 0])
    odds = np.log(model.weights_[order[1]] / model.weights_[order[0]])
    start = np.array([odds, *model.means_[order, 0], *np.log(model.covariances_[order, 0, 0])])

    def densities(parameters: Array) -> tuple[Array, Array]:
        odds, mean0, mean1, variance0, variance1 = parameters
        background = norm.logpdf(samples, mean0, np.exp(variance0 / 2)) - np.logaddexp(0, odds)
        return background, norm.logpdf(samples, mean1, np.exp(variance1 / 2)) - np.logaddexp(0, -odds)

    found = minimize(lambda parameters: -np.logaddexp(*densities(parameters)).mean(), start, method="BFGS", tol=1e-7)
    background, foreground = densities(found.x)
    first = int(np.argmax(np.cumsum((foreground - background)[::-1])[::-1]))
    return float(samples[first - 1 : first + 1].mean())


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "swapped order"])
def test_threshold_is_the_likelihood_split_of_the_likeliest_mixture(shape: str) -> None:
    threshold, _ = fit_mixture(counts_of(shape), clamp=(0.01, 0.99))
    assert threshold.item() == pytest.approx(best_split(SHAPES[shape]), abs=1e-3)


def test_state_holds_the_parameters_of_the_mixture() -> None:
    _, state = fit_mixture(counts_of("separated"))
    wanted = torch.tensor([8000 / 28000, 0.2, 0.75, 0.05**2, 0.1**2])
    torch.testing.assert_close(state[1:], wanted, rtol=0.03, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_start_stays_at_the_converged_fit(shape: str) -> None:
    threshold, state = fit_mixture(counts_of(shape))
    again, _ = fit_mixture(counts_of(shape), state)
    torch.testing.assert_close(again, threshold, atol=1e-5, rtol=0)


def test_split_in_a_gap_is_where_the_components_cross() -> None:
    samples = np.concatenate([RNG.normal(0.2, 0.02, 4000), RNG.normal(0.8, 0.02, 4000)])
    threshold, _ = fit_mixture(histogram(torch.tensor(samples), None))
    assert threshold.item() == pytest.approx(0.5, abs=0.02)


def test_split_maximises_the_likelihood_over_all_edges() -> None:
    counts = counts_of("decay and plateau").double().numpy()
    fitted = fit(counts, 0.05)
    assert fitted is not None
    threshold = split(counts, 0.05, fitted)
    assert threshold is not None
    centres = (np.arange(256) + 0.5) / 256
    weight, *parameters = fitted
    background = np.log(1 - weight) + norm.logpdf(centres, parameters[0], parameters[2] ** 0.5)
    foreground = np.log(weight) + norm.logpdf(centres, parameters[1], parameters[3] ** 0.5)
    used = counts * (centres > 0.05)
    values = [used[:k] @ background[:k] + used[k:] @ foreground[k:] for k in range(257)]
    assert abs(threshold - int(np.argmax(values)) / 256) <= 1 / 256


@pytest.mark.parametrize("seed", range(20))
def test_any_histogram_gives_a_finite_threshold_inside_the_clamp(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = None
    for _ in range(3):
        sparse = torch.rand(256, generator=generator) < torch.rand((), generator=generator) ** 3
        counts = (torch.rand(256, generator=generator) * 10 ** (seed % 7)).floor() * sparse
        threshold, state = fit_mixture(counts, state)
        assert state.isfinite().all()
        assert 0.2 - 1e-6 <= threshold.item() <= 0.9 + 1e-6


def test_overlapping_components_take_tens_of_turns_not_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    step = mixture._step
    monkeypatch.setattr(mixture, "_step", lambda *arguments: steps.append(0) or step(*arguments))
    fit_mixture(counts_of("overlapping"))
    assert 10 < len(steps) < 150


# --- the kernel against it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["separated", "spike at zero", "swapped order"])
def test_agrees_with_the_definition_cold_and_warm(kernel_device: torch.device, shape: str) -> None:
    counts = counts_of(shape, kernel_device)
    state = assert_agrees(counts, clamp=(0.01, 0.99))
    assert state[1] > 0
    assert_agrees(counts, state, clamp=(0.01, 0.99))


@pytest.mark.parametrize("bins", [2, 7, 1000])
def test_any_number_of_bins(kernel_device: torch.device, bins: int) -> None:
    assert_agrees(counts_of("spike at zero", kernel_device, bins))


def test_slow_convergence_of_overlapping_components(kernel_device: torch.device) -> None:
    assert_agrees(counts_of("overlapping", kernel_device, 64))


def test_fits_that_run_out_of_turns_end_where_the_definition_ends(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (mixture, sys.modules[_run.__module__]):
        monkeypatch.setattr(module, "MAX_ITERATIONS", 4)
    for previous in (None, state_of(kernel_device, 0.5, 0.5, 0.74, 0.76, 1e-2, 1e-2)):
        assert_agrees(counts_of("overlapping", kernel_device, 64), previous)


@pytest.mark.parametrize("seed", range(3))
def test_random_sparse_histograms_in_a_chain_of_states(kernel_device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = None
    for _ in range(2):
        sparse = torch.rand(40, generator=generator) < 0.2
        counts = (torch.rand(40, generator=generator) * 10 ** (3 * seed)).floor() * sparse
        state = assert_agrees(counts.to(kernel_device), state)


def test_a_misleading_warm_start_is_left_for_the_likelier_fit(kernel_device: torch.device) -> None:
    counts = counts_of("separated", kernel_device)
    state = assert_agrees(counts, state_of(kernel_device, 0.5, 0.5, 0.74, 0.76, 1e-2, 1e-2))
    torch.testing.assert_close(state[1:], fit_mixture(counts)[1][1:], atol=1e-4, rtol=0)


def test_smoothing_mixes_with_the_previous_threshold_only_after_a_fit(kernel_device: torch.device) -> None:
    counts = counts_of("spike at zero", kernel_device, 64)
    fitted = state_of(kernel_device, 0.3, 0.4, 0.3, 0.8, 6e-3, 6e-3)
    fresh = assert_agrees(counts, None, smoothing=0.75)[0]
    torch.testing.assert_close(assert_agrees(counts, fitted, smoothing=0.75)[0], 0.25 * fresh + 0.75 * 0.3)
    unfitted = state_of(kernel_device, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0)
    torch.testing.assert_close(assert_agrees(counts, unfitted, smoothing=0.75)[0], fresh)
    assert_agrees(counts, fitted, smoothing=0.0)


@pytest.mark.parametrize(("clamp", "wanted"), [((0.7, 0.9), 0.7), ((0.1, 0.3), 0.3), ((0.4, 0.4), 0.4)])
def test_threshold_stays_inside_the_clamp(
    kernel_device: torch.device, clamp: tuple[float, float], wanted: float
) -> None:
    counts = counts_of("spike at zero", kernel_device, 64)
    for state in (None, state_of(kernel_device, 0.95, 0.4, 0.3, 0.8, 6e-3, 6e-3)):
        assert float(assert_agrees(counts, state, clamp=clamp, smoothing=0.0)[0]) == pytest.approx(wanted)


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.45, 0.9999])
def test_bins_at_or_below_the_floor_take_no_part(kernel_device: torch.device, floor: float) -> None:
    counts = torch.tensor([90.0, 50, 9, 1, 2, 7, 20, 40, 7, 0], device=kernel_device)  # centres 0.05, 0.15, ...
    expected = assert_agrees(counts, floor=floor)
    below = sum((index + 0.5) / 10 <= floor for index in range(10))
    assert below == {0.0: 0, 0.05: 1, 0.45: 5, 0.9999: 10}[floor]
    counts[:below] = torch.nan  # must not be read as samples
    assert torch.equal(fit_mixture(counts, floor=floor, backend="triton")[1], expected)
    torch.testing.assert_close(fit_mixture(counts, floor=floor)[1], expected, atol=1e-6, rtol=0)


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
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # ∞ − ∞ in NumPy
def test_no_mixture_keeps_the_previous_threshold_or_the_middle(
    kernel_device: torch.device, degenerate: Tensor, poisoned: None
) -> None:
    degenerate = degenerate.to(kernel_device)
    assert float(assert_agrees(degenerate, clamp=(0.2, 0.8))[0]) == pytest.approx(0.5)
    fitted = state_of(kernel_device, *FITTED)
    assert torch.equal(assert_agrees(degenerate, fitted, clamp=(0.2, 0.8)), fitted)


def test_two_filled_bins_split_between_them(kernel_device: torch.device) -> None:
    state = assert_agrees(only(64, 192).to(kernel_device))
    assert float(state[0]) == pytest.approx(128.5 / 256, abs=1e-3)
    assert state[4:].min() > 0


def test_outputs_share_no_memory_with_the_previous_state_or_each_other(
    kernel_device: torch.device, backend: str
) -> None:
    state = state_of(kernel_device, *FITTED)
    threshold, following = fit_mixture(torch.zeros(256, device=kernel_device), state, backend=backend)
    threshold += 1
    following += 1
    assert torch.equal(state, state_of(kernel_device, *FITTED))
    assert following[0] == state[0] + 1


def test_any_type_and_stride_of_counts_is_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    counts = only(64, 65, 192).to(kernel_device)
    expected = fit_mixture(counts, backend="triton")[1]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        typed = counts.to(dtype)  # 1000 is exact in all of them
        assert torch.equal(fit_mixture(typed, backend="triton")[1], expected)
    state = state_of(kernel_device, *FITTED)
    for name, view in layouts(counts):
        assert torch.equal(fit_mixture(view, backend="triton")[1], expected), name
        out = torch.empty(6, device=kernel_device)
        for previous in (None, state):
            assert_no_copies(
                lambda view=view, previous=previous, out=out: _run(view, previous, 0.05, 0.2, 0.9, 0.9, out[0], out)
            )
    following = fit_mixture(counts, state, backend="triton")[1]
    for name, view in layouts(state):
        assert torch.equal(fit_mixture(counts, view, backend="triton")[1], following), name


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
