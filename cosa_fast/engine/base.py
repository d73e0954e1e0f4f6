"""The training step: AN assigns, ON learns, AN follows.

`EngineBase` holds what both engines of CoSA do alike, `learn` above all. engine/plain.py is the readable one,
engine/fused.py does the same faster and is measured against it. Their checkpoints are interchangeable.
`TrainingEngine` is what a run needs of these, and of engine/standalone.py.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import compute_type
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.engine.compiling import workable
from cosa_fast.errors import UserError
from cosa_fast.kernels.launch.runtime import use_triton
from cosa_fast.method.assignment import Assignment, AssignmentNetwork
from cosa_fast.method.objective import Objective
from cosa_fast.method.threshold import DynamicThreshold, FixedThreshold, build_thresholds
from cosa_fast.network.attention_choice import check_attention, choose_attention
from cosa_fast.network.build import SegmentationNetwork, build_model
from cosa_fast.network.model import CoSANet

logger = logging.getLogger(__name__)


class NonFiniteLoss(Exception):
    """A loss term, or a gradient, became NaN or infinite; the engine still holds the state before that step."""

    def __init__(self, iteration: int, term: str) -> None:
        super().__init__(f"iteration {iteration}: {term} is not finite")
        self.iteration = iteration
        self.term = term


# What `EngineBase.phase` marks in a step, in this order.
PHASES = ("AN", "labels", "ON", "losses", "backward", "optimiser")


def mark_phase(name: str) -> AbstractContextManager[Any]:
    """Names a part of the step in profiles: "cosa_fast.AN", ..."""
    return torch.profiler.record_function(f"cosa_fast.{name}")


@dataclass
class OnlineNetwork:
    """ON: `master` is the float32 network, `compute` what its forward pass runs: the same, or a copy of it in another
    type that the engine keeps equal."""

    master: CoSANet
    compute: CoSANet


class TrainingEngine(ABC):
    """Networks that learn, step by step.

    `learner`: the float32 network that gradients change. `masters`: those that are evaluated, "on" and "an"; a
    standalone one is alone, in AN's place. `thresholds`: ξ and ξ†, where there are any. `iteration` counts the finished
    steps and alone decides learning rate, phase, and (outside) the position in the data. `phase`: called with each of
    PHASES as the step comes to it; a benchmark puts its clock there. `replayed_peak`: bytes that a captured step used.
    `not_captured`: why a GPU's steps are not captured in a CUDA graph (None: they are, or on a CPU).
    """

    learner: SegmentationNetwork
    masters: dict[str, SegmentationNetwork]
    thresholds: Sequence[DynamicThreshold | FixedThreshold] = ()

    def __init__(self, config: Config, device: torch.device, ranks: Ranks) -> None:
        check_backend(config.run.backend, device)
        torch.manual_seed(config.run.seed)
        self.config = config
        self.device = device
        # What torch takes for float32 convolutions of its own accord; matrix products it never does.
        torch.backends.cudnn.allow_tf32 = config.run.tf32
        if device.type == "cuda" and config.run.tf32 and compute_type(config.run.precision, device) == torch.float32:
            logger.info("float32: convolutions round what they multiply to TF32; run.tf32=false prevents that")
        self.ranks = ranks
        self.iteration = 0
        self.replayed_peak = 0
        self.not_captured: str | None = None
        self.phase: Callable[[str], AbstractContextManager[Any]] = mark_phase

    @property
    def attentions(self) -> tuple[str | None, str | None]:
        """The kernels by which ON and AN attend; None for a network without attention, or with one of its own."""
        return None, None

    @property
    @abstractmethod
    def cotraining(self) -> bool:
        """Whether the next step computes the co-training losses, or all that there are."""

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
        """To evaluate `masters` in."""
        return nullcontext()

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that training depends on, besides configuration and data."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken."""


class EngineBase(TrainingEngine):
    """ON, AN and thresholds, and what they learn from.

    `on` and `an` hold `.master` and `.compute` each. `working`: the configuration as this machine can run it. With
    `network`, ON starts as that one, in place of what the configuration asks for.
    """

    def __init__(
        self,
        config: Config,
        num_classes: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        network: CoSANet | None = None,
    ) -> None:
        super().__init__(config, device, ranks)
        self.working = working = workable(config, device)
        network = (network or build_model(config.model, num_classes)).to(device).train()
        # Convolutions are faster in this layout, on CPU and GPU alike. (Missing in torch's annotations of `to`.)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.on = OnlineNetwork(network, network)
        half_grid = config.threshold.grid == "half"
        self.an = AssignmentNetwork(network, config.teacher, working.run.backend, half_grid=half_grid)
        self.learner = network
        self.masters = {"on": self.on.master, "an": self.an.master}
        self.thresholds = build_thresholds(config.threshold, device, working.run.backend, ranks)
        self.objective = Objective(working, ranks)

    def choose_attentions(self) -> None:
        """Let both networks attend as configured, once their `compute` is what it will be; evaluation, too, takes the
        scales of one that packs them in one pass. UserError where they cannot."""
        choose_attention("model.attention", self.config.model.attention, self.on.compute.encoder, learns=True)
        choose_attention("teacher.attention", self.config.teacher.attention, self.an.compute.encoder, learns=False)
        for network in (self.on, self.an):
            if network.compute.is_packed:
                network.master.encoder.attend(str(network.compute.encoder.attention))

    @property
    def attentions(self) -> tuple[str | None, str | None]:
        return self.on.compute.encoder.attention, self.an.compute.encoder.attention

    @property
    def cotraining(self) -> bool:
        return self.iteration >= self.config.optim.cotrain_after

    @property
    def threshold_values(self) -> tuple[Tensor, Tensor]:
        """(ξ, ξ†) as 0-d tensors on the device."""
        return self.thresholds[0].value, self.thresholds[1].value

    def learn(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The step up to its gradients: (this rank's shares of every term and, as `loss`, of their weighted sum;
        statistics of the pseudo-labels).

        The batch is computed in `optim.accumulate` parts. AN looks at all of them first, since thresholds and
        normalisers are those of the whole batch; so are the gradients.
        """
        parts, cotraining = batch.split(self.config.optim.accumulate), self.cotraining
        assignments: list[Assignment] = []
        statistics: dict[str, Tensor] = {}
        if cotraining:
            for part in parts:
                with self.phase("AN"):
                    outputs = self.an.forward(part.weak)
                with self.phase("labels"):
                    assignments.append(self.an.assign(outputs, part.labels, part.valid))
            with self.phase("labels"):
                assignment = Assignment.join(assignments)
                rejoin = self._beside(partial(self._update_thresholds, assignment))
                if len(parts) > 1:
                    rejoin()
                    self.objective.count(parts, assignments, self.threshold_values)
        shares: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            with self.phase("ON"):
                seen = self.on.compute(part.strong.to(self.on.compute.dtype), seg=cotraining)
            with self.phase("losses"):
                if cotraining and index == 0:
                    rejoin()
                    statistics = self._statistics(assignment)
                terms = self.objective.classification(seen, part.labels)
                if cotraining:
                    seed = (self._step_seed + index) % 2**63
                    terms |= self.objective.cotraining(seen, assignments[index], part, self.threshold_values, seed)
                loss = self.objective.total(terms)
            with self.phase("backward"):
                self._backward(loss, first=index == 0)
            for name, value in {**terms, "loss": loss}.items():
                shares[name] = shares[name] + value.detach() if name in shares else value.detach()
        return shares, statistics

    def _beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do what ON's forward pass does not wait for; to be called is the result before anything reads what it did."""
        work()
        return lambda: None

    @abstractmethod
    def _backward(self, loss: Tensor, first: bool) -> None:
        """Add this part's gradients to those of the step, or begin anew with them."""

    def _update_thresholds(self, assignment: Assignment) -> None:
        for threshold, confidence, category in zip(
            self.thresholds, assignment.grid_confidence, assignment.grid_category, strict=False
        ):
            threshold.update(confidence, assignment.grid_valid & (category > 0))

    def _statistics(self, assignment: Assignment) -> dict[str, Tensor]:
        xi, xi_aux = (value.clone() for value in self.threshold_values)
        statistics = {"xi": xi, **self.objective.diagnostics(assignment, 0, xi)}
        if len(assignment.grid_confidence) > 1:
            aux = self.objective.diagnostics(assignment, 1, xi_aux)
            # csc selects its pixels by P†.
            statistics |= {"xi_aux": xi_aux, "omega": aux["omega"], "foreground_share_aux": aux["foreground_share"]}
        statistics["omega"] = statistics["omega"] * self.ranks.size  # a count of the whole batch, unlike the means
        return statistics

    def _metrics(self, shares: dict[str, Tensor], statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * self.ranks.size for name, value in shares.items()} | statistics

    @abstractmethod
    def _optimizer_state(self) -> dict[str, Any]:
        """As torch.optim.AdamW's state_dict."""

    @abstractmethod
    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over what `_optimizer_state` gave, of either engine."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "student": self.on.master.state_dict(),
            "teacher": self.an.master.state_dict(),
            "optimizer": self._optimizer_state(),
            "thresholds": [threshold.state_dict() for threshold in self.thresholds],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = int(state["iteration"])
        self.on.master.load_state_dict(state["student"])
        self.an.master.load_state_dict(state["teacher"])
        self._load_optimizer_state(state["optimizer"])
        for threshold, saved in zip(self.thresholds, state["thresholds"], strict=True):
            threshold.load_state_dict(saved)


def check_backend(backend: str, device: torch.device) -> None:
    """UserError, before anything is computed, for a run.backend that cannot work on this device."""
    try:
        use_triton(backend, torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(f"run.backend = {backend} on {device.type}: {error}; use run.backend=auto") from error


def check_attentions(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """UserError, before weights are read, for kernels that cannot run on this device in this type."""
    check_attention("model.attention", config.model.attention, device, dtype)
    check_attention("teacher.attention", config.teacher.attention, device, dtype)
