"""histogram and fit_mixture: against scikit-learn run to convergence, and the degenerate histograms."""

import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cosa_fast.kernels import fit_mixture, histogram
from cosa_fast.kernels.reference.mixture import fit, split

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
SHAPES: dict[str, Array] = {
    "separated": np.concatenate([RNG.normal(0.2, 0.05, 20000), RNG.normal(0.75, 0.1, 8000)]),
    "overlapping": np.concatenate([RNG.normal(0.3, 0.12, 20000), RNG.normal(0.6, 0.15, 8000)]),
    "skewed": np.concatenate([RNG.beta(1, 6, 30000), RNG.beta(6, 2, 10000)]),
    "decay and plateau": np.concatenate([RNG.exponential(0.12, 30000), RNG.uniform(0.4, 1, 9000)]),
    "spike at zero": np.concatenate([np.zeros(50000), RNG.normal(0.3, 0.08, 9000), RNG.normal(0.8, 0.08, 6000)]),
    "foreground wider": np.concatenate([RNG.normal(0.15, 0.03, 9000), RNG.normal(0.5, 0.2, 20000)]),
}


def counts_of(samples: Array, bins: int = 256) -> Tensor:
    return histogram(torch.tensor(samples.clip(0, 1)), None, bins)


def converged_split(samples: Array) -> float:
    """Eq. 6 on the raw samples above the floor, with the mixture of scikit-learn run to convergence."""
    samples = np.sort(samples.clip(0, 1)[samples > 0.05])
    model = GaussianMixture(2, tol=1e-10, max_iter=5000, reg_covar=0, random_state=0).fit(samples[:, None])
    background, foreground = (
        np.log(model.weights_[k]) + norm.logpdf(samples, model.means_[k, 0], model.covariances_[k, 0, 0] ** 0.5)
        for k in np.argsort(model.means_[:, 0])
    )
    first = int(np.argmax(np.cumsum((foreground - background)[::-1])[::-1]))
    return float(samples[first - 1 : first + 1].mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_is_the_likelihood_split_of_the_converged_mixture(shape: str) -> None:
    threshold, _ = fit_mixture(counts_of(SHAPES[shape]), clamp=(0.01, 0.99))
    assert threshold.item() == pytest.approx(converged_split(SHAPES[shape]), abs=1e-3)


def test_state_holds_the_parameters_of_the_mixture() -> None:
    _, state = fit_mixture(counts_of(SHAPES["separated"]))
    wanted = torch.tensor([8000 / 28000, 0.2, 0.75, 0.05**2, 0.1**2])
    torch.testing.assert_close(state[1:], wanted, rtol=0.03, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_start_stays_at_the_converged_fit(shape: str) -> None:
    counts = counts_of(SHAPES[shape])
    threshold, state = fit_mixture(counts)
    again, _ = fit_mixture(counts, state)
    torch.testing.assert_close(again, threshold, atol=1e-5, rtol=0)


def test_a_misleading_warm_start_is_left_for_the_likelier_fit() -> None:
    counts = counts_of(SHAPES["separated"])
    stale = torch.tensor([0.5, 0.5, 0.74, 0.76, 1e-2, 1e-2])
    _, state = fit_mixture(counts, stale)
    torch.testing.assert_close(state[1:], fit_mixture(counts)[1][1:], atol=1e-4, rtol=0)


def test_split_in_a_gap_is_where_the_components_cross() -> None:
    counts = counts_of(np.concatenate([RNG.normal(0.2, 0.02, 4000), RNG.normal(0.8, 0.02, 4000)]))
    threshold, _ = fit_mixture(counts)
    assert threshold.item() == pytest.approx(0.5, abs=0.02)


def test_split_maximises_the_likelihood_over_all_edges() -> None:
    counts = counts_of(SHAPES["decay and plateau"]).double().numpy()
    mixture = fit(counts, 0.05)
    assert mixture is not None
    threshold = split(counts, 0.05, mixture)
    assert threshold is not None
    centres = (np.arange(256) + 0.5) / 256
    weight, *parameters = mixture
    background = np.log(1 - weight) + norm.logpdf(centres, parameters[0], parameters[2] ** 0.5)
    foreground = np.log(weight) + norm.logpdf(centres, parameters[1], parameters[3] ** 0.5)
    used = counts * (centres > 0.05)
    values = [used[:k] @ background[:k] + used[k:] @ foreground[k:] for k in range(257)]
    assert abs(threshold - int(np.argmax(values)) / 256) <= 1 / 256


def test_smoothing_mixes_with_the_previous_threshold_only_when_there_is_one() -> None:
    first, state = fit_mixture(counts_of(SHAPES["separated"]), smoothing=0.75)
    fresh, _ = fit_mixture(counts_of(SHAPES["overlapping"]), smoothing=0.75)
    mixed, _ = fit_mixture(counts_of(SHAPES["overlapping"]), state, smoothing=0.75)
    torch.testing.assert_close(mixed, 0.75 * first + 0.25 * fresh, atol=1e-5, rtol=0)
    _, unfitted = fit_mixture(torch.zeros(256))
    torch.testing.assert_close(fit_mixture(counts_of(SHAPES["overlapping"]), unfitted)[0], fresh)


@pytest.mark.parametrize(("clamp", "wanted"), [((0.7, 0.9), 0.7), ((0.1, 0.3), 0.3)])
def test_threshold_stays_inside_the_clamp(clamp: tuple[float, float], wanted: float) -> None:
    _, state = fit_mixture(counts_of(SHAPES["separated"]), clamp=(0.0, 1.0))
    for previous in (None, state):
        threshold, _ = fit_mixture(counts_of(SHAPES["separated"]), previous, clamp=clamp)
        assert threshold.item() == pytest.approx(wanted)


def only(*filled: int) -> Tensor:
    counts = torch.zeros(256)
    counts[list(filled)] = 1000
    return counts


@pytest.mark.parametrize("degenerate", [
    torch.zeros(256),
    only(255),
    only(130),
    only(0, 5, 11),  # everything at or below the floor
    only(3, 200),  # one-sided: one bin above the floor
    torch.full((256,), torch.nan),
    torch.full((256,), torch.inf),
], ids=["empty", "one", "middle", "floor", "one-sided", "nan", "inf"])  # fmt: skip
def test_no_mixture_keeps_the_previous_threshold_or_the_middle(degenerate: Tensor) -> None:
    threshold, state = fit_mixture(degenerate, clamp=(0.2, 0.8))
    assert threshold.item() == pytest.approx(0.5)
    assert state.isfinite().all()
    previous, fitted = fit_mixture(counts_of(SHAPES["overlapping"]), clamp=(0.2, 0.8))
    kept, unchanged = fit_mixture(degenerate, fitted, clamp=(0.2, 0.8))
    assert torch.equal(kept, previous)
    assert torch.equal(unchanged, fitted)


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


def test_two_filled_bins_split_between_them() -> None:
    threshold, state = fit_mixture(only(64, 192))
    assert threshold.item() == pytest.approx(128.5 / 256, abs=1e-3)
    assert state[4:].min() > 0


def test_outputs_do_not_share_memory_with_the_state_given_or_with_each_other() -> None:
    _, state = fit_mixture(counts_of(SHAPES["overlapping"]))
    copy = state.clone()
    threshold, following = fit_mixture(torch.zeros(256), state)
    threshold += 1
    following += 1
    assert torch.equal(state, copy)
    assert following[0] == copy[0] + 1


def test_fit_takes_milliseconds() -> None:
    counts = counts_of(SHAPES["overlapping"])
    _, state = fit_mixture(counts)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        fit_mixture(counts, state)
        best = min(best, time.perf_counter() - start)
    assert best < 0.05  # 4 ms on an idle core


def test_histogram_counts_valid_values_in_their_bins() -> None:
    confidence = torch.tensor([[0.0, 0.25, 0.2499, 0.5], [0.99, 1.0, 0.6, 0.6]])
    valid = torch.tensor([[True, True, True, True], [True, True, True, False]])
    counts = histogram(confidence, valid, 4)
    assert counts.tolist() == [2, 1, 2, 2]
    assert counts.dtype == torch.float32
    assert histogram(confidence, None, 4).sum() == 8


def test_histogram_is_additive_and_empty_without_valid_values() -> None:
    confidence, valid = torch.rand(4, 5, 6), torch.rand(4, 5, 6) < 0.5
    parts = histogram(confidence[:1], valid[:1]) + histogram(confidence[1:], valid[1:])
    assert torch.equal(histogram(confidence, valid), parts)
    assert histogram(confidence, valid & False).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_histogram_takes_every_float_type_and_stride(dtype: torch.dtype) -> None:
    confidence, valid = torch.rand(4, 5, 6).to(dtype), torch.rand(4, 5, 6) < 0.5
    expected = np.histogram(confidence.double()[valid].numpy(), 256, (0, 1))[0]
    counts = histogram(confidence.mT.contiguous().mT, valid.mT.contiguous().mT)
    assert counts.tolist() == expected.tolist()
