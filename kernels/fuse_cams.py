"""Multi-scale, flipped CAMs to confidence and category (METHOD section 3).

fused_c = Σ_s relu(max(up(CAM_s), flipped back up(CAM_s of the mirror image))) on the (H, W) grid, c a present class;
M'_c = (fused_c − min) / (max − min + 1e-5), extremes over the valid pixels of the image; ν = max_c M'_c and
ŷ = argmax_c M'_c + 1. Not differentiable. Flipping back commutes with upsampling: the mirrored columns are read.

Two passes over the pixels, as the extremes must be known before the first normalised value. Both evaluate `fused` anew
from the (2B, C, h_s, w_s) maps, which stay in the cache, so that nothing of shape (B, C, H, W) exists: extra memory is
the list of present classes and two integers per image and class. The first pass collects extremes by integer atomics:
fused ≥ 0, so its bits order as it does, and a maximum of integers does not depend on the order of its arguments.
Must move: `valid` twice, 4 bytes of confidence and 1 of category per pixel (22 MB for B = 16, 448²), and the present
classes' maps. Computes per pixel, present class and pass at least 5 operations a scale (two interpolations, two maxima,
a sum); no exp. Arithmetic and loads of taps, not memory, are the limit, and the tiling saves both:

A program owns ROWS × COLUMNS pixels, of one warp, and walks the source rows under them. Each is interpolated along the
columns once, and serves all the rows of the tile that lie between it and the next: about 7 source rows instead of 24
pairs (3 scales × 8 rows). A lane owns whole columns, so source rows never cross lanes. Tiles of padding visit no class.
Any number of scales; the taps of each take registers, and from about eight on they spill.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu, reference
from .launch.runtime import ceil_div, configure, launch, strides, tl, triton_jit, use_triton
from .triton_functions import bilinear_tap, present_classes
from .validation import TensorChecks, check_scales, check_size


@triton_jit
def _interpolate(first, second, weight):
    return first + weight * (second - first)


@triton_jit
def _maximum(a, b):
    """The larger; NaN if one is NaN, as in torch."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton_jit
def _quotient(a, b, inverse):
    """a / b, correctly rounded, from inverse = 1/b: three operations instead of a division's ten and its branch."""
    estimate = a * inverse
    return tl.fma(tl.fma(-estimate, b, a), inverse, estimate)


@triton_jit
def _source_row(row_ptr, first, second, weight):
    """One row of a map at the columns of the tile: (1, COLUMNS)."""
    row = _interpolate(tl.load(row_ptr + first).to(tl.float32), tl.load(row_ptr + second).to(tl.float32), weight)
    return row[None, :]


@triton_jit
def _flip_max(plain_ptr, mirrored_ptr, height, width, row_stride, column_stride, rows, columns, out_height, out_width):
    """relu(max(up(plain), up(mirrored) flipped back)) at (rows, columns); the rows follow each other."""
    first, second, weight = bilinear_tap(columns, width, out_width)
    first, second = first.to(tl.int64) * column_stride, second.to(tl.int64) * column_stride
    mirrored_ptr += tl.cast(width - 1, tl.int64) * column_stride  # its last column, to which the first one flips

    # Where the rows lie below the source row `start`, in units of 1 / (2 out_height) of a source row: whole numbers.
    start, _, _ = bilinear_tap(tl.min(rows, 0), height, out_height)
    unit = 2 * out_height
    numerator = tl.minimum((2 * rows + 1) * height - out_height, unit * (height - 1))
    offset = tl.maximum(numerator - start * unit, 0).to(tl.float32)
    last, inverse = tl.max(offset, 0), 1.0 / unit

    at = start.to(tl.int64) * row_stride
    plain_above = _source_row(plain_ptr + at, first, second, weight)
    mirrored_above = _source_row(mirrored_ptr + at, -first, -second, weight)
    at = tl.minimum(start + 1, height - 1).to(tl.int64) * row_stride
    plain_below = _source_row(plain_ptr + at, first, second, weight)
    mirrored_below = _source_row(mirrored_ptr + at, -first, -second, weight)
    row_weight = (offset * inverse)[:, None]
    plain = _interpolate(plain_above, plain_below, row_weight)
    mirrored = _interpolate(mirrored_above, mirrored_below, row_weight)
    passed = unit
    while passed <= last:  # some rows lie below the next source row: they take its values instead
        start += 1
        plain_above, mirrored_above = plain_below, mirrored_below
        at = tl.minimum(start + 1, height - 1).to(tl.int64) * row_stride
        plain_below = _source_row(plain_ptr + at, first, second, weight)
        mirrored_below = _source_row(mirrored_ptr + at, -first, -second, weight)
        beyond = (offset - passed)[:, None]
        row_weight = beyond * inverse
        plain = tl.where(beyond >= 0, _interpolate(plain_above, plain_below, row_weight), plain)
        mirrored = tl.where(beyond >= 0, _interpolate(mirrored_above, mirrored_below, row_weight), mirrored)
        passed += unit
    return _maximum(_maximum(plain, mirrored), 0.0)


@triton_jit
def _fused(
    cams_ptr, heights, widths, cams_stride0, cams_stride1, cams_stride2, cams_stride3,
    image, batch, category, rows, columns, out_height, out_width,
):  # fmt: skip
    """Σ_s relu(max(CAM_s, flipped back CAM_s)) of a class at (rows, columns): (ROWS, COLUMNS), never −0."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for scale in tl.static_range(len(cams_ptr)):
        class_ptr = cams_ptr[scale] + category * cams_stride1[scale]
        plain_ptr = class_ptr + image * cams_stride0[scale]
        mirrored_ptr = class_ptr + (image + batch) * cams_stride0[scale]
        total += _flip_max(
            plain_ptr, mirrored_ptr, heights[scale], widths[scale], cams_stride2[scale], cams_stride3[scale],
            rows, columns, out_height, out_width,
        )  # fmt: skip
    return total


@triton_jit
def _tile(
    counts_ptr, valid_ptr, valid_stride0, valid_stride1, valid_stride2, out_height, out_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """This program's image, rows and columns, which of its pixels are in the grid, which of them are valid, and the
    number of classes to visit: none for a tile of padding."""
    image = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(out_width, COLUMNS)
    rows = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < out_height)[:, None] & (columns < out_width)[None, :]
    valid = inside
    if valid_ptr is not None:
        # Read where the pixels are computed, one a thread: the minima hide from the compiler that columns are
        # contiguous. A vector load would give a thread 16 columns of a row, and move the pixels of every class through
        # shared memory.
        i = tl.minimum(rows, out_height - 1).to(tl.int64)[:, None]
        j = tl.minimum(columns, out_width - 1).to(tl.int64)[None, :]
        valid &= tl.load(valid_ptr + image * valid_stride0 + i * valid_stride1 + j * valid_stride2) != 0
    count = tl.load(counts_ptr + image) * tl.max(tl.max(valid.to(tl.int32), 0), 0)
    return image, rows, columns, inside, valid, count


@triton_jit
def _extremes_kernel(
    cams_ptr,  # per scale (2B, C, h_s, w_s) floating, any strides: raw CAMs, rows B.. of the mirrored images
    heights, widths,  # per scale: h_s, w_s
    cams_stride0, cams_stride1, cams_stride2, cams_stride3,  # per scale
    classes_ptr,  # (B, C) int32, contiguous: the present classes first, ascending
    counts_ptr,  # (B,) int32: number of present classes
    valid_ptr,  # (B, H, W) bool, any strides: the pixels that count; or None
    extremes_ptr,  # (B, C, 2) int32, contiguous, in and out: LARGEST − bits of the minimum, and bits of the maximum
    batch, num_classes, out_height, out_width,
    valid_stride0, valid_stride1, valid_stride2,
    LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, rows, columns, _, valid, count = _tile(
        counts_ptr, valid_ptr, valid_stride0, valid_stride1, valid_stride2, out_height, out_width, ROWS, COLUMNS
    )
    for slot in range(0, count):
        category = tl.load(classes_ptr + image * num_classes + slot).to(tl.int64)
        fused = _fused(
            cams_ptr, heights, widths, cams_stride0, cams_stride1, cams_stride2, cams_stride3,
            image, batch, category, rows, columns, out_height, out_width,
        )  # fmt: skip
        bits = fused.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN of either sign becomes the largest
        low = tl.min(tl.min(tl.where(valid, bits, LARGEST), 0), 0)
        high = tl.max(tl.max(tl.where(valid, bits, 0), 0), 0)
        at = extremes_ptr + (image * num_classes + category) * 2
        tl.atomic_max(at, LARGEST - low, sem="relaxed")
        tl.atomic_max(at + 1, high, sem="relaxed")


@triton_jit
def _fuse_kernel(
    cams_ptr,  # per scale (2B, C, h_s, w_s) floating, any strides: raw CAMs, rows B.. of the mirrored images
    heights, widths,  # per scale: h_s, w_s
    cams_stride0, cams_stride1, cams_stride2, cams_stride3,  # per scale
    classes_ptr,  # (B, C) int32, contiguous: the present classes first, ascending
    counts_ptr,  # (B,) int32: number of present classes
    valid_ptr,  # (B, H, W) bool, any strides: the pixels that count; or None
    extremes_ptr,  # (B, C, 2) int32, contiguous: LARGEST − bits of the minimum, and bits of the maximum
    confidence_ptr,  # (B, H, W) fp32, contiguous, out: ν, 0 where not valid or no class is present
    category_ptr,  # (B, H, W) uint8 or int16, contiguous, out: ŷ, 0 likewise
    batch, num_classes, out_height, out_width,
    valid_stride0, valid_stride1, valid_stride2,
    LARGEST: tl.constexpr, EPSILON: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, rows, columns, inside, valid, count = _tile(
        counts_ptr, valid_ptr, valid_stride0, valid_stride1, valid_stride2, out_height, out_width, ROWS, COLUMNS
    )
    best = tl.full((ROWS, COLUMNS), -1.0, tl.float32)
    best_category = tl.zeros((ROWS, COLUMNS), tl.int32)
    for slot in range(0, count):
        category = tl.load(classes_ptr + image * num_classes + slot)
        at = extremes_ptr + (image * num_classes + category) * 2
        low = (LARGEST - tl.load(at)).to(tl.float32, bitcast=True)
        high = tl.load(at + 1).to(tl.float32, bitcast=True)
        spread = high - low + EPSILON
        inverse = tl.div_rn(1.0, spread)
        fused = _fused(
            cams_ptr, heights, widths, cams_stride0, cams_stride1, cams_stride2, cams_stride3,
            image, batch, category.to(tl.int64), rows, columns, out_height, out_width,
        )  # fmt: skip
        # The compiler may round differently in the two kernels: kept between the extremes, ν stays in [0, 1].
        fused = tl.minimum(tl.maximum(fused, low), high)
        normalised = _quotient(fused - low, spread, inverse)
        better = (normalised > best) | (normalised != normalised)  # NaN is never hidden
        best = tl.where(better, normalised, best)
        best_category = tl.where(better, category + 1, best_category)
    counted = valid & (count > 0)
    at = (image * out_height + rows[:, None]) * out_width + columns[None, :]
    tl.store(confidence_ptr + at, tl.where(counted, best, 0.0), mask=inside)
    best_category = tl.where(counted, best_category, 0).to(category_ptr.dtype.element_ty)
    tl.store(category_ptr + at, best_category, mask=inside)


LARGEST_BITS = 0x7F7FFFFF  # the bits of the largest finite float32


def _run(
    cams: Sequence[Tensor], image_labels: Tensor, valid: Tensor | None, confidence: Tensor, category: Tensor
) -> None:
    batch, height, width = confidence.shape
    num_classes = image_labels.shape[1]
    classes, counts = present_classes(image_labels)
    # Zeros stand for "no pixel seen": the minimum at its largest, the maximum at its smallest.
    extremes = torch.zeros((batch, num_classes, 2), dtype=torch.int32, device=confidence.device)
    common = {
        "cams_ptr": tuple(cams),
        "heights": tuple(cam.shape[2] for cam in cams),
        "widths": tuple(cam.shape[3] for cam in cams),
        **{f"cams_stride{axis}": tuple(cam.stride(axis) for cam in cams) for axis in range(4)},
        "classes_ptr": classes,
        "counts_ptr": counts,
        "valid_ptr": valid,
        "extremes_ptr": extremes,
        "batch": batch,
        "num_classes": num_classes,
        "out_height": height,
        "out_width": width,
        **strides("valid_stride", confidence if valid is None else valid),
        "LARGEST": LARGEST_BITS,
    }
    chosen = configure("fuse_cams" if len(cams) <= 3 else "fuse_cams_many_scales", width, confidence.device)
    grid = (ceil_div(height, chosen.blocks["ROWS"]) * ceil_div(width, chosen.blocks["COLUMNS"]), batch)
    launch(_extremes_kernel, grid, chosen, **common)
    outputs = {"confidence_ptr": confidence, "category_ptr": category}
    launch(_fuse_kernel, grid, chosen, **common, **outputs, EPSILON=reference.MIN_MAX_EPSILON)


def _outputs(image_labels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    shape, device = (image_labels.shape[0], height, width), image_labels.device
    category = torch.empty(shape, dtype=reference.category_type(image_labels.shape[1]), device=device)
    return torch.empty(shape, dtype=torch.float32, device=device), category


@torch.library.custom_op("cosa_fast::fuse_cams", mutates_args=())
def _forward(
    cams: list[Tensor], image_labels: Tensor, height: int, width: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    confidence, category = _outputs(image_labels, height, width)
    _run(cams, image_labels, valid, confidence, category)
    return confidence, category


@_forward.register_fake
def _(cams: list[Tensor], image_labels: Tensor, height: int, width: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return _outputs(image_labels, height, width)


def fuse_cams(
    cams: Sequence[Tensor],
    image_labels: Tensor,
    size: tuple[int, int],
    valid: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Fuse multi-scale, flipped CAMs into confidence ν = max_c M'_c and category ŷ = argmax_c M'_c + 1.

    On the full grid: max over {id, flipped back}, ReLU, sum over scales, (x − min)/(max − min + 1e-5) per image and
    class over the valid pixels, present classes only. Not differentiable.

    Args:
        cams: per scale (2B, C, h_s, w_s) raw CAM logits; rows B.. computed on the flipped images.
        image_labels: (B, C), present where > 0, any dtype.
        size: (H, W) of the grid.
        valid: (B, H, W) bool, the real pixels; None: all.

    Returns:
        confidence (B, H, W) float32 in [0, 1] (float64 for float64 CAMs); category (B, H, W) uint8
        (int16 for more than 254 classes) in 1..C. Ties, and pixels where every map is 0, take the lowest present class.
        Both are 0 outside `valid` and in images without a class.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    height, width = check_size(size)
    checks = TensorChecks(H=height, W=width)
    checks.check("image_labels", image_labels, "B C", "number")
    checks = checks.with_pairs()
    check_scales("cams", cams, checks, "C")
    checks.check_optional("valid", valid, "B H W", "bool")
    if use_triton(backend, cams[0]):
        with torch.no_grad():
            return _forward(list(cams), image_labels, height, width, valid)
    values = len(image_labels) * height * width
    plain = cpu if cpu.pays("fuse_cams", backend, cams[0], values) else reference
    return plain.fuse_cams(cams, image_labels, (height, width), valid)
