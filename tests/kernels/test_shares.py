"""Losses of parts of a batch, each divided by what the whole batch counts, add up to the loss of the batch."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from cosa_fast.kernels import contrastive_separation, raw_cross_entropy, seg_to_cam_loss
from cosa_fast.kernels.sums import Whole

Loss = Callable[[slice, Whole | None, str], Tensor]


def losses(device: torch.device) -> dict[str, Loss]:
    """Each loss of the images in a slice, on one batch of three."""
    generator = torch.Generator().manual_seed(0)
    cam, seg = (torch.randn(3, n, 3, 3, generator=generator).to(device) for n in (4, 5))
    confidence = torch.rand(3, 6, 6, generator=generator).to(device)
    category = torch.randint(1, 5, (3, 6, 6), generator=generator).to(device, torch.uint8)
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]], device=device)
    valid = torch.ones(3, 6, 6, dtype=torch.bool, device=device)
    valid[0, 2:] = False
    teacher = torch.randn(6, 5, 3, 3, generator=generator).to(device)

    def c2s(part: slice, whole: Whole | None, backend: str) -> Tensor:
        return raw_cross_entropy(
            seg[part], confidence[part], category[part], 0.4, valid[part],
            foreground_weight=0.5, whole=whole, backend=backend,
        )  # fmt: skip

    def s2c(part: slice, whole: Whole | None, backend: str) -> Tensor:
        rows = torch.cat([teacher[:3][part], teacher[3:][part]])
        return seg_to_cam_loss(cam[part], [rows], labels[part], (6, 6), valid[part], whole=whole, backend=backend)

    def csc(part: slice, whole: Whole | None, backend: str, vectors: str = "logits") -> Tensor:
        return contrastive_separation(
            cam[part], category[part, ::2, ::2], confidence[part, ::2, ::2], 0.4, valid[part, ::2, ::2],
            vectors=vectors, image_labels=labels[part], whole=whole, backend=backend,
        )  # fmt: skip

    return {"c2s": c2s, "s2c": s2c, "csc": csc, "csc probability": partial(csc, vectors="probability")}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["c2s", "s2c", "csc", "csc probability"])
def test_shares_add_up(name: str, backend: str, kernel_device: torch.device) -> None:
    loss, parts = losses(kernel_device)[name], (slice(0, 1), slice(1, 3))
    counted: list[Tensor] = []

    def count(own: Tensor) -> Tensor:
        counted.append(own)
        return own

    apart = [loss(part, count, backend) for part in parts]
    total = torch.stack(counted).sum(0)
    shares = [loss(part, lambda _: total, backend) for part in parts]
    expected = loss(slice(0, 3), None, backend)
    torch.testing.assert_close(sum(shares), expected, rtol=1e-5, atol=1e-6)
    assert abs(float(sum(apart) - expected)) > 0.05  # dividing each by its own count is another loss
