"""The fast step: flat buffers, half-precision compute over float32 masters, no synchronisation with the host, and on a
GPU the whole step captured in one CUDA graph per phase.

It computes what the plain engine computes. A number that is not finite is found on the device: from that step on
nothing is updated any more, and `check()`, at the next log point, says which step it was.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import compute_type
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.engine.base import EngineBase, NonFiniteLoss
from cosa_fast.engine.flat import FlatNetworks
from cosa_fast.engine.optim import learning_rate
from cosa_fast.kernels.launch.runtime import HAS_TRITON
from cosa_fast.network.attention import check_attention
from cosa_fast.network.model import CoSANet

TERMS = ("cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc", "energy", "loss", "gradient")
# Steps of a phase before its capture: lazy initialisation and compilation must be over.
WARM_UP = 3


class FusedEngine(EngineBase):
    """EngineBase on flat buffers."""

    def __init__(
        self,
        config: Config,
        num_classes: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        network: CoSANet | None = None,
    ) -> None:
        dtype = compute_type(config.run.precision, device)
        check_attention(config.teacher.attention, device, dtype)
        super().__init__(config, num_classes, device, ranks, network)
        self.networks = FlatNetworks(self.on.master, self.an.master, config, dtype)
        self.on.compute, self.an.compute = self.networks.compute
        self._compiled = compiles(config, device)
        if self._compiled:
            for network in self.networks.compute:
                compile_blocks(network)
        self._rate = torch.zeros((), device=device)
        self._healthy = torch.ones((), dtype=torch.bool, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._finite = torch.ones(len(TERMS), dtype=torch.bool, device=device)
        self._captures = captures(config, device)
        self._captured: _CapturedStep | None = None

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """As EngineBase.step; nothing waits for the device. Metrics of a step that `check` will refuse are not
        finite; those of a captured step are overwritten by the next one."""
        self._rate.fill_(learning_rate(self.iteration, self.config.optim))
        torch.manual_seed(self._step_seed)
        metrics = self._captured_step()(batch) if self._captures else self.run(batch)
        self.iteration += 1
        return metrics

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """The step itself: device work only, of static shapes."""
        state = [tensor for threshold in self.thresholds for tensor in threshold.tensors()]
        before = [tensor.clone() for tensor in state]
        shares, statistics = self.learn(batch)
        gradients = self.ranks.sum_(self.networks.gradients)
        self._judge({**shares, "gradient": torch.linalg.vector_norm(gradients, dtype=torch.float32)})
        with self.phase("optimiser"):
            self.networks.update(self._rate, self.config.teacher.momentum, self._healthy, self.config.run.backend)
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(torch.where(self._healthy, tensor, old))
        return {**self._metrics(shares, statistics), "lr": self._rate.clone()}

    def evaluating(self) -> AbstractContextManager[Any]:
        """Compiled blocks stay out of it: they would be compiled anew for every size of images."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def _backward(self, loss: Tensor, first: bool) -> None:
        self.networks.clear_gradients()
        loss.backward()
        self.networks.collect_gradients(add=not first)

    def _captured_step(self) -> "_CapturedStep":
        """The next step's; at the change of phase the other phase's goes, and its memory with it."""
        if self._captured is None or self._captured.cotraining != self.cotraining:
            torch.cuda.synchronize(self.device)  # the last replay may still run in that memory
            self._captured = None
            self._captured = _CapturedStep(self)
        return self._captured

    def check(self) -> None:
        """Wait for the device; NonFiniteLoss, once, if a step could not be done. The state is that before it."""
        if not bool(self._healthy):
            self.iteration = int(self._good_steps)
            name = next(name for name, finite in zip(TERMS, self._finite.tolist(), strict=True) if not finite)
            self._healthy.fill_(True)
            raise NonFiniteLoss(self.iteration, name)

    def _judge(self, values: dict[str, Tensor]) -> None:
        """Whether this step's numbers are finite on all ranks; once they were not, no later step counts."""
        unknown = torch.ones((), dtype=torch.bool, device=self.device)
        flags = torch.stack([torch.isfinite(values[name].detach()) if name in values else unknown for name in TERMS])
        finite = self.ranks.sum_((~flags).float()) == 0
        self._finite.copy_(torch.where(self._healthy, finite, self._finite))
        self._healthy.logical_and_(finite.all())
        self._good_steps.add_(self._healthy)

    def _optimizer_state(self) -> dict[str, Any]:
        return self.networks.optimizer_state()

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.networks.load_optimizer_state(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.networks.refresh()
        self._good_steps.fill_(self.iteration)
        self._healthy.fill_(True)
        self._captured = None


class _CapturedStep:
    """One phase's step: a few times as it is, then captured in a CUDA graph and replayed."""

    def __init__(self, engine: FusedEngine) -> None:
        self.cotraining = engine.cotraining
        self._engine = engine
        self._steps = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._metrics: dict[str, Tensor]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self._steps < WARM_UP:
            self._steps += 1
            return self._run_aside(batch)
        if self._graph is None:
            self._capture(batch)
        self._batch.copy_(batch)
        assert self._graph is not None
        self._graph.replay()
        return self._metrics

    def _run_aside(self, batch: Batch) -> dict[str, Tensor]:
        """On the stream of the capture, where autograd's nodes will expect to be."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            metrics = self._engine.run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return metrics

    def _capture(self, batch: Batch) -> None:
        self._batch = batch.map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: what loads data may allocate memory or ask for events meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._metrics = self._engine.run(self._batch)
        self._graph = graph
        # Its memory stays with the graph, and no statistics of the allocator show it again.
        self._engine.replayed_peak = torch.cuda.max_memory_allocated(self._engine.device)


def compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks are compiled; "auto": on a GPU."""
    return config.run.compile == "on" or (config.run.compile == "auto" and device.type == "cuda")


def captures(config: Config, device: torch.device) -> bool:
    """Whether steps are captured. Not with what needs the host in a step: the oracles of the guidance ablation, plain
    kernels, and recomputed blocks (they save the state of the random generators, which a capture forbids)."""
    possible = config.loss.guidance == "teacher" and config.run.backend != "reference" and HAS_TRITON
    possible = possible and not config.model.checkpoint_blocks
    return config.run.capture == "auto" and device.type == "cuda" and possible


def compile_blocks(network: CoSANet) -> None:
    """Compile the encoder block by block: they are alike, so that one compilation serves all of them. What is compiled
    is kept for later runs, in TORCHINDUCTOR_CACHE_DIR or the user's cache folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "cosa_fast" / "inductor"))
    for block in getattr(network.encoder.backbone, "blocks", []):
        block.compile(dynamic=False)
