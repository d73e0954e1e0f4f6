"""A network for other programs: one graph from RGB pixels to a segmentation, and the files that it is exported to.

The graph is one scale without mirror images (`predict --scales 1.0 eval.flip=false`): pixels are normalised, brought to
multiples of the network's stride, segmented, and the logits brought back to the image's size. Any size and batch.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError, first_line
from cosa_fast.evaluation.exported import read_export, write_export
from cosa_fast.evaluation.networks import Networks
from cosa_fast.files import written_aside
from cosa_fast.network.build import SegmentationNetwork

Format = Literal["safetensors", "torch-export", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
FILES: dict[Format, str] = {"safetensors": "model.safetensors", "torch-export": "model.pt2", "onnx": "model.onnx"}
INPUT, OUTPUTS = "images", ("segmentation", "scores")
SMALLEST, LARGEST, MOST_IMAGES = 32, 4096, 256
INSTALL = 'pip install -c constraints.txt -e ".[export]"'
# An image to trace with: sides that are neither equal nor multiples of a stride, so that nothing is taken for fixed.
EXAMPLE = (2, 3, 150, 210)

Run = Callable[[Tensor], Tensor]


class InferenceModel(nn.Module):
    """images (N, 3, H, W) float32, RGB in 0..255 -> segmentation logits (N, C + 1, H, W), background first, and the
    classifier's logits (N, C), or what stands for them in a network without one."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: SegmentationNetwork, config: Config) -> None:
        super().__init__()
        self.network = network
        self.stride = network.stride
        self.register_buffer("mean", 255 * torch.tensor(config.data.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(config.data.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2], images.shape[3]
        size = (_nearest_multiple(height, self.stride), _nearest_multiple(width, self.stride))
        normalised = (images - self.mean) / self.std
        outputs = self.network(F.interpolate(normalised, size=size, mode="bilinear", align_corners=False))
        logits = F.interpolate(outputs.segmentation(), size=(height, width), mode="bilinear", align_corners=False)
        return logits, outputs.logits


def _nearest_multiple(side: int, stride: int) -> int:
    """As network/resizing.py rounds, halves to even, in integers that may be symbols; sides are at least a stride."""
    return (side + stride // 2 - 1 + (side // stride) % 2) // stride * stride


class Agreement(NamedTuple):
    """pixels: the share in [0, 1] whose class is the same; largest: difference of a logit, over the images."""

    images: int
    pixels: float
    largest: float


def export(networks: Networks, name: str, format: Format, path: Path, images: Sequence[Image.Image]) -> Agreement:
    """Write the network "on" or "an" to `path`, after what was written was read back and has segmented `images` as the
    network does. UserError where it does not agree, is not installed, or cannot be written."""
    model = InferenceModel(networks.named(name).cpu().eval(), networks.config).eval()
    with written_aside(path) as aside:
        with _told(format):
            if format == "safetensors":
                about = (networks.config, networks.classes, networks.thresholds, networks.iteration, networks.chosen)
                write_export(aside, networks.named(name), *about)
            elif format == "torch-export":
                _write_program(model, aside)
            else:
                _write_onnx(model, aside)
            agreement = compare(_runner(format, aside), model, images)
        if agreement.pixels < 0.999:
            raise UserError(
                f"--format {format}: only {agreement.pixels:.2%} of the pixels are as PyTorch's (logits differ by up "
                f"to {agreement.largest:.2g}); nothing was written: try another format or version of its packages"
            )
    return agreement


@contextmanager
def _told(format: Format) -> Iterator[None]:
    """Exporters and their runtimes take most networks, and raise exceptions of many kinds for the rest: one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"--format {format}: this network cannot be exported so ({first_line(error, 150)}); nothing was written: "
            f"take another of {', '.join(FORMATS)}"
        ) from error


def compare(run: Run, model: InferenceModel, images: Sequence[Image.Image]) -> Agreement:
    """What `run` (images -> segmentation logits) says of each image against what `model` does."""
    same = pixels = 0
    largest = 0.0
    with torch.no_grad():
        for image in images:
            tensor = as_input(image)
            wanted, found = model(tensor)[0], run(tensor)
            same += int((wanted.argmax(1) == found.argmax(1)).sum())
            pixels += wanted[:, 0].numel()
            largest = max(largest, float((wanted - found).abs().max()))
    return Agreement(len(images), same / max(pixels, 1), largest)


def as_input(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 in 0..255 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None]


def facts(networks: Networks) -> dict[str, Any]:
    """What a program must know that runs the file."""
    data = networks.config.data
    scores = "logits of the image classifier"
    if networks.config.model.standalone:
        scores = "logits of each class at the pixel that is surest of it"
    return {
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, "height", "width"],
            "type": "float32",
            "colours": "RGB, upright by EXIF",
            "range": [0, 255],
            "sides": [SMALLEST, LARGEST],
        },
        "done in the graph": {
            "normalisation": "(image / 255 - mean) / std",
            "mean": list(data.mean),
            "std": list(data.std),
            "resize": f"bilinear, half-pixel centres, each side to the nearest multiple of {networks.an.stride}",
        },
        "outputs": {
            OUTPUTS[0]: "float32 [batch, classes + 1, height, width]: logits; the class is the argmax",
            OUTPUTS[1]: f"float32 [batch, classes]: {scores}; sigmoid gives probabilities",
        },
        "trained at": {"crop": data.crop_size, "scales of the image": list(data.scale_range)},
        "classes": ["background", *networks.classes],
    }


def _write_program(model: InferenceModel, path: Path) -> None:
    with path.open("wb") as file, _quiet():
        torch.export.save(_program(model), file)


def _program(model: InferenceModel) -> torch.export.ExportedProgram:
    """Its batch and sides may be any within the bounds above."""
    sides = {"min": SMALLEST, "max": LARGEST}
    dimensions = {
        0: torch.export.Dim("batch", min=1, max=MOST_IMAGES),
        2: torch.export.Dim("height", **sides),
        3: torch.export.Dim("width", **sides),
    }
    return torch.export.export(
        model,
        (torch.zeros(EXAMPLE),),
        dynamic_shapes=(dimensions,),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,  # some networks compare the grid with that of their training
    )


def _write_onnx(model: InferenceModel, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  (torch's exporter needs it and says so less clearly)
    except ImportError as error:
        raise UserError(f"--format onnx needs onnx, onnxscript and onnxruntime: {INSTALL}") from error
    with _quiet():
        program = torch.onnx.export(
            _program(model),
            (torch.zeros(EXAMPLE),),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
        )
    if program is None:
        raise UserError("--format onnx: torch's exporter gave no graph")
    proto = program.model_proto
    del proto.graph.value_info[:]  # sizes in between, by torch's names of symbols
    axes = ("batch", None, "height", "width")
    names = {
        dimension.dim_param: axis
        for dimension, axis in zip(proto.graph.input[0].type.tensor_type.shape.dim, axes, strict=True)
        if axis is not None
    }
    for value in (*proto.graph.input, *proto.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]
    path.write_bytes(proto.SerializeToString())


def _runner(format: Format, path: Path) -> Run:
    """The written file, loaded back: images -> segmentation logits."""
    if format == "safetensors":
        exported = read_export(path)
        if exported is None:
            raise UserError(f"{path}: lost its metadata while it was written")
        model = InferenceModel(exported.network, exported.config).eval()
        return lambda images: model(images)[0]
    if format == "torch-export":
        program = torch.export.load(io.BytesIO(path.read_bytes())).module()
        return lambda images: program(images)[0]
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--format onnx is checked with onnxruntime: {INSTALL}") from error
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUTS[0]], {INPUT: images.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters talk of their own workings, on standard output, in logs and in warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
