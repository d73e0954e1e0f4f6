"""The training step: AN assigns, ON learns, AN follows.

`Engine` is the plain one, readable first and on one device; cosa_fast.fused_engine does the same faster and is measured
against it. Their checkpoints are interchangeable.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import check_backend
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.method.assignment import Assignment, AssignmentNetwork, valid_on_grid
from cosa_fast.method.objective import Objective
from cosa_fast.method.threshold import build_thresholds
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet


class NonFiniteLoss(Exception):
    """A loss term, or a gradient, became NaN or infinite; the engine still holds the state before that step."""

    def __init__(self, iteration: int, term: str) -> None:
        super().__init__(f"iteration {iteration}: {term} is not finite")
        self.iteration = iteration
        self.term = term


class EngineBase(ABC):
    """Online network, assignment network and thresholds, and what they learn from.

    `student` and `teacher.model` are the float32 networks; `iteration` counts the finished steps and alone decides
    learning rate, phase, and (outside) the position in the data. `replayed_peak`: bytes that a captured step used.
    """

    def __init__(self, config: Config, num_classes: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        check_backend(config.run.backend, device)
        torch.manual_seed(config.run.seed)
        self.config = config
        self.device = device
        self.ranks = ranks
        self.iteration = 0
        self.replayed_peak = 0
        self.student: CoSANet = build_model(config.model, num_classes).to(device).train()
        # Convolutions are faster in this layout, on CPU and GPU alike. (Missing in torch's annotations of `to`.)
        self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = AssignmentNetwork(self.student, config.teacher, config.run.backend)
        self.thresholds = build_thresholds(config.threshold, device, config.run.backend, ranks)
        self.objective = Objective(config, ranks)

    @property
    def online(self) -> CoSANet:
        """ON in the type that it computes with."""
        return self.student

    @property
    def cotraining(self) -> bool:
        """Whether the next step computes the co-training losses."""
        return self.iteration >= self.config.optim.cotrain_after

    @property
    def threshold_values(self) -> tuple[Tensor, Tensor]:
        """(ξ, ξ†) as 0-d tensors on the device."""
        return self.thresholds[0].value, self.thresholds[1].value

    @property
    def _step_seed(self) -> int:
        return hash((self.config.run.seed, self.iteration)) % 2**63

    @abstractmethod
    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration on this rank's batch, which is on the device; returns detached 0-d metrics: `loss`, every term,
        statistics. Their means over the ranks are those of the whole batch."""

    @abstractmethod
    def check(self) -> None:
        """Raise NonFiniteLoss if a step since the last check had to be left out."""

    def evaluating(self) -> AbstractContextManager[Any]:
        """To evaluate `student` and `teacher.model` in."""
        return nullcontext()

    def _learn(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Forward and backward passes over this rank's batch, in `optim.accumulate` parts: its shares of the terms,
        their weighted sum, and the statistics. The gradients are what one pass over the whole batch gives."""
        parts, cotraining, statistics = batch.split(self.config.optim.accumulate), self.cotraining, {}
        assignments: list[Assignment] = []
        if cotraining:
            assignments = [self.teacher.assign(part.weak, part.labels, part.valid) for part in parts]
            assignment = Assignment.join(assignments)
            self._update_thresholds(assignment, batch)
            statistics = self._statistics(assignment, batch)
            if len(parts) > 1:
                self.objective.count(parts, assignments, self.threshold_values)
        shares = [self._learn_part(part, index, assignments) for index, part in enumerate(parts)]
        totals = {name: sum((share[name] for share in shares[1:]), start=shares[0][name]) for name in shares[0]}
        return totals, totals.pop("loss"), statistics

    def _learn_part(self, part: Batch, index: int, assignments: list[Assignment]) -> dict[str, Tensor]:
        """The terms of one part, and as `loss` what was propagated back."""
        terms = self._losses(part, index, assignments)
        loss = self.objective.total(terms)
        self._backward(loss, first=index == 0)
        return {name: term.detach() for name, term in (*terms.items(), ("loss", loss))}

    def _losses(self, part: Batch, index: int, assignments: list[Assignment]) -> dict[str, Tensor]:
        """The terms of one part's images, their share in those of the whole batch."""
        outputs = self.online(part.strong.to(next(self.online.parameters()).dtype), seg=bool(assignments))
        terms = self.objective.classification(outputs, part.labels)
        if assignments:
            seed = (self._step_seed + index) % 2**63
            terms |= self.objective.cotraining(outputs, assignments[index], part, self.threshold_values, seed)
        return terms

    @abstractmethod
    def _backward(self, loss: Tensor, first: bool) -> None:
        """Add this part's gradients to those of the step, or begin anew with them."""

    def _update_thresholds(self, assignment: Assignment, batch: Batch) -> None:
        for threshold, maps in zip(self.thresholds, (assignment.cam, assignment.cam_aux), strict=True):
            if maps is not None:
                grid = (maps.grid_confidence.shape[1], maps.grid_confidence.shape[2])
                threshold.update(maps.grid_confidence, valid_on_grid(batch.valid, grid) & (maps.grid_category > 0))

    def _statistics(self, assignment: Assignment, batch: Batch) -> dict[str, Tensor]:
        xi, xi_aux = (value.clone() for value in self.threshold_values)
        targets = self.objective.targets(assignment, (xi, xi_aux))
        statistics = {"xi": xi, **self.objective.diagnostics(targets["c2s"], batch.valid)}
        if "c2s_aux" in targets:
            aux = self.objective.diagnostics(targets["c2s_aux"], batch.valid)
            # csc selects its pixels by P†.
            statistics |= {"xi_aux": xi_aux, "omega": aux["omega"], "foreground_share_aux": aux["foreground_share"]}
        statistics["omega"] = statistics["omega"] * self.ranks.size  # a count of the whole batch, unlike the means
        return statistics

    def _metrics(self, loss: Tensor, terms: dict[str, Tensor], statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        shares = {"loss": loss, **terms}
        return {name: value * self.ranks.size for name, value in shares.items()} | statistics

    @abstractmethod
    def _optimizer_state(self) -> dict[str, Any]:
        """As torch.optim.AdamW's state_dict."""

    @abstractmethod
    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over what `_optimizer_state` gave, of either engine."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that training depends on, besides configuration and data."""
        return {
            "iteration": self.iteration,
            "student": self.student.state_dict(),
            "teacher": self.teacher.model.state_dict(),
            "optimizer": self._optimizer_state(),
            "thresholds": [threshold.state_dict() for threshold in self.thresholds],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken."""
        self.iteration = int(state["iteration"])
        self.student.load_state_dict(state["student"])
        self.teacher.model.load_state_dict(state["teacher"])
        self._load_optimizer_state(state["optimizer"])
        for threshold, saved in zip(self.thresholds, state["thresholds"], strict=True):
            threshold.load_state_dict(saved)
