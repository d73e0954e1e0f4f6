"""The plain training step: AN assigns, ON learns, AN follows. Readable first; everything faster is measured against
it."""

from typing import Any

import torch
from torch import Tensor

from cosa_fast.assignment import Assignment, AssignmentNetwork, valid_on_grid
from cosa_fast.config import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import check_backend
from cosa_fast.model import CoSANet, build_model
from cosa_fast.objective import Objective
from cosa_fast.optim import build_optimizer, load_optimizer_state, set_learning_rate
from cosa_fast.threshold import build_thresholds


class NonFiniteLoss(Exception):
    """A loss term, or a gradient, became NaN or infinite; the engine still holds the state before that step."""

    def __init__(self, iteration: int, term: str) -> None:
        super().__init__(f"iteration {iteration}: {term} is not finite")
        self.iteration = iteration
        self.term = term


class Engine:
    """Online network, assignment network, optimiser and thresholds, and the step that moves them.

    `iteration` counts the finished steps; it alone decides learning rate, phase, and (outside) the position in the
    data.
    """

    def __init__(self, config: Config, num_classes: int, device: torch.device) -> None:
        check_backend(config.run.backend, device)
        torch.manual_seed(config.run.seed)
        self.config = config
        self.device = device
        self.iteration = 0
        self.student: CoSANet = build_model(config.model, num_classes).to(device).train()
        # Convolutions are faster in this layout, on CPU and GPU alike. (Missing in torch's annotations of `to`.)
        self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = AssignmentNetwork(self.student, config.teacher, config.run.backend)
        self.optimizer = build_optimizer(self.student, config.optim)
        self.thresholds = build_thresholds(config.threshold, device, config.run.backend)
        self.objective = Objective(config)

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

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration on a batch that is on the device; returns detached 0-d metrics: `loss`, every term, statistics.

        Raises NonFiniteLoss before anything is changed: weights, moments, thresholds and counter stay those of the
        last good step.
        """
        rate = set_learning_rate(self.optimizer, self.iteration, self.config.optim)
        # Random layers of a backbone (dropout, stochastic depth): like the data, a function of seed and iteration.
        torch.manual_seed(self._step_seed)
        before = [threshold.state_dict() for threshold in self.thresholds]
        terms, statistics = self._losses(batch)
        loss = self.objective.total(terms)
        try:
            self._check_finite({**terms, "loss": loss})
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._check_finite({"gradient": self._gradient_norm()})
        except NonFiniteLoss:
            for threshold, state in zip(self.thresholds, before, strict=True):
                threshold.load_state_dict(state)
            raise
        self.optimizer.step()
        self.teacher.update()
        self.iteration += 1
        metrics = {"loss": loss, **terms, **statistics, "lr": torch.tensor(rate)}
        return {name: value.detach() for name, value in metrics.items()}

    def _losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cotraining = self.cotraining
        outputs = self.student(batch.strong, seg=cotraining)
        terms = self.objective.classification(outputs, batch.labels)
        if not cotraining:
            return terms, {}
        assignment = self.teacher.assign(batch.weak, batch.labels, batch.valid)
        self._update_thresholds(assignment, batch)
        terms |= self.objective.cotraining(outputs, assignment, batch, self.threshold_values, self._step_seed)
        return terms, self._statistics(assignment, batch)

    def _update_thresholds(self, assignment: Assignment, batch: Batch) -> None:
        for threshold, maps in zip(self.thresholds, (assignment.cam, assignment.cam_aux), strict=True):
            if maps is not None:
                grid = (maps.grid_confidence.shape[1], maps.grid_confidence.shape[2])
                threshold.update(maps.grid_confidence, valid_on_grid(batch.valid, grid) & (maps.grid_category > 0))

    def _statistics(self, assignment: Assignment, batch: Batch) -> dict[str, Tensor]:
        xi, xi_aux = self.threshold_values
        targets = self.objective.targets(assignment, (xi, xi_aux))
        statistics = {"xi": xi, **self.objective.diagnostics(targets["c2s"], batch.valid)}
        if "c2s_aux" in targets:
            aux = self.objective.diagnostics(targets["c2s_aux"], batch.valid)
            # csc selects its pixels by P†.
            statistics |= {"xi_aux": xi_aux, "omega": aux["omega"], "foreground_share_aux": aux["foreground_share"]}
        return statistics

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _check_finite(self, values: dict[str, Tensor]) -> None:
        finite = torch.stack([torch.isfinite(value.detach()) for value in values.values()])
        if not bool(finite.all()):
            names = [name for name, good in zip(values, finite.tolist(), strict=True) if not good]
            raise NonFiniteLoss(self.iteration, names[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything that training depends on, besides configuration and data."""
        return {
            "iteration": self.iteration,
            "student": self.student.state_dict(),
            "teacher": self.teacher.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "thresholds": [threshold.state_dict() for threshold in self.thresholds],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken."""
        self.iteration = int(state["iteration"])
        self.student.load_state_dict(state["student"])
        self.teacher.model.load_state_dict(state["teacher"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        for threshold, saved in zip(self.thresholds, state["thresholds"], strict=True):
            threshold.load_state_dict(saved)
