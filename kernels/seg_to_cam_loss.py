"""Binary cross entropy of the CAM against the segmentation pseudo-label (eqs. 7, 8), value and gradient in one pass.

S'_k = Σ_scales (up(S_k) + mirrored up(S^flip_k)) on the (H, W) grid, p = softmax(S'/τ) over background and the present
classes, target t_k = Σ of 4 pixels w·p_k on the (h, w) grid (0 for absent classes), x = M or max(M, 0):
    L = Σ over valid cells and all classes of max(x, 0) − x·t + log(1 + e^−|x|),    ∂L/∂M = σ(x) − t (ReLU: 0 at M ≤ 0).

Bilinear reduction without antialias reads 2 × 2 pixels of a cell, 4 of 256 at 448 → 28, and S' is needed nowhere else.
A program takes BLOCK cells of one image as a (BLOCK, 4) tile of pixels. It visits the background and the present
classes twice: once for the softmax's maximum and sum, once for target, loss and gradient of those classes. Only the
device knows their number, so their logits could only be kept in memory; they are computed again, from maps that lie in
the cache. All absent classes follow in tiles of (CLASSES, BLOCK), with target 0. So every element of M is read once and
every gradient written once, and there is no target tensor.

Bytes: M and the float32 gradient once, (1 + P) of K channels of the 2·scales maps (P present classes): VOC, B = 16,
28 × 28, P = 2, bf16: 0.5 + 1.0 + 0.5 MB; one exponential per element of M and 8·(1 + P) per cell: a launch-bound
kernel. The backward multiplies the stored gradient by that of the loss: 4 bytes in, 2–4 out. The stored gradient is
float32, so that it is rounded to the type of M once, after the multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch.runtime import ceil_div, configure, launch, strides, tl, triton_jit, use_triton
from .sums import Whole, mean_loss
from .triton_functions import bilinear_tap, log1p, present_classes
from .validation import TensorChecks, check_number, check_scales, check_size

LARGEST = 3e38  # of float32, for 1/τ


@triton_jit
def _cross_entropy(cam, target, RELU: tl.constexpr):
    """Binary cross entropy of σ(x) against the target, x = M or max(M, 0), and its derivative by M."""
    x = tl.maximum(cam, 0.0) if RELU else cam
    e = tl.exp(-tl.abs(x))
    loss = tl.maximum(x, 0.0) - x * target + log1p(e)
    gradient = tl.where(x >= 0.0, 1.0, e) / (1.0 + e) - target
    if RELU:
        gradient = tl.where(cam > 0.0, gradient, 0.0)
    return loss, gradient


@triton_jit
def _summed_logits(
    maps_ptrs, heights, widths, strides0, strides1, strides2, strides3,
    image, batch, channel, row, column, height, width,
):  # fmt: skip
    """S' of one channel at pixels (row, column) of the (height, width) grid, fp32, in the shape of those."""
    total = tl.zeros(row.shape, tl.float32)
    for scale in tl.static_range(len(maps_ptrs)):
        top, bottom, down = bilinear_tap(row, heights[scale], height)
        left, right, across = bilinear_tap(column, widths[scale], width)
        plain = maps_ptrs[scale] + image * strides0[scale] + channel * strides1[scale]
        flipped = plain + batch.to(tl.int64) * strides0[scale]
        top, bottom = top.to(tl.int64) * strides2[scale], bottom.to(tl.int64) * strides2[scale]
        left, right = left.to(tl.int64), right.to(tl.int64)
        mirrored_left = (widths[scale] - 1 - left) * strides3[scale]
        mirrored_right = (widths[scale] - 1 - right) * strides3[scale]
        left, right = left * strides3[scale], right * strides3[scale]
        # The flips are added before the interpolation, rows are mixed before columns: as in the definition.
        a = tl.load(plain + top + left).to(tl.float32) + tl.load(flipped + top + mirrored_left).to(tl.float32)
        b = tl.load(plain + top + right).to(tl.float32) + tl.load(flipped + top + mirrored_right).to(tl.float32)
        c = tl.load(plain + bottom + left).to(tl.float32) + tl.load(flipped + bottom + mirrored_left).to(tl.float32)
        d = tl.load(plain + bottom + right).to(tl.float32) + tl.load(flipped + bottom + mirrored_right).to(tl.float32)
        total += (1.0 - across) * ((1.0 - down) * a + down * c) + across * ((1.0 - down) * b + down * d)
    return total


@triton_jit
def _loss_kernel(
    cam_ptr,  # (B, C, h, w) any float, any strides: M
    maps_ptrs,  # tuple, one per scale: (2B, K, h_s, w_s) any float, any strides: teacher logits S and S^flip
    valid_ptr,  # (B, H, W) bool, any strides; None: all valid
    classes_ptr,  # (B, C) int32: present classes of each image, then the absent ones
    counts_ptr,  # (B,) int32: number of present classes
    gradient_ptr,  # (B, C, h, w) float32, contiguous: dL/dM; None: not wanted
    losses_ptr,  # (B, blocks of cells) float32: sums over the valid cells of a block
    cells_ptr,  # (B, blocks of cells) int32: numbers of valid cells
    heights, widths,  # of each scale's maps
    strides0, strides1, strides2, strides3,  # of each scale's maps
    num_classes, cam_height, cam_width,
    height, width,  # of the full grid
    cam_stride0, cam_stride1, cam_stride2, cam_stride3,
    valid_stride0, valid_stride1, valid_stride2,
    inverse_temperature,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cells = cam_height * cam_width
    inside = cell < cells
    y, x = tl.where(inside, cell // cam_width, 0), cell % cam_width
    corner = tl.arange(0, 4)

    # The four pixels that a cell reads; a tap without weight is the other one again.
    top, bottom, down = bilinear_tap(y, height, cam_height)
    left, right, across = bilinear_tap(x, width, cam_width)
    bottom, right = tl.where(down > 0.0, bottom, top), tl.where(across > 0.0, right, left)
    lower, righter = (corner // 2 == 1)[None, :], (corner % 2 == 1)[None, :]
    row, column = tl.where(lower, bottom[:, None], top[:, None]), tl.where(righter, right[:, None], left[:, None])
    weight = tl.where(lower, down[:, None], 1.0 - down[:, None])
    weight *= tl.where(righter, across[:, None], 1.0 - across[:, None])
    counted = inside
    if valid_ptr is not None:
        pixel = image * valid_stride0 + row.to(tl.int64) * valid_stride1 + column.to(tl.int64) * valid_stride2
        counted = counted & (tl.min((tl.load(valid_ptr + pixel) != 0).to(tl.int32), 1) == 1)

    # Softmax over background and present classes at each pixel: maximum and sum.
    count = tl.load(counts_ptr + image)
    largest = _summed_logits(
        maps_ptrs, heights, widths, strides0, strides1, strides2, strides3,
        image, tl.num_programs(1), image * 0, row, column, height, width,
    )  # fmt: skip
    total = tl.full((BLOCK, 4), 1.0, tl.float32)
    for slot in range(0, count):
        category = tl.load(classes_ptr + image * num_classes + slot).to(tl.int64)
        logit = _summed_logits(
            maps_ptrs, heights, widths, strides0, strides1, strides2, strides3,
            image, tl.num_programs(1), category + 1, row, column, height, width,
        )  # fmt: skip
        higher = tl.maximum(largest, logit)
        total *= tl.exp((largest - higher) * inverse_temperature)
        total += tl.exp((logit - higher) * inverse_temperature)
        largest = higher
    weight /= total

    # Present classes: target, loss, gradient.
    out_at = image * num_classes * cells + cell
    cam_at = image * cam_stride0 + y.to(tl.int64) * cam_stride2 + x.to(tl.int64) * cam_stride3
    loss_sum = tl.zeros((BLOCK,), tl.float32)
    for slot in range(0, count):
        category = tl.load(classes_ptr + image * num_classes + slot).to(tl.int64)
        logit = _summed_logits(
            maps_ptrs, heights, widths, strides0, strides1, strides2, strides3,
            image, tl.num_programs(1), category + 1, row, column, height, width,
        )  # fmt: skip
        target = tl.sum(tl.exp((logit - largest) * inverse_temperature) * weight, 1)
        cam = tl.load(cam_ptr + cam_at + category * cam_stride1, mask=counted, other=0.0).to(tl.float32)
        loss, gradient = _cross_entropy(cam, target, RELU)
        loss_sum += tl.where(counted, loss, 0.0)
        if gradient_ptr is not None:
            tl.store(gradient_ptr + out_at + category * cells, tl.where(counted, gradient, 0.0), mask=inside)

    # Absent classes: the same with target 0.
    losses = tl.zeros((CLASSES, BLOCK), tl.float32)
    for start in range(count, num_classes, CLASSES):
        slots = start + tl.arange(0, CLASSES)
        absent = slots < num_classes
        categories = tl.load(classes_ptr + image * num_classes + slots, mask=absent, other=0).to(tl.int64)
        read = absent[:, None] & counted[None, :]
        values = tl.load(cam_ptr + cam_at[None, :] + (categories * cam_stride1)[:, None], mask=read, other=0.0)
        tile, slope = _cross_entropy(values.to(tl.float32), 0.0, RELU)
        losses += tl.where(read, tile, 0.0)
        if gradient_ptr is not None:
            tile_at = out_at[None, :] + (categories * cells)[:, None]
            tl.store(gradient_ptr + tile_at, tl.where(read, slope, 0.0), mask=absent[:, None] & inside[None, :])

    program = image * tl.num_programs(0) + tl.program_id(0)
    tl.store(losses_ptr + program, tl.sum(loss_sum, 0) + tl.sum(tl.sum(losses, 0), 0))
    tl.store(cells_ptr + program, tl.sum(counted.to(tl.int32), 0))


@triton_jit
def _sum_kernel(
    losses_ptr,  # (programs,) float32
    cells_ptr,  # (programs,) int32
    sums_ptr,  # (2,) float32: Σ of the losses, and number of terms = classes · Σ cells
    programs,
    num_classes,
    BLOCK: tl.constexpr,
):
    # One program, always the same order; float64 and int64 as there may be many terms.
    losses, cells = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        losses += tl.load(losses_ptr + index, mask=index < programs, other=0.0).to(tl.float64)
        cells += tl.load(cells_ptr + index, mask=index < programs, other=0).to(tl.int64)
    tl.store(sums_ptr, tl.sum(losses, 0).to(tl.float32))
    tl.store(sums_ptr + 1, (tl.sum(cells, 0) * num_classes).to(tl.float32))


@triton_jit
def _backward_kernel(
    gradient_ptr,  # (size,) float32: dL/dM as the forward stored it
    scale_ptr,  # (2,) float32, any stride: gradient of the sums, of which the first counts
    out_ptr,  # (size,) in the type of M
    size,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    gradient = tl.load(gradient_ptr + offset, mask=inside, other=0.0)
    result = gradient * tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + offset, result.to(out_ptr.dtype.element_ty), mask=inside)


def _run(
    cam: Tensor, maps: Sequence[Tensor], image_labels: Tensor, size: tuple[int, int], valid: Tensor | None,
    inverse_temperature: float, relu: bool, sums: Tensor, gradient: Tensor | None,
) -> None:  # fmt: skip
    batch, num_classes, cam_height, cam_width = cam.shape
    classes, counts = present_classes(image_labels)
    chosen = configure("seg_to_cam_loss", num_classes, cam.device)
    blocks = ceil_div(cam_height * cam_width, chosen.blocks["BLOCK"])
    losses = torch.empty((batch, blocks), dtype=torch.float32, device=cam.device)
    cells = torch.empty((batch, blocks), dtype=torch.int32, device=cam.device)
    launch(
        _loss_kernel,
        (blocks, batch),
        chosen,
        cam_ptr=cam,
        maps_ptrs=tuple(maps),
        valid_ptr=valid,
        classes_ptr=classes,
        counts_ptr=counts,
        gradient_ptr=gradient,
        losses_ptr=losses,
        cells_ptr=cells,
        heights=tuple(scale.shape[2] for scale in maps),
        widths=tuple(scale.shape[3] for scale in maps),
        **{f"strides{axis}": tuple(scale.stride(axis) for scale in maps) for axis in range(4)},
        num_classes=num_classes,
        cam_height=cam_height,
        cam_width=cam_width,
        height=size[0],
        width=size[1],
        **strides("cam_stride", cam),
        **strides("valid_stride", cam[:, 0] if valid is None else valid),
        inverse_temperature=inverse_temperature,
        RELU=relu,
    )
    launch(
        _sum_kernel,
        (1,),
        configure("seg_to_cam_loss_sum", losses.numel(), cam.device),
        losses_ptr=losses,
        cells_ptr=cells,
        sums_ptr=sums,
        programs=losses.numel(),
        num_classes=num_classes,
    )


def _run_backward(scale: Tensor, gradient: Tensor, out: Tensor) -> None:
    chosen = configure("seg_to_cam_loss_backward", out.numel(), out.device)
    launch(
        _backward_kernel,
        (ceil_div(out.numel(), chosen.blocks["BLOCK"]),),
        chosen,
        gradient_ptr=gradient,
        scale_ptr=scale,
        out_ptr=out,
        size=out.numel(),
    )


def _outputs(cam: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Buffers of the two results; without a gradient the second is empty."""
    shape = cam.shape if with_gradient else (0,)
    device = cam.device
    return torch.empty(2, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.float32, device=device)


@torch.library.custom_op("cosa_fast::seg_to_cam_loss", mutates_args=())
def _forward(
    cam: Tensor, maps: Sequence[Tensor], image_labels: Tensor, height: int, width: int, valid: Tensor | None,
    inverse_temperature: float, relu: bool, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums, gradient = _outputs(cam, with_gradient)
    wanted = gradient if with_gradient else None
    _run(cam, maps, image_labels, (height, width), valid, inverse_temperature, relu, sums, wanted)
    return sums, gradient


@torch.library.custom_op("cosa_fast::seg_to_cam_loss_backward", mutates_args=())
def _backward(scale: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    _run_backward(scale, gradient, out)
    return out


@_forward.register_fake
def _(
    cam: Tensor, maps: Sequence[Tensor], image_labels: Tensor, height: int, width: int, valid: Tensor | None,
    inverse_temperature: float, relu: bool, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(cam, with_gradient)


@_backward.register_fake
def _(scale: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype, ctx.scales = inputs[0].dtype, len(inputs[1])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, scale: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return _backward(scale, gradient, ctx.dtype), [None] * ctx.scales, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def seg_to_cam_loss(
    cam: Tensor,
    teacher_logits: Sequence[Tensor],
    image_labels: Tensor,
    size: tuple[int, int],
    valid: Tensor | None = None,
    *,
    temperature: float = 0.01,
    relu: bool = False,
    whole: Whole | None = None,
    backend: str = "auto",
) -> Tensor:
    """Binary cross entropy of σ(M) against the segmentation pseudo-label (eqs. 7, 8), over valid cells and classes.

    S' is the sum over scales and flips of the logits upsampled to (H, W). The target is softmax(S'/τ) over background
    and the present classes, background dropped, bilinearly reduced to (h, w) without antialias; absent classes and
    images without a class have target 0. It is evaluated only at the pixels that the reduction reads, without gradient.

    Args:
        cam: (B, C, h, w) raw CAM logits; the only differentiable input.
        teacher_logits: per scale (2B, K, h_s, w_s); rows B.. computed on the flipped images.
        image_labels: (B, C), present where > 0, any dtype.
        size: (H, W) of the full grid.
        valid: (B, H, W) bool; a cell counts when every pixel that its target reads (with weight > 0) is valid.
        temperature: τ > 0.
        relu: put a ReLU on M first, as the published recipe does: the loss then has the floor ln 2 on absent classes.
        whole: for a batch that is computed in parts (by several processes, or in several calls): maps the normaliser of
            these images to that of the whole batch. The result is then these images' share of the batch's loss.

    Returns:
        () loss; 0 with gradient 0 without a valid cell.

    Raises:
        ValueError: wrong shape, dtype or device; temperature not positive.
    """
    height, width = check_size(size)
    checks = TensorChecks(H=height, W=width)
    checks.check("cam", cam, "B C h w")
    checks = checks.with_pairs()
    check_scales("teacher_logits", teacher_logits, checks, "K")
    checks.check("image_labels", image_labels, "B C", "number")
    checks.check_optional("valid", valid, "B H W", "bool")
    check_number("temperature", temperature, 0, open_low=True)
    if use_triton(backend, cam):
        sums, _ = _forward(
            cam,
            [scale.detach() for scale in teacher_logits],
            image_labels.detach(),
            height,
            width,
            valid,
            min(1 / temperature, LARGEST),
            relu,
            torch.is_grad_enabled() and cam.requires_grad,
        )
        return mean_loss(sums, whole)
    sums = reference.seg_to_cam_loss(
        cam, teacher_logits, image_labels, (height, width), valid, temperature=temperature, relu=relu
    )
    return mean_loss(sums, whole)
