"""Mean-field inference in a fully connected CRF (Krähenbühl and Koltun, NIPS 2011), the optional clean-up of a
segmentation (METHOD section 7).

E(x) = Σ_i −log p_i(x_i) + Σ_{i<j} [x_i ≠ x_j]·(w_s·k_s(i, j) + w_b·k_b(i, j)) with Gaussian kernels k_s over positions
and k_b over positions and colours. One iteration: Q ← softmax(log p + w_s·Ã_s(Q) + w_b·Ã_b(Q)). Ã is the kernel,
symmetrically normalised as pydensecrf does by default: Ã(Q)_i = n_i·Σ_j k(i, j)·n_j·Q_j, n = (Σ_j k(i, j))^−½. Its sums
hold the pair i = j, which the model leaves out: so do pydensecrf's, whose results this module reproduces.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.errors import UserError
from cosa_fast.kernels import bilateral_filter
from cosa_fast.kernels.validation import TensorChecks, check_choice, check_number, fail

METHODS = ("exact", "lattice")
PROBABILITY_FLOOR = 1e-5  # as in the field's evaluations: no pixel is certain
REACH = 10  # in σ: further away a Gaussian is below e^-50

Filter = Callable[[Tensor], Tensor]


@torch.no_grad()
def crf_inference(
    probabilities: Tensor,
    image: Tensor,
    *,
    logits: bool = False,
    iterations: int = 10,
    spatial_sigma: float = 1.0,
    spatial_weight: float = 3.0,
    bilateral_sigma_xy: float = 67.0,
    bilateral_sigma_rgb: float = 3.0,
    bilateral_weight: float = 4.0,
    method: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Marginals Q of the CRF after mean-field inference. The defaults are those that DeepLab's and later work evaluates
    with.

    "exact" sums over all pairs of pixels: the work grows with (H·W)². That is for GPUs and small images: on a CPU core
    64×48 pixels take seconds, 100×100 half a minute, 320×320 an hour. "lattice" approximates the sums on the CPU by
    pydensecrf (extra `crf`), in a second or two for an image of a data set; one or two of a hundred labels differ.

    Args:
        probabilities: (K, H, W) of any float dtype, K classes; below 1e-5 they count as 1e-5.
        image: (3, H, W) uint8, red, green, blue.
        logits: `probabilities` are logits instead.
        iterations: of mean field; 0 gives the input back.
        spatial_sigma, spatial_weight: σ in pixels, and w_s; a weight of 0 leaves the term out.
        bilateral_sigma_xy, bilateral_sigma_rgb, bilateral_weight: σ in pixels and in units of the image, and w_b.
        method: "exact" or "lattice".
        backend: of the exact filter, as for `cosa_fast.kernels.bilateral_filter`.

    Returns:
        (K, H, W) float32 that sum to 1 over K; float64 for float64 input and "exact".

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range.
        UserError: "lattice" without pydensecrf.
    """
    checks = TensorChecks()
    checks.check("probabilities", probabilities, "K H W")
    checks.check("image", image, "3 H W", "uint8")
    check_choice("method", method, METHODS)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise fail("iterations", repr(iterations), "a whole number, not negative")
    for name, sigma in {
        "spatial_sigma": spatial_sigma,
        "bilateral_sigma_xy": bilateral_sigma_xy,
        "bilateral_sigma_rgb": bilateral_sigma_rgb,
    }.items():
        check_number(name, sigma, 0, open_low=True)
    check_number("spatial_weight", spatial_weight, 0)
    check_number("bilateral_weight", bilateral_weight, 0)
    log_probabilities = _log(probabilities, logits)
    spatial = (spatial_sigma, spatial_weight)
    bilateral = (bilateral_sigma_xy, bilateral_sigma_rgb, bilateral_weight)
    if method == "lattice":
        return _lattice(log_probabilities, image, iterations, spatial, bilateral)

    def over_positions(values: Tensor) -> Tensor:
        return _gaussian_blur(values, spatial_sigma)

    def over_colours(values: Tensor) -> Tensor:
        filtered = bilateral_filter(values[None], image[None], bilateral_sigma_xy, bilateral_sigma_rgb, backend=backend)
        return filtered[0]

    terms = [(spatial_weight, over_positions), (bilateral_weight, over_colours)]
    return _mean_field(log_probabilities, iterations, [term for term in terms if term[0] > 0])


def _log(probabilities: Tensor, logits: bool) -> Tensor:
    values = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    if logits:
        return values.log_softmax(0).clamp(min=math.log(PROBABILITY_FLOOR))
    return values.clamp(min=PROBABILITY_FLOOR).log()


def _mean_field(log_probabilities: Tensor, iterations: int, terms: list[tuple[float, Filter]]) -> Tensor:
    one = torch.ones_like(log_probabilities[:1])
    normalised = [(weight, kernel, kernel(one).rsqrt()) for weight, kernel in terms]
    marginals = log_probabilities.softmax(0)
    for _ in range(iterations):
        energy = log_probabilities
        for weight, kernel, norm in normalised:
            energy = energy + weight * norm * kernel(norm * marginals)
        marginals = energy.softmax(0)
    return marginals


def _gaussian_blur(values: Tensor, sigma: float) -> Tensor:
    """Σ_j exp(−|i − j|²/2σ²)·V_j over the pixels j of the image: (K, H, W)."""
    for axis in (1, 2):
        radius = min(math.ceil(REACH * sigma), values.shape[axis] - 1)
        distance = torch.arange(-radius, radius + 1, dtype=values.dtype, device=values.device)
        kernel = torch.exp(-0.5 * (distance / sigma) ** 2)
        shape, padding = ((1, 1, -1, 1), (radius, 0)) if axis == 1 else ((1, 1, 1, -1), (0, radius))
        values = F.conv2d(values[:, None], kernel.view(shape), padding=padding)[:, 0]
    return values


def _lattice(
    log_probabilities: Tensor,
    image: Tensor,
    iterations: int,
    spatial: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> Tensor:
    try:
        from pydensecrf import densecrf
    except ImportError:
        raise UserError(
            "the CRF with method 'lattice' needs pydensecrf: pip install -c constraints.txt -e '.[crf]', "
            "or choose method 'exact'"
        ) from None
    classes, height, width = log_probabilities.shape
    crf = densecrf.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy((-log_probabilities).flatten(1).float().cpu().contiguous().numpy())
    if spatial[1] > 0:
        crf.addPairwiseGaussian(sxy=spatial[0], compat=spatial[1])
    if bilateral[2] > 0:
        pixels = image.permute(1, 2, 0).cpu().contiguous().numpy()
        crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=pixels, compat=bilateral[2])
    marginals = np.array(crf.inference(iterations), dtype=np.float32)
    return torch.from_numpy(marginals).view(classes, height, width).to(log_probabilities.device)
