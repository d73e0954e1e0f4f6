"""Launch configurations: one row per kernel, architecture and size. Nothing is tuned at start-up.

The size of a row is what its kernel file names: classes, channels, or elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

UNLIMITED = 2**62


@dataclass(frozen=True)
class Configuration:
    """Block sizes (constexpr arguments of the kernel by name), warps of a program and pipeline stages."""

    num_warps: int = 4
    num_stages: int = 2
    block_items: tuple[tuple[str, int], ...] = ()

    @property
    def blocks(self) -> Mapping[str, int]:
        """Block sizes by the kernel's argument name."""
        return MappingProxyType(dict(self.block_items))


@dataclass(frozen=True)
class Row:
    """Serves sizes up to `up_to` on `architectures` (empty: all)."""

    configuration: Configuration
    up_to: int = UNLIMITED
    architectures: frozenset[str] = field(default_factory=frozenset)


def row(up_to: int = UNLIMITED, on: str = "", *, warps: int = 4, stages: int = 2, **blocks: int) -> Row:
    """A line of the table: sizes up to `up_to`, `on` architectures separated by spaces, blocks by name."""
    return Row(Configuration(warps, stages, tuple(blocks.items())), up_to, frozenset(on.split()))


# The first row that fits counts.
TABLE: dict[str, list[Row]] = {
    # fuse_cams: size = W. One warp; a lane keeps a column of ROWS pixels and the taps of all scales. More would spill.
    "fuse_cams": [row(32, warps=1, stages=1, ROWS=2, COLUMNS=32), row(warps=1, stages=1, ROWS=8, COLUMNS=32)],
    "fuse_cams_many_scales": [row(warps=1, stages=1, ROWS=4, COLUMNS=32)],
    "adamw_ema": [row(BLOCK=1024)],
    "bilateral_filter": [
        row(16, stages=1, BLOCK_I=64, BLOCK_J=32, BLOCK_K=16),
        row(32, stages=1, BLOCK_I=64, BLOCK_J=32, BLOCK_K=32),
        row(on="sm_90 sm_100 gfx942 interpreter", stages=1, BLOCK_I=64, BLOCK_J=32, BLOCK_K=64),
        row(stages=1, BLOCK_I=64, BLOCK_J=32, BLOCK_K=32),  # 64 would spill on sm_80
    ],
    "dense_energy_backward": [row(BLOCK=1024)],
    "fit_mixture": [row(on="gfx942", warps=8, BLOCK=256), row(BLOCK=256)],
    "histogram": [row(BLOCK=1024, BINS=256)],
    "histogram_add": [row(ROWS=32, COLUMNS=64)],
    "perplexity": [row(BLOCK=1024)],
    "present_classes": [row(128, warps=1, BLOCK=128), row(BLOCK=1024)],
    "seg_to_cam_loss": [row(BLOCK=32, CLASSES=16)],
    "seg_to_cam_loss_backward": [row(BLOCK=1024)],
    "seg_to_cam_loss_sum": [row(BLOCK=1024)],
    # Selection by pixels of a group (an image, or the batch), pairs by the width of a feature row.
    "contrastive_separation_select": [row(4096, BLOCK=64), row(16384, BLOCK=128), row(warps=8, BLOCK=256)],
    "contrastive_separation_loss": [  # wider tiles spill on some
        row(32, "gfx942", BLOCK_I=16, BLOCK_J=64, BLOCK_C=32),
        row(32, BLOCK_I=32, BLOCK_J=64, BLOCK_C=32),
        row(on="gfx942 sm_100", BLOCK_I=16, BLOCK_J=64, BLOCK_C=16),
        row(BLOCK_I=32, BLOCK_J=64, BLOCK_C=16),
    ],
    "contrastive_separation_total": [row(BLOCK=512)],
    "contrastive_separation_gradient": [
        row(32, warps=2, BLOCK_I=32, BLOCK_J=32, BLOCK_C=32, BLOCK_G=32),
        row(128, BLOCK_I=32, BLOCK_J=16, BLOCK_C=16, BLOCK_G=128),
        row(warps=8, BLOCK_I=32, BLOCK_J=16, BLOCK_C=16, BLOCK_G=256),
    ],
    "contrastive_separation_scatter": [row(BLOCK=64)],
    # raw_cross_entropy: size = K. One warp; a lane keeps a column of up to ROWS pixels, CLASSES go by at a time.
    "raw_cross_entropy": [
        row(on="interpreter", warps=1, ROWS=16, COLUMNS=128, CLASSES=128),
        row(warps=1, ROWS=8, COLUMNS=32, CLASSES=1),
    ],
    "raw_cross_entropy_corners": [
        row(on="interpreter", warps=1, ROWS=16, COLUMNS=128, CLASSES=128),
        row(warps=1, ROWS=16, COLUMNS=32, CLASSES=1),
    ],
    "raw_cross_entropy_gather": [row(BLOCK=256)],
}


def configuration(kernel: str, size: int, architecture: str) -> Configuration:
    """The first row of `kernel` that serves this size and architecture."""
    for line in TABLE[kernel]:
        if size <= line.up_to and (not line.architectures or architecture in line.architectures):
            return line.configuration
    raise KeyError(f"{kernel}: no launch configuration for size {size} on {architecture}")
