"""Behind bench/memory.py: a step without data, its bytes counted while they live; and which GPU has room for it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.steps.providers import BACKBONES, changed
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.flops import without_data
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.kernels.launch.runtime import record_launches
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet

GPUS = (8, 12, 16, 24, 40, 80)  # GiB
SLACK, CONTEXT = 0.1, 0.5 * 2**30
META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, each to its end: bytes now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._note((args, kwargs), counted=False)  # what was there before
        result = func(*args, **(kwargs or {}))
        self._note(result, counted=True)
        return result

    def _note(self, values: Any, *, counted: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._known:
                continue
            storage = value.untyped_storage()
            self._known[storage._cdata] = storage.nbytes() if counted else 0
            self.now += self._known[storage._cdata]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def predict(config: Config, network: CoSANet, *, cotraining: bool = True) -> dict[str, int]:
    """Bytes of `network` training as configured: {"static": between steps, "step": at most beyond that, "peak"}.

    `network` is only read. The batch counts twice: as it comes, and as a captured step's own copy.
    """
    first = 0 if cotraining else config.optim.iterations
    config = changed(config, [f"optim.cotrain_after={first}", "run.backend=triton", "run.compile=off"])
    with (
        record_launches("sm_90"),
        mock.patch.object(functional, "scaled_dot_product_attention", flash_attention),
        LiveBytes() as live,
    ):
        engine = FusedEngine(config, network.num_classes, META, network=without_data(network))
        batches = [_batch(config, network.num_classes) for _ in range(2)]
        engine.run(batches[0])  # from the second step on everything that lasts is there
        static = live.now
        live.peak = live.now
        engine.run(batches[0])
        return {"static": static, "step": live.peak - static, "peak": live.peak}


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What CUDA runs. Without data torch would write out the attention matrix."""
    assert options.get("attn_mask") is None
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _batch(config: Config, num_classes: int) -> Batch:
    count, size = config.optim.batch_size, config.data.crop_size
    views = [torch.empty(count, 3, size, size, device=META) for _ in range(2)]
    valid = torch.empty(count, size, size, dtype=torch.bool, device=META)
    return Batch(*views, torch.empty(count, num_classes, device=META), valid, [])


def predict_all(base: Config, num_classes: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every backbone, with blocks kept and recomputed, and batch size."""
    rows = []
    for label, backbone in BACKBONES.items():
        for recompute in (False, True):
            config = changed(base, [f"model.backbone={backbone}", f"model.checkpoint_blocks={recompute}"])
            network = build_model(config.model, num_classes)
            for size in sizes:
                found = predict(changed(config, [f"optim.batch_size={size}"]), network)
                row = {"backbone": label, "checkpoint_blocks": recompute, "batch_size": size}
                rows.append({**row, **{f"{name}_mib": value / 2**20 for name, value in found.items()}})
    return rows


def needs(peak: float) -> float:
    """Bytes of a GPU that a predicted peak asks for."""
    return peak * (1 + SLACK) + CONTEXT


def largest(rows: list[dict[str, Any]], backbone: str, recompute: bool, gpu: int) -> int | None:
    """The largest batch of a GPU of so many GiB; None where not even one image fits."""
    fitting = [
        row["batch_size"]
        for row in rows
        if row["backbone"] == backbone
        and row["checkpoint_blocks"] == recompute
        and needs(row["peak_mib"] * 2**20) <= gpu * 2**30
    ]
    return max(fitting, default=None)


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Both tables as Markdown: peaks, and which GPU trains what."""
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    print("\n| predicted peak, GiB | blocks | between steps | " + " | ".join(f"B = {size}" for size in sizes) + " |")
    print("|---" * (3 + len(sizes)) + "|")
    for name in names:
        for recompute, label in ((False, "kept"), (True, "recomputed")):
            own = [row for row in rows if (row["backbone"], row["checkpoint_blocks"]) == (name, recompute)]
            peaks = " | ".join(f"{row['peak_mib'] / 1024:.1f}" for row in own)
            print(f"| {name} | {label} | {own[0]['static_mib'] / 1024:.1f} | {peaks} |")
    print("\n| GPU | " + " | ".join(names) + " |")
    print("|---" * (1 + len(names)) + "|")
    for gpu in GPUS:
        pairs = [[largest(rows, name, recompute, gpu) or "–" for recompute in (False, True)] for name in names]
        print(f"| {gpu} GB | " + " | ".join(f"{kept} / {recomputed}" for kept, recomputed in pairs) + " |")
