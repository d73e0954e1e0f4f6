"""What an evaluation costs, without a GPU: `python -m bench.steps.evaluation [--out FILE.json]`.

Operators and memory of a batch, counted on tensors without contents by the code that runs on a GPU (a value read back
would raise); the CPU time of counting; and what an evaluation should take of a run, from operations. voc.yaml, images
of 500 x 375 pixels, which most of VOC's are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.arguments import result_file
from bench.operators.output import machine
from bench.steps.memory import META, LiveBytes, flash_attention
from bench.steps.prediction import GPUS, LAUNCH, VITS, Gpu, forward, predict
from bench.tables import aligned
from bench.timing import quantiles
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.engine.flops import without_data
from cosa_fast.evaluation.cam import Slots
from cosa_fast.evaluation.evaluator import Evaluator
from cosa_fast.evaluation.inference import in_one_pass, inference
from cosa_fast.evaluation.part import Part, parts_of
from cosa_fast.files import write_json
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet, Outputs

SIZE, CLASSES, PRESENT, STRIDE = (375, 500), 20, 2, 16
LARGE = (3000, 4000)  # an image of 12 million pixels
VAL_IMAGES = 1449
NAMES = ("on", "an")


class Operators(TorchDispatchMode):
    """Counts what a GPU would launch: every operator that computes; views and uninitialised memory are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        returned = func._schema.returns
        is_view = bool(returned) and all(each.alias_info and not each.alias_info.is_write for each in returned)
        self.count += not is_view and not func._schema.name.startswith(("aten::empty", "aten::detach"))
        return func(*args, **(kwargs or {}))


class Fixed(nn.Module):
    """A network whose outputs are there already: random maps of a ViT's size, for one image at a time."""

    stride, is_packed = STRIDE, False

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._made: dict[tuple[int, ...], Outputs] = {}

    def forward(self, images: Tensor, seg: bool = True) -> Outputs:
        """As CoSANet's."""
        rows, grid = len(images), (images.shape[2] // STRIDE, images.shape[3] // STRIDE)
        if (rows, *grid) not in self._made:
            maps = [torch.randn(rows, CLASSES + k, *grid, generator=self._generator) for k in (0, 1, 0)]
            logits = torch.randn(rows, CLASSES, generator=self._generator) - 1.3  # finds two classes of 20
            self._made[rows, *grid] = Outputs(logits, maps[0], maps[1], logits, maps[2])
        return self._made[rows, *grid]


def batch_on(device: torch.device, images: int, size: tuple[int, int]) -> tuple[Tensor, list[Part]]:
    """Images of two classes each and their masks, ready to be looked at."""
    pixels = torch.empty(images, 3, *size, device=device)
    if device.type == "cpu":
        generator = torch.Generator().manual_seed(0)
        truth = torch.randint(0, PRESENT + 1, (images, *size), generator=generator, dtype=torch.uint8)
        labels = torch.zeros(images, CLASSES, dtype=torch.bool)
        labels[:, :PRESENT] = True
        return pixels, parts_of(range(images), labels, truth)
    truth = torch.empty(images, *size, dtype=torch.uint8, device=device)
    slots = (torch.empty(images, PRESENT, dtype=kind, device=device) for kind in (torch.int64, torch.bool))
    return pixels, [Part(range(images), range(images), Slots(*slots), torch.empty(0), truth)]


def look(
    config: Config, networks: dict[str, Any], images: int, size: tuple[int, int], device: torch.device
) -> Callable[[], None]:
    """What looks at a batch with both networks."""
    evaluator = Evaluator(config, [f"class{number}" for number in range(CLASSES)], device)
    counts = {name: evaluator.counts(True, range(images), (0.4, 0.5)) for name in networks}
    pixels, parts = batch_on(device, images, size)

    def run() -> None:
        with ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(inference(network))
                stack.enter_context(in_one_pass(network, device))
            evaluator.look(networks, counts, pixels, parts)

    return run


def on_a_gpu(config: Config, network: CoSANet, images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Operators per image and network: all, and without the networks' own; GFLOP; MiB at its peak, in float32."""
    networks = {name: without_data(network) for name in NAMES}
    run = look(config, networks, images, size, META)
    with mock.patch.object(functional, "scaled_dot_product_attention", flash_attention):
        run()
        with Operators() as operators:
            run()
        with LiveBytes() as live:
            live.peak = live.now
            run()
        with FlopCounterMode(display=False) as flops:
            run()
    fixed: dict[str, Any] = {name: _Shapes() for name in NAMES}
    counting = look(config, fixed, images, size, META)
    counting()
    with Operators() as own:
        counting()
    share = images * len(NAMES)
    return {
        "images": images, "size": size, "operators": operators.count / share, "of_counting": own.count / share,
        "read_backs": 0, "gflop": flops.get_total_flops() / share / 1e9, "peak_mib": live.peak / 2**20,
    }  # fmt: skip


class _Shapes(Fixed):
    """`Fixed` without contents."""

    def __init__(self) -> None:
        super().__init__(0)

    def forward(self, images: Tensor, seg: bool = True) -> Outputs:
        rows, grid = len(images), (images.shape[2] // STRIDE, images.shape[3] // STRIDE)
        if (rows, *grid) not in self._made:
            maps = [torch.empty(rows, CLASSES + k, *grid, device=META) for k in (0, 1, 0)]
            logits = torch.empty(rows, CLASSES, device=META)
            self._made[rows, *grid] = Outputs(logits, maps[0], maps[1], logits, maps[2])
        return self._made[rows, *grid]


def cpu_seconds(config: Config, images: int, repetitions: int) -> dict[str, float]:
    """CPU time of what is not the network's, per image and network, in one thread: quantiles over repetitions."""
    run = look(config, {name: Fixed(seed) for seed, name in enumerate(NAMES)}, images, SIZE, torch.device("cpu"))
    run()
    found = []
    for _ in range(repetitions):
        start = time.thread_time()
        run()
        found.append((time.thread_time() - start) / (images * len(NAMES)))
    low, median, high = quantiles(found)
    return {"low": low, "median": median, "high": high}


def predicted_ms(scales: tuple[float, ...], flip: bool, images: int, gpu: Gpu) -> float:
    """Of an image and network, ViT-B/16: the forward passes of bench/steps/prediction.py, on squares of the same
    area."""
    area = math.sqrt(SIZE[0] * SIZE[1])
    rows = images * (1 + flip)
    parts = [part for scale in scales for part in forward("", VITS[1], rows, round(area * scale), gpu)]
    return 1e3 * sum(part.seconds + part.launches * LAUNCH for part in parts) / images


def shares(config: Config, operators: float) -> list[dict[str, Any]]:
    """Of a run on VOC, for choices of eval.networks and eval.every: evaluated images, minutes, share of the whole run.
    operators: per image and network, beside the networks' own."""
    optim = config.optim
    rows = []
    for gpu in GPUS:
        step = predict(VITS[1], optim.batch_size, gpu)
        alone = sum(step["phases_ms"][phase] for phase in ("ON", "optimiser")) + step["phases_ms"]["backward"]
        before, after = optim.cotrain_after, optim.iterations - optim.cotrain_after
        training = (before * alone + after * step["ms"]) / 1e3
        ms = predicted_ms(config.eval.scales, config.eval.flip, 16, gpu) + 1e3 * operators * LAUNCH
        for networks in ("both", "teacher"):
            for every in (2000, 4000):
                count = -(-optim.iterations // every)
                looks = VAL_IMAGES * (2 * count if networks == "both" else count + 1)
                seconds = looks * ms / 1e3
                rows.append({
                    "gpu": gpu.name, "networks": networks, "every": every, "looks": looks, "ms": ms,
                    "evaluation_s": seconds, "training_s": training, "share": seconds / (training + seconds),
                })  # fmt: skip
    return rows


def measure(images: int = 4, repetitions: int = 7) -> dict[str, Any]:
    """All of it."""
    config = load_config("voc.yaml", ["model.weights=none", "eval.coexistence=[]", "run.precision=fp32"])
    network = build_model(config.model, CLASSES)
    counted = [on_a_gpu(config, network, count, size) for count, size in ((16, SIZE), (1, SIZE), (1, LARGE))]
    return {
        "machine": machine(torch.device("cpu")), "counted": counted,
        "cpu_seconds": cpu_seconds(config, images, repetitions), "shares": shares(config, counted[0]["of_counting"]),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = CommandLine(prog="python -m bench.steps.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=result_file, help="JSON")
    out = parser.parse_args(argv).out
    torch.set_num_threads(1)
    results = measure()
    if out:
        write_json(out, results)
    head = ["images", "size", "operators", "of counting", "read-backs", "GFLOP", "MiB"]
    lines = [
        [str(row["images"]), "{}x{}".format(*row["size"][::-1]), f"{row['operators']:.0f}", f"{row['of_counting']:.0f}",
         str(row["read_backs"]), f"{row['gflop']:.0f}", f"{row['peak_mib']:.0f}"]
        for row in results["counted"]
    ]  # fmt: skip
    print("per image and network, on a GPU\n" + aligned(head, lines, words=0))
    print(f"CPU time beside the network: {1e3 * results['cpu_seconds']['median']:.0f} ms per image and network")
    head = ["GPU", "eval.networks", "eval.every", "ms", "evaluation s", "training s", "share"]
    lines = [
        [row["gpu"], row["networks"], str(row["every"]), f"{row['ms']:.2f}", f"{row['evaluation_s']:.0f}",
         f"{row['training_s']:.0f}", f"{row['share']:.1%}"]
        for row in results["shares"]
    ]  # fmt: skip
    print("predicted, not measured\n" + aligned(head, lines, words=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
