"""The step of CoSA-MS: one network learns from pseudo-labels with cross entropy; no AN, no thresholds, no CAM."""

from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import compute_type
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.engine.base import NonFiniteLoss, TrainingEngine
from cosa_fast.engine.optim import build_optimizer, load_optimizer_state, set_learning_rate
from cosa_fast.errors import UserError
from cosa_fast.method.supervised import pseudo_label_terms
from cosa_fast.network.standalone import build_standalone


class StandaloneEngine(TrainingEngine):
    """AdamW on the strong view and its pseudo-label, in float32 with the matrix products of run.precision.

    Batch norm of these networks learns its statistics, unlike that of CoSA's encoder. So a batch must be seen whole: by
    one process, in one part, of two images or more. UserError for anything else.
    """

    def __init__(self, config: Config, num_classes: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        _require_whole_batches(config, ranks)
        super().__init__(config, device, ranks)
        self.network = build_standalone(config.model, num_classes).to(device).train()
        # As in CoSA's engines; missing in torch's annotations of `to`.
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.learner = self.network
        self.masters = {"an": self.network}
        self.optimizer = build_optimizer(self.network, config.optim)
        self._dtype = compute_type(config.run.precision, device)
        if device.type == "cuda":
            self.not_captured = f"model.architecture={config.model.architecture}"

    @property
    def cotraining(self) -> bool:
        return True

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """As TrainingEngine.step; `batch.truth` is the pseudo-label. NonFiniteLoss before anything is changed."""
        if batch.truth is None:
            raise ValueError("batch.truth: got None, want the pseudo-labels")
        rate = set_learning_rate(self.optimizer, self.iteration, self.config.optim)
        torch.manual_seed(self._step_seed)
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        with self.phase("ON"), torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = self.network.segment(batch.strong)
        with self.phase("losses"):
            terms = pseudo_label_terms(logits, batch.truth)
        with self.phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        finite = {"loss": terms["loss"], "gradient": torch.nn.utils.get_total_norm(gradients)}
        for name, value in finite.items():
            if not bool(value.isfinite()):
                for buffer, before in zip(self.network.buffers(), statistics, strict=True):
                    buffer.copy_(before)
                raise NonFiniteLoss(self.iteration, name)
        with self.phase("optimiser"):
            self.optimizer.step()
        self.iteration += 1
        return {name: value.detach() for name, value in terms.items()} | {"lr": torch.tensor(rate)}

    def check(self) -> None:
        """Nothing to do: `step` itself raises."""

    def state_dict(self) -> dict[str, Any]:
        """In the shape of CoSA's checkpoints: the one network is student and teacher, and takes the room of one."""
        state = self.network.state_dict()
        return {
            "iteration": self.iteration,
            "student": state,
            "teacher": state,
            "optimizer": self.optimizer.state_dict(),
            "thresholds": [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = int(state["iteration"])
        self.network.load_state_dict(state["teacher"])
        load_optimizer_state(self.optimizer, state["optimizer"])


def _require_whole_batches(config: Config, ranks: Ranks) -> None:
    name, optim = config.model.architecture, config.optim
    if ranks.size > 1:
        raise UserError(
            f"model.architecture = {name} trains in one process, not in {ranks.size}; start without torchrun"
        )
    if optim.accumulate > 1:
        raise UserError(
            f"optim.accumulate = {optim.accumulate}: the batch norm of {name} must see whole batches; set it to 1, and "
            "optim.batch_size lower if memory is short"
        )
    if optim.batch_size < 2:
        raise UserError(f"optim.batch_size = 1: the batch norm of {name} needs two images or more")
