"""A batch on its way to a GPU, on CUDA tensors without contents."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_cuda import DEVICE, fake_cuda

from cosa_fast.data_pipeline import batch as batches
from cosa_fast.data_pipeline.batch import Batch


def test_a_copy_runs_beside_the_computation_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(which: Stream) -> Iterator[None]:
        events.append(f"begin {which.name}")
        yield
        events.append(f"end {which.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("computation"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(batches, "_copy_stream", lambda _: Stream("copies"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, which: events.append(f"kept for {which.name}"))
    with fake_cuda():
        on_host = Batch(torch.empty(2, 3, 8, 8), torch.empty(2, 3, 8, 8), torch.empty(2, 5), torch.empty(2, 8, 8), [])
        moved = on_host.to(DEVICE)
        order = ["begin copies", "end copies", "computation waits for copies", *["kept for computation"] * 4]
        assert events == order
        assert {t.device for t in (moved.weak, moved.strong, moved.labels, moved.valid)} == {DEVICE}
        moved.to(DEVICE)  # already there
        on_host.to("cpu")
        assert events == order
