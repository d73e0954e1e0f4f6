"""The fast step: flat buffers, half-precision compute over float32 masters, no synchronisation with the host, and on a
GPU the whole step captured in one CUDA graph per phase.

It computes what the plain engine computes. A number that is not finite is found on the device: from that step on
nothing is updated any more, and `check()`, at the next log point, says which step it was.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import compute_type
from cosa_fast.distributed import ALONE, Ranks, release_before_end
from cosa_fast.engine.base import EngineBase, NonFiniteLoss, check_attentions
from cosa_fast.engine.capture import CapturedStep, NotCaptured, captures, left_out
from cosa_fast.engine.compiling import compile_blocks, compiles
from cosa_fast.engine.flat import FlatNetworks
from cosa_fast.engine.optim import learning_rate
from cosa_fast.network.model import CoSANet

TERMS = ("cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc", "energy", "loss", "gradient")

logger = logging.getLogger(__name__)


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
        check_attentions(config, device, dtype)
        super().__init__(config, num_classes, device, ranks, network)
        self.networks = FlatNetworks(self.on.master, self.an.master, config, dtype)
        self.on.compute, self.an.compute = self.networks.compute
        self.choose_attentions()
        self._compiled = compiles(self.working, device)
        if self._compiled:
            # ON sees one size, AN one at each scale, or all of them packed.
            for network, shapes in zip(self.networks.compute, (1, len(config.teacher.scales)), strict=True):
                compile_blocks(network, shapes)
        self._rate = torch.zeros((), device=device)
        self._healthy = torch.ones((), dtype=torch.bool, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._finite = torch.ones(len(TERMS), dtype=torch.bool, device=device)
        self._captures, self.not_captured = captures(self.working, device), left_out(self.working, device)
        self._captured: CapturedStep | None = None
        self._side: torch.cuda.Stream | None = None
        release_before_end(self)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """As EngineBase.step; nothing waits for the device. Metrics of a step that `check` will refuse are not
        finite; those of a captured step are overwritten by the next one."""
        self._rate.fill_(learning_rate(self.iteration, self.config.optim))
        torch.manual_seed(self._step_seed)
        metrics = self._replay(batch) if self._captures else self.run(batch)
        self.iteration += 1
        return metrics

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """The step itself: device work only, of static shapes."""
        state = self._threshold_state()
        before = [tensor.clone() for tensor in state]
        shares, statistics = self.learn(batch)
        gradients = self.ranks.sum_(self.networks.gradients)
        self._judge({**shares, "gradient": torch.linalg.vector_norm(gradients, dtype=torch.float32)})
        with self.phase("optimiser"):
            self.networks.update(self._rate, self.config.teacher.momentum, self._healthy, self.working.run.backend)
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

    def _replay(self, batch: Batch) -> dict[str, Tensor]:
        """The captured step; where it cannot be captured the ordinary one, from then on, which is said once."""
        step = self._captured_step()
        state = self._threshold_state()
        before = [] if step.captured else [tensor.clone() for tensor in state]
        try:
            metrics = step(self.run, batch)
        except NotCaptured as refusal:
            self._captures, self.not_captured = False, str(refusal)
            logger.warning("steps are not captured in a CUDA graph: %s; the run goes on without, slower", refusal)
            self.release()
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
            torch.manual_seed(self._step_seed)
            return self.run(batch)
        self.replayed_peak = max(self.replayed_peak, step.peak)
        return metrics

    def _captured_step(self) -> CapturedStep:
        """The next step's; at the change of phase the other phase's goes, and its memory with it."""
        if self._captured is None or self._captured.cotraining != self.cotraining:
            self.release()
            self._captured = CapturedStep(self.cotraining, self.device)
        return self._captured

    def release(self) -> None:
        """Let go of the captured step, once the device is done with it: its last replay may still run in its memory,
        and the collective operations in it belong to a process group that must outlive it."""
        if self._captured is not None:
            torch.cuda.synchronize(self.device)
            self._captured = None

    def _beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """In a branch of the graph to be captured: the mixtures' fits are one program each, and leave the device to
        ON's forward pass."""
        if not self._captures:
            return super()._beside(work)
        self._side = side = self._side or torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        return lambda: torch.cuda.current_stream().wait_stream(side)

    def _threshold_state(self) -> list[Tensor]:
        return [tensor for threshold in self.thresholds for tensor in threshold.tensors()]

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
        self.release()
